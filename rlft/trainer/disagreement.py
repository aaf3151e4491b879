"""Limit the difference between engine and trainer per sequence, and diagnose sequences beyond the limit.

Legend: d = logprob (trainer) - sampler logprob (engine) of a token, in nats; n trained tokens of a sequence; p a
position; noise and sd the mean and the standard deviation of |d|.

bf16 noise is per token, so the mean |d| of a short sequence varies more than that of a long one. |d| is modelled as
sub-gamma (Boucheron, Lugosi, Massart, "Concentration Inequalities", 2.4) with the variance sd^2 and the scale
sd^2 / noise of a gamma distribution of that mean: the mean of n tokens exceeds its expectation by more than

    sd sqrt(2 x / n) + (sd^2 / noise) x / n

with probability at most exp(-x). x = 20.7 gives one false stop in 10^9 sequences. Each token is capped at 1 nat, so
that no single outlier stops a run. (With the cap, a sequence of one or two tokens exceeds the limit only where the
noise is small; the mean over the step covers those.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlft.batch import pack_all
from rlft.types import Batch, PackPlan, Rollout

CAP = 1.0
"""Cap of |d| per token in the mean of its sequence, in nats."""
FALSE_STOPS = math.log(1e9)
"""x of the formula above."""
SPREAD = 1.36
"""Standard deviation of |d| over its mean. Measured on an H100: 0.0507 / 0.0373 nat (benchmarks/results/grpo_run)."""
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 1.75, 2.0)
"""Factors of the temperature that the diagnosis tries."""


@dataclass(frozen=True)
class Limit:
    """How far engine and trainer may disagree, in nats."""

    step: float
    """Largest mean |d| over the tokens of a step."""
    sequence: float
    """Largest mean |d| of a long sequence."""
    noise: float
    """Expected mean |d|."""
    sd: float
    """Standard deviation of |d| over tokens."""
    probed: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the probe that every step repeats."""

    @staticmethod
    def of(step: float, factor: float, worst: float = 0.0, sd: float = 0.0, most: float = math.inf) -> Limit:
        """Derive all limits from that of a step, which is `factor` times the noise.

        worst: the largest mean of a sequence in the probe, less what its length explains. sd: as measured; at least
        SPREAD times the noise is used. most: upper bound of the limit of a sequence.
        """
        noise = step / factor
        return Limit(step, min(max(step, 2 * worst), max(step, most)), noise, max(SPREAD * noise, sd))

    def allowed(self, tokens: Tensor) -> Tensor:
        """Return the largest allowed mean of min(|d|, CAP), float64 [S]. tokens: [S] trained tokens, any dtype."""
        x = FALSE_STOPS / tokens.double().clamp(min=1)
        return self.sequence + self.sd * (2 * x).sqrt() + self.sd**2 / self.noise * x


@dataclass(frozen=True)
class ComparedSequence:
    """One sequence with its log-prob differences between engine and trainer."""

    rollout: Rollout
    batch: Batch
    """Micro-batch it was run in."""
    d: Tensor
    """[L] float64: trainer - engine per token, nan where not trained or not finite."""
    positions: Tensor
    """[L] int64."""

    @property
    def trained(self) -> Tensor:
        """|d| of the compared tokens, in order."""
        return self.d[~self.d.isnan()].abs()


def sequences(seen: Sequence[tuple[Tensor, Batch]]) -> list[ComparedSequence]:
    """Split the micro-batches into sequences. seen: (trainer's log-probs [T], micro-batch) pairs."""
    compared = []
    for logprobs, batch in seen:
        assert batch.sampler_logprobs is not None
        d = (logprobs - batch.sampler_logprobs.to(logprobs.device)).double().cpu()
        d = torch.where(batch.train_mask.cpu() & d.isfinite(), d, torch.nan)
        sizes = batch.cu_seqlens.diff().tolist()
        times = batch.position_ids.cpu().reshape(-1, len(d))[0]  # of three axes the one that all tokens advance on
        parts = zip(d.split(sizes), times.split(sizes), batch.group_ids.tolist(), strict=True)
        real = [(differences, positions) for differences, positions, group in parts if group >= 0]
        compared += [
            ComparedSequence(sample.rollout, batch, differences, positions)
            for sample, (differences, positions) in zip(batch.samples, real, strict=True)
        ]
    return compared


Score = Callable[[Batch], Tensor]


