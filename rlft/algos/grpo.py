"""Group relative policy optimisation (GRPO, 2402.03300) in the form TRL runs by default (DAPO, 2503.14476).

    loss = sum_t weight_t ( -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) sg(min(rho_t, cap)) + kl_coef KL_t )

The five choices: ratio per token, r = exp(now - old); clip [1 - 0.2, 1 + 0.2]; no KL; advantage (reward - group mean) /
(group std + 1e-4); mean over all tokens of the step. With one update per rollout batch old = sg(now), so r = 1,
clipping never acts and the gradient is REINFORCE's. Presets: `dapo` (clip_high 0.28, dynamic sampling, overlong
penalty, 16 updates) and `dr_grpo` (2503.20783: advantage "group_mean", aggregation "constant").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlft.algos import corrections, kl
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stat, Stats

ADVANTAGE = "group_norm"
AGGREGATION: Aggregation = "token_mean"
RATIO = True
WHOLE_GROUPS = False
ENTROPY_GRAD = False


@dataclass(frozen=True)
class Config:
    """Settings of [algo] for grpo."""

    advantage: str = ADVANTAGE
    """Estimator: "group_norm", "group_mean", "leave_one_out", "identity", or "file.py:function"."""
    aggregation: Aggregation = AGGREGATION
    """How token losses become one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    kl_coef: float = 0.0
    """Factor of the KL term; 0 skips the reference forward."""
    kl: Literal["k2", "k3_ratio", "forward"] = "k3_ratio"
    """Estimator of the KL term: see rlft.algos.kl."""
    correction: Literal["auto", "single", "decoupled", "bypass", "none"] = "auto"
    """Correction for the sampler: see rlft.algos.corrections. "auto" is "single" with one update per rollout batch and
    "decoupled" with several."""
    correction_cap: float = 2.0
    """Largest correction weight of a token."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "kl_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"algo.{name} = {getattr(self, name)}: want 0 or more, and finite")
        if self.clip_low >= 1:
            raise ConfigError(f"algo.clip_low = {self.clip_low}: want below 1, the ratio is never negative")
        if not self.correction_cap >= 1:
            raise ConfigError(f"algo.correction_cap = {self.correction_cap}: want 1 or more")
        known = {"aggregation": get_args(Aggregation), "kl": kl.CHOICES, "correction": corrections.CHOICES}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ConfigError(f'algo.{name} = "{getattr(self, name)}": want one of {", ".join(names)}')


def NEEDS_REFERENCE(cfg: Config) -> bool:
    """A constant of the loss file that depends on a number: true with a KL term."""
    return cfg.kl_coef > 0


def NEEDS_SAMPLER(cfg: Config) -> bool:
    """With "bypass" the ratio is against the sampler's log-probs."""
    return cfg.correction == "bypass"


def ZERO_ADV_ZERO_GRAD(cfg: Config) -> bool:
    """A token of zero advantage has no gradient, unless the KL term gives it one."""
    return cfg.kl_coef == 0


def words(cfg: Config) -> str:
    """Ratio, clip, KL and correction in words, for the start of a run."""
    penalty = f"{cfg.kl_coef:g} x KL ({cfg.kl})" if cfg.kl_coef else "no KL"
    correction = corrections.words(cfg.correction, cfg.correction_cap)
    return f"ratio per token, clipped to [{1 - cfg.clip_low:g}, {1 + cfg.clip_high:g}], {penalty}, {correction}"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """The weighted sum of this file's formula, and TRL's clip metrics. logprobs: [T] with gradient."""
    # A token of weight 0 may hold nan or inf: it is replaced before any arithmetic, so that no 0 * inf can follow.
    used = batch.train_mask & (batch.weight != 0)
    now = torch.where(used, logprobs, 0)
    old = now.detach() if batch.old_logprobs is None else torch.where(used, batch.old_logprobs, 0)
    # exp(89) overflows fp32: one wild token must not make the step NaN.
    r = (now - old).clamp(-20, 20).exp()
    clipped = r.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    a = batch.advantages
    token_loss = -torch.min(r * a, clipped * a) * corrections.factor(cfg.correction, now, batch, cfg.correction_cap)
    low, high = (r < 1 - cfg.clip_low) & (a < 0), (r > 1 + cfg.clip_high) & (a > 0)
    stats = {
        "clip_ratio/low_mean": Stat.mean(low.float(), used),
        "clip_ratio/high_mean": Stat.mean(high.float(), used),
        "clip_ratio/region_mean": Stat.mean((low | high).float(), used),
        **corrections.stats(cfg.correction, now, batch),
    }
    if cfg.kl_coef:
        assert batch.ref_logprobs is not None
        ref = torch.where(used, batch.ref_logprobs, 0)
        token_loss = token_loss + cfg.kl_coef * kl.penalty(cfg.kl, now, ref, r)
        d = kl.difference(now.detach(), ref)
        stats |= {"kl": Stat.mean(kl.k3(d), used), "kl/k1": Stat.mean(d, used)}
    return (token_loss * batch.weight).sum(), stats
