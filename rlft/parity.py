"""Do engine and trainer agree about the probabilities of the same tokens? A probe at the start, a gate at every step.

d = logprob (trainer) - sampler logprob (engine), over trained tokens, in nats. Reported: mean and p99 of |d|, its
maximum, the share of tokens whose ratio exp(d) lies outside [0.9, 1.1], and the k3 estimate of KL(sampler : trainer),
exp(d) - 1 - d, and the effective sample size of the ratios w = exp(d) as a share, (sum w)^2 / (N sum w^2). Percentiles
come from a fixed log-spaced histogram, because histograms add over micro-batches and ranks.

The probe measures this model's noise on this machine with a random adapter that moves log-probs by half a nat, adapter
on and off; the gate stops the run when a step's mean is well above it. (The third guard, reading the adapter back from
the engine, is in the engines.) Template faults are invisible here, since both sides see the same tokens: data.py finds
those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlft.batch import count, pack
from rlft.errors import ParityError
from rlft.rollout.engine import asleep
from rlft.types import Batch, PackPlan, Prompt, Rollout

EDGES = torch.logspace(-7, 2, 181, dtype=torch.float64)
"""Bin edges of |d| in nats: 20 per decade, so a percentile is exact to 12%."""
LOW, HIGH = -0.10536051565782628, 0.0953101798043249
"""ln 0.9 and ln 1.1."""


def bins_(size: Tensor) -> Tensor:
    """The bin of each |d|, int64: `torch.bucketize(size, EDGES)` but for rounding at an edge, in a tenth of its time.
    nan is in the last one."""
    at = size.float().log10_().add_(7).mul_(20).ceil_()
    # fmin takes the number where the other one is nan.
    return torch.fmin(at, torch.tensor(float(len(EDGES)))).clamp_(min=0).long()


class Mismatch:
    """|trainer - engine| over the trained tokens of a step, as sums that add over micro-batches and ranks."""

    def __init__(self) -> None:
        self._sums = torch.zeros(6 + len(EDGES) + 1, dtype=torch.float64)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._largest = 0.0
        self._seen: list[tuple[Tensor, Batch]] = []

    def add(self, logprobs: Tensor, batch: Batch) -> None:
        """Add a micro-batch. logprobs: [T], the trainer's, any dtype. Without sampler log-probs they are only kept."""
        self._seen.append((logprobs.detach(), batch))
        if batch.sampler_logprobs is None:
            return
        # Added up when first asked: micro-batches are many, and each sum has a start-up cost and, on a GPU, waits.
        self._waiting.append((logprobs.detach(), batch.sampler_logprobs, batch.train_mask))

    def _add_up(self) -> None:
        if not self._waiting:
            return
        now, sampler, rows = (torch.cat([w[i].to(self._waiting[0][0].device) for w in self._waiting]) for i in range(3))
        self._waiting = []
        d = (now - sampler).masked_select(rows).double().cpu()
        if not d.numel():
            return
        # In place: most of the time would go into fresh memory.
        outside = (d < LOW).sum() + (d > HIGH).sum()
        rho = d.clamp(-20, 20).exp_()
        weights = [rho.sum(), rho.dot(rho)]
        k3 = rho.sub_(1).sub_(d).sum()
        size = d.abs_()
        self._sums[:6] += torch.stack([torch.tensor(float(d.numel())), size.sum(), outside.double(), k3, *weights])
        self._largest = max(self._largest, float(size.max()))
        self._sums[6:] += torch.bincount(bins_(size), minlength=len(EDGES) + 1).double()

    @property
    def sums(self) -> Tensor:
        """Tokens, sum of |d|, tokens outside, sums of k3, w and w^2, then the histogram: one tensor to sum over ranks,
        in place."""
        self._add_up()
        return self._sums

    @property
    def largest(self) -> float:
        """Largest |d|; 0 over no token."""
        self._add_up()
        return self._largest

    @property
    def logprobs(self) -> dict[int, Tensor]:
        """Rollout (an index of `batch.rows`) -> the trainer's log-probs of its sequence [L], nan where not trained."""
        found: dict[int, Tensor] = {}
        for logprobs, batch in self._seen:
            known = torch.where(batch.train_mask.cpu(), logprobs.cpu(), torch.nan)
            parts = zip(known.split(batch.cu_seqlens.diff().tolist()), batch.group_ids.tolist(), strict=True)
            found |= zip(batch.rows, [values for values, group in parts if group >= 0], strict=True)
        return found

    @property
    def tokens(self) -> int:
        """Tokens compared."""
        return int(self.sums[0])

    @property
    def mean(self) -> float:
        """Mean |d|, nan over no token."""
        return float(self.sums[1] / self.sums[0]) if self.tokens else float("nan")

    def percentile(self, share: float) -> float:
        """Upper edge of the bin in which `share` of the tokens is reached."""
        cumulative = self.sums[6:].cumsum(0)
        bin_ = int(torch.searchsorted(cumulative, share * cumulative[-1]))
        return min(float(EDGES[min(bin_, len(EDGES) - 1)]), self.largest)

    def values(self) -> dict[str, float]:
        """The metrics of a step; empty without sampler log-probs."""
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


@dataclass(frozen=True)
class Probe:
    """What the probe found, in nats."""

    off: float
    """Mean |d| with the adapter's B at 0."""
    on: float
    """Mean |d| with the random adapter."""
    shift: float
    """Mean |change of log-prob| that the random adapter makes: at least 0.5, or a missing adapter would not show."""
    tokens: int

    @property
    def noise(self) -> float:
        """The larger of the two means."""
        return max(self.off, self.on)


