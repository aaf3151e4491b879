"""Gated activations: SwiGLU and both GeGLUs, forward and backward in one pass each.

    h = round(act(gate)) up                act(g) = g s(g) (silu), g Phi(g) (gelu), g s(2 z(g)) (gelu_pytorch_tanh)
    with s(v) = 1 / (1 + exp(-v)),  z(g) = sqrt(2/pi) (g + 0.044715 g^3);  (1 + tanh z) / 2 = s(2 z)

    dup = dh round(act(gate)),   dgate = dh up act'(gate)
    silu' = s (1 + g (1 - s)),   gelu' = Phi + g phi,   gelu_tanh' = s + 2 g s (1 - s) z'  with s = s(2 z)

act is fp32 and rounded to the input's dtype before the product, as in transformers' act_fn(gate) * up. The backward
recomputes h along with dgate and dup, so that h need not be saved for the down projection's LoRA; dgate is fp32 with
one rounding.

Bytes per element of a 2-byte dtype: forward 6, backward 12 (reads dh, gate, up; writes h, dgate, dup). T or t rows, M
or m columns.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.launch import KERNEL_DTYPES, as_rows, check_args, jit, kernel, launch, on_gpu, power_of_2, tl

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
"""transformers' names: x sigmoid(x), GELU by erf, GELU by tanh."""


def swiglu_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Compute the formula in plain PyTorch, differentiable by autograd. Arguments as `swiglu`."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none") * up


@jit
def _activation(g, ACT: tl.constexpr):
    """Compute act(g) and its derivative in fp32; what the caller does not use is not computed."""
    if ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        return g * cdf, cdf + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
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
    up = tl.load(up_ptr + rows * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activation(gate, ACT)
    act = act.to(h_ptr.dtype.element_ty).to(tl.float32)
    tl.store(h_ptr + rows * stride_h + cols, act * up, mask=mask)


@kernel(varying=("T",))
def backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    h_ptr,
    dgate_ptr,
    dup_ptr,
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
    up = tl.load(up_ptr + rows * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activation(gate, ACT)
    act = act.to(dgate_ptr.dtype.element_ty).to(tl.float32)
    if h_ptr is not None:
        tl.store(h_ptr + rows * stride_h + cols, act * up, mask=mask)
    tl.store(dgate_ptr + rows * stride_dgate + cols, dh * up * slope, mask=mask)
    tl.store(dup_ptr + rows * stride_dup + cols, dh * act, mask=mask)


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
    up: Tensor,
    activation: str = "silu",
    *,
    out: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
) -> Tensor:
    """Launch the forward. Returns h [T, M].

    gate, up: [T, M], one dtype, columns adjacent, any row stride: two tensors or the halves of one [T, 2 M]. out: where
    h is written, [T, M] with any row stride (rows longer than M leave room for LoRA's tail, which is not written); a
    caller that owns gate or up may pass it here. shape: (columns, rows, warps) of a program, for benchmarks.
    """
    _check("swiglu_forward", activation, gate=gate, up=up, out=out)
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
        t,
        gate.stride(0),
        up.stride(0),
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
    up: Tensor,
    activation: str = "silu",
    *,
    keep_h: bool = True,
    h_out: Tensor | None = None,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Launch the backward. Returns h (None if keep_h is False), dgate and dup, each [T, M].

    dh, gate, up: [T, M] as in the forward. h_out, dgate, dup: where the results are written; a caller that owns dh,
    gate and up may pass them here, one for each (every element is read before it is written).
    """
    _check("swiglu_backward", activation, gate=gate, up=up, dh=dh, h_out=h_out, dgate=dgate, dup=dup)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if h_out is None and keep_h else h_out
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if dgate is None else dgate
    dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if dup is None else dup
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
        t,
        dh.stride(0),
        gate.stride(0),
        up.stride(0),
        0 if h is None else h.stride(0),
        dgate.stride(0),
        dup.stride(0),
        m,
        block,
        rows,
        activation,
        num_warps=warps,
    )
    return h, dgate, dup


def _check(op: str, activation: str, gate: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for an unknown activation and tensors that do not fit."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation = {activation!r}: want one of {', '.join(ACTIVATIONS)}")
    shape, dtype = gate.shape, gate.dtype
    ok = len(shape) == 2 and dtype in KERNEL_DTYPES and gate.stride(1) == 1
    for other in others.values():
        ok = ok and (other is None or (other.shape == shape and other.dtype == dtype and other.stride(1) == 1))
    check_args(op, ok, "[T, M] of one dtype (float32, bfloat16 or float16) with adjacent columns", gate=gate, **others)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):  # type: ignore[override]
        gate_rows, up_rows = as_rows(gate), as_rows(up)
        ctx.save_for_backward(gate_rows, up_rows)
        ctx.activation = activation
        return swiglu_forward(gate_rows, up_rows, activation).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        _, dgate, dup = swiglu_backward(as_rows(dh), gate, up, ctx.activation, keep_h=False)
        return dgate.view(dh.shape), dup.view(dh.shape), None


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Compute act(gate) * up, with gradients to both.

    gate, up: [..., M] float32, bfloat16 or float16, one dtype; the halves of one [..., 2 M] are not copied. activation:
    "silu", "gelu" or "gelu_pytorch_tanh". Returns [..., M] in their dtype. Raises ValueError on an unknown activation
    and on shapes, dtypes or devices that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation = {activation!r}: want one of {', '.join(ACTIVATIONS)}")
    check_args(
        "swiglu",
        gate.shape == up.shape and gate.dim() > 0 and gate.dtype == up.dtype,
        "gate and up [..., M] alike",
        gate=gate,
        up=up,
    )
    if on_gpu("swiglu", gate=gate, up=up):
        return _SwiGlu.apply(gate, up, activation)  # type: ignore[return-value]
    return swiglu_reference(gate, up, activation)
