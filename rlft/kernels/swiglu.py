"""Activations of an MLP, with a gate (SwiGLU and its relatives) or without: forward and backward in one pass each.

    h = round(act(gate)) up                with a gate;  without one h = act(gate), where gate is the only projection
    dup = dh round(act(gate)),   dgate = dh up act'(gate);  without a gate dgate = dh act'(gate)

    silu         g s(g)                    s (1 + g (1 - s))
    gelu         g Phi(g)                  Phi + g phi
    gelu_tanh    g s(2 z)                  s + 2 g s (1 - s) z'  with s = s(2 z)
    relu2        max(g, 0)^2               2 max(g, 0)
    xielu        g > 0: p g^2 + c g        2 p g + c
                 else: n (e^u - 1 - g) + c g with u = min(g, e0)        n (e^g - 1) + c;  where g >= e0: c - n

with s(v) = 1 / (1 + exp(-v)) and z(g) = sqrt(2/pi) (g + 0.044715 g^3), for which (1 + tanh z) / 2 = s(2 z). xIELU
(arXiv 2411.13010) has a curve per layer: p, n, c and e0 are its alpha_p, alpha_n, beta and eps, frozen here.

act is fp32 and rounded to the input's dtype before the product, as in transformers' act_fn(gate) * up. The backward
recomputes h along with dgate and dup, so that h need not be saved for the down projection's LoRA; dgate is fp32 with
one rounding. e^u - 1 - u of xIELU is a series near 0, where it cancels.

Bytes per element of a 2-byte dtype: forward 6, backward 12 (reads dh, gate, up; writes h, dgate, dup); without a gate 4
and 8. T or t rows, M or m columns, g an entry of gate.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.launch import KERNEL_DTYPES, as_rows, check_args, jit, kernel, launch, on_gpu, power_of_2, tl

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu2", "xielu")
"""transformers' names: x sigmoid(x), GELU by erf, GELU by tanh, the square of ReLU, xIELU."""


