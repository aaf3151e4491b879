"""RMSNorm with a frozen weight, alone or after a residual addition, forward and backward.

    x' = x + delta (with the residual; else x' = x)
    rstd = 1 / sqrt(mean(x'^2) + eps),   n = x' rstd
    y = round(n) w  (Llama: rounded to the input's dtype, then times w in that dtype)
    y = n (1 + w)   (Gemma: in fp32, rounded once)
    y = n w         (OLMo: in fp32, rounded once)

    g = dy w  (Gemma: dy (1 + w)),   dx = rstd (g - n mean(n g)) + dx'

The weight is frozen and gets no gradient, which would take a second pass over rows. The forward rounds as transformers'
LlamaRMSNorm, Gemma3RMSNorm and Olmo2RMSNorm do; the backward is fp32 with one rounding at the end. dx' is the gradient
that reaches x' through the residual stream, added in the same kernel; the result is the gradient of x and of delta.

Bytes per row of H in a 2-byte dtype: forward 4 H, with the residual 8 H; backward 6 H, with the residual 8 H; rstd is 4
bytes. One program holds whole rows in registers, so each element is read once. T or t rows, h their length H.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.launch import KERNEL_DTYPES, as_rows, check_args, jit, kernel, launch, on_gpu, power_of_2, tl

LLAMA, GEMMA, OLMO = 0, 1, 2
"""How the weight is multiplied, `style` below."""
MAX_H = 16384
"""Longest row: one program holds it in registers."""
WANTED = f"[T, H] of one dtype with adjacent columns, H at most {MAX_H}, weight [H] of that dtype"


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, style: int = LLAMA) -> Tensor:
    """Compute the formula in plain PyTorch, differentiable; float64 stays float64. Arguments as `rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.to(wide)
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + eps)
    if style != LLAMA:
        return (n * ((1.0 if style == GEMMA else 0.0) + weight.to(wide))).to(x.dtype)
    return weight * n.to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, style: int = LLAMA
) -> tuple[Tensor, Tensor]:
    """Compute (y, x') in plain PyTorch. Arguments as `add_rms_norm`."""
    total = x + delta
    return rms_norm_reference(total, weight, eps, style), total


@jit
def times_weight(n, w, out_ptr, STYLE: tl.constexpr):
    """Compute n w with the roundings of the model family; n and w are fp32, the result is not yet rounded."""
    if STYLE == 1:
        return n * (1.0 + w)
    if STYLE == 2:
        return n * w
    return n.to(out_ptr.dtype.element_ty).to(tl.float32) * w


@kernel(varying=("T",))
def forward_kernel(
    x_ptr,
    delta_ptr,
    w_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    T,
    stride_x,
    stride_delta,
    stride_y,
    stride_total,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STYLE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    live = rows < T
    mask = live[:, None] & (cols < H)
    w = tl.load(w_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x += tl.load(delta_ptr + rows[:, None] * stride_delta + cols, mask=mask, other=0.0).to(tl.float32)
        # The norm reads x' rounded, as the residual stream stores it.
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        tl.store(total_ptr + rows[:, None] * stride_total + cols, x, mask=mask)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / H) + eps)
    tl.store(rstd_ptr + rows, rstd, mask=live)
    y = times_weight(x * rstd[:, None], w, y_ptr, STYLE)
    tl.store(y_ptr + rows[:, None] * stride_y + cols, y, mask=mask)


@kernel(varying=("T",))
def backward_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dres_ptr,
    dx_ptr,
    T,
    stride_dy,
    stride_x,
    stride_dres,
    stride_dx,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STYLE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    live = rows < T
    mask = live[:, None] & (cols < H)
    w = tl.load(w_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    if STYLE == 1:
        w += 1.0
    g = tl.load(dy_ptr + rows[:, None] * stride_dy + cols, mask=mask, other=0.0).to(tl.float32) * w
    n = tl.load(x_ptr + rows[:, None] * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)[:, None]
    n *= rstd
    dx = rstd * (g - n * (tl.sum(n * g, axis=1) * (1.0 / H))[:, None])
    if dres_ptr is not None:
        dx += tl.load(dres_ptr + rows[:, None] * stride_dres + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + rows[:, None] * stride_dx + cols, dx, mask=mask)


@cache
def launch_shape(h: int) -> tuple[int, int]:
    """Return (rows per program, warps) for rows of h: 16 elements per thread, short rows share a program."""
    block = power_of_2(h)
    rows = max(1, 2048 // block)
    return rows, min(16, max(1, rows * block // 512))


def _fits(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Check what WANTED describes. Written out in full, since it runs before every launch."""
    shape, dtype = x.shape, x.dtype
    if len(shape) != 2 or shape[1] > MAX_H or dtype not in KERNEL_DTYPES or x.stride(1) != 1:
        return False
    for other in others:
        if other is not None and (other.shape != shape or other.dtype != dtype or other.stride(1) != 1):
            return False
    return weight.shape == shape[1:] and weight.dtype == dtype and weight.stride(0) == 1


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    style: int = LLAMA,
    *,
    delta: Tensor | None = None,
    out: Tensor | None = None,
    total_out: Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward. Returns y [T, H], rstd [T] float32 and x' [T, H] (x itself without delta).

    x, delta: [T, H], columns adjacent, any row stride. weight: [H], the same dtype. out: where y is written, [T, H]
    with any row stride (rows longer than H leave room for LoRA's tail, which is not written). total_out: where x' is
    written; a caller that owns x or delta may pass it here. shape: (rows per program, warps), for benchmarks.
    """
    check_args(
        "rms_norm_forward",
        _fits(x, weight, delta, out, total_out) and (delta is not None or total_out is None),
        f"{WANTED}; total_out only with delta",
        x=x,
        weight=weight,
        delta=delta,
        out=out,
        total_out=total_out,
    )
    t, h = x.shape
    y = torch.empty((t, h), dtype=x.dtype, device=x.device) if out is None else out
    total = x
    if delta is not None:
        total = torch.empty((t, h), dtype=x.dtype, device=x.device) if total_out is None else total_out
    rstd = torch.empty(t, dtype=torch.float32, device=x.device)
    if t == 0 or h == 0:
        return y, rstd, total
    rows, warps = launch_shape(h) if shape is None else shape
    launch(
        forward_kernel,
        (-(-t // rows),),
        x,
        delta,
        weight,
        y,
        total,
        rstd,
        t,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        y.stride(0),
        total.stride(0),
        eps,
        h,
        power_of_2(h),
        rows,
        style,
        num_warps=warps,
    )
    return y, rstd, total


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    style: int = LLAMA,
    *,
    dres: Tensor | None = None,
    dx_out: Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Launch the backward. Returns dx [T, H].

    dy: [T, H], gradient of y. x: [T, H], input of the norm (x' after a residual addition). rstd: [T] float32 from the
    forward. dres: [T, H], gradient of x' that bypasses the norm, added to dx. dx_out: where dx is written; a caller
    that owns dy, x or dres may pass it here. All have adjacent columns and any row stride.
    """
    check_args(
        "rms_norm_backward",
        _fits(x, weight, dy, dres, dx_out) and rstd.shape == x.shape[:1] and rstd.dtype == torch.float32,
        f"{WANTED}; rstd [T] float32",
        dy=dy,
        x=x,
        weight=weight,
        rstd=rstd,
        dres=dres,
        dx_out=dx_out,
    )
    t, h = x.shape
    dx = torch.empty((t, h), dtype=x.dtype, device=x.device) if dx_out is None else dx_out
    if t == 0 or h == 0:
        return dx
    rows, warps = launch_shape(h) if shape is None else shape
    launch(
        backward_kernel,
        (-(-t // rows),),
        dy,
        x,
        weight,
        rstd,
        dres,
        dx,
        t,
        dy.stride(0),
        x.stride(0),
        0 if dres is None else dres.stride(0),
        dx.stride(0),
        h,
        power_of_2(h),
        rows,
        style,
        num_warps=warps,
    )
    return dx


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, style):  # type: ignore[override]
        rows = as_rows(x)
        y, rstd, _ = rms_norm_forward(rows, weight, eps, style)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.style = style
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        return rms_norm_backward(as_rows(dy), x, weight, rstd, ctx.style).view(dy.shape), None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps, style):  # type: ignore[override]
        y, rstd, total = rms_norm_forward(as_rows(x), weight, eps, style, delta=as_rows(delta))
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.style = style
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal):  # type: ignore[override]
        if dy is None:
            return dtotal, dtotal, None, None, None
        total, weight, rstd = ctx.saved_tensors
        dres = None if dtotal is None else as_rows(dtotal)
        dx = rms_norm_backward(as_rows(dy), total, weight, rstd, ctx.style, dres=dres).view(dy.shape)
        return dx, dx, None, None, None


def _check(op: str, x: Tensor, weight: Tensor, delta: Tensor | None = None) -> bool:
    """Return whether the kernel runs; raise ValueError on shapes that do not fit and on a weight that requires a
    gradient."""
    check_args(
        op,
        x.dim() > 0
        and weight.shape == x.shape[-1:]
        and (delta is None or delta.shape == x.shape)
        and weight.dtype == x.dtype
        and (delta is None or delta.dtype == x.dtype),
        "x [..., H], delta as x, weight [H], all of one dtype",
        x=x,
        delta=delta,
        weight=weight,
    )
    if weight.requires_grad:
        raise ValueError(f"{op}: weight.requires_grad is True: the norm's weight is frozen here")
    return on_gpu(op, x=x, delta=delta, weight=weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: int = LLAMA) -> Tensor:
    """Compute RMSNorm over the last dimension, with gradient to x.

    x: [..., H] float32, bfloat16 or float16. weight: [H], the same dtype, frozen. style: LLAMA, GEMMA or OLMO.
    Returns [..., H] in x's dtype. Raises ValueError on shapes, dtypes or devices that do not fit, and
    on a weight that requires a gradient.
    """
    if _check("rms_norm", x, weight):
        return _RmsNorm.apply(x, weight, eps, style)  # type: ignore[return-value]
    return rms_norm_reference(x, weight, eps, style)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, style: int = LLAMA) -> tuple[Tensor, Tensor]:
    """Compute RMSNorm of x + delta, and the sum for the residual stream, in one pass, with gradients to x and delta.

    x, delta: [..., H], one dtype. The rest as `rms_norm`. Returns (y, x + delta), both [..., H].
    """
    if _check("add_rms_norm", x, weight, delta):
        return _AddRmsNorm.apply(x, delta, weight, eps, style)  # type: ignore[return-value]
    return add_rms_norm_reference(x, delta, weight, eps, style)
