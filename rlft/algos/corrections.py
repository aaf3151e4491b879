"""Correction for the sampler: the engine's log-probs are not exactly the trainer's.

rho = exp(old - sampler), where old is the trainer's log-prob before the first update of the step.

    single      one update per rollout batch: old = sg(now), so r = 1; the policy term of a token is multiplied by
                sg(min(rho, cap)) (token-level truncated importance sampling, Yao et al. 2025; cap 2 in verl, slime)
    decoupled   several updates: old comes from a forward of the trainer before the first, the loss's ratio is
                r = exp(now - old), and the same factor sg(min(rho, cap)) corrects for the sampler (2110.00641)
    bypass      old is the sampler's own log-prob, so the ratio w = exp(now - sampler) corrects by itself and no factor
                may follow: that would correct twice
    none        no factor

A token that a correction masks keeps its place in every denominator: the weights were counted before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlft.errors import ConfigError
from rlft.types import Batch, Stat, Stats

CLAMP = 20.0
CHOICES = ("auto", "single", "decoupled", "bypass", "none")
FACTOR = ("auto", "single", "decoupled")
"""Those that multiply a token by min(rho, cap)."""


def resolve(choice: str, updates: int) -> str:
    """The correction of a run with `updates` updates per rollout batch: "auto" is "single" for one, else "decoupled".

    Raises ConfigError for "single" with several updates, whose ratio would be of the wrong policy.
    """
    if choice == "auto":
        return "single" if updates == 1 else "decoupled"
    if choice == "single" and updates > 1:
        raise ConfigError(
            f'algo.correction = "single" with {updates} updates per rollout batch: after the first the ratio is '
            f'against a policy that is gone; set "decoupled" (one more forward) or "bypass"'
        )
    return choice


def ratio(logprobs: Tensor, batch: Batch) -> Tensor:
    """rho [T] without gradient; 1 where there is nothing to compare with."""
    if batch.sampler_logprobs is None:
        return torch.ones_like(logprobs)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    # where before exp: a token of weight 0 may hold anything, and 0 * inf is nan.
    d = torch.where(batch.train_mask & (batch.weight != 0), old - batch.sampler_logprobs, 0)
    return d.clamp(-CLAMP, CLAMP).exp()


def factor(choice: str, logprobs: Tensor, batch: Batch, cap: float) -> Tensor:
    """What the policy term of each token is multiplied by, [T] without gradient."""
    return ratio(logprobs, batch).clamp(max=cap) if choice in FACTOR else torch.ones_like(logprobs)


def words(choice: str, cap: float) -> str:
    """The correction in words, for the start of a run."""
    return {
        "none": "no correction", "bypass": "ratio against the sampler (bypass)",
        "single": f"sampler correction up to {cap:g}", "decoupled": f"decoupled sampler correction up to {cap:g}",
        "auto": f"sampler correction up to {cap:g}",
    }[choice]  # fmt: skip


def stats(choice: str, logprobs: Tensor, batch: Batch) -> Stats:
    """TRL's metrics of rho, before any cap; nothing without sampler log-probs, nor where old is the sampler itself and
    the loss's own ratio says it."""
    if batch.sampler_logprobs is None or choice == "bypass":
        return {}
    rho, mask = ratio(logprobs, batch), batch.train_mask & (batch.weight != 0)
    name = "sampling/importance_sampling_ratio"
    return {
        f"{name}/mean": Stat.mean(rho, mask),
        f"{name}/min": Stat("min", torch.where(mask, rho, math.inf).min()),
        f"{name}/max": Stat("max", torch.where(mask, rho, 0).max()),
    }
