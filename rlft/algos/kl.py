"""Estimators of the KL divergence of the policy from the reference on sampled tokens. d = logprob - ref_logprob.

    k1 = d                    mean under the policy: KL(policy : reference); its gradient in a loss is 0 on average
    k2 = d^2 / 2              biased value, exact token-level gradient of KL(policy : reference)
    k3 = exp(-d) - 1 + d      mean: KL(policy : reference), never negative; in a loss the gradient of the forward KL

A loss therefore uses `k2`, `k3_ratio` = r k3 or `k1_ratio` = r k1, with the differentiable ratio r = exp(now - old)
(old = sg(now) for one update per rollout batch). All three have the token-level gradient of the logged KL. `forward` is
plain k3. `reward` is not a term of the loss: kl_coef times the sum of k1 over the completion is subtracted from its
reward before advantages are estimated, which gives the gradient of the sequence-level KL (REINFORCE++, TRL's RLOO).
Sources: Schulman, "Approximating KL Divergence"; arXiv 2510.01555; arXiv 2512.21852.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Penalty = Literal["k2", "k3_ratio", "k1_ratio", "forward", "reward"]
IN_LOSS = ("k2", "k3_ratio", "k1_ratio", "forward")
CLAMP = 20.0
"""Bound of d: exp(20) is far from overflow, and the clamp is wide enough not to cut off the gradient in practice."""


def difference(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d clamped to +-20, so that its exponential is finite. Both [T] or both [N]."""
    return (logprobs - ref_logprobs).clamp(-CLAMP, CLAMP)


def k3(d: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d, elementwise."""
    return torch.expm1(-d) + d


def penalty(choice: str, logprobs: Tensor, ref_logprobs: Tensor, r: Tensor) -> Tensor:
    """Return the per-token KL term of a loss, same shape as `logprobs`, differentiable.

    choice: one of IN_LOSS. r: exp(logprobs - old_logprobs) with gradient, the importance weight of samples from the old
    policy; "forward" omits it, as other libraries do.
    """
    d = difference(logprobs, ref_logprobs)
    if choice == "k2":
        return r.detach() * d**2 / 2
    if choice == "forward":
        return k3(d)
    assert choice in ("k3_ratio", "k1_ratio"), choice
    return r * (k3(d) if choice == "k3_ratio" else d)
