"""Compare the log-probs of engine and trainer for the same tokens: a probe at the start, a gate at every step.

d = logprob (trainer) - sampler logprob (engine), over trained tokens, in nats. Reported are mean, percentiles and
maximum of |d|, the share of tokens whose ratio exp(d) is outside [0.9, 1.1], the k3 estimate of KL(sampler : trainer),
exp(d) - 1 - d, and the effective sample size of the ratios w = exp(d) as a share, (sum w)^2 / (N sum w^2). Percentiles
come from a fixed log-spaced histogram, because histograms add over micro-batches and ranks.

The probe measures the noise of this model on this machine, with the adapter off and with a random adapter that moves
log-probs by half a nat. The gate stops the run when the mean of a step is well above that noise, or when the mean of
one sequence is beyond what its length explains (`rlft.trainer.disagreement`). The engines add another guard, reading
the adapter back. Faults of the chat template are invisible here, since both sides see the same tokens; `rlft.data`
checks those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlft import dist
from rlft.batch import pack_all
from rlft.errors import ParityError
from rlft.rollout.engine import asleep
from rlft.trainer.broken import not_finite, unsampled
from rlft.trainer.disagreement import CAP, SPREAD, ComparedSequence, Limit, Score, cause, sequences
from rlft.types import Batch, PackPlan, Prompt, Rollout

EDGES = torch.logspace(-7, 2, 181, dtype=torch.float64)
"""Bin edges of |d| in nats: 20 per decade, so a percentile is exact to 12%."""
LOW, HIGH = -0.10536051565782628, 0.0953101798043249
"""ln 0.9 and ln 1.1."""


def bins_(size: Tensor) -> Tensor:
    """Return the bin of each |d|, int64; nan is in the last one.

    Equals `torch.bucketize(size, EDGES)` except for rounding at an edge, in a tenth of its time.
    """
    at = size.float().log10_().add_(7).mul_(20).ceil_()
    # fmin takes the number where the other one is nan.
    return torch.fmin(at, torch.tensor(float(len(EDGES)))).clamp_(min=0).long()


class Mismatch:
    """Statistics of |trainer - engine| over the trained tokens of a step, which add over micro-batches and ranks."""

    def __init__(self) -> None:
        self._sums = torch.zeros(7 + len(EDGES) + 1, dtype=torch.float64)
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._largest = 0.0
        self._count = 0
        self._per_sequence = torch.zeros(2, 0, dtype=torch.float64)
        self._batches: list[tuple[Tensor, Batch]] = []

    def add(self, logprobs: Tensor, batch: Batch) -> None:
        """Add a micro-batch.

        logprobs: [T], the trainer's, any dtype. Without sampler log-probs they are only stored.
        """
        self._batches.append((logprobs.detach(), batch))
        if batch.sampler_logprobs is None:
            return
        # Summed on first access: each sum has a start-up cost and a GPU wait, and there are many micro-batches.
        self._waiting.append((logprobs.detach(), batch.sampler_logprobs, batch.train_mask, batch.seq_ids + self._count))
        self._count += len(batch.prefix)

    def _flush(self) -> None:
        if not self._waiting:
            return
        device = self._waiting[0][0].device
        now, sampler, rows, ids = (torch.cat([entry[i].to(device) for entry in self._waiting]) for i in range(4))
        self._waiting = []
        d, ids = (now - sampler).masked_select(rows).double().cpu(), ids.masked_select(rows).cpu()
        finite = d.isfinite()
        if not finite.all():
            d, ids = d[finite], ids[finite]  # rlft.trainer.broken stops the run for the others
        if not d.numel():
            return
        # In place, because allocating new memory would take most of the time.
        outside = (d < LOW).sum() + (d > HIGH).sum()
        rho = d.clamp(-20, 20).exp_()
        weights = [rho.sum(), rho.dot(rho)]
        k3 = rho.sub_(1).sub_(d).sum()
        size = d.abs_()
        sums = [torch.tensor(float(d.numel())), size.sum(), outside.double(), k3, *weights, size.dot(size)]
        self._sums[:7] += torch.stack(sums)
        self._largest = max(self._largest, float(size.max()))
        self._sums[7:] += torch.bincount(bins_(size), minlength=len(EDGES) + 1).double()
        _, sequence = torch.unique_consecutive(ids, return_inverse=True)
        totals = torch.stack([torch.bincount(sequence).double(), torch.bincount(sequence, size.clamp(max=CAP))])
        self._per_sequence = torch.cat([self._per_sequence, totals], 1)

    @property
    def sums(self) -> Tensor:
        """Sums that add over micro-batches and ranks.

        The tensor has tokens, sum of |d|, tokens outside, sums of k3, w, w^2 and d^2, then the histogram.
        """
        self._flush()
        return self._sums

    def sum_over_ranks(self) -> None:
        """Add what the other ranks have compared. Sequences stay apart: each rank knows its own."""
        dist.sum_tensor(self.sums)
        self._largest = float(dist.max_tensor(torch.tensor(self.largest, dtype=torch.float64)))

    @property
    def largest(self) -> float:
        """Largest |d|; 0 over no token."""
        self._flush()
        return self._largest

    def store_logprobs(self) -> None:
        """Set `Sample.logprobs` of every sample that was run. Waits for the GPU."""
        for logprobs, batch in self._batches:
            values = torch.where(batch.train_mask.cpu(), logprobs.cpu(), torch.nan)
            parts = zip(values.split(batch.cu_seqlens.diff().tolist()), batch.group_ids.tolist(), strict=True)
            trained = [sequence for sequence, group in parts if group >= 0]
            for sample, sequence in zip(batch.samples, trained, strict=True):
                sample.logprobs = sequence

    @property
    def tokens(self) -> int:
        """Number of compared tokens."""
        return int(self.sums[0])

    @property
    def mean(self) -> float:
        """Mean |d|, nan over no token."""
        return float(self.sums[1] / self.sums[0]) if self.tokens else float("nan")

    @property
    def sd(self) -> float:
        """Standard deviation of |d| over tokens, nan over no token."""
        return max(0.0, float(self.sums[6] / self.sums[0]) - self.mean**2) ** 0.5 if self.tokens else float("nan")

    @property
    def per_sequence(self) -> tuple[Tensor, Tensor]:
        """Compared tokens and mean of min(|d|, 1 nat), each [S] float64, of this rank's sequences with such tokens."""
        self._flush()
        return self._per_sequence[0], self._per_sequence[1] / self._per_sequence[0]

    def excess(self, limit: Limit) -> float:
        """Return the largest excess of a sequence over its limit, over all ranks; negative when none is above."""
        tokens, means = self.per_sequence
        above = (means - limit.allowed(tokens)).amax(0, keepdim=True) if len(tokens) else torch.tensor([-math.inf])
        return float(dist.max_tensor(above.double()))

    def sequences(self) -> list[ComparedSequence]:
        """Return every compared sequence of this rank. Slow; for diagnosis only."""
        return [
            sequence
            for sequence in sequences([entry for entry in self._batches if entry[1].sampler_logprobs is not None])
            if len(sequence.trained)
        ]

    def percentile(self, share: float) -> float:
        """Return the upper edge of the bin in which `share` of the tokens is reached."""
        cumulative = self.sums[7:].cumsum(0)
        bin_ = int(torch.searchsorted(cumulative, share * cumulative[-1]))
        return min(float(EDGES[min(bin_, len(EDGES) - 1)]), self.largest)

    def values(self) -> dict[str, float]:
        """Return the metrics of a step; empty without sampler log-probs."""
        if not self.tokens:
            return {}
        return {
            "sampling/sampling_logp_difference/mean": self.mean,
            "sampling/sampling_logp_difference/max": self.largest,
            "mismatch/p50": self.percentile(0.5),
            "mismatch/p90": self.percentile(0.9),
            "mismatch/p99": self.percentile(0.99),
            "mismatch/outside": float(self.sums[2] / self.sums[0]),
            "mismatch/k3": float(self.sums[3] / self.sums[0]),
            "mismatch/ess": float(self.sums[4] ** 2 / (self.sums[0] * self.sums[5])),
        }


