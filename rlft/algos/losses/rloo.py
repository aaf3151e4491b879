"""REINFORCE leave-one-out (RLOO, 2402.14740) with the clipped ratio of whole completions, as in TRL's RLOO trainer.

    s_i = exp( sum_t (now_t - old_t) )
    loss of a sequence = -min(s_i A, clip(s_i, 1 - clip_low, 1 + clip_high) A)

The five choices: ratio per sequence, the product over its tokens; clip [1 - 0.2, 1 + 0.2]; KL, if any, subtracted from
the reward (kl = "reward"); advantage reward - mean of the others in the group; mean over sequences. With one update s =
1 and the gradient is that of REINFORCE. A product over a thousand tokens is outside the clip range after the first
update; `reinforce` has no ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlft.algos.checks import check_clip
from rlft.algos.kl import Penalty
from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.types import Aggregation, Stats


@dataclass(frozen=True)
class Rloo(PolicyLoss):
    """The policy gradient with a clipped ratio per completion."""

    has_clip: ClassVar[bool] = True

    advantage: str = "leave_one_out"
    """Estimator: a name in rlft.algos.advantages, or "file.py:function"."""
    aggregation: Aggregation = "sequence_sum"
    """How token losses are reduced to one number; each token has an equal share of the sequence's loss."""
    kl: Penalty = "reward"
    """Estimator of the KL term, or "reward" to subtract k1 from the reward: see rlft.algos.kl."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)

    def summary(self) -> str:
        return (
            f"ratio per sequence (product), clipped to [{1 - self.clip_low:g}, {1 + self.clip_high:g}], "
            f"{self.common_summary()}"
        )

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        s, a, now = tokens.sum(tokens.now - tokens.old).detach().exp(), tokens.advantages, tokens.now
        low, high = (s < 1 - self.clip_low) & (a < 0), (s > 1 + self.clip_high) & (a > 0)
        # Per token, so that the token weights apply: the sum has the value s A and the gradient s A sum_t grad now_t.
        value_of = s.clamp(1 - self.clip_low, 1 + self.clip_high).where(low | high, s) * tokens.per_token()
        token_loss = -(value_of + torch.where(low | high, 0, s * (now - now.detach()))) * a
        return token_loss, tokens.clip_stats(low, high)
