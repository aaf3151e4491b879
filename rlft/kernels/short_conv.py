"""Causal depthwise convolution of a few rows over packed sequences, optionally with SiLU, forward and backward.

    z_t = b + sum_j w_(K-1-j) x_(t-j),  0 <= j < K         y = z, or z s(z) with s(z) = 1 / (1 + exp(-z))

    dz = dy, or dy s(z) (1 + z (1 - s(z)))                 dx_t = sum_j w_(K-1-j) dz_(t+j)

x_(t-j) is the row j places before t in the same sequence. Before the first row of a sequence are the last rows of its
prefix, if it continues one, and zeros otherwise; so the last K - 1 rows of a prefix get gradients from all sequences
that continue it. They are summed in one program, in the order of the sequences: two runs are bitwise equal. Weight and
bias are frozen. This is the convolution in front of Gated DeltaNet (arXiv 2412.06464) and in LFM2's blocks; with zeros
before each sequence it is causal_conv1d_fn of transformers.

Sums are fp32 with one rounding. The backward computes z again, from rows that are in the cache, so that x is all that
is saved. Bytes per element of a 2-byte dtype: forward 4, backward 6.

S sequences, T rows, C channels, K taps of the kernel, j a distance in rows, t a row
or their number, x [T, C], w [C, K] and b [C].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.launch import KERNEL_DTYPES, check_args, jit, kernel, launch, on_gpu, power_of_2, tl

MAX_K = 4
"""Most taps."""
ACTIVATIONS = (None, "silu")
WANTED = f"x [T, C], weight [C, K], bias [C] of one dtype (float32, bfloat16 or float16), 2 <= K <= {MAX_K}"


class ConvRows(NamedTuple):
    """Where the sequence of each row begins and ends, and which sequences continue it."""

    sequence: Tensor
    """[T] int32: the sequence of each row."""
    bounds: Tensor
    """[S, 6] int32: first row and end of the sequence, first row and end of its prefix (0, 0: none), first and end of
    the entries of `continued` that continue it."""
    continued: Tensor
    """[S, 2] int32: first row and end of each sequence, grouped by prefix."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, prefix: Tensor, rows: int) -> ConvRows:
        """Build from [S + 1] and [S] integers on the device of the rows, without waiting for it."""
        cu, prefix = cu_seqlens.long(), prefix.long()
        starts, ends = cu[:-1].contiguous(), cu[1:].contiguous()
        sequence = torch.searchsorted(ends, torch.arange(rows, device=cu.device), right=True)
        zero, parent = torch.zeros_like(starts), prefix.clamp(min=0)
        ordered, order = prefix.sort(stable=True)
        each = torch.arange(prefix.numel(), device=cu.device)
        bounds = [
            starts,
            ends,
            torch.where(prefix >= 0, starts[parent], zero),
            torch.where(prefix >= 0, ends[parent], zero),
            torch.searchsorted(ordered, each),
            torch.searchsorted(ordered, each, right=True),
        ]
        continued = torch.stack([starts[order], ends[order]], dim=1)
        return cls(sequence.int(), torch.stack(bounds, dim=1).int(), continued.int())


def short_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, prefix: Tensor, activation: str | None = None
) -> Tensor:
    """Compute the formula in plain PyTorch, one sequence at a time. Arguments as `short_conv`."""
    bounds, outs = cu_seqlens.tolist(), []
    width = weight.shape[1]
    for i, parent in enumerate(prefix.tolist()):
        rows = x[bounds[i] : bounds[i + 1]]
        if not rows.shape[0]:
            continue
        first = bounds[parent + 1] - width + 1
        tail = x[max(bounds[parent], first) : bounds[parent + 1]] if parent >= 0 else x[:0]
        padded = F.pad(torch.cat([tail, rows]), (0, 0, width - 1 - tail.shape[0], 0))
        outs.append(F.conv1d(padded.T[None], weight[:, None], bias, groups=x.shape[1])[0].T)
    out = torch.cat(outs) if outs else x
    return F.silu(out) if activation == "silu" else out


# In the helpers `inputs` is (x, w, b, stride of x), and `place` is (first row, first row of the prefix and its end) of
# the sequence of each row.


