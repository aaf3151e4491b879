"""Products of sorted rows with the weights of their experts, forward and backward.

Rows lie expert by expert; offsets [E + 1] int32 on the device say where (`rlft.kernels.route`). For each row m of e:

    grouped              y_m  = x_m w_e^T + bias_e
    grouped_transposed   dx_m = dy_m w_e

LoRA takes no extra pass over y or dx, by K-concatenation as in `rlft.kernels.lora`: of a buffer [E, N + tail, K + tail]
with w_e upper left, scale B_e upper right and A_e lower left, all products are these two on views of it,

    S  = x A^T               grouped(x, buffer[:, N:, :K], offsets, out=tail of x)
    y  = [x, S] [w, B]^T     grouped([x, S], buffer[:, :N], offsets)
    dS = dy B                grouped_transposed(dy, buffer[:, :N, K:], offsets, out=tail of dy)
    dx = [dy, dS] [w ; A]    grouped_transposed([dy, dS], buffer[:, :, :K], offsets)

and `rlft.kernels.grouped_gradient` gives dA and dB. Two back ends: torch.nn.functional.grouped_mm where rows and
weights are large on Hopper, and a Triton kernel for the rest, which also writes rows of any stride and adds a bias.
Both accumulate in fp32 and never wait for the offsets. Operations: 2 M N K; bytes: x, y and the weights of experts with
rows, once each where they fit the L2 cache. In the kernel m, n, k index rows, columns and what is summed over.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.kernels.expert_tiles import bins, expert_tile, fits, most_tiles
from rlft.kernels.launch import KERNEL_DTYPES, check_args, kernel, launch, on_gpu, power_of_2, tl


class Tile(NamedTuple):
    """Tile of the product [rows, columns], depth of a step over the inner dimension, warps, stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TOGETHER = 8
"""Tiles of rows that run through the columns together, so that weights are read from the L2 cache."""
LEAST_ROWS, LEAST_INNER, LEAST_OUTER = 192, 512, 256
"""Average rows per expert and dimensions of w from which grouped_mm is taken. On an H200 it is slower at 128 rows and
faster at 256 (benchmarks/kernels_experts.py)."""


