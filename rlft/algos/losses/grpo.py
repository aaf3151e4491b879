"""Group relative policy optimisation (GRPO, 2402.03300) in the default form of TRL (DAPO, 2503.14476).

    loss_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A),    r_t = exp(now - old)
    delta: upper bound of r_t, which bounds the loss where A < 0 (dual clip 1912.09729; two-sided 2505.07291)

The five choices: ratio per token; clip [1 - 0.2, 1 + 0.2]; no KL; advantage (reward - group mean) / (group std + 1e-4);
mean over all tokens of the step (TRL's "dapo" and "bnpo", with the counts of the whole step in both). With one update
per rollout batch old = sg(now), so r = 1, clipping never acts and the gradient is that of REINFORCE. Presets: `dapo`
(clip_high 0.28, dynamic sampling, overlong penalty, 16 updates), `dr_grpo` (2503.20783: advantage "group_mean",
aggregation "constant").

The sampler correction differs from the default of TRL 1.16. Here a token has the weight rho, at most 2
(correction_weight "token_truncate"). In TRL with vLLM a sequence has the product of its tokens' rho as weight, and 0
where that is above 3: correction_weight "sequence_mask" with correction_cap 3. A token whose sampler log-prob is not
finite is masked here, and trained with weight 1 in TRL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.algos import settings, surrogate
from rlft.algos.tokens import read
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stats

ADVANTAGE = "group_norm"
AGGREGATION: Aggregation = "token_mean"
RATIO = True
NEEDS_REFERENCE = settings.needs_reference
WHOLE_GROUPS = False
NEEDS_SAMPLER = settings.needs_sampler
ZERO_ADV_ZERO_GRAD = settings.zero_adv_zero_grad
ENTROPY_GRAD = settings.entropy_grad
prepare = surrogate.prepare
adapt = surrogate.adapt


@dataclass(frozen=True)
class Config(settings.Settings):
    """Settings of [algo] for grpo."""

    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""
    delta: float | None = None
    """Upper bound of the ratio, which bounds tokens of negative advantage; above 1 + clip_high. None: no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check_clip(self.clip_low, self.clip_high)
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise ConfigError(
                f"algo.delta = {self.delta}: want above 1 + clip_high = {1 + self.clip_high:g}; it bounds the ratio "
                f"itself (dual clip's c), not its distance from 1"
            )


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    band = f"[{1 - cfg.clip_low:g}, {1 + cfg.clip_high:g}]" + (f" and {cfg.delta:g}" if cfg.delta else "")
    return f"ratio per token, clipped to {band}, {surrogate.summary(cfg)}"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and TRL's metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    r, a = tokens.log_ratio().exp(), tokens.advantages
    bounded_r = r if cfg.delta is None else r.clamp(max=cfg.delta)
    token_loss = -torch.min(bounded_r * a, r.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * a)
    low, high = (r < 1 - cfg.clip_low) & (a < 0), (r > 1 + cfg.clip_high) & (a > 0)
    value, stats = surrogate.total(token_loss, tokens, batch, cfg)
    return value, stats | surrogate.clip_stats(low, high, tokens)
