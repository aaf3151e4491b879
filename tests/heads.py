"""Heads for the tests: hidden states, weights and targets, and one chunk of them by the kernels' launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.logprobs import launch_jacobian
from rlft.kernels.target_softmax import Rows, launch_entropy, launch_rows


def make(n: int, h: int, v: int, dtype: torch.dtype = torch.float64, peaked: float = 1.0, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=g)
    # RL-like rows lean towards the row of their target, so that p is near 1.
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64) + (peaked - 1) * weight[targets] / h
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets


OPTIONS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot, softcap": {"temperature": 1.7, "softcap": 5.0},
    "scaled": {"temperature": 0.9, "scale": 0.25},
    "negative scale": {"temperature": 1.0, "scale": -0.5},
}


def by_kernels(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    block: int,
    pad: int = 0,
) -> tuple[Rows, Tensor, Tensor]:
    """One chunk by the launchers and the two jacobians, with `pad` columns behind each row of the logits and of the
    weights. The chunk's own, others and weights are the entropy's."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    z = torch.full((rows, vocab + pad), float("nan"))[:, :vocab]
    z.copy_(hidden.float() @ weight.float().T)
    behind = torch.full((rows, vocab + pad), float("nan"), dtype=hidden.dtype)
    weights = behind[:, :vocab]
    room = torch.full((4, rows + 2), float("nan"))
    jacobians = [torch.full_like(hidden, float("nan")) for _ in range(2)]
    before = z.nan_to_num(7.5)
    chunk = launch_rows(z, targets, [row[1:-1] for row in room], weights, temperature, softcap, scale, block)
    for i, jacobian in enumerate(jacobians):
        if i:
            chunk = launch_entropy(z, targets, chunk, temperature, softcap, scale, block)
        launch_jacobian(weights.float() @ weight.float(), weight[targets], chunk, scale / temperature, jacobian)
    assert room[:, [0, -1]].isnan().all() and behind[:, vocab:].isnan().all() and torch.equal(z.nan_to_num(7.5), before)
    return chunk, *jacobians
