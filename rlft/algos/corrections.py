"""Correction for the sampler: the engine's log-probs are not exactly the trainer's.

rho = exp(old - sampler), with old = sg(now) for one update per rollout batch. `single` multiplies the policy term of a
token by sg(min(rho, cap)) (token-level truncated importance sampling, Yao et al. 2025; cap 2 in verl, slime, SkyRL). A
token that a correction masks keeps its place in every denominator: the weights were counted before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlft.types import Batch, Stat, Stats

CLAMP = 20.0


def ratio(logprobs: Tensor, batch: Batch) -> Tensor:
    """rho [T] without gradient; 1 where there is nothing to compare with."""
    if batch.sampler_logprobs is None:
        return torch.ones_like(logprobs)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    # where before exp: a token of weight 0 may hold anything, and 0 * inf is nan.
    d = torch.where(batch.train_mask & (batch.weight != 0), old - batch.sampler_logprobs, 0)
    return d.clamp(-CLAMP, CLAMP).exp()


def single(logprobs: Tensor, batch: Batch, cap: float) -> Tensor:
    """Token weight min(rho, cap), [T] without gradient."""
    return ratio(logprobs, batch).clamp(max=cap)


def stats(logprobs: Tensor, batch: Batch) -> Stats:
    """TRL's metrics of the ratio, before any cap; nothing without sampler log-probs."""
    if batch.sampler_logprobs is None:
        return {}
    rho, mask = ratio(logprobs, batch), batch.train_mask & (batch.weight != 0)
    name = "sampling/importance_sampling_ratio"
    return {
        f"{name}/mean": Stat.mean(rho, mask),
        f"{name}/min": Stat("min", torch.where(mask, rho, math.inf).min()),
        f"{name}/max": Stat("max", torch.where(mask, rho, 0).max()),
    }