def _batches(rollouts: Sequence[Rollout], plan: PackPlan) -> list[Batch]:
    rollouts = list(rollouts)
    plan = replace(plan, keep=(True,) * len(rollouts), whole_groups=False)
    return pack(rollouts, torch.ones(len(rollouts)), plan, count(rollouts, plan))


def _compare(policy: Any, engine: Any, prompts: Sequence[Prompt], sampling: Any, seed: int, plan: PackPlan,
             version: int) -> tuple[Mismatch, list[Rollout]]:  # fmt: skip
    engine.load_adapter(policy.adapter(), version=version)
    rollouts = engine.generate(prompts, sampling, seed=(seed, 2**31, -version))
    mismatch = Mismatch()
    with asleep(engine):  # scoring has the memory that it gives back
        for batch in _batches(rollouts, plan):
            mismatch.add(policy.score(batch), batch)
    return mismatch, rollouts


def _random_adapter(policy: Any, rollouts: list[Rollout], plan: PackPlan, seed: int) -> float:
    """Fill B with noise that moves the log-probs of `rollouts` by at least 0.5 nat; returns the shift."""
    batches = _batches(rollouts, plan)
    before = [policy.score(b) for b in batches]
    generator = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in policy.adapter().items() if ".lora_B." in n}
    size, shift = 0.01, 0.0
    for _ in range(12):
        for name, tensor in policy.adapter().items():
            if ".lora_B." in name:
                tensor.copy_(noise[name] * size)
        moved = [
            (policy.score(b) - old)[b.train_mask.to(old.device)].abs() for b, old in zip(batches, before, strict=True)
        ]
        shift = float(torch.cat(moved).mean())
        if shift >= 0.5:
            return shift
        size *= 2
    raise ParityError(
        f"no adapter of size {size:.3g} moves log-probs by 0.5 nat (got {shift:.3g}): is it applied at all?"
    )


def probe(policy: Any, engine: Any, prompts: Sequence[Prompt], sampling: Any, seed: int, plan: PackPlan) -> Probe:
    """Compare engine and trainer on `prompts` with the adapter off (B = 0) and with a random adapter.

    The trainer's adapter is restored bit for bit and no global random state is used; the caller loads the adapter into
    the engine again. sampling: rlft.config.Sampling with group_size 1. plan: budget, temperature and max_len are used.
    Raises ParityError when the two disagree by more than 0.2 nat, or the engine does not follow the random adapter.
    """
    flat = policy.flat.flat.data
    kept = flat.clone()
    try:
        for name, tensor in policy.adapter().items():
            if ".lora_B." in name:
                tensor.zero_()
        off, rollouts = _compare(policy, engine, prompts, sampling, seed, plan, version=-1)
        if not off.mean <= 0.2:
            none = "" if off.tokens else "; none of the engine's log-probs was finite"
            raise ParityError(
                f"at the start engine and trainer differ by {off.mean:.3g} nat on the base (limit 0.2{none}): the base "
                f"itself differs: dtype, weights, or token ids."
            )
        with asleep(engine):
            shift = _random_adapter(policy, rollouts[:2], plan, seed)
        on, _ = _compare(policy, engine, prompts, sampling, seed, plan, version=-2)
    finally:
        flat.copy_(kept)
    found = Probe(off.mean, on.mean, shift, off.tokens + on.tokens)
    if not found.on <= 0.2:
        raise ParityError(
            f"at the start engine and trainer differ by {found.off:.3g} nat on the base and {found.on:.3g} nat with a "
            f"random adapter that moves log-probs by {found.shift:.2g} nat (limit 0.2): the engine does not apply the "
            f"adapter as the trainer does."
        )
    return found


def limit(found: Probe | None, cfg: Any) -> float:
    """Largest mean |d| a step may have, in nats. cfg: rlft.config.Parity."""
    return cfg.ceiling if found is None else min(max(cfg.factor * found.noise, cfg.floor), cfg.ceiling)


def gate(mismatch: Mismatch, most: float, score: Callable[[Batch], Tensor], batch: Batch | None) -> None:
    """Stop before the update when engine and trainer disagree. No-op without sampler log-probs.

    most: from `limit`. score: Policy.score. batch: one micro-batch of the step, scored again at other temperatures to
    say what fits the numbers. Raises ParityError.
    """
    if not mismatch.tokens or mismatch.mean <= most:
        return
    cause = "" if batch is None else _cause(mismatch.mean, score, batch)
    raise ParityError(
        f"engine and trainer disagree: mean |log-prob difference| {mismatch.mean:.3g} nat over {mismatch.tokens} "
        f"tokens, limit {most:.3g} (p99 {mismatch.percentile(0.99):.3g}, max {mismatch.largest:.3g}). {cause} "
        f"No update was made."
    )


def _cause(mean: float, score: Callable[[Batch], Tensor], batch: Batch) -> str:
    """Which of temperature, token ids and numerics fits the difference."""
    best, at = mean, batch.temperature
    for factor in (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 1.75, 2.0):
        there = replace(batch, temperature=batch.temperature * factor)
        found = Mismatch()
        found.add(score(there), there)
        if found.mean < best:
            best, at = found.mean, there.temperature
    if best < 0.3 * mean:
        return (
            f"Temperature fits the numbers: at {at:.3g} the trainer would be {best:.3g} nat away instead, but "
            f"sampling.temperature is {batch.temperature:.3g}."
        )
    if mean > 1:
        return "Token ids or weights fit the numbers: a difference this large means another text or another adapter."
    return "Numerics fit the numbers: another dtype, a stale adapter, or kernels that round differently."
