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

import torch
from torch import Tensor

from rlft.algos.settings import Settings, has_sequence_mask, masks_sequences
from rlft.algos.tokens import CLAMP, Tokens
from rlft.errors import ConfigError
from rlft.types import Stat, Stats

FACTOR = ("auto", "single", "decoupled")
"""Corrections that multiply the policy term by a weight."""


def resolve(choice: str, updates: int, ratio: bool = True) -> str:
    """Resolve "auto" and check the correction of a run with `updates` updates per rollout batch.

    "auto" is "single" for one update, else "decoupled". ratio: whether the loss has a ratio against old. Without one
    the weight is recomputed against the sampler at every update, which is "single". Raises ConfigError for "single"
    with a ratio and several updates, since old would then be the wrong policy, and for a correction that needs a ratio
    the loss does not have.
    """
    if not ratio:
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


def weigh(cfg: Settings, tokens: Tokens) -> tuple[Tensor, Stats]:
    """Return the weight of each token's policy term, [T] without gradient, and its metrics."""
    log_rho = (tokens.old - tokens.sampler).clamp(-CLAMP, CLAMP)
    rho = log_rho.exp()
    weight = _weight(cfg, tokens, log_rho, rho)
    return weight, _stats(cfg, tokens, rho, weight)


def _weight(cfg: Settings, tokens: Tokens, log_rho: Tensor, rho: Tensor) -> Tensor:
    weight = torch.ones_like(rho)
    if cfg.correction in FACTOR:
        kind, _, bound = cfg.correction_weight.partition("_")
        weight = rho if kind == "token" else tokens.sum(log_rho).exp()
        within = weight.clamp(cfg.correction_floor, cfg.correction_cap)
        weight = within if bound == "truncate" else torch.where(within == weight, weight, 0)
    if has_sequence_mask(cfg):
        mean = tokens.mean(log_rho).exp()
        weight = torch.where((mean >= cfg.sequence_mask_low) & (mean <= cfg.sequence_mask_high), weight, 0)
    if cfg.off_policy_limit < math.inf:
        behind = tokens.mean(-tokens.against_sampler().detach())
        weight = torch.where((tokens.advantages < 0) & (behind > cfg.off_policy_limit), 0, weight)
    return weight


def _stats(cfg: Settings, tokens: Tokens, rho: Tensor, weight: Tensor) -> Stats:
    """Return TRL's metrics of rho before clamping, and the share of masked tokens.

    With "bypass" the metrics of rho are omitted, since old is the sampler and rho is 1.
    """
    stats: Stats = {}
    if masks_sequences(cfg) or cfg.correction_weight.endswith("mask"):
        stats["sampling/masked_ratio"] = Stat.mean((weight == 0).float(), tokens.used)
    if cfg.correction == "bypass":
        return stats
    name = "sampling/importance_sampling_ratio"
    return stats | {
        f"{name}/mean": Stat.mean(rho, tokens.used),
        f"{name}/min": Stat("min", torch.where(tokens.used, rho, math.inf).min()),
        f"{name}/max": Stat("max", torch.where(tokens.used, rho, 0).max()),
    }


def summary(cfg: Settings) -> str:
    """Describe the correction in one line, for the start of a run."""
    weighted = f"sampler correction up to {cfg.correction_cap:g}"
    if cfg.correction_weight != "token_truncate" or cfg.correction_floor:
        weighted = f"sampler correction {cfg.correction_weight} [{cfg.correction_floor:g}, {cfg.correction_cap:g}]"
    text = {
        "none": "no correction",
        "bypass": "ratio against the sampler (bypass)",
        "single": weighted,
        "decoupled": f"decoupled {weighted}",
        "auto": weighted,
    }[cfg.correction]
    if has_sequence_mask(cfg):
        text += f", sequences outside [{cfg.sequence_mask_low:g}, {cfg.sequence_mask_high:g}] left out"
    if cfg.off_policy_limit < math.inf:
        text += f", bad sequences above {cfg.off_policy_limit:g} nat left out"
    return text
