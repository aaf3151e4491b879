"""View of a micro-batch for the policy losses: log-probs without NaN, and sums over each token's sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlft.batch import segment_sum
from rlft.types import Batch, Stat, Stats

CLAMP = 20.0
"""Bound of log-ratios: exp(89) overflows fp32, and one outlier token must not make a step NaN."""


class Tokens(NamedTuple):
    """The tokens of a micro-batch: all tensors [T], 0 where nothing is trained."""

    used: Tensor
    """bool: trained tokens with nonzero weight."""
    now: Tensor
    """Current log-probs, with gradient."""
    old: Tensor
    sampler: Tensor
    """`old` where no engine sampled the tokens."""
    advantages: Tensor
    seq_ids: Tensor
    """int64."""
    sequences: int
    """S."""
    fresh: bool
    """True when old is now (one update per rollout batch), so that every ratio against old is exactly 1."""

    def log_ratio(self) -> Tensor:
        """Return now - old, with gradient, clamped to +-20."""
        return (self.now - self.old).clamp(-CLAMP, CLAMP)

    def against_sampler(self) -> Tensor:
        """Return now - sampler, with gradient, clamped to +-20."""
        return (self.now - self.sampler).clamp(-CLAMP, CLAMP)

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` [T] over each token's sequence, [T], clamped to +-20."""
        return segment_sum(values, self.seq_ids, self.sequences).clamp(-CLAMP, CLAMP)[self.seq_ids]

    def mean(self, values: Tensor) -> Tensor:
        """Average `values` [T] over the used tokens of each token's sequence, [T], clamped to +-20."""
        total = segment_sum(values, self.seq_ids, self.sequences) / self._lengths()
        return total.clamp(-CLAMP, CLAMP)[self.seq_ids]

    def per_token(self) -> Tensor:
        """Return 1 / length of each token's sequence, [T]."""
        return 1 / self._lengths()[self.seq_ids]

    def clip_stats(self, low: Tensor, high: Tensor) -> Stats:
        """Return TRL's clip metrics of a ratio against old. low, high: [T] bool, tokens clipped on either side."""
        if self.fresh:
            # Every ratio is 1 and nothing is clipped, so the per-micro-batch computation is skipped.
            zero, count = torch.zeros((), device=self.now.device), self.used.sum()
            means = {f"clip_ratio/{name}_mean": Stat("mean", zero, count) for name in ("low", "high", "region")}
            return means | {"clip_ratio/low_min": Stat("min", zero), "clip_ratio/high_max": Stat("max", zero)}
        used, stats = self.used, {}
        for name, clipped in (("low", low), ("high", high), ("region", low | high)):
            stats[f"clip_ratio/{name}_mean"] = Stat.mean(clipped.float(), used)
        shares = [
            torch.where(used, self.mean((flags & used).to(self.now.dtype)), empty)
            for flags, empty in ((low, 1.0), (high, 0.0))
        ]
        stats["clip_ratio/low_min"] = Stat("min", shares[0].min())
        stats["clip_ratio/high_max"] = Stat("max", shares[1].max())
        return stats

    def _lengths(self) -> Tensor:
        """Return the number of used tokens of each sequence, at least 1: [S]."""
        return segment_sum(self.used.to(self.now.dtype), self.seq_ids, self.sequences).clamp(min=1)


def read(logprobs: Tensor, batch: Batch) -> Tokens:
    """Build the token view of a micro-batch. logprobs: [T] with gradient.

    Tokens of weight 0 may be nan or inf. They are replaced before any arithmetic, so that 0 * inf cannot occur.
    """
    used = batch.train_mask & (batch.weight != 0)
    now = torch.where(used, logprobs, 0)
    old = now.detach() if batch.old_logprobs is None else torch.where(used, batch.old_logprobs, 0)
    sampler = old if batch.sampler_logprobs is None else torch.where(used, batch.sampler_logprobs, 0)
    return Tokens(
        used, now, old, sampler, batch.advantages, batch.seq_ids, len(batch.prefix), batch.old_logprobs is None
    )
