"""Group sequence policy optimisation (GSPO, 2507.18071): one ratio per sequence, the geometric mean over its tokens.

    s_i = exp( mean_t (now_t - old_t) )
    loss_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)

    form = "sequence":  r_t = s_i
    form = "token":     r_t = sg(s_i) exp(now_t - sg(now_t)), equal in value and gradient while A is the same for all
                        tokens of a sequence; allows a sampler correction per token

The five choices: ratio per sequence; clip [1 - 3e-4, 1 + 4e-4]; no KL; advantage (reward - group mean) / (group std +
1e-4); mean over sequences of the mean over tokens. The clip range is so narrow that `old` must be the trainer's. With
one update per rollout batch s = 1 and clipping never acts; the paper uses four updates, as does the preset `gspo`,
which this name selects in a config file. LUSPO (2602.05261) multiplies a sequence's loss by its length, which is
aggregation "sequence_sum" here: preset `luspo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlft.algos.checks import check_clip
from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.errors import ConfigError
from rlft.types import Aggregation, Stats


@dataclass(frozen=True)
class Gspo(PolicyLoss):
    """The policy gradient with a clipped ratio per sequence."""

    has_clip: ClassVar[bool] = True

    aggregation: Aggregation = "sequence_mean"
    """How token losses are reduced to one number; token_mean would weight sequences by their length."""
    form: Literal["token", "sequence"] = "token"
    """Form of the ratio; the two differ only when tokens are corrected or weighted individually."""
    clip_low: float = 3e-4
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 4e-4
    """The ratio is clipped at 1 + clip_high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)
        if self.correction == "bypass":
            raise ConfigError(
                f'algo.correction = "bypass": the noise of the sampler is wider than the clip [1 - {self.clip_low:g}, '
                f'1 + {self.clip_high:g}] of a sequence, so old must be the trainer\'s; set "auto"'
            )
        if self.form not in ("token", "sequence"):
            raise ConfigError(f'algo.form = "{self.form}": want "token" or "sequence"')
        if self.form == "sequence" and self.correction_weight.startswith("token"):
            if self.correction in ("single", "decoupled"):
                raise ConfigError(
                    f'algo.correction = "{self.correction}" weighs tokens apart: set algo.form = "token", or '
                    f'algo.correction_weight = "sequence_truncate"'
                )
            object.__setattr__(self, "correction", "none")

    def summary(self) -> str:
        band = f"[{1 - self.clip_low:g}, {1 + self.clip_high:g}]"
        return f"ratio per sequence ({self.form} form), clipped to {band}, {self.common_summary()}"

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        s, a = tokens.mean(tokens.now - tokens.old).exp(), tokens.advantages
        ratio = s if self.form == "sequence" else s.detach() * (tokens.now - tokens.now.detach()).exp()
        token_loss = -torch.min(ratio * a, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * a)
        low, high = (s < 1 - self.clip_low) & (a < 0), (s > 1 + self.clip_high) & (a > 0)
        return token_loss, tokens.clip_stats(low, high)
