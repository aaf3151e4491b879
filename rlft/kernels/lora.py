"""Linear projections of a frozen weight with LoRA: y = x W^T + scale (x A^T) B^T, for a group that shares x.

By K-concatenation the update takes no extra pass over y or dx: with S = x A^T in the tail columns of x's own rows, and
b = scale B and a = A behind and below W in its buffer (`rlft.kernels.lora_group`), forward and backward are one product
each,

    y  = [x, S] [W, b]^T                                   K = H + tail
    dx = [dY, dS] [W ; a],   dS = dY b                     K = out + tail
    dB = scale dY^T S,   dA = dS^T x

accumulated in fp32 by cuBLAS, so the update is added before the result is rounded. Producers of x and dY therefore
write rows with `tail` free columns, and W is decoded with a row stride of H + tail. `forward` and `backward` use such
buffers and are for layers that own theirs; without a tail on dY, dx takes a second product. `lora_linear` is a
standalone autograd function that takes x and W as they are and adds the update to y by a second product.

Bytes beyond the frozen projection per token, with element size e: forward reads x once more (e H), backward reads dY
and x once more (e (out + H)). T tokens, H input columns, Y output columns, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.launch import as_rows, check_args
from rlft.kernels.lora_group import LoraGroup, write_adapters
from rlft.kernels.low_rank import gradients, shrink
from rlft.kernels.nf4 import Nf4Weight, decode, decode_reference


def lora_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scales: Sequence[float],
    bias: Tensor | None = None,
) -> Tensor:
    """Compute y [T, sum of out] = x W^T + scale (x A^T) B^T per projection, side by side; differentiable."""
    parts = [
        x @ weight.T + scale * ((x @ a.T) @ b.T) for weight, a, b, scale in zip(weights, A, B, scales, strict=True)
    ]
    y = torch.cat(parts, dim=1)
    return y if bias is None else y + bias


class Weight(NamedTuple):
    """A group's weight buffer, and the views of it that matrix products read.

    The views are created once, since creating them takes as much host time as launching the products.
    """

    group: LoraGroup
    buffer: Tensor
    """[out + tail, H + tail]"""
    b: Tensor
    """[out, tail], written by `AdapterWriteTables`."""
    a: Tensor
    """[tail, H], likewise."""
    extended: Tensor
    """[H + tail, out]: the factor of [x, S]."""
    plain: Tensor
    """[H, out]: the factor of x."""
    stacked: Tensor
    """[out + tail, H]: the factor of [dY, dS]."""

    @classmethod
    def of(cls, group: LoraGroup, buffer: Tensor) -> Weight:
        """Build the views; W belongs into buffer[:out, :H]. Raises ValueError for a buffer of another shape."""
        Y, H = group.out, group.in_features
        check_args("Weight", buffer.shape == group.buffer, f"a buffer {list(group.buffer)}", buffer=buffer)
        weight_rows = buffer[:Y]
        return cls(
            group, buffer, weight_rows[:, H:], buffer[Y:, :H], weight_rows.T, weight_rows[:, :H].T, buffer[:, :H]
        )


def forward(
    weight: Weight,
    x: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    adapter: bool = True,
    s: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute y [T, out], and S = x A^T.

    weight: decoded, with the adapter written. x: [T, H + tail], whose tail is overwritten with S; or [T, H] with s: [T,
    tail], overwritten with S, which takes another pass over y. bias: [out] or None. residual: [T, out] or None, added
    before y is rounded. out: [T, out] to write to, rows of any stride; may be residual. adapter=False is the plain
    product of x and W, bitwise, and leaves tail and s unchanged. Raises ValueError on shapes that do not fit.
    """
    group = weight.group
    H, tail, columns = group.in_features, group.tail, group.in_features + group.tail
    concatenated = s is None or not tail
    y = (x.shape[0], group.out)
    check_args(
        "lora.forward",
        x.dim() == 2
        and x.shape[1] == (columns if concatenated else H)
        and (s is None or s.shape == (y[0], tail))
        and (out is None or out.shape == y)
        and (residual is None or residual.shape == y),
        f"x [T, {columns}] or, with s [T, {tail}], [T, {H}]; out and residual [T, {group.out}]",
        x=x,
        s=s,
        out=out,
        residual=residual,
    )
    if adapter and tail:
        shrink(group, x[:, :H], weight.a, x[:, H:] if s is None else s)
    matrix = weight.extended
    if not adapter or not concatenated:
        x, matrix = x[:, :H] if tail else x, weight.plain
    if bias is not None and residual is not None:
        y = _product(x, matrix, residual, out).add_(bias)
    else:
        y = _product(x, matrix, bias if residual is None else residual, out)
    return y.addmm_(s, weight.b.T) if adapter and not concatenated and s is not None else y


