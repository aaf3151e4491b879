"""REINFORCE (Williams 1992): the plain policy gradient. With the baseline "leave_one_out" it is RLOO (2402.14740).

    loss_t = -A now_t

The five choices: no ratio; no clip; no KL; advantage reward - mean of the others; mean over sequences of the sum over
tokens, which is the gradient of the expected reward. With several updates the sampler correction is computed from the
current policy, so it also corrects for earlier updates of the step, up to correction_cap. Presets: `max_rl`, `opo`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlft.algos import settings, surrogate
from rlft.algos.tokens import read
from rlft.types import Aggregation, Batch, Stats

ADVANTAGE = "leave_one_out"
AGGREGATION: Aggregation = "sequence_sum"
RATIO = False
NEEDS_REFERENCE = settings.needs_reference
WHOLE_GROUPS = False
NEEDS_SAMPLER = settings.needs_sampler
ZERO_ADV_ZERO_GRAD = settings.zero_adv_zero_grad
ENTROPY_GRAD = settings.entropy_grad
prepare = surrogate.prepare
adapt = surrogate.adapt


@dataclass(frozen=True)
class Config(settings.Settings):
    """Settings of [algo] for reinforce."""

    advantage: str = ADVANTAGE
    """Estimator: a name in rlft.algos.advantages, or "file.py:function"."""
    aggregation: Aggregation = AGGREGATION
    """How token losses are reduced to one number: token_mean, sequence_mean, constant, sequence_sum, prompt_mean."""


def summary(cfg: Config) -> str:
    """Describe ratio, clip, KL and correction in one line, for the start of a run."""
    return f"no ratio, no clip, {surrogate.summary(cfg)}"


def loss(logprobs: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, Stats]:
    """Return the weighted sum of the formula above, and its metrics. logprobs: [T] with gradient."""
    tokens = read(logprobs, batch)
    return surrogate.total(-tokens.advantages * tokens.now, tokens, batch, cfg)
