"""Linear projections of a frozen weight with LoRA: y = x W^T + scale (x A^T) B^T, for a group that shares x.

By K-concatenation the update costs no extra pass over y or dx: with S = x A^T in the tail columns of x's own rows, and
scale B and A behind and below W in its buffer (`rlft.kernels.lora_group`), forward and backward are one product each,

    y  = [x, S] [W, sB]^T                                  K = H + tail
    dx = [dY, dS] [W ; A],   dS = dY sB                    K = out + tail
    dB = scale dY^T S,   dA = dS^T x

accumulated in fp32 by cuBLAS, so the update is added before the one rounding. Producers of x and dY therefore write
rows with `tail` free columns, and W is decoded with a row stride of H + tail. `forward` and `backward` work on such
buffers and are for layers that own theirs; without a tail on dY, dx takes a second product. `lora_linear` stands alone
in autograd, takes x and W as they are and adds the update to y by a second product.

Source: reference/kernels.md 4. Bytes beyond the frozen projection per token and element size e: forward reads x once
more (e H), backward reads dY and x once more (e (out + H)).
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
    """[T, sum of out]: y = x W^T + scale (x A^T) B^T per projection, side by side. Differentiable by autograd."""
    parts = [x @ w.T + scale * ((x @ a.T) @ b.T) for w, a, b, scale in zip(weights, A, B, scales, strict=True)]
    y = torch.cat(parts, dim=1)
    return y if bias is None else y + bias


class Weight(NamedTuple):
    """A group's weight buffer, and the parts of it that products read: views, made once, since they would take as much
    of the host's time as launching the products."""

    group: LoraGroup
    buffer: Tensor
    """[out + tail, H + tail]"""
    b: Tensor
    """[out, tail], which `fill` writes."""
    a: Tensor
    """[tail, H], likewise."""
    extended: Tensor
    """[H + tail, out]: what [x, S] is multiplied by."""
    plain: Tensor
    """[H, out]: what x is multiplied by."""
    stacked: Tensor
    """[out + tail, H]: what [dY, dS] is multiplied by."""

    @classmethod
    def of(cls, group: LoraGroup, buffer: Tensor) -> Weight:
        """W goes to buffer[:out, :H]. Raises ValueError for a buffer of another shape."""
        Y, H = group.out, group.in_features
        check_args("Weight", buffer.shape == group.buffer, f"a buffer {list(group.buffer)}", buffer=buffer)
        w = buffer[:Y]
        return cls(group, buffer, w[:, H:], buffer[Y:, :H], w.T, w[:, :H].T, buffer[:, :H])


