"""The settings common to all policy losses, and the requirements that follow from them.

The `Config` of a loss file extends `Settings`. Constants of a loss file that depend on a setting are functions here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from rlft.errors import ConfigError
from rlft.types import Aggregation

Correction = Literal["auto", "single", "decoupled", "bypass", "none"]
Weight = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Penalty = Literal["k2", "k3_ratio", "k1_ratio", "forward", "reward"]


@dataclass(frozen=True)
class Settings:
    """Settings of [algo] common to all policy losses."""

    advantage: str = "group_norm"
    """Estimator: a name in rlft.algos.advantages ("group_norm", "group_mean", "leave_one_out", ...), or
    "file.py:function"."""
    aggregation: Aggregation = "token_mean"
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""
    correction: Correction = "auto"
    """Correction for the sampler: see rlft.algos.corrections. "auto" is "single" with one update per rollout batch and
    "decoupled" with several."""
    correction_weight: Weight = "token_truncate"
    """Whether the weight is the ratio of the token or of its sequence. Outside [correction_floor, correction_cap] it is
    set to the bound (truncate) or to 0 (mask)."""
    correction_cap: float = 2.0
    """Largest correction weight."""
    correction_floor: float = 0.0
    """Smallest correction weight."""
    sequence_mask_low: float = 0.0
    """Sequences whose geometric mean of trainer / sampler is below this are masked; 0: none."""
    sequence_mask_high: float = math.inf
    """Sequences whose geometric mean of trainer / sampler is above this are masked; inf: none."""
    off_policy_limit: float = math.inf
    """Sequences of negative advantage are masked where the mean of sampler - now is above this, in nats; inf: none
    (off-policy sequence masking of DeepSeek-V3.2)."""
    kl_coef: float = 0.0
    """Factor of the KL term; 0 skips the reference forward."""
    kl: Penalty = "k3_ratio"
    """Estimator of the KL term, or "reward" to subtract k1 from the reward: see rlft.algos.kl."""
    entropy_coef: float = 0.0
    """Factor of the entropy bonus; the initial value if `entropy_target` is set."""
    entropy_target: float | None = None
    """Adaptive entropy (2505.22312): the bonus is active only after a step whose mean entropy, in nats, was at most
    this. Its factor grows after such steps and falls after the others. None: the factor is constant."""
    entropy_coef_delta: float = 0.005
    """Change of the factor per step."""
    entropy_coef_max: float = 1.0
    """Largest factor; the smallest is 0."""
    entropy_share: float = 1.0
    """Share of an update's tokens, those of highest entropy, in the policy term (2506.01939)."""

    def __post_init__(self) -> None:
        bonus = ("entropy_coef", "entropy_coef_delta", "entropy_coef_max")
        for name in ("kl_coef", *bonus, "correction_floor", "sequence_mask_low"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"algo.{name} = {getattr(self, name)}: want 0 or more, and finite")
        if not 0 < self.entropy_share <= 1:
            raise ConfigError(f"algo.entropy_share = {self.entropy_share}: want above 0, at most 1 (every token)")
        literals = {"aggregation": Aggregation, "kl": Penalty, "correction": Correction, "correction_weight": Weight}
        for name, names in literals.items():
            if getattr(self, name) not in get_args(names):
                raise ConfigError(f'algo.{name} = "{getattr(self, name)}": want one of {", ".join(get_args(names))}')
        _check_correction(self)


def check_clip(low: float, high: float) -> None:
    """Raise ConfigError unless [1 - low, 1 + high] is a valid range of ratios around 1."""
    for name, value in (("clip_low", low), ("clip_high", high)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"algo.{name} = {value}: want 0 or more, and finite")
    if low >= 1:
        raise ConfigError(f"algo.clip_low = {low}: want below 1, the ratio is never negative")


def check_against_sampler(cfg: Settings, name: str) -> None:
    """Raise ConfigError when a loss whose ratio is against the sampler has a correction too. name: of the loss."""
    if cfg.correction != "none":
        raise ConfigError(
            f'algo.correction = "{cfg.correction}": the ratio of {name} is against the sampler by itself, so a '
            f"correction would count twice; leave it out"
        )


def needs_reference(cfg: Settings) -> bool:
    """Return True with a KL term in the loss."""
    return cfg.kl_coef > 0 and cfg.kl != "reward"


def needs_sampler(cfg: Settings) -> bool:
    """Return True when the ratio (correction "bypass") or a sequence mask uses the sampler's log-probs."""
    return cfg.correction == "bypass" or masks_sequences(cfg)


def zero_adv_zero_grad(cfg: Settings) -> bool:
    """Return True when tokens of zero advantage have no gradient: without a KL term and an entropy bonus."""
    return not needs_reference(cfg) and not entropy_grad(cfg)


def entropy_grad(cfg: Settings) -> bool:
    """Return True when an entropy bonus needs the gradient of the entropy."""
    return cfg.entropy_coef > 0 or cfg.entropy_target is not None


def has_sequence_mask(cfg: Settings) -> bool:
    """Return True when sequences far from the sampler are masked."""
    return cfg.sequence_mask_low > 0 or cfg.sequence_mask_high < math.inf


def masks_sequences(cfg: Settings) -> bool:
    """Return True when whole sequences may be masked."""
    return has_sequence_mask(cfg) or cfg.off_policy_limit < math.inf


def _check_correction(cfg: Settings) -> None:
    """Raise ConfigError for a range without 1, and for settings that would correct twice or have no effect."""
    if not cfg.correction_cap >= 1:
        raise ConfigError(f"algo.correction_cap = {cfg.correction_cap}: want 1 or more")
    if cfg.correction_floor > 1:
        raise ConfigError(f"algo.correction_floor = {cfg.correction_floor}: want 1 or less")
    if cfg.sequence_mask_low > 1 or not cfg.sequence_mask_high >= 1:
        raise ConfigError(
            f"algo.sequence_mask_low = {cfg.sequence_mask_low}, algo.sequence_mask_high = {cfg.sequence_mask_high}: "
            f"want a band around 1"
        )
    if math.isnan(cfg.off_policy_limit):
        raise ConfigError(f"algo.off_policy_limit = {cfg.off_policy_limit}: want a number of nats")
    weights = ("correction_weight", "correction_cap", "correction_floor")
    changed = [name for name in weights if getattr(cfg, name) != getattr(type(cfg), name)]
    if changed and cfg.correction == "bypass":
        raise ConfigError(
            f'algo.{changed[0]} = {getattr(cfg, changed[0])} with algo.correction = "bypass": the ratio is against the '
            f'sampler, so a weight would correct twice; leave it out, or set algo.correction = "decoupled"'
        )
    if changed and cfg.correction == "none":
        raise ConfigError(
            f'algo.{changed[0]} = {getattr(cfg, changed[0])} with algo.correction = "none": there is no weight; '
            f"leave one out"
        )
    if cfg.correction == "bypass" and has_sequence_mask(cfg):
        raise ConfigError(
            f"algo.sequence_mask_low = {cfg.sequence_mask_low}, algo.sequence_mask_high = {cfg.sequence_mask_high} "
            f'with algo.correction = "bypass": old is the sampler, so no sequence is ever outside; set '
            f'algo.correction = "decoupled"'
        )
