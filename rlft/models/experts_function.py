"""Compute a layer of experts, with LoRA per expert, as one autograd function.

`rlft.models.experts` registers it with transformers, whose layers of fused experts call it in place of their forward.
Rows are sorted by expert and multiplied in groups. For row i of expert e, with the gate's function g and the routing
weight w_i:

    u_i = W1_e x_i + B1_e (A1_e x_i) + b1_e        h_i = g(u_i)        y_i = W2_e h_i + B2_e (A2_e h_i) + b2_e
    out_t = sum of w_i y_i over the rows i of token t

W + B A is never formed: with r columns the adapter costs r (N + K) products per row and no memory per expert. The scale
alpha / r is in B. For d_i = dout of the row's token, the backward is

    p_i = (W2_e + B2_e A2_e)^T d_i      dw_i = <p_i, h_i> + <d_i, b2_e>      dh_i = w_i p_i
    du_i = g'(u_i)^T dh_i               dx_t = sum of (W1_e + B1_e A1_e)^T du_i
    dB2_e = sum of w_i d_i (A2_e h_i)^T,  dA2_e = sum of w_i (B2_e^T d_i) h_i^T,  and so for layer 1 with du_i and x_i

so y_i is not needed. The forward keeps x, the weights w and 8 bytes per row; u and h are computed again. Frozen weights
in 4 bits are decoded once per call, those of experts without rows left out.

In shapes: T tokens, k choices of each, M = T k rows, E experts, H the hidden size, I the width of an expert, r the
rank. In names, x, w, u, h, y, d and p are these rows, a and b are A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.gather import combine, gather, row_dots
from rlft.kernels.grouped import grouped, grouped_transposed
from rlft.kernels.grouped_gradient import grouped_gradient
from rlft.kernels.route import sort_by_expert


@dataclass(frozen=True)
class Frozen:
    """The frozen side of one of the two products of a layer."""

    decode: Callable[[torch.dtype, Tensor], Tensor]
    """Returns the weights [E, out, in] in a dtype. The second argument is the offsets of the sorted rows, [E + 1]: the
    weights of experts without rows may be anything."""
    bias: Tensor | None
    """[E, out]."""


@dataclass(frozen=True)
class Factors:
    """LoRA of one of the two products of a layer."""

    a: Tensor
    """[E, r, in]."""
    b: Tensor
    """[E, out, r], the scale included."""


@dataclass(frozen=True)
class Layer:
    """What a call of the function has beside its differentiable arguments."""

    experts: int
    up: Frozen
    down: Frozen
    gate: Callable[[Tensor], Tensor]
    """[M, 2 I] -> [M, I]; differentiable, and acts on each row alone."""
    dtype: torch.dtype
    """Dtype of the products."""


def experts(
    x: Tensor, chosen: Tensor, weights: Tensor, layer: Layer, up: Factors | None, down: Factors | None
) -> Tensor:
    """Compute a layer of experts, [T, H] in the dtype of x.

    x: [T, H]. chosen: [T, k] of any integer type. weights: [T, k] of a floating dtype. up, down: the adapter of the two
    products; None where there is none. Differentiable in x, weights and the adapter.
    """
    factors = [tensor for each in (up, down) for tensor in ((None, None) if each is None else (each.a, each.b))]
    return Experts.apply(x, weights, chosen, layer, *factors)  # type: ignore[return-value]


class Experts(torch.autograd.Function):
    """The function of this file's docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, layer: Layer, *factors: Tensor | None) -> Tensor:
        """Arguments as `experts`; factors: A1, B1, A2, B2."""
        routing, k = sort_by_expert(chosen, layer.experts), chosen.shape[1]
        weights = weights.contiguous()
        ctx.save_for_backward(x, weights, *routing, *factors)
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            first, second = _cast(factors, layer.dtype)
            rows = gather(x.to(layer.dtype), routing.order, k)
            up = layer.up.decode(layer.dtype, routing.offsets)
            h = layer.gate(_product(rows, up, layer.up.bias, first, routing.offsets))
            del rows, up
            y = _product(h, layer.down.decode(layer.dtype, routing.offsets), layer.down.bias, second, routing.offsets)
            return combine(y, routing.inverse, weights, k).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weights and the factors."""
        x, weights, order, inverse, offsets, *factors = ctx.saved_tensors
        layer, k = ctx.layer, weights.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            first, second = _cast(factors, layer.dtype)
            rows, up = gather(x.to(layer.dtype), order, k), layer.up.decode(layer.dtype, offsets)
            u = _product(rows, up, layer.up.bias, first, offsets).requires_grad_()
            with torch.enable_grad():
                h = layer.gate(u)
            d, w = gather(dout.to(layer.dtype).contiguous(), order, k), weights.reshape(-1)[order.long(), None]
            p, low = _transposed(d, layer.down.decode(layer.dtype, offsets), second, offsets)
            dweights = row_dots(p, h.detach())
            if layer.down.bias is not None:
                dweights += row_dots(d, layer.down.bias.to(d.dtype)[_expert_of_rows(offsets, len(order))])
            second_gradients = _factor_gradients(d, h.detach(), low, second, offsets, w)
            (du,) = torch.autograd.grad(h, u, (p * w).to(layer.dtype))
            del d, h, p
            drows, low = _transposed(du, up, first, offsets)
            gradients = [*_factor_gradients(du, rows, low, first, offsets), *second_gradients]
            dx = combine(drows, inverse, None, k).to(x.dtype)
        cast = [None if g is None else g.to(factor.dtype) for g, factor in zip(gradients, factors, strict=True)]
        return dx, dweights[inverse].view_as(weights).to(weights.dtype), None, None, *cast


Pair = tuple[Tensor, Tensor] | None
"""A [E, r, in] and B [E, out, r] of one product, in the dtype of the products; None without an adapter."""


def _cast(factors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Pair]:
    """Return the adapters of the two products. factors: A1, B1, A2, B2."""
    pairs = [(a, b) for a, b in zip(factors[::2], factors[1::2], strict=True)]
    # PEFT's B, seen by expert, is not contiguous.
    return [None if a is None or b is None else (a.to(dtype), b.to(dtype).contiguous()) for a, b in pairs]


def _product(rows: Tensor, w: Tensor, bias: Tensor | None, pair: Pair, offsets: Tensor) -> Tensor:
    """Compute W_e x + b_e + B_e (A_e x) of every row, [M, out]."""
    out = grouped(rows, w, offsets, bias=None if bias is None else bias.to(w.dtype))
    return out if pair is None else out.add_(grouped(grouped(rows, pair[0], offsets), pair[1], offsets))


def _transposed(d: Tensor, w: Tensor, pair: Pair, offsets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute (W_e + B_e A_e)^T d of every row, [M, in], and B_e^T d, [M, r]."""
    out = grouped_transposed(d, w, offsets)
    if pair is None:
        return out, None
    low = grouped_transposed(d, pair[1], offsets)
    return out.add_(grouped_transposed(low, pair[0], offsets)), low


def _factor_gradients(
    d: Tensor, rows: Tensor, low: Tensor | None, pair: Pair, offsets: Tensor, w: Tensor | None = None
) -> list[Tensor | None]:
    """Return the gradients of A and B, [E, r, in] and [E, out, r], in fp32 or float64.

    d: of the product's outputs, [M, out]. low: from `_transposed`. w: factors of the rows of d and low, [M, 1].
    """
    if pair is None or low is None:
        return [None, None]
    inner = grouped(rows, pair[0], offsets)
    if w is not None:
        low, inner = (low * w).to(low.dtype), (inner * w).to(inner.dtype)
    wide = torch.promote_types(d.dtype, torch.float32)
    da, db = (torch.empty(factor.shape, dtype=wide, device=d.device) for factor in pair)
    return [grouped_gradient(low, rows, offsets, da), grouped_gradient(d, inner, offsets, db)]


def _expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Return the expert of every sorted row, [M] int64."""
    return torch.searchsorted(offsets, torch.arange(rows, dtype=offsets.dtype, device=offsets.device), right=True) - 1