def grouped_reference(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `grouped` in plain PyTorch, an expert after the other; differentiable."""
    out = x.new_zeros(len(x), w.shape[1])
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        if end > start:
            rows = x[start:end]
            out[start:end] = rows @ w[e].T if bias is None else torch.addmm(bias[e], rows, w[e].T)
    return out


def grouped_transposed_reference(dy: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Compute `grouped_transposed` in plain PyTorch."""
    return grouped_reference(dy, w.transpose(1, 2), offsets)


@kernel(varying=("T",))
def _product(
    x,
    w,
    bias,
    offsets,
    out,
    T,
    x_stride,
    w_expert,
    w_inner,
    w_outer,
    bias_stride,
    out_stride,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute a tile [BM, BN] of x w_e, w_e [INNER, OUTER] by its strides. T: most tiles of rows; WIDE: as low_rank."""
    COLUMNS: tl.constexpr = (OUTER + BN - 1) // BN
    program = tl.program_id(0)
    first_tile = program // (TOGETHER * COLUMNS) * TOGETHER
    beside = tl.minimum(T - first_tile, TOGETHER)
    within = program % (TOGETHER * COLUMNS)
    expert, first, stop, _ = expert_tile(first_tile + within % beside, offsets, BM, EXPERTS, BINS)
    if first < stop:
        m = first + tl.arange(0, BM)
        n = within // beside * BN + tl.arange(0, BN)
        live_m, live_n = m < stop, n < OUTER
        x_rows = x + m.to(tl.int64)[:, None] * x_stride
        w_columns = w + expert.to(tl.int64) * w_expert + n.to(tl.int64)[None, :] * w_outer
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, INNER, BK):
            k = start + tl.arange(0, BK)
            if INNER % BK == 0:
                xt = tl.load(x_rows + k[None, :], mask=live_m[:, None], other=0.0)
                wt = tl.load(w_columns + k.to(tl.int64)[:, None] * w_inner, mask=live_n[None, :], other=0.0)
            else:
                live_k = k < INNER
                xt = tl.load(x_rows + k[None, :], mask=live_m[:, None] & live_k[None, :], other=0.0)
                wt = tl.load(
                    w_columns + k.to(tl.int64)[:, None] * w_inner, mask=live_k[:, None] & live_n[None, :], other=0.0
                )
            if WIDE:
                xt, wt = xt.to(tl.float32), wt.to(tl.float32)
            acc = tl.dot(xt, wt, acc, input_precision="ieee")
        if bias is not None:
            acc += tl.load(bias + expert.to(tl.int64) * bias_stride + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
        place = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


def tile_of(rows: int, outer: int, element_size: int, rows_adjacent: bool) -> Tile:
    """Choose the tile of the Triton kernel.

    rows: average per expert. outer: columns of the product. rows_adjacent: w is adjacent along the columns of the
    product, as in `grouped_transposed`.
    """
    most = 64 if element_size == 4 else 128
    BM, BN = (max(16, min(most, power_of_2(size))) for size in (rows, outer))
    if element_size == 4:
        return Tile(BM, BN, 32, 4, 2)
    if rows_adjacent and BN < 64:
        # Rows of less than 128 bytes in shared memory: two warps take no wgmma, whose descriptors ptxas gets wrong.
        return Tile(BM, BN, 64, 2, 3)
    return Tile(BM, BN, 64, 8 if BM * BN > 8192 else 4, 3)


def grouped_launch(
    x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor, tile: Tile | None = None
) -> Tensor:
    """Compute out = x w_e by the Triton kernel. w: [E, inner, outer] by any strides, one of the last two being 1."""
    (M, inner), (experts, _, outer) = x.shape, w.shape
    if not out.numel():
        return out
    if not inner:
        return out.zero_() if bias is None else out.copy_(grouped_reference(x, w.transpose(1, 2), offsets, bias))
    tile = tile or tile_of(-(-M // experts), outer, x.element_size(), w.stride(2) == 1 != w.stride(1))
    row_tiles = most_tiles(M, tile.rows, experts)
    launch(
        _product,
        (row_tiles * -(-outer // tile.columns),),
        x,
        w,
        bias,
        offsets,
        out,
        row_tiles,
        x.stride(0),
        *w.stride(),
        0 if bias is None else bias.stride(0),
        out.stride(0),
        INNER=inner,
        OUTER=outer,
        EXPERTS=experts,
        BINS=bins(experts),
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        TOGETHER=TOGETHER,
        WIDE=not x.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def by_grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None) -> Tensor:
    """Compute x w_e by PyTorch's grouped_mm; w [E, inner, outer]. An out that is given takes a copy of the result."""
    y = F.grouped_mm(x, w, offs=offsets[1:])
    return y if out is None else out.copy_(y)


def takes_grouped_mm(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Return whether grouped_mm computes this product: bf16 on Hopper, addresses and strides of 16 bytes, large enough.

    On other cards grouped_mm copies the offsets to the host, which would wait for the device.
    """
    (M, inner), (experts, _, outer) = x.shape, w.shape
    strides = (x.stride(0), *(stride for stride in w.stride() if stride != 1))
    return (
        bias is None
        and x.dtype == torch.bfloat16
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and M // experts >= LEAST_ROWS
        and inner >= LEAST_INNER
        and outer >= LEAST_OUTER
        and inner % 8 == outer % 8 == 0
        and all(stride % 8 == 0 for stride in strides)
        and x.data_ptr() % 16 == w.data_ptr() % 16 == 0
    )


def _compute(op: str, x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """Compute x w_e by device and shape; w [E, inner, outer]."""
    if not on_gpu(op, x=x, w=w, offsets=offsets, bias=bias, out=out):
        y = grouped_reference(x, w.transpose(1, 2), offsets, bias)
        return y if out is None else out.copy_(y)
    check_args(op, x.dtype in KERNEL_DTYPES, "float32, bfloat16 or float16 on a GPU", x=x)
    if takes_grouped_mm(x, w, bias):
        return by_grouped_mm(x, w, offsets, out)
    return grouped_launch(x, w, offsets, bias, x.new_empty(x.shape[0], w.shape[2]) if out is None else out)


def _adjacent(tensor: Tensor | None) -> bool:
    """Return whether the last dimension is adjacent in memory."""
    return tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1


def grouped(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Compute y [M, N] = x w_e^T + bias_e, e the expert of each row.

    x: [M, K], sorted by expert. w: [E, N, K] of x's dtype. offsets: [E + 1] int32 of `sort_by_expert`, the last of them
    M. out: [M, N] to write to, or None. bias: [E, N] or None, added before y is rounded. Rows of all tensors may have
    any stride, so that views of buffers with a tail fit; multiples of 8 elements are read fastest. w may be
    transposed. Raises ValueError on shapes and dtypes that do not fit.
    """
    _check("grouped", x, w, offsets, 2, out, bias)
    return _compute("grouped", x, w.transpose(1, 2), offsets, bias, out)


def grouped_transposed(dy: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute dx [M, K] = dy w_e, e the expert of each row: the backward of `grouped`.

    dy: [M, N], sorted by expert. Other arguments and errors as `grouped`; out: [M, K].
    """
    _check("grouped_transposed", dy, w, offsets, 1, out, None)
    return _compute("grouped_transposed", dy, w, offsets, None, out)


def _check(op: str, x: Tensor, w: Tensor, offsets: Tensor, inner: int, out: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError for arguments that do not fit. inner: the dimension of w that is summed over."""
    ok = x.dim() == 2 and w.dim() == 3 and w.shape[0] >= 1 and fits(offsets, w.shape[0])
    shape = (x.shape[0], w.shape[3 - inner]) if ok else ()
    check_args(
        op,
        ok
        and x.shape[1] == w.shape[inner]
        and x.dtype == w.dtype
        and (out is None or (tuple(out.shape) == shape and out.dtype == x.dtype))
        and (bias is None or (tuple(bias.shape) == tuple(w.shape[:2]) and bias.dtype == x.dtype))
        and all(map(_adjacent, (x, out, bias)))
        and (_adjacent(w) or _adjacent(w.mT)),
        f"rows [M, {'NK'[inner - 1]}], w [E, N, K], offsets [E + 1] int32, out [M, {'KN'[inner - 1]}], bias [E, N], of "
        f"one dtype, the last dimension adjacent (of w, one of the last two)",
        rows=x,
        w=w,
        offsets=offsets,
        out=out,
        bias=bias,
    )
