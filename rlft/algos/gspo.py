"""Group sequence policy optimisation (GSPO, 2507.18071): one ratio per sequence, the geometric mean of its tokens'.

    s_i = exp( mean_t (now_t - old_t) )
    loss = sum_t weight_t ( -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) )

    form = "sequence":  r_t = s_i
    form = "token":     r_t = sg(s_i) exp(now_t - sg(now_t)), equal in value and gradient while A is the same for all
                        tokens of a sequence, and open to a correction of each token for the sampler

The five choices: ratio per sequence; clip [1 - 3e-4, 1 + 4e-4]; no KL; advantage (reward - group mean) / (group std +
1e-4); mean over sequences of the mean over tokens. The band is so narrow that `old` must be the trainer's own. With one
update per rollout batch s = 1 and clipping never acts; the paper takes four, and so does the preset `gspo`, which is
what this name stands for in a config file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlft.algos import corrections
from rlft.batch import segment_sum
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stat, Stats

ADVANTAGE = "group_norm"
AGGREGATION: Aggregation = "sequence_mean"
RATIO = True
NEEDS_REFERENCE = False
WHOLE_GROUPS = False
NEEDS_SAMPLER = False
ZERO_ADV_ZERO_GRAD = True
ENTROPY_GRAD = False


@dataclass(frozen=True)
class Config:
    """Settings of [algo] for gspo."""

    advantage: str = ADVANTAGE
    """Estimator: "group_norm", "group_mean", "leave_one_out", "identity", or "file.py:function"."""
    aggregation: Aggregation = AGGREGATION
    """How token losses become one number; token_mean would weigh sequences by their length."""
    form: Literal["token", "sequence"] = "token"
    """Which of the two forms of the ratio; they differ only once tokens are corrected or weighted apart."""
    clip_low: float = 3e-4
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 4e-4
    """The ratio counts up to 1 + clip_high."""
    correction: Literal["auto", "single", "decoupled", "bypass", "none"] = "auto"
    """Correction for the sampler: see rlft.algos.corrections. "auto" is "single" with one update per rollout batch and
    "decoupled" with several; "none" in the sequence form, whose tokens cannot be weighed apart. "bypass" is refused."""
    correction_cap: float = 2.0
    """Largest correction weight of a token."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"algo.{name} = {getattr(self, name)}: want 0 or more, and finite")
        if self.clip_low >= 1:
            raise ConfigError(f"algo.clip_low = {self.clip_low}: want below 1, the ratio is never negative")
        if not self.correction_cap >= 1:
            raise ConfigError(f"algo.correction_cap = {self.correction_cap}: want 1 or more")
        if self.correction == "bypass":
            raise ConfigError(
                f'algo.correction = "bypass": the noise of the sampler is wider than the clip [1 - {self.clip_low:g}, '
                f'1 + {self.clip_high:g}] of a sequence, so old must be the trainer\'s; set "auto"'
            )
        known = {"aggregation": get_args(Aggregation), "form": ("token", "sequence"),
                 "correction": (*corrections.FACTOR, "none")}  # fmt: skip
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ConfigError(f'algo.{name} = "{getattr(self, name)}": want one of {", ".join(names)}')
        if self.form == "sequence" and self.correction in ("single", "decoupled"):
            raise ConfigError(f'algo.correction = "{self.correction}" weighs tokens apart: set algo.form = "token"')
        if self.form == "sequence":
            object.__setattr__(self, "correction", "none")


def words(cfg: Config) -> str:
    """Ratio, clip, KL and correction in words, for the start of a run."""
    correction = corrections.words(cfg.correction, cfg.correction_cap)
    band = f"[{1 - cfg.clip_low:g}, {1 + cfg.clip_high:g}]"
    return f"ratio per sequence ({cfg.form} form), clipped to {band}, no KL, {correction}"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """The weighted sum of this file's formula, and TRL's clip metrics. logprobs: [T] with gradient."""
    # A token of weight 0 may hold nan or inf: it is replaced before any arithmetic, so that no 0 * inf can follow.
    used = batch.train_mask & (batch.weight != 0)
    now = torch.where(used, logprobs, 0)
    old = now.detach() if batch.old_logprobs is None else torch.where(used, batch.old_logprobs, 0)
    sequences = len(batch.prefix)
    lengths = segment_sum(used.to(now.dtype), batch.seq_ids, sequences).clamp(min=1)
    mean = segment_sum(now - old, batch.seq_ids, sequences) / lengths
    s = mean.clamp(-20, 20).exp()[batch.seq_ids]
    r = s if cfg.form == "sequence" else s.detach() * (now - now.detach()).exp()
    a = batch.advantages
    token_loss = -torch.min(r * a, r.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * a)
    token_loss = token_loss * corrections.factor(cfg.correction, now, batch, cfg.correction_cap)
    low, high = (s < 1 - cfg.clip_low) & (a < 0), (s > 1 + cfg.clip_high) & (a > 0)
    stats = {
        "clip_ratio/low_mean": Stat.mean(low.float(), used),
        "clip_ratio/high_mean": Stat.mean(high.float(), used),
        "clip_ratio/region_mean": Stat.mean((low | high).float(), used),
        **corrections.stats(cfg.correction, now, batch),
    }
    return (token_loss * batch.weight).sum(), stats
