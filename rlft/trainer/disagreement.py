"""How far a single sequence may be off between engine and trainer, and what fits when one is further off.

The noise of bf16 is of single tokens, so a short sequence may be further off in its mean than a long one. |d| is taken
as sub-gamma (Boucheron, Lugosi, Massart, "Concentration Inequalities", 2.4) with the variance sd^2 and the scale
sd^2 / noise of a gamma distribution of that mean: the mean of n tokens is above its expectation by more than

    sd sqrt(2 x / n) + (sd^2 / noise) x / n

with probability exp(-x) at most. x = 20.7 is one false stop in 10^9 sequences. Each token counts as 1 nat at most, so
that no single outlier, however far off, stops a run. (A sequence of one or two tokens can therefore pass the limit only
where the noise is small; the mean over the step covers them.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlft.batch import count, pack
from rlft.types import Batch, PackPlan, Rollout

CAP = 1.0
"""Most that one token adds to the sum of its sequence, in nats."""
FALSE_STOPS = math.log(1e9)
"""x of the formula above."""
SPREAD = 1.36
"""Standard deviation of |d| over its mean: 0.0507 / 0.0373 nat on an H100 (benchmarks/results/grpo_run)."""
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 1.75, 2.0)
"""Of the temperature, tried for a fit."""


@dataclass(frozen=True)
class Limit:
    """How far engine and trainer may be apart, in nats."""

    step: float
    """Largest mean |d| over the tokens of a step."""
    sequence: float
    """Largest mean |d| of a long sequence."""
    noise: float
    """Mean |d| that is expected."""
    sd: float
    """Standard deviation of |d| over tokens."""

    @staticmethod
    def of(step: float, factor: float, worst: float = 0.0, sd: float = 0.0, most: float = math.inf) -> Limit:
        """From the limit of a step, which is `factor` times the noise. worst: the largest mean of a sequence that the
        probe found, less what its length explains. sd: measured; never taken below the usual shape. most: of the limit
        of a sequence."""
        noise = step / factor
        return Limit(step, min(max(step, 2 * worst), max(step, most)), noise, max(SPREAD * noise, sd))

    def allowed(self, tokens: Tensor) -> Tensor:
        """Largest mean of min(|d|, CAP) that a sequence may have. tokens: [S] trained tokens, any dtype; float64."""
        x = FALSE_STOPS / tokens.double().clamp(min=1)
        return self.sequence + self.sd * (2 * x).sqrt() + self.sd**2 / self.noise * x


@dataclass(frozen=True)
class Compared:
    """One sequence with what engine and trainer say about it."""

    row: int
    """Index of its rollout in the step."""
    batch: Batch
    """Micro-batch that it was run in."""
    d: Tensor
    """[L] float64: trainer - engine at its tokens, nan where not trained or not finite."""
    positions: Tensor
    """[L] int64."""

    @property
    def trained(self) -> Tensor:
        """|d| of its compared tokens, in order."""
        return self.d[~self.d.isnan()].abs()


def sequences(seen: Sequence[tuple[Tensor, Batch]]) -> list[Compared]:
    """All sequences of the micro-batches. seen: the trainer's log-probs [T] of each."""
    found = []
    for logprobs, batch in seen:
        assert batch.sampler_logprobs is not None
        d = (logprobs - batch.sampler_logprobs.to(logprobs.device)).double().cpu()
        d = torch.where(batch.train_mask.cpu() & d.isfinite(), d, torch.nan)
        sizes = batch.cu_seqlens.diff().tolist()
        parts = zip(d.split(sizes), batch.position_ids.cpu().split(sizes), batch.group_ids.tolist(), strict=True)
        real = [(own, at) for own, at, group in parts if group >= 0]
        found += [Compared(row, batch, own, at) for row, (own, at) in zip(batch.rows, real, strict=True)]
    return found


Score = Callable[[Batch], Tensor]