def swiglu_reference(gate: Tensor, up: Tensor | None, activation: str = "silu", curve: Tensor | None = None) -> Tensor:
    """Compute the formula in plain PyTorch, differentiable by autograd. Arguments as `swiglu`."""
    if activation == "silu":
        act = F.silu(gate)
    elif activation == "relu2":
        act = torch.square(F.relu(gate))
    elif activation == "xielu":
        assert curve is not None
        above, below, linear, least = curve.to(gate.dtype).unbind()
        negative = (torch.expm1(torch.minimum(gate, least)) - gate) * below + linear * gate
        act = torch.where(gate > 0, above * gate * gate + linear * gate, negative)
    else:
        act = F.gelu(gate, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none")
    return act if up is None else act * up


@jit
def _xielu(g, curve_ptr):
    """Compute xIELU and its derivative in fp32."""
    above, below = tl.load(curve_ptr), tl.load(curve_ptr + 1)
    linear, eps = tl.load(curve_ptr + 2), tl.load(curve_ptr + 3)
    u = tl.minimum(g, eps)
    # e^u - 1 - u = u^2 (1/2! + u/3! + ... + u^7/9!): above -0.5 what follows is below fp32's resolution.
    series = 1.0 / 40320 + u * (1.0 / 362880)
    series = 1.0 / 720 + u * (1.0 / 5040 + u * series)
    series = u * u * (0.5 + u * (1.0 / 6 + u * (1.0 / 24 + u * (1.0 / 120 + u * series))))
    rest = tl.where(u > -0.5, series, tl.exp(u) - 1.0 - u)
    # From eps on, u is constant.
    slope = tl.where(g < eps, rest + u, -1.0)
    act = tl.where(g > 0, above * g * g, below * (rest + (u - g))) + linear * g
    return act, tl.where(g > 0, 2.0 * above * g, below * slope) + linear


@jit
def _activation(g, curve_ptr, ACT: tl.constexpr):
    """Compute act(g) and its derivative in fp32; what the caller does not use is not computed."""
    if ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        return g * cdf, cdf + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    elif ACT == "relu2":
        # As in PyTorch, nan stays nan.
        relu = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return relu * relu, 2.0 * relu
    elif ACT == "xielu":
        return _xielu(g, curve_ptr)
    else:
        z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        s = 1.0 / (1.0 + tl.exp(-2.0 * z))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        return g * s, s + 2.0 * g * s * (1.0 - s) * slope


@kernel(varying=("T",))
def forward_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    curve_ptr,
    T,
    stride_gate,
    stride_up,
    stride_h,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ACT: tl.constexpr,
):
    PARTS: tl.constexpr = (M + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    rows = (program // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < T) & (cols < M)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    if up_ptr is not None:
        up = tl.load(up_ptr + rows * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activation(gate, curve_ptr, ACT)
    h = act.to(h_ptr.dtype.element_ty).to(tl.float32)
    if up_ptr is not None:
        h *= up
    tl.store(h_ptr + rows * stride_h + cols, h, mask=mask)


@kernel(varying=("T",))
def backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    h_ptr,
    dgate_ptr,
    dup_ptr,
    curve_ptr,
    T,
    stride_dh,
    stride_gate,
    stride_up,
    stride_h,
    stride_dgate,
    stride_dup,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ACT: tl.constexpr,
):
    PARTS: tl.constexpr = (M + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    rows = (program // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < T) & (cols < M)
    dh = tl.load(dh_ptr + rows * stride_dh + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    if up_ptr is not None:
        up = tl.load(up_ptr + rows * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activation(gate, curve_ptr, ACT)
    act = act.to(dgate_ptr.dtype.element_ty).to(tl.float32)
    if h_ptr is not None:
        h = act
        if up_ptr is not None:
            h *= up
        tl.store(h_ptr + rows * stride_h + cols, h, mask=mask)
    dgate_at = dgate_ptr + rows * stride_dgate + cols
    if up_ptr is not None:
        tl.store(dgate_at, dh * up * slope, mask=mask)
        tl.store(dup_ptr + rows * stride_dup + cols, dh * act, mask=mask)
    else:
        tl.store(dgate_at, dh * slope, mask=mask)


@cache
def launch_shape(m: int) -> tuple[int, int, int]:
    """Return (columns, rows, warps) of a program for rows of m columns.

    512 elements per program and 4 per thread were the fastest of a sweep on an H100.
    """
    block = min(512, power_of_2(m))
    rows = 512 // block
    return block, rows, 4


def swiglu_forward(
    gate: Tensor,
    up: Tensor | None,
    activation: str = "silu",
    curve: Tensor | None = None,
    *,
    out: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Tensor:
    """Launch the forward. Returns h [T, M].

    gate, up: [T, M], one dtype, columns adjacent, any row stride: two tensors or the halves of one [T, 2 M]; up None
    without a gate. curve: as in `swiglu`. out: where h is written, [T, M] with any row stride (rows longer than M leave
    room for LoRA's tail, which is not written); a caller that owns gate or up may pass it here. shape: (columns, rows,
    warps) of a program, for benchmarks.
    """
    _check("swiglu_forward", activation, curve, gate=gate, up=up, out=out)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    t, m = gate.shape
    if t == 0 or m == 0:
        return h
    block, rows, warps = launch_shape(m) if shape is None else shape
    launch(
        forward_kernel,
        (-(-t // rows) * -(-m // block),),
        gate,
        up,
        h,
        curve,
        t,
        gate.stride(0),
        0 if up is None else up.stride(0),
        h.stride(0),
        m,
        block,
        rows,
        activation,
        num_warps=warps,
    )
    return h


def swiglu_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str = "silu",
    curve: Tensor | None = None,
    *,
    keep_h: bool = True,
    h_out: Tensor | None = None,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Launch the backward. Returns h (None if keep_h is False), dgate and dup (None without a gate), each [T, M].

    dh, gate, up, curve: as in the forward. h_out, dgate, dup: where the results are written; a caller that owns dh,
    gate and up may pass them here, one for each (every element is read before it is written).
    """
    _check("swiglu_backward", activation, curve, gate=gate, up=up, dh=dh, h_out=h_out, dgate=dgate, dup=dup)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if h_out is None and keep_h else h_out
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if dgate is None else dgate
    if up is not None and dup is None:
        dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    t, m = gate.shape
    if t == 0 or m == 0:
        return h, dgate, dup
    block, rows, warps = launch_shape(m) if shape is None else shape
    launch(
        backward_kernel,
        (-(-t // rows) * -(-m // block),),
        dh,
        gate,
        up,
        h,
        dgate,
        dup,
        curve,
        t,
        dh.stride(0),
        gate.stride(0),
        0 if up is None else up.stride(0),
        0 if h is None else h.stride(0),
        dgate.stride(0),
        0 if dup is None else dup.stride(0),
        m,
        block,
        rows,
        activation,
        num_warps=warps,
    )
    return h, dgate, dup


def _check_names(op: str, activation: str, curve: Tensor | None) -> None:
    """Raise ValueError for an unknown activation, and where a curve is missing or given for nothing."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation = {activation!r}: want one of {', '.join(ACTIVATIONS)}")
    ok = curve is None if activation != "xielu" else curve is not None and curve.shape == (4,)
    check_args(op, ok, f"a curve [4] for xielu and none for others, activation = {activation!r}", curve=curve)


def _check(op: str, activation: str, curve: Tensor | None, gate: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for an unknown activation and tensors that do not fit."""
    _check_names(op, activation, curve)
    shape, dtype = gate.shape, gate.dtype
    ok = len(shape) == 2 and dtype in KERNEL_DTYPES and gate.stride(1) == 1
    ok = ok and (curve is None or curve.dtype == torch.float32)
    for other in others.values():
        ok = ok and (other is None or (other.shape == shape and other.dtype == dtype and other.stride(1) == 1))
    wanted = "[T, M] of one dtype (float32, bfloat16 or float16) with adjacent columns, and a curve of float32"
    check_args(op, ok, wanted, gate=gate, **others)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, curve):  # type: ignore[override]
        gate_rows, up_rows = as_rows(gate), None if up is None else as_rows(up)
        ctx.save_for_backward(gate_rows, up_rows, curve)
        ctx.activation = activation
        return swiglu_forward(gate_rows, up_rows, activation, curve).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):  # type: ignore[override]
        gate, up, curve = ctx.saved_tensors
        _, dgate, dup = swiglu_backward(as_rows(dh), gate, up, ctx.activation, curve, keep_h=False)
        return dgate.view(dh.shape), None if dup is None else dup.view(dh.shape), None, None


def swiglu(gate: Tensor, up: Tensor | None, activation: str = "silu", curve: Tensor | None = None) -> Tensor:
    """Compute act(gate) * up, or act(gate) without a gate, with gradients to both.

    gate, up: [..., M] float32, bfloat16 or float16, one dtype; the halves of one [..., 2 M] are not copied. up: None
    for MLPs without a gate, whose only projection is `gate`. activation: one of `ACTIVATIONS`. curve: [4] float32, for
    xielu alone: alpha_p and alpha_n behind their softplus, beta and eps. Returns [..., M] in their dtype. Raises
    ValueError on an unknown activation and on shapes, dtypes or devices that do not fit.
    """
    _check_names("swiglu", activation, curve)
    check_args(
        "swiglu",
        gate.dim() > 0 and (up is None or (gate.shape == up.shape and gate.dtype == up.dtype)),
        "gate and up [..., M] alike",
        gate=gate,
        up=up,
    )
    if on_gpu("swiglu", gate=gate, up=up, curve=curve):
        return _SwiGlu.apply(gate, up, activation, curve)  # type: ignore[return-value]
    return swiglu_reference(gate, up, activation, curve)