def input_gradient(weight: Weight, dy: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute dx [T, H] from dy [T, out + tail], whose tail holds dS of `low_rank.gradients_b`.

    weight: as in the forward. dy: without a tail, only W contributes. out: [T, H] to write to, rows of any stride.
    """
    Y, H, tail = weight.group.out, weight.group.in_features, weight.group.tail
    check_args(
        "lora.input_gradient",
        dy.dim() == 2 and dy.shape[1] in (Y, Y + tail) and (out is None or out.shape == (dy.shape[0], H)),
        f"dy [T, {Y + tail}] or [T, {Y}], out [T, {H}]",
        dy=dy,
        out=out,
    )
    return _product(dy, weight.stacked if dy.shape[1] == Y + tail else weight.stacked[:Y], None, out)


def backward(
    weight: Weight,
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """Compute dx [T, H], and add the gradients of A and B to the caller's.

    weight: that of the forward, or decoded and written again. dy: [T, out + tail], whose tail is overwritten with dS.
    x: [T, H]. s: [T, tail] of the forward. grad_A, grad_B: as `rlft.kernels.low_rank.gradients`. out: [T, H] to write
    to, rows of any stride. Saved tensors are not overwritten. Raises ValueError on shapes that do not fit. A layer that
    has x only after dx calls `gradients_b`, `input_gradient` and `gradients_a` instead.
    """
    group = weight.group
    check_args(
        "lora.backward",
        dy.dim() == 2 and dy.shape[1] == group.out + group.tail,
        f"dy [T, {group.out + group.tail}]",
        dy=dy,
    )
    if group.tail:
        gradients(group, dy[:, : group.out], x, s, weight.b, dy[:, group.out :], grad_A, grad_B)
    return input_gradient(weight, dy, out)


def _product(x: Tensor, matrix: Tensor, start: Tensor | None, out: Tensor | None) -> Tensor:
    """Compute start + x matrix; start is a bias, a [T, out] tensor (in place if it is out), or None."""
    if out is not None and start is out:
        return out.addmm_(x, matrix)
    if out is None:
        return torch.mm(x, matrix) if start is None else torch.addmm(start, x, matrix)
    return torch.mm(x, matrix, out=out) if start is None else torch.addmm(start, x, matrix, out=out)


class _LoraLinear(torch.autograd.Function):
    """Saves x, S, A and B; decodes the weight and writes the adapter again in the backward."""

    @staticmethod
    def forward(ctx, x, group, weights, bias, *adapters):  # type: ignore[override]
        rows = as_rows(x)
        b, a = _filled(group, x, adapters)
        s = rows.new_empty(rows.shape[0], group.tail)
        y = rows.new_empty(rows.shape[0], group.out)
        for i, weight in enumerate(_dense(weights, x)):
            part = group.rows(i)
            _product(rows, weight.T, None if bias is None else bias[part], y[:, part])
        if group.tail:
            shrink(group, rows, a, s)
            y.addmm_(s, b.T)
        ctx.save_for_backward(rows, s, *adapters)
        ctx.group, ctx.weights, ctx.shape = group, weights, x.shape
        return y.view(*x.shape[:-1], group.out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        group = ctx.group
        rows, s, *adapters = ctx.saved_tensors
        dy = as_rows(dy)
        b, a = _filled(group, rows, adapters)
        ds = dy.new_empty(dy.shape[0], group.tail)
        wide = torch.promote_types(rows.dtype, torch.float32)
        grads = [torch.zeros_like(tensor, dtype=wide, memory_format=torch.contiguous_format) for tensor in adapters]
        if group.tail:
            gradients(group, dy, rows, s, b, ds, grads[: len(grads) // 2], grads[len(grads) // 2 :])
        dx = None
        if ctx.needs_input_grad[0]:
            for i, weight in enumerate(_dense(ctx.weights, rows)):
                part = dy[:, group.rows(i)]
                dx = part @ weight if dx is None else dx.addmm_(part, weight)
            assert dx is not None
            dx = (dx.addmm_(ds, a) if group.tail else dx).view(ctx.shape)
        return dx, None, None, None, *(grad.to(tensor.dtype) for grad, tensor in zip(grads, adapters, strict=True))


def _filled(group: LoraGroup, like: Tensor, adapters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return new b and a in the dtype of `like`."""
    b, a = like.new_empty(group.out, group.tail), like.new_empty(group.tail, group.in_features)
    adapters = [tensor.detach().contiguous() for tensor in adapters]
    write_adapters(group, adapters[: len(adapters) // 2], adapters[len(adapters) // 2 :], b, a)
    return b, a


def _dense(weights: Sequence[Tensor | Nf4Weight], like: Tensor) -> list[Tensor]:
    """Return the weights as tensors in the dtype of `like`; NF4 weights are decoded into new memory, in one launch."""
    packed = [weight for weight in weights if isinstance(weight, Nf4Weight)]
    # Only the reference decodes to float64.
    if like.dtype == torch.float64:
        decoded = iter([decode_reference(weight, like.dtype) for weight in packed])
    else:
        outs = [like.new_empty(weight.shape) for weight in packed]
        if packed:
            decode(packed, outs)
        decoded = iter(outs)
    return [next(decoded) if isinstance(weight, Nf4Weight) else weight for weight in weights]


def lora_linear(
    x: Tensor, weights: Any, A: Any, B: Any, scale: float | Sequence[float], bias: Tensor | None = None
) -> Tensor:
    """Compute y = x W^T + scale (x A^T) B^T + bias for one projection, or for up to three of the same x.

    x: [..., H]. weights: a frozen [out, H] tensor of x's dtype or an `Nf4Weight`, or a sequence of them; their outputs
    are side by side in y [..., sum of out]. A: [r, H], B: [out, r], any float dtype, a tensor or a sequence like the
    weights; any rank. scale: alpha / r, one or per projection. bias: [sum of out], frozen. Gradients go to x, A and B,
    accumulated in float32 for 16-bit x. Raises ValueError on shapes and dtypes that do not fit and on a weight that
    requires a gradient.
    """
    weights = [weights] if isinstance(weights, Tensor | Nf4Weight) else list(weights)
    A, B = ([side] if isinstance(side, Tensor) else list(side) for side in (A, B))
    scales = tuple(scale) if isinstance(scale, Sequence) else (float(scale),) * len(weights)
    if not len(weights) == len(A) == len(B) == len(scales):
        raise ValueError(
            f"lora_linear: want A, B and scale per weight, got {len(weights)} weights, {len(A)} A, {len(B)} B, "
            f"{len(scales)} scales"
        )
    for weight, a, b in zip(weights, A, B, strict=True):
        dense = weight if isinstance(weight, Tensor) else None
        check_args(
            "lora_linear",
            weight.shape[1] == x.shape[-1]
            and (dense is None or (dense.dtype == x.dtype and not dense.requires_grad))
            and tuple(a.shape) == (b.shape[1], x.shape[-1])
            and b.shape[0] == weight.shape[0],
            f"a frozen weight [out, {x.shape[-1]}] of x's dtype, A [r, {x.shape[-1]}] and B [out, r]",
            x=x,
            weight=dense,
            A=a,
            B=b,
        )
    group = LoraGroup(
        x.shape[-1], tuple(weight.shape[0] for weight in weights), tuple(a.shape[0] for a in A), scales, align=16
    )
    check_args(
        "lora_linear",
        bias is None or (tuple(bias.shape) == (group.out,) and not bias.requires_grad),
        f"a frozen bias [{group.out}]",
        bias=bias,
    )
    return _LoraLinear.apply(x, group, weights, bias, *A, *B)  # type: ignore[return-value]
