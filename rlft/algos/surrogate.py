"""The common part of all policy losses: sampler correction, KL and entropy terms, and the weighted sum.

    loss = sum_t weight_t ( loss_t c_t + kl_coef KL_t - entropy_coef H_t )

loss_t is the formula of the loss file. c_t is the weight of `rlft.algos.corrections`, 0 for masked tokens; these still
count in the denominator, which is part of weight_t.

Legend: d logprob - ref_logprob of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlft.algos import corrections, kl
from rlft.algos.settings import Settings, entropy_grad, needs_reference
from rlft.algos.tokens import Tokens
from rlft.types import Batch, Stat, Stats, StepView


def summary(cfg: Settings) -> str:
    """Describe KL, entropy and correction in one line, for the start of a run."""
    terms = [f"{cfg.kl_coef:g} x KL ({cfg.kl})" if cfg.kl_coef else "no KL"]
    if entropy_grad(cfg):
        target = f" below {cfg.entropy_target:g} nat" if cfg.entropy_target is not None else ""
        terms.append(f"entropy bonus {cfg.entropy_coef:g}{target}")
    if cfg.entropy_share < 1:
        terms.append(f"the {cfg.entropy_share:.0%} of tokens with the highest entropy")
    return ", ".join([*terms, corrections.summary(cfg)])


def total(token_loss: Tensor, tokens: Tokens, batch: Batch, cfg: Settings) -> tuple[Tensor, Stats]:
    """Return the weighted sum of a loss with correction, KL and entropy terms, and their metrics.

    token_loss: [T], the formula of the loss file.
    """
    stats: Stats = {}
    if batch.sampler_logprobs is not None:
        weight, stats = corrections.weigh(cfg, tokens)
        token_loss = token_loss * weight
    if cfg.entropy_share < 1:
        assert batch.entropy is not None and "entropy_floor" in batch.prepared
        token_loss = torch.where(batch.entropy.detach() >= batch.prepared["entropy_floor"], token_loss, 0)
    if needs_reference(cfg):
        assert batch.ref_logprobs is not None
        ref = torch.where(tokens.used, batch.ref_logprobs, 0)
        token_loss = token_loss + cfg.kl_coef * kl.penalty(cfg.kl, tokens.now, ref, tokens.log_ratio().exp())
        d = kl.difference(tokens.now.detach(), ref)
        stats |= {"kl": Stat.mean(kl.k3(d), tokens.used), "kl/k1": Stat.mean(d, tokens.used)}
    if entropy_grad(cfg):
        assert batch.entropy is not None
        stats["policy_loss"] = Stat("sum", (token_loss.detach() * batch.weight).sum())
        first = cfg.entropy_coef if cfg.entropy_target is None else 0.0  # there is no entropy before the first step
        coef = batch.prepared.get("entropy_coef_now", first)
        token_loss = token_loss - coef * torch.where(tokens.used, batch.entropy, 0)
    return (token_loss * batch.weight).sum(), stats


def prepare(look: StepView, cfg: Settings) -> dict[str, float]:
    """Return the smallest entropy of a token in the policy term, if `entropy_share` is below 1.

    It is the quantile over the update's tokens under its initial policy, so every update trains on that share.
    """
    return {"entropy_floor": look.entropy_quantile(1 - cfg.entropy_share)} if cfg.entropy_share < 1 else {}


def adapt(adapted: dict[str, float], entropy: float, cfg: Settings) -> dict[str, float]:
    """Return the new factor of the entropy bonus, given the mean entropy of the last step.

    The result has `entropy_coef`, and `entropy_coef_now`, which is 0 when the entropy was above the target.
    """
    if cfg.entropy_target is None or math.isnan(entropy):
        return adapted
    low, coef = entropy <= cfg.entropy_target, adapted.get("entropy_coef", cfg.entropy_coef)
    coef = min(cfg.entropy_coef_max, max(0.0, coef + (cfg.entropy_coef_delta if low else -cfg.entropy_coef_delta)))
    return {"entropy_coef": coef, "entropy_coef_now": coef if low else 0.0}


def clip_stats(low: Tensor, high: Tensor, tokens: Tokens) -> Stats:
    """Return TRL's clip metrics of a ratio against old. low, high: [T] bool, tokens clipped on either side."""
    if tokens.fresh:
        # Every ratio is 1 and nothing is clipped, so the per-micro-batch computation is skipped.
        zero, count = torch.zeros((), device=tokens.now.device), tokens.used.sum()
        means = {f"clip_ratio/{name}_mean": Stat("mean", zero, count) for name in ("low", "high", "region")}
        return means | {"clip_ratio/low_min": Stat("min", zero), "clip_ratio/high_max": Stat("max", zero)}
    used, stats = tokens.used, {}
    for name, clipped in (("low", low), ("high", high), ("region", low | high)):
        stats[f"clip_ratio/{name}_mean"] = Stat.mean(clipped.float(), used)
    shares = [
        torch.where(used, tokens.mean((flags & used).to(tokens.now.dtype)), empty)
        for flags, empty in ((low, 1.0), (high, 0.0))
    ]
    stats["clip_ratio/low_min"] = Stat("min", shares[0].min())
    stats["clip_ratio/high_max"] = Stat("max", shares[1].max())
    return stats
