"""REINFORCE (Williams 1992): the plain policy gradient. With the baseline "leave_one_out" it is RLOO (2402.14740).

    loss_t = -A now_t

The five choices: no ratio; no clip; no KL; advantage reward - mean of the others; mean over sequences of the sum over
tokens, which is the gradient of the expected reward. With several updates the sampler correction is computed from the
current policy, so it also corrects for earlier updates of the step, up to correction_cap. Presets: `max_rl`, `opo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlft.algos.policy_loss import PolicyLoss
from rlft.algos.tokens import Tokens
from rlft.types import Aggregation, Stats


@dataclass(frozen=True)
class Reinforce(PolicyLoss):
    """The plain policy gradient."""

    has_ratio: ClassVar[bool] = False

    advantage: str = "leave_one_out"
    """Estimator: a name in rlft.algos.advantages, or "file.py:function"."""
    aggregation: Aggregation = "sequence_sum"
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""

    def summary(self) -> str:
        return f"no ratio, no clip, {self.common_summary()}"

    def token_loss(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        return -tokens.advantages * tokens.now, {}
