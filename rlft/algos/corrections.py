"""Importance weights that correct for the difference between the sampler's and the trainer's log-probs.

rho = exp(old - sampler), where old is the trainer's log-prob before the first update of the step. `correction` selects
how old is defined, such that no difference is corrected twice:

    single      one update per rollout batch: old = sg(now), so r = 1; the policy term of a token is multiplied by a
                weight computed from rho (a first-order correction, unless the weight is that of the whole sequence)
    decoupled   several updates: old comes from a forward of the trainer before the first, the loss's ratio is
                r = exp(now - old), and the same weight corrects for the sampler (2110.00641)
    bypass      old is the sampler's log-prob, so the ratio w = exp(now - sampler) already corrects; an additional
                weight would correct twice
    none        no weight

`correction_weight` selects the weight from R, which is rho of the token or exp(sum_t log rho) of its sequence:

    token_truncate, sequence_truncate   R clamped to [floor, cap]              TIS (Yao et al. 2025), cap 2
    token_mask, sequence_mask           R where floor <= R <= cap, else 0      MIS [0.5, 2], IcePop (2510.18855) to 5

The default is token_truncate with cap 2; that of TRL 1.16 with vLLM is sequence_mask with cap 3.

In addition, whole sequences can be masked:

    sequence_mask_low, sequence_mask_high   where exp(mean_t log rho) is outside these bounds    geometric sequence mask
    off_policy_limit                        where A < 0 and mean_t(sampler - now) is above it    OPSM (2512.02556)

A masked token still counts in every denominator, since the weights of `rlft.batch.pack` are computed before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlft.algos.tokens import CLAMP, Tokens
from rlft.errors import ConfigError
from rlft.types import Stat, Stats

Correction = Literal["auto", "single", "decoupled", "bypass", "none"]
Weight = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
FACTOR = ("auto", "single", "decoupled")
"""Corrections that multiply the policy term by a weight."""


def resolve(choice: Correction, updates: int, has_ratio: bool = True) -> Correction:
    """Resolve "auto" and check the correction of a run with `updates` updates per rollout batch.

    "auto" is "single" for one update, else "decoupled". has_ratio: whether the loss has a ratio against old. Without
    one the weight is recomputed against the sampler at every update, which is "single". Raises ConfigError for "single"
    with a ratio and several updates, since old would then be the wrong policy, and for a correction that needs a ratio
    the loss does not have.
    """
    if not has_ratio:
        if choice in ("decoupled", "bypass"):
            raise ConfigError(
                f'algo.correction = "{choice}": this loss has no ratio against old log-probs; set "single" or "none"'
            )
        return "single" if choice == "auto" else choice
    if choice == "auto":
        return "single" if updates == 1 else "decoupled"
    if choice == "single" and updates > 1:
        raise ConfigError(
            f'algo.correction = "single" with {updates} updates per rollout batch: after the first the ratio is '
            f'against a policy that is gone; set "decoupled" (one more forward) or "bypass"'
        )
    return choice


@dataclass(frozen=True)
class SamplerCorrection:
    """The settings of a policy loss that correct for the sampler."""

    correction: Correction
    weight: Weight
    cap: float
    floor: float
    sequence_mask_low: float
    sequence_mask_high: float
    off_policy_limit: float
    """In nats."""

    @property
    def has_sequence_mask(self) -> bool:
        """Whether sequences far from the sampler are masked."""
        return self.sequence_mask_low > 0 or self.sequence_mask_high < math.inf

    @property
    def masks_sequences(self) -> bool:
        """Whether whole sequences may be masked."""
        return self.has_sequence_mask or self.off_policy_limit < math.inf

    def weigh(self, tokens: Tokens) -> tuple[Tensor, Stats]:
        """Return the weight of each token's policy term, [T] without gradient, and its metrics."""
        log_rho = (tokens.old - tokens.sampler).clamp(-CLAMP, CLAMP)
        rho = log_rho.exp()
        weight = self._weight(tokens, log_rho, rho)
        return weight, self._stats(tokens, rho, weight)

    def _weight(self, tokens: Tokens, log_rho: Tensor, rho: Tensor) -> Tensor:
        weight = torch.ones_like(rho)
        if self.correction in FACTOR:
            kind, _, bound = self.weight.partition("_")
            weight = rho if kind == "token" else tokens.sum(log_rho).exp()
            within = weight.clamp(self.floor, self.cap)
            weight = within if bound == "truncate" else torch.where(within == weight, weight, 0)
        if self.has_sequence_mask:
            mean = tokens.mean(log_rho).exp()
            weight = torch.where((mean >= self.sequence_mask_low) & (mean <= self.sequence_mask_high), weight, 0)
        if self.off_policy_limit < math.inf:
            behind = tokens.mean(-tokens.against_sampler().detach())
            weight = torch.where((tokens.advantages < 0) & (behind > self.off_policy_limit), 0, weight)
        return weight

    def _stats(self, tokens: Tokens, rho: Tensor, weight: Tensor) -> Stats:
        """Return TRL's metrics of rho before clamping, and the share of masked tokens.

        With "bypass" the metrics of rho are omitted, since old is the sampler and rho is 1.
        """
        stats: Stats = {}
        if self.masks_sequences or self.weight.endswith("mask"):
            stats["sampling/masked_ratio"] = Stat.mean((weight == 0).float(), tokens.used)
        if self.correction == "bypass":
            return stats
        name = "sampling/importance_sampling_ratio"
        return stats | {
            f"{name}/mean": Stat.mean(rho, tokens.used),
            f"{name}/min": Stat("min", torch.where(tokens.used, rho, math.inf).min()),
            f"{name}/max": Stat("max", torch.where(tokens.used, rho, 0).max()),
        }

    def summary(self) -> str:
        """Describe the correction in one line, for the start of a run."""
        weighted = f"sampler correction up to {self.cap:g}"
        if self.weight != "token_truncate" or self.floor:
            weighted = f"sampler correction {self.weight} [{self.floor:g}, {self.cap:g}]"
        text = {
            "none": "no correction",
            "bypass": "ratio against the sampler (bypass)",
            "single": weighted,
            "decoupled": f"decoupled {weighted}",
            "auto": weighted,
        }[self.correction]
        if self.has_sequence_mask:
            text += f", sequences outside [{self.sequence_mask_low:g}, {self.sequence_mask_high:g}] left out"
        if self.off_policy_limit < math.inf:
            text += f", bad sequences above {self.off_policy_limit:g} nat left out"
        return text
