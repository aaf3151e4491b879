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

import torch
from torch import Tensor

from rlft.algos import settings, surrogate
from rlft.algos.tokens import read
from rlft.types import Aggregation, Batch, Stats

ADVANTAGE = "leave_one_out"
AGGREGATION: Aggregation = "sequence_sum"
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
    """Settings of [algo] for rloo."""

    advantage: str = ADVANTAGE
    """Estimator: a name in rlft.algos.advantages, or "file.py:function"."""
    aggregation: Aggregation = AGGREGATION
    """How token losses are reduced to one number; each token has an equal share of the sequence's loss."""
    kl: settings.Penalty = "reward"
    """Estimator of the KL term, or "reward" to subtract k1 from the reward: see rlft.algos.kl."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check_clip(self.clip_low, self.clip_high)


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return (
        f"ratio per sequence (product), clipped to [{1 - cfg.clip_low:g}, {1 + cfg.clip_high:g}], "
        f"{surrogate.summary(cfg)}"
    )


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and its metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    s, a, now = tokens.sum(tokens.now - tokens.old).detach().exp(), tokens.advantages, tokens.now
    low, high = (s < 1 - cfg.clip_low) & (a < 0), (s > 1 + cfg.clip_high) & (a > 0)
    # Per token, so that the token weights apply: the sum has the value s A and the gradient s A sum_t grad now_t.
    value_of = s.clamp(1 - cfg.clip_low, 1 + cfg.clip_high).where(low | high, s) * tokens.per_token()
    token_loss = -(value_of + torch.where(low | high, 0, s * (now - now.detach()))) * a
    value, stats = surrogate.total(token_loss, tokens, batch, cfg)
    return value, stats | surrogate.clip_stats(low, high, tokens)