def forward(
    weight: Weight,
    x: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    adapter: bool = True,
    s: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y [T, out], and S = x A^T.

    weight: decoded and filled. x: [T, H + tail], the tail is overwritten with S; or [T, H] with s: [T, tail],
    overwritten with S, which costs another pass over y. bias: [out] or None. residual: [T, out] or None, added before
    the one rounding. out: [T, out] to write to, rows of any stride; may be residual. adapter=False is the plain product
    of x and W, bit for bit, and leaves tail and s alone. Raises ValueError on shapes that do not fit.
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
    w = weight.extended
    if not adapter or not concatenated:
        x, w = x[:, :H] if tail else x, weight.plain
    if bias is not None and residual is not None:
        y = _product(x, w, residual, out).add_(bias)
    else:
        y = _product(x, w, bias if residual is None else residual, out)
    return y.addmm_(s, weight.b.T) if adapter and not concatenated and s is not None else y


def input_gradient(weight: Weight, dy: Tensor, out: Tensor | None = None) -> Tensor:
    """dx [T, H] of dy [T, out + tail], whose tail holds dS of `low_rank.gradients_b`; without a tail that of W alone.

    weight: as in the forward. out: [T, H] to write to, rows of any stride.
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
    """dx [T, H]; the gradients of A and B are added to the caller's.

    weight: that of the forward, or decoded and filled again. dy: [T, out + tail], the tail is overwritten with dS.
    x: [T, H]. s: [T, tail] of the forward. grad_A, grad_B: as `rlft.kernels.low_rank.gradients`. out:
    [T, H] to write to, rows of any stride. Nothing that was saved is overwritten. Raises ValueError on shapes that do
    not fit. A layer that has x only after dx calls `gradients_b`, `input_gradient` and `gradients_a` itself.
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


def _product(x: Tensor, w: Tensor, start: Tensor | None, out: Tensor | None) -> Tensor:
    """start + x w, where start is a bias, a whole [T, out] (in place where it is out), or nothing."""
    if out is not None and start is out:
        return out.addmm_(x, w)
    if out is None:
        return torch.mm(x, w) if start is None else torch.addmm(start, x, w)
    return torch.mm(x, w, out=out) if start is None else torch.addmm(start, x, w, out=out)


class _LoraLinear(torch.autograd.Function):
    """Saves x, S, A and B; decodes and fills again in backward."""

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
        grads = [torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in adapters]
        if group.tail:
            gradients(group, dy, rows, s, b, ds, grads[: len(grads) // 2], grads[len(grads) // 2 :])
        dx = None
        if ctx.needs_input_grad[0]:
            for i, weight in enumerate(_dense(ctx.weights, rows)):
                part = dy[:, group.rows(i)]
                dx = part @ weight if dx is None else dx.addmm_(part, weight)
            assert dx is not None
            dx = (dx.addmm_(ds, a) if group.tail else dx).view(ctx.shape)
        return dx, None, None, None, *(g.to(t.dtype) for g, t in zip(grads, adapters, strict=True))


def _filled(group: LoraGroup, like: Tensor, adapters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Fresh b and a of like's dtype."""
    b, a = like.new_empty(group.out, group.tail), like.new_empty(group.tail, group.in_features)
    adapters = [t.detach().contiguous() for t in adapters]
    write_adapters(group, adapters[: len(adapters) // 2], adapters[len(adapters) // 2 :], b, a)
    return b, a


def _dense(weights: Sequence[Tensor | Nf4Weight], like: Tensor) -> list[Tensor]:
    """The weights as tensors of like's dtype; NF4 ones are decoded into fresh memory, in one launch."""
    packed = [w for w in weights if isinstance(w, Nf4Weight)]
    # Only the reference decodes to float64.
    if like.dtype == torch.float64:
        decoded = iter([decode_reference(w, like.dtype) for w in packed])
    else:
        outs = [like.new_empty(w.shape) for w in packed]
        if packed:
            decode(packed, outs)
        decoded = iter(outs)
    return [next(decoded) if isinstance(w, Nf4Weight) else w for w in weights]


def lora_linear(
    x: Tensor, weights: Any, A: Any, B: Any, scale: float | Sequence[float], bias: Tensor | None = None
) -> Tensor:
    """y [..., sum of out] = x W^T + scale (x A^T) B^T + bias for one projection or for up to three of the same x.

    x: [..., H]. weights: a frozen [out, H] tensor of x's dtype or an `Nf4Weight`, or a sequence of them; y holds their
    outputs side by side. A: [r, H], B: [out, r], any float dtype, a tensor or a sequence as the weights; any rank.
    scale: alpha / r, one or per projection. bias: [sum of out], frozen. Gradients go to x, A and B, accumulated in
    float32 for 16-bit x. Raises ValueError on shapes and dtypes that do not fit and on a weight that wants a gradient.
    """
    weights = [weights] if isinstance(weights, Tensor | Nf4Weight) else list(weights)
    A, B = ([t] if isinstance(t, Tensor) else list(t) for t in (A, B))
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
    group = LoraGroup(x.shape[-1], tuple(w.shape[0] for w in weights), tuple(a.shape[0] for a in A), scales, align=16)
    check_args(
        "lora_linear",
        bias is None or (tuple(bias.shape) == (group.out,) and not bias.requires_grad),
        f"a frozen bias [{group.out}]",
        bias=bias,
    )
    return _LoraLinear.apply(x, group, weights, bias, *A, *B)  # type: ignore[return-value]