def cause(worst: Sequence[ComparedSequence], every: Sequence[ComparedSequence], score: Score) -> str:
    """Describe the likely cause: the pass itself, packing, temperature, positions, token ids or numerics.

    worst: a few of the sequences beyond the limit. every: all sequences of the step. score: Policy.score.
    """
    mean = float(torch.cat([sequence.trained for sequence in worst]).mean())
    batches = {id(sequence.batch): sequence.batch for sequence in worst}
    rescored = _mean_difference(
        sequences([(score(batch), batch) for batch in batches.values()]), [sequence.rollout for sequence in worst]
    )
    if rescored < 0.3 * mean:
        return (
            f"Scored again, without gradient, the same tokens are {rescored:.3g} nat away: a pass that computes "
            f"otherwise with a gradient than without fits the numbers."
        )
    temperature = worst[0].batch.temperature
    single_batches = [batch for sequence in worst for batch in _alone(sequence.rollout, temperature)]
    alone = _mean_difference(sequences([(score(batch), batch) for batch in single_batches]), None)
    if alone < 0.3 * mean:
        return (
            f"Packing fits the numbers: scored alone the same tokens are {alone:.3g} nat away, so another sequence of "
            f"the micro-batch reaches them. packing.share_prefix = false may help."
        )
    best, nearest = mean, temperature
    for factor in FACTORS:
        rescaled = [replace(batch, temperature=temperature * factor) for batch in single_batches]
        difference = _mean_difference(sequences([(score(batch), batch) for batch in rescaled]), None)
        if difference < best:
            best, nearest = difference, temperature * factor
    if best < 0.3 * mean:
        return (
            f"Temperature fits the numbers: at {nearest:.3g} the trainer would be {best:.3g} nat away instead, but "
            f"sampling.temperature is {temperature:.3g}."
        )
    if (jump := position(every)) is not None:
        start, before, after = jump
        return (
            f"Positions fit the numbers: tokens before position {start} are {before:.3g} nat away, those from there on "
            f"{after:.3g}: a sliding window, RoPE scaling, chunked prefill or a prefix cache."
        )
    if mean > 1:
        return "Token ids or weights fit the numbers: a difference this large means another text or another adapter."
    return "Numerics fit the numbers: another dtype, a stale adapter, or kernels that round differently."


def position(every: Sequence[ComparedSequence]) -> tuple[int, float, float] | None:
    """Find the position p from which tokens disagree, as (p, mean |d| before p, mean |d| from p on), or None.

    Most tokens from p on must disagree, in two sequences, or in one that also has eight good tokens before p: a
    sequence that is wrong from its beginning has no such position.
    """
    positions = torch.cat([sequence.positions[~sequence.d.isnan()] for sequence in every])
    size = torch.cat([sequence.trained for sequence in every])
    owner = torch.cat([torch.full((len(sequence.trained),), i) for i, sequence in enumerate(every)])
    order = positions.argsort(stable=True)
    positions, size, owner = positions[order], size[order], owner[order]
    # A split is between two positions, with at least 8 tokens on either side.
    splits = (positions.diff() > 0).nonzero().flatten() + 1
    splits = splits[(splits >= 8) & (splits <= len(size) - 8)]
    if not len(splits):
        return None
    left_sum, total = size.cumsum(0)[splits - 1], size.sum()
    left_mean, right_mean = left_sum / splits, (total - left_sum) / (len(size) - splits)
    # The split that explains most of the variance.
    split = int(splits[((right_mean - left_mean) * (splits * (len(size) - splits)).double().sqrt()).argmax()])
    before, after = float(size[:split].mean()), float(size[split:].mean())
    beyond = owner[split:].unique()
    straddles = int((owner[:split][:, None] == beyond[None, :1]).sum()) >= 8
    if before > 0.2 * after or float(size[split:].median()) < 0.3 * after or (len(beyond) < 2 and not straddles):
        return None
    return int(positions[split]), before, after


def _alone(rollout: Rollout, temperature: float) -> list[Batch]:
    """Pack the rollout alone into a micro-batch."""
    length = len(rollout.prompt.ids) + len(rollout.completion_ids)
    return pack_all([rollout], PackPlan("token_mean", length, length, temperature, share_prefix=False))


def _mean_difference(compared: Sequence[ComparedSequence], rollouts: Sequence[Rollout] | None) -> float:
    """Return mean |d| over the tokens of these rollouts (None: all); infinite over no token."""
    wanted = {id(rollout) for rollout in rollouts or ()}
    values = torch.cat(
        [sequence.trained for sequence in compared if rollouts is None or id(sequence.rollout) in wanted]
    )
    return float(values.mean()) if len(values) else math.inf
