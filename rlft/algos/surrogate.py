"""What follows a policy loss's formula: correction for the sampler, KL and entropy terms, and the sum that is returned.

    loss = sum_t weight_t ( loss_t c_t + kl_coef KL_t - entropy_coef H_t )

loss_t: what a loss file says. c_t: `rlft.algos.corrections`, and 0 for tokens that a mask leaves out; they keep their
place in the denominator, which weight_t holds.
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
    """KL, entropy and correction in words, for the start of a run."""
    said = [f"{cfg.kl_coef:g} x KL ({cfg.kl})" if cfg.kl_coef else "no KL"]
    if entropy_grad(cfg):
        target = f" below {cfg.entropy_target:g} nat" if cfg.entropy_target is not None else ""
        said.append(f"entropy bonus {cfg.entropy_coef:g}{target}")
    if cfg.entropy_share < 1:
        said.append(f"the {cfg.entropy_share:.0%} of tokens with the highest entropy")
    return ", ".join([*said, corrections.summary(cfg)])


def total(token_loss: Tensor, tokens: Tokens, batch: Batch, cfg: Settings) -> tuple[Tensor, Stats]:
    """The weighted sum of a loss file's formula with correction, KL and entropy, and their metrics.

    token_loss: [T], the formula.
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
        first = cfg.entropy_coef if cfg.entropy_target is None else 0.0  # no entropy is known before the first step
        coef = batch.prepared.get("entropy_coef_now", first)
        token_loss = token_loss - coef * torch.where(tokens.used, batch.entropy, 0)
    return (token_loss * batch.weight).sum(), stats


def prepare(look: StepView, cfg: Settings) -> dict[str, float]:
    """The entropy that a token must have for the policy term to act on it, where only a share of them is trained.

    Of the update's tokens, by the policy that it starts from: every update trains on that share."""
    return {"entropy_floor": look.entropy_quantile(1 - cfg.entropy_share)} if cfg.entropy_share < 1 else {}


def adapt(adapted: dict[str, float], entropy: float, cfg: Settings) -> dict[str, float]:
    """The factor of the entropy bonus after a step of this mean entropy: `entropy_coef`, and `entropy_coef_now`, which
    is 0 where the entropy was above the target."""
    if cfg.entropy_target is None or math.isnan(entropy):
        return adapted
    low, coef = entropy <= cfg.entropy_target, adapted.get("entropy_coef", cfg.entropy_coef)
    coef = min(cfg.entropy_coef_max, max(0.0, coef + (cfg.entropy_coef_delta if low else -cfg.entropy_coef_delta)))
    return {"entropy_coef": coef, "entropy_coef_now": coef if low else 0.0}


def clip_stats(low: Tensor, high: Tensor, tokens: Tokens) -> Stats:
    """TRL's clip metrics of a ratio against old. low, high: [T] bool, tokens clipped on either side."""
    if tokens.fresh:
        # Every ratio is 1 and nothing is clipped: a step of many micro-batches need not find that out one by one.
        none, count = torch.zeros((), device=tokens.now.device), tokens.used.sum()
        means = {f"clip_ratio/{name}_mean": Stat("mean", none, count) for name in ("low", "high", "region")}
        return means | {"clip_ratio/low_min": Stat("min", none), "clip_ratio/high_max": Stat("max", none)}
    used, stats = tokens.used, {}
    for name, clipped in (("low", low), ("high", high), ("region", low | high)):
        stats[f"clip_ratio/{name}_mean"] = Stat.mean(clipped.float(), used)
    shares = [torch.where(used, tokens.mean((c & used).to(tokens.now.dtype)), e) for c, e in ((low, 1.0), (high, 0.0))]
    stats["clip_ratio/low_min"] = Stat("min", shares[0].min())
    stats["clip_ratio/high_max"] = Stat("max", shares[1].max())
    return stats