CEILING = 0.2
"""Largest mean |d| at the start, in nats."""
SHIFT = 0.5
"""Mean change of log-probs that the random adapter of the probe should cause, in nats."""


@dataclass(frozen=True)
class Probe:
    """Result of the probe, in nats."""

    off: float
    """Mean |d| with the adapter's B at 0."""
    on: float
    """Mean |d| with the random adapter."""
    shift: float
    """Mean |change of log-prob| by the random adapter: 0.5 or more, except for small random models."""
    tokens: int
    worst: float = 0.0
    """Largest mean |d| of a sequence less what its length explains; at least 0."""
    sd: float = 0.0
    """Standard deviation of |d| over tokens."""
    live: float | None = None
    """The larger mean |d| where the trainer's routers choose the experts; None where the engine reports none."""

    @property
    def noise(self) -> float:
        """The larger of the two means."""
        return max(self.off, self.on)

    @property
    def weaker(self) -> str:
        """Note for when no adapter of the probe moved log-probs far enough; empty otherwise."""
        if self.shift >= SHIFT:
            return ""
        return (
            f"no random adapter moved log-probs by {SHIFT} nat (reached {self.shift:.2g}), as in small random models: "
            f"the check that the engine applies the adapter is weaker (limit {_most(self.shift, self.off):.2g} nat)"
        )


