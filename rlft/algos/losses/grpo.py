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
from typing import ClassVar

import torch
from torch import Tensor

from rlft.algos.checks import check_clip
from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.errors import ConfigError
from rlft.types import Stats


@dataclass(frozen=True)
class Grpo(PolicyLoss):
    """The policy gradient with a clipped ratio per token."""

    has_clip: ClassVar[bool] = True

    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""
    delta: float | None = None
    """Upper bound of the ratio, which bounds tokens of negative advantage; above 1 + clip_high. None: no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise ConfigError(
                f"algo.delta = {self.delta}: want above 1 + clip_high = {1 + self.clip_high:g}; it bounds the ratio "
                f"itself (dual clip's c), not its distance from 1"
            )

    def summary(self) -> str:
        band = f"[{1 - self.clip_low:g}, {1 + self.clip_high:g}]" + (f" and {self.delta:g}" if self.delta else "")
        return f"ratio per token, clipped to {band}, {self.common_summary()}"

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        r, a = tokens.log_ratio().exp(), tokens.advantages
        bounded_r = r if self.delta is None else r.clamp(max=self.delta)
        token_loss = -torch.min(bounded_r * a, r.clamp(1 - self.clip_low, 1 + self.clip_high) * a)
        low, high = (r < 1 - self.clip_low) & (a < 0), (r > 1 + self.clip_high) & (a > 0)
        return token_loss, tokens.clip_stats(low, high)