@jit
def _sums(rows, live, place, cols, inputs, C: tl.constexpr, K: tl.constexpr):
    """Compute z [ROWS, BLOCK] in fp32."""
    x_ptr, w_ptr, b_ptr, stride_x = inputs
    start, tail, tail_end = place
    inside = cols < C
    z = tl.zeros([rows.shape[0], cols.shape[1]], tl.float32)
    if b_ptr is not None:
        z += tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(K):  # type: ignore[reportGeneralTypeIssues]
        row = rows - j
        here = row >= start
        row = tl.where(here, row, tail_end - start + row)
        read = live & (here | (row >= tail))
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride_x + cols, mask=read[:, None] & inside, other=0.0)
        z += tl.load(w_ptr + cols * K + (K - 1 - j), mask=inside, other=0.0).to(tl.float32) * x.to(tl.float32)
    return z


@jit
def _slopes(rows, live, place, cols, dy_ptr, stride_dy, inputs, C: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr):
    """Compute dz [ROWS, BLOCK] in fp32."""
    at = rows.to(tl.int64)[:, None] * stride_dy + cols
    dz = tl.load(dy_ptr + at, mask=live[:, None] & (cols < C), other=0.0).to(tl.float32)
    if ACT:
        z = _sums(rows, live, place, cols, inputs, C, K)
        s = 1.0 / (1.0 + tl.exp(-z))
        dz *= s * (1.0 + z * (1.0 - s))
    return dz


