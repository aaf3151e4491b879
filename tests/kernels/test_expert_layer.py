"""The kernels of experts together: a layer with LoRA, forward and backward, against autograd of a loop in float64.

What a fused layer does with them: choose, sort, gather, products on buffers with the adapter in the tail, combine; and
back, with the gradients of the routing weights from <dh, h>, where no output of an expert is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from kernel_rule import DEVICE, QUIET
from torch import Tensor

from rlft.kernels.expert_choice import Scoring, choose_backward_launch, choose_launch
from rlft.kernels.gather import combine_launch, gather_launch, row_dots_launch
from rlft.kernels.grouped import grouped_launch
from rlft.kernels.grouped_gradient import grouped_gradient_launch
from rlft.kernels.route import sort_launch

pytestmark = QUIET

E, K, H, I, R = 5, 2, 24, 16, 4  # noqa: E741
"""Experts, choices, hidden and inner size, rank."""


class Layer(NamedTuple):
    """A router and two projections with adapters; the activation is squared, so that its gradient is 2 z."""

    router: Tensor
    up: Tensor
    up_A: Tensor
    up_B: Tensor
    down: Tensor
    down_A: Tensor
    down_B: Tensor


def drawn(T: int) -> tuple[Layer, Tensor, Tensor]:
    g = torch.Generator().manual_seed(T)
    shapes = (E, H), (E, I, H), (E, R, H), (E, I, R), (E, H, I), (E, R, I), (E, H, R)
    layer = Layer(*(torch.randn(shape, generator=g) / shape[-1] ** 0.5 for shape in shapes))
    return layer, torch.randn(T, H, generator=g), torch.randn(T, H, generator=g)


def loop(layer: Layer, x: Tensor) -> Tensor:
    """A token and a choice after the other, never sorted, with W + BA."""
    p = (x @ layer.router.T).softmax(dim=1)
    rows = []
    for t in range(len(x)):
        values, experts = p[t].topk(K)
        row = x[t] * 0
        for weight, e in zip(values / values.sum(), experts.tolist(), strict=True):
            z = (layer.up[e] + layer.up_B[e] @ layer.up_A[e]) @ x[t]
            row = row + weight * ((layer.down[e] + layer.down_B[e] @ layer.down_A[e]) @ z.square())
        rows.append(row)
    return torch.stack(rows) if rows else x * 0


def buffer_of(w: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """w upper left, B upper right, A lower left; what is not read is NaN."""
    _, N, width = w.shape
    buffer = torch.full((E, N + R, width + R), float("nan"), device=DEVICE)
    buffer[:, :N, :width], buffer[:, :N, width:], buffer[:, N:, :width] = w, B, A
    return buffer


def projected(rows: Tensor, buffer: Tensor, offsets: Tensor, width: int) -> Tensor:
    """y of rows [M, width + R], whose tail is overwritten with S; y has a tail too."""
    N = buffer.shape[1] - R
    grouped_launch(rows[:, :width], buffer[:, N:, :width].mT, offsets, None, rows[:, width:])
    y = torch.full((len(rows), N + R), float("nan"), device=DEVICE)
    grouped_launch(rows, buffer[:, :N].mT, offsets, None, y[:, :N])
    return y


def gradients(dy: Tensor, rows: Tensor, buffer: Tensor, offsets: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA, dB; the tail of dy is overwritten with dS."""
    N = buffer.shape[1] - R
    grouped_launch(dy[:, :N], buffer[:, :N, width:], offsets, None, dy[:, N:])
    dx = grouped_launch(dy, buffer[:, :, :width], offsets, None, torch.empty(len(rows), width, device=DEVICE))
    dA, dB = torch.empty(E, R, width, device=DEVICE), torch.empty(E, N, R, device=DEVICE)
    grouped_gradient_launch(dy[:, N:], rows[:, :width], offsets, dA, False)
    grouped_gradient_launch(dy[:, :N], rows[:, width:], offsets, dB, False)
    return dx, dA, dB


def by_kernels(layer: Layer, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    T = len(x)
    logits = x @ layer.router.T
    chosen, weights = choose_launch(logits, K, Scoring())
    order, inverse, offsets = sort_launch(chosen, E)
    up, down = buffer_of(layer.up, layer.up_A, layer.up_B), buffer_of(layer.down, layer.down_A, layer.down_B)
    rows = torch.full((T * K, H + R), float("nan"), device=DEVICE)
    gather_launch(x, order, K, None, rows[:, :H])
    z = projected(rows, up, offsets, H)[:, :I]
    h = torch.full((T * K, I + R), float("nan"), device=DEVICE)
    h[:, :I] = z.square()
    y = projected(h, down, offsets, I)[:, :H]
    out = combine_launch(y, inverse, weights, K, None, torch.empty_like(x))

    dy = torch.full((T * K, H + R), float("nan"), device=DEVICE)
    gather_launch(dout, order, K, weights, dy[:, :H])
    dh, down_A, down_B = gradients(dy, h, down, offsets, I)
    dots = row_dots_launch(dh, h[:, :I])[inverse.long()].view(T, K) / weights
    dz = torch.full((T * K, I + R), float("nan"), device=DEVICE)
    dz[:, :I] = dh * 2 * z
    drows, up_A, up_B = gradients(dz, rows, up, offsets, H)
    dlogits = choose_backward_launch(logits, chosen, dots.contiguous(), Scoring())
    dx = combine_launch(drows, inverse, None, K, dlogits @ layer.router, torch.empty_like(x))
    return {"out": out, "x": dx, "up_A": up_A, "up_B": up_B, "down_A": down_A, "down_B": down_B}


@pytest.mark.parametrize("T", [0, 1, 40])
def test_a_layer_of_experts_by_the_kernels(T: int) -> None:
    layer, x, dout = drawn(T)
    got = by_kernels(Layer(*(t.to(DEVICE) for t in layer)), x.to(DEVICE), dout.to(DEVICE))
    true = Layer(*(t.double().requires_grad_() for t in layer))
    leaf = x.double().requires_grad_()
    out = loop(true, leaf)
    names = ("up_A", "up_B", "down_A", "down_B")
    leaves = (leaf, *(getattr(true, name) for name in names))
    found = torch.autograd.grad(out, leaves, dout.double(), materialize_grads=True)
    want = {"out": out, **dict(zip(("x", *names), found, strict=True))}
    for name, truth in want.items():
        torch.testing.assert_close(got[name].cpu().double(), truth, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)