def _most(shift: float, off: float) -> float:
    """Return the limit of mean |d| under a random adapter of that shift, well below that of a missing adapter."""
    return min(CEILING, max(0.4 * shift, 3 * off))


Parts = Sequence[tuple[Sequence[Prompt], Any]]
"""Prompts and the rlft.config.run.Sampling to draw their completions with."""


def _compare(
    policy: Any, engine: Any, parts: Parts, seed: int, plan: PackPlan, version: int
) -> tuple[Mismatch, list[Rollout], float]:
    """Return the mismatch, what was sampled, and mean |d| where routers choose the experts; nan without routes."""
    engine.load_adapter(policy.adapter(), version=version)
    rollouts: list[Rollout] = []
    for i, (prompts, sampling) in enumerate(parts):
        rollouts += engine.generate(prompts, sampling, seed=(seed, 2**31 + i, -version))
    mismatch, live = Mismatch(), Mismatch()
    with asleep(engine):  # scoring uses the memory that the engine frees
        batches = pack_all(rollouts, plan)
        for batch in batches:
            mismatch.add(policy.score(batch), batch)
            if batch.routes is not None:
                live.add(policy.score(replace(batch, routes=None)), batch)
        scored = sum(int(batch.train_mask.sum()) for batch in batches)
        if mismatch.tokens < scored or not scored:
            sampled = sum(len(rollout.completion_ids) for rollout in rollouts)
            if not sampled:
                raise ParityError("at the start every completion of the engine is empty: stop tokens or prompts")
            subject = f"at the start {sampled - mismatch.tokens} of {sampled} log-probs of engine or trainer"
            raise not_finite(policy, unsampled(rollouts, plan), subject)
    return mismatch, rollouts, live.mean


def _random_adapter(policy: Any, rollouts: list[Rollout], plan: PackPlan, seed: int) -> float:
    """Fill B with noise that moves the log-probs of `rollouts` by 0.5 nat or, failing that, as far as possible.

    Returns the shift.
    """
    batches = pack_all(rollouts, plan)
    before = [policy.score(batch) for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    noise = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in policy.adapter().items()
        if ".lora_B." in name
    }

    def shift_of(size: float) -> float:
        for name, values in noise.items():
            policy.adapter()[name].copy_(values * size)
        changes = [
            (policy.score(batch) - logprobs)[batch.train_mask.to(logprobs.device)].abs()
            for batch, logprobs in zip(batches, before, strict=True)
        ]
        return float(torch.cat(changes).mean())

    best, best_size, size = 0.0, 0.0, 0.01
    for _ in range(12):
        shift = shift_of(size)
        if math.isfinite(shift) and shift > best:
            best, best_size = shift, size
        if best >= SHIFT:
            return best
        size *= 2
    if not best:
        raise ParityError(f"no adapter of size {size / 2:.3g} moves log-probs at all: the trainer does not apply it")
    return shift_of(best_size)