def cause(worst: Sequence[Compared], every: Sequence[Compared], score: Score, rollouts: Sequence[Rollout]) -> str:
    """Which of dropout, packing, temperature, positions, token ids and numerics fits the difference.

    worst: the sequences that are too far off, a few of them. every: all of the step. score: Policy.score.
    """
    mean = float(torch.cat([s.trained for s in worst]).mean())
    batches = {id(s.batch): s.batch for s in worst}
    again = _apart(sequences([(score(b), b) for b in batches.values()]), {s.row for s in worst})
    if again < 0.3 * mean:
        return (
            f"Scored again, without dropout and gradient, the same tokens are {again:.3g} nat away: lora.dropout, or a "
            f"pass that computes otherwise with a gradient than without, fits the numbers."
        )
    temperature = worst[0].batch.temperature
    own = [b for s in worst for b in _alone(rollouts[s.row], temperature)]
    alone = _apart(sequences([(score(b), b) for b in own]), None)
    if alone < 0.3 * mean:
        return (
            f"Packing fits the numbers: scored alone the same tokens are {alone:.3g} nat away, so another sequence of "
            f"the micro-batch reaches them. packing.share_prefix = false may help."
        )
    best, at = mean, temperature
    for factor in FACTORS:
        there = [replace(b, temperature=temperature * factor) for b in own]
        apart = _apart(sequences([(score(b), b) for b in there]), None)
        if apart < best:
            best, at = apart, temperature * factor
    if best < 0.3 * mean:
        return (
            f"Temperature fits the numbers: at {at:.3g} the trainer would be {best:.3g} nat away instead, but "
            f"sampling.temperature is {temperature:.3g}."
        )
    if (found := position(every)) is not None:
        start, before, after = found
        return (
            f"Positions fit the numbers: tokens before position {start} are {before:.3g} nat away, those from there on "
            f"{after:.3g}: a sliding window, RoPE scaling, chunked prefill or a prefix cache."
        )
    if mean > 1:
        return "Token ids or weights fit the numbers: a difference this large means another text or another adapter."
    return "Numerics fit the numbers: another dtype, a stale adapter, or kernels that round differently."


def position(every: Sequence[Compared]) -> tuple[int, float, float] | None:
    """(p, mean |d| before p, from p on) where tokens disagree from some position on and hardly before; else None.

    From p on most tokens have to be off, in two sequences or beside eight good tokens of the same one: a sequence that
    is wrong from its beginning has no such position.
    """
    at = torch.cat([s.positions[~s.d.isnan()] for s in every])
    size = torch.cat([s.trained for s in every])
    owner = torch.cat([torch.full((len(s.trained),), i) for i, s in enumerate(every)])
    order = at.argsort(stable=True)
    at, size, owner = at[order], size[order], owner[order]
    # A split lies between two positions, with at least 8 tokens on either side.
    splits = (at.diff() > 0).nonzero().flatten() + 1
    splits = splits[(splits >= 8) & (splits <= len(size) - 8)]
    if not len(splits):
        return None
    low, total = size.cumsum(0)[splits - 1], size.sum()
    left, right = low / splits, (total - low) / (len(size) - splits)
    # What a split explains of the variance.
    split = int(splits[((right - left) * (splits * (len(size) - splits)).double().sqrt()).argmax()])
    before, after = float(size[:split].mean()), float(size[split:].mean())
    beyond = owner[split:].unique()
    straddles = int((owner[:split][:, None] == beyond[None, :1]).sum()) >= 8
    if before > 0.2 * after or float(size[split:].median()) < 0.3 * after or (len(beyond) < 2 and not straddles):
        return None
    return int(at[split]), before, after


def _alone(rollout: Rollout, temperature: float) -> list[Batch]:
    """The rollout in a micro-batch of its own."""
    length = len(rollout.prompt.ids) + len(rollout.completion_ids)
    plan = PackPlan((True,), "token_mean", length, length, temperature, share_prefix=False)
    return pack([rollout], torch.ones(1), plan, count([rollout], plan))


def _apart(found: Sequence[Compared], rows: set[int] | None) -> float:
    """Mean |d| over the tokens of the sequences of `rows`, or all; infinite over none."""
    values = torch.cat([s.trained for s in found if rows is None or s.row in rows])
    return float(values.mean()) if len(values) else math.inf