@jit
def _places(sequence_ptr, bounds_ptr, T, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return rows, columns and which rows exist, of a program; the line of the bounds of each row, and `place`."""
    PARTS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    rows = program // PARTS * ROWS + tl.arange(0, ROWS)
    cols = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = rows < T
    bounds = bounds_ptr + tl.load(sequence_ptr + rows, mask=live, other=0) * 6
    start = tl.load(bounds, mask=live, other=0)
    place = (start, tl.load(bounds + 2, mask=live, other=0), tl.load(bounds + 3, mask=live, other=0))
    return rows, cols, live, bounds, place


@kernel(varying=("T",))
def forward_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    sequence_ptr,
    bounds_ptr,
    T,
    stride_x,
    stride_y,
    C: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, cols, live, _, place = _places(sequence_ptr, bounds_ptr, T, C, BLOCK, ROWS)
    z = _sums(rows, live, place, cols, (x_ptr, w_ptr, b_ptr, stride_x), C, K)
    if ACT:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * stride_y + cols, z, mask=live[:, None] & (cols < C))


@kernel(varying=("T",))
def backward_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    b_ptr,
    dx_ptr,
    sequence_ptr,
    bounds_ptr,
    continued_ptr,
    T,
    stride_dy,
    stride_x,
    stride_dx,
    C: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, cols, live, bounds, place = _places(sequence_ptr, bounds_ptr, T, C, BLOCK, ROWS)
    start, end, inside = place[0], tl.load(bounds + 1, mask=live, other=0), cols < C
    inputs = (x_ptr, w_ptr, b_ptr, stride_x)
    dx = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in tl.static_range(K):  # type: ignore[reportGeneralTypeIssues]
        dz = _slopes(rows + j, live & (rows + j < end), place, cols, dy_ptr, stride_dy, inputs, C, K, ACT)
        dx += tl.load(w_ptr + cols * K + (K - 1 - j), mask=inside, other=0.0).to(tl.float32) * dz
    # The last rows of a prefix: what the first rows of the sequences behind it read. No others enter the loop.
    last = live & (rows + K > end)
    first = tl.load(bounds + 4, mask=last, other=0)
    count = tl.load(bounds + 5, mask=last, other=0) - first
    for i in range(tl.max(count, 0)):
        reads = i < count
        child = tl.load(continued_ptr + (first + i) * 2, mask=reads, other=0)
        child_end = tl.load(continued_ptr + (first + i) * 2 + 1, mask=reads, other=0)
        for ahead in tl.static_range(K - 1):  # type: ignore[reportGeneralTypeIssues]
            row, tap = child + ahead, K - 1 - (end - rows + ahead)
            near = reads & (tap >= 0) & (row < child_end)
            dz = _slopes(row, near, (child, start, end), cols, dy_ptr, stride_dy, inputs, C, K, ACT)
            w = tl.load(w_ptr + cols * K + tap[:, None], mask=near[:, None] & inside, other=0.0)
            dx += w.to(tl.float32) * dz
    tl.store(dx_ptr + rows.to(tl.int64)[:, None] * stride_dx + cols, dx, mask=live[:, None] & inside)


@cache
def launch_shape(channels: int) -> tuple[int, int, int]:
    """Return (columns, rows, warps) of a program: rows that share their neighbours in the cache. Not yet measured."""
    block = min(128, power_of_2(channels))
    return block, 2048 // block, 4


def _check_activation(op: str, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation = {activation!r}: want one of {', '.join(map(repr, ACTIVATIONS))}")


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Check what WANTED describes, but for the dtype of x."""
    ok = x.dim() == 2 and weight.dim() == 2 and weight.shape[0] == x.shape[1] and 2 <= weight.shape[1] <= MAX_K
    return ok and weight.dtype == x.dtype and (bias is None or (bias.shape == x.shape[1:] and bias.dtype == x.dtype))


def _check(op: str, weight: Tensor, bias: Tensor | None, x: Tensor, activation: str | None, **more: Tensor) -> None:
    """Raise ValueError for an unknown activation and tensors that the kernels do not take."""
    _check_activation(op, activation)
    ok = _fits(x, weight, bias) and x.dtype in KERNEL_DTYPES and x.stride(1) == 1
    ok = ok and weight.is_contiguous() and (bias is None or bias.is_contiguous())
    for other in more.values():
        ok = ok and other.shape == x.shape and other.dtype == x.dtype and other.stride(1) == 1
    check_args(op, ok, f"{WANTED}, adjacent columns", x=x, weight=weight, bias=bias, **more)


def _launch(
    function: Any, wide: Sequence[Tensor], pointers: Sequence[Tensor | None], taps: int, activation: str | None
) -> None:
    """Launch a kernel over the rows and columns of `wide`, the [T, C] tensors of `pointers` in their order."""
    t, channels = wide[0].shape
    block, height, warps = launch_shape(channels)
    grid = (-(-t // height) * -(-channels // block),)
    constants = (channels, taps, activation == "silu", block, height)
    launch(function, grid, *pointers, t, *(each.stride(0) for each in wide), *constants, num_warps=warps)


def short_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: ConvRows, activation: str | None = None
) -> Tensor:
    """Launch the forward. Returns y [T, C], contiguous.

    x: [T, C], columns adjacent, any row stride. weight: [C, K] and bias [C], contiguous, of x's dtype. rows: as
    `ConvRows.of` builds them once for all layers.
    """
    _check("short_conv_forward", weight, bias, x, activation)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        pointers = (x, weight, bias, y, rows.sequence, rows.bounds)
        _launch(forward_kernel, (x, y), pointers, weight.shape[1], activation)
    return y


def short_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: ConvRows, activation: str | None = None
) -> Tensor:
    """Launch the backward. Returns dx [T, C], contiguous. dy: [T, C]; the rest as in the forward."""
    _check("short_conv_backward", weight, bias, x, activation, dy=dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        pointers = (dy, x, weight, bias, dx, rows.sequence, rows.bounds, rows.continued)
        _launch(backward_kernel, (dy, x, dx), pointers, weight.shape[1], activation)
    return dx


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows, activation):  # type: ignore[override]
        x = x if x.stride(1) == 1 else x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.rest = (rows, activation)
        return short_conv_forward(x, weight, bias, rows, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        return short_conv_backward(dy, *ctx.saved_tensors, *ctx.rest), None, None, None, None


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, prefix: Tensor, activation: str | None = None
) -> Tensor:
    """Convolve each channel with the K - 1 rows before each row, with gradient to x.

    x: [T, C] float32, bfloat16 or float16. weight: [C, K], 2 <= K <= 4, and bias [C] or None, the same dtype, frozen;
    weight[:, K - 1] is the factor of the row itself. cu_seqlens: [S + 1] integers: sequence s is rows cu_seqlens[s] to
    cu_seqlens[s + 1]. prefix: [S] integers: the sequence that each one continues, which has no prefix itself; -1 for
    none. activation: None or "silu". Returns [T, C] in x's dtype. Deterministic. Raises ValueError on an unknown
    activation, on shapes, dtypes or devices that do not fit, and on a weight or bias that requires a gradient.
    """
    op = "short_conv"
    _check_activation(op, activation)
    ok = _fits(x, weight, bias)
    ok = ok and cu_seqlens.dim() == prefix.dim() == 1 and cu_seqlens.numel() == prefix.numel() + 1
    wanted = f"{WANTED}; cu_seqlens [S + 1], prefix [S]"
    check_args(op, ok, wanted, x=x, weight=weight, bias=bias, cu_seqlens=cu_seqlens, prefix=prefix)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(f"{op}: weight or bias requires a gradient: both are frozen here")
    if on_gpu(op, x=x, weight=weight, bias=bias, cu_seqlens=cu_seqlens, prefix=prefix):
        rows = ConvRows.of(cu_seqlens, prefix, x.shape[0])
        bias = None if bias is None else bias.contiguous()
        return _ShortConv.apply(x, weight.contiguous(), bias, rows, activation)  # type: ignore[return-value]
    return short_conv_reference(x, weight, bias, cu_seqlens, prefix, activation)