def probe(
    policy: Any,
    engine: Any,
    prompts: Sequence[Prompt],
    sampling: Any,
    seed: int,
    plan: PackPlan,
    long: Sequence[Prompt] = (),
) -> Probe:
    """Compare engine and trainer on `prompts` with the adapter off (B = 0) and with a random adapter.

    The trainer's adapter is restored bit for bit, and no global random state is used; the caller must load the adapter
    into the engine again. sampling: rlft.config.run.Sampling with group_size 1. plan: its budget, temperature and
    max_len are used. long: further prompts, generated in a separate call, since an engine that pads would pad all to
    the longest. Raises ParityError when the two disagree by more than 0.2 nat in the mean, or in one sequence by more
    than its length explains, or when the engine does not follow the random adapter; TrainError when log-probs are not
    finite.
    """
    parts = [(subset, sampling) for subset in (prompts, long) if subset]
    flat = policy.adapter_params.data
    saved = flat.clone()
    most = Limit.of(CEILING, 5.0)
    try:
        for name, tensor in policy.adapter().items():
            if ".lora_B." in name:
                tensor.zero_()
        off, rollouts, live_off = _compare(policy, engine, parts, seed, plan, version=-1)
        if not off.mean <= CEILING:
            raise ParityError(
                f"at the start engine and trainer differ by {off.mean:.3g} nat on the base (limit {CEILING}): the base "
                f"itself differs: dtype, weights, or token ids."
            )
        with asleep(engine):
            _check_sequences(off, most, policy.score, "at the start, on the base, ")
            shift = _random_adapter(policy, rollouts[:2], plan, seed)
        on, rollouts, live_on = _compare(policy, engine, parts, seed, plan, version=-2)
        if not on.mean <= _most(shift, off.mean):
            raise ParityError(
                f"at the start engine and trainer differ by {off.mean:.3g} nat on the base and {on.mean:.3g} nat with "
                f"a random adapter that moves log-probs by {shift:.2g} nat (limit {_most(shift, off.mean):.2g}): the "
                f"engine does not apply the adapter as the trainer does."
            )
        with asleep(engine):
            _check_sequences(on, most, policy.score, "at the start, with a random adapter, ")
    finally:
        flat.copy_(saved)
    sd, noise = max(off.sd, on.sd), max(off.mean, on.mean)
    short = Limit(0.0, 0.0, max(noise, 1e-12), max(sd, SPREAD * noise))
    worst = max(0.0, off.excess(short), on.excess(short))
    live = None if math.isnan(live_off) else max(live_off, live_on)
    return Probe(off.mean, on.mean, shift, off.tokens + on.tokens, worst, sd, live)


def limit(result: Probe | None, cfg: Any) -> Limit:
    """Return how far engine and trainer may disagree. result: of the probe, if it ran. cfg: rlft.config.run.Parity."""
    if result is None:
        return Limit.of(cfg.ceiling, cfg.factor)
    step = min(max(cfg.factor * result.noise, cfg.floor), cfg.ceiling)
    return Limit.of(step, cfg.factor, result.worst, result.sd, cfg.ceiling)


WORST = 8
"""Largest number of sequences used for the diagnosis."""


def gate(mismatch: Mismatch, most: Limit, score: Score) -> None:
    """Stop before the update when engine and trainer disagree. No-op without sampler log-probs.

    most: from `limit`. score: Policy.score, called only for the diagnosis. Raises ParityError on every rank, for the
    mean over the step or for a single sequence.
    """
    if mismatch.tokens and mismatch.mean > most.step:
        every = mismatch.sequences()
        worst = sorted(every, key=lambda sequence: -float(sequence.trained.mean()))[:WORST]
        raise ParityError(
            f"engine and trainer disagree: mean |log-prob difference| {mismatch.mean:.3g} nat over {mismatch.tokens} "
            f"tokens, limit {most.step:.3g} (p99 {mismatch.percentile(0.99):.3g}, max {mismatch.largest:.3g}). "
            f"{cause(worst, every, score) if worst else ''} No update was made."
        )
    _check_sequences(mismatch, most, score, "")


def _check_sequences(mismatch: Mismatch, most: Limit, score: Score, when: str) -> None:
    """Raise ParityError when a sequence differs by more than its length explains. when: start of the message."""
    if not mismatch.tokens or mismatch.excess(most) <= 0:
        return
    every = mismatch.sequences()
    lengths = torch.tensor([len(sequence.trained) for sequence in every])
    above = torch.tensor([float(sequence.trained.clamp(max=CAP).mean()) for sequence in every]).double() - most.allowed(
        lengths
    )
    bad = [every[i] for i in above.argsort(descending=True).tolist() if above[i] > 0]
    if not bad:
        raise ParityError(f"{when}engine and trainer disagree about a sequence of another rank. No update was made.")
    first, size = bad[0], bad[0].trained
    rollout = first.rollout
    raise ParityError(
        f"{when}engine and trainer disagree about {len(bad)} of {len(every)} sequences, most about sample "
        f"{rollout.sample_index} of row {rollout.prompt.index} of the data: mean |log-prob difference| "
        f"{float(size.mean()):.3g} nat over its {len(size)} trained tokens (prompt of {len(rollout.prompt.ids)}), "
        f"limit {float(most.allowed(lengths.new_tensor([len(size)]))):.3g} for that length; the mean of all is "
        f"{mismatch.mean:.3g}. {cause(bad[:WORST], every, score)} No update was made."
    )
