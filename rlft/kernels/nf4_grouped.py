"""Products of few sorted rows with the NF4 weights of their experts, decoded inside the product: for sampling.

    y_m = x_m round(w_e)^T + bias_e          m in rows of e, w_e [N, K] as `rlft.kernels.nf4` decodes it

When an engine samples token by token, each expert has a few rows, and the time is that of reading its weights. The
4-bit weights of experts with rows are read once per tile of rows, K N / 2 bytes and their scales, and no decoded copy
is written. They are rounded to the dtype of x before the product, so that the engine multiplies with the bits that the
trainer decodes (`rlft.kernels.nf4_stack`), with fp32 sums. From about 64 rows per expert decoding once and
`rlft.kernels.grouped` do less work. Offsets stay on the device. There is no gradient. `rlft.kernels.mxfp4` has the same
product of its weights.

M rows of E experts e. In the kernel the weights are the left operand, since they come from registers: acc [BN, BM] is
y^T. m, n, k index rows, columns of y and columns of x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlft.kernels.expert_tiles import bins, expert_tile, fits, most_tiles
from rlft.kernels.grouped import grouped_reference
from rlft.kernels.launch import KERNEL_DTYPES, check_args, jit, kernel, launch, on_gpu, power_of_2, tl
from rlft.kernels.nf4 import Nf4Weight, decode_reference
from rlft.kernels.nf4_stack import NF4_BITS, block_scales, check_stack, look_up, stack_pointers


class Tile(NamedTuple):
    """Rows and columns of the product, depth of a step over K, warps, stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def nf4_grouped_reference(
    x: Tensor, weight: Nf4Weight, shape: tuple[int, int, int], offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute `nf4_grouped` in plain PyTorch; float64 x takes weights that are rounded to float32."""
    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    return grouped_reference(x, decode_reference(weight, dtype).view(shape).to(x.dtype), offsets, bias)


@jit
def _weights(
    packed,
    absmax,
    nested_code,
    nested_absmax,
    offset,
    row,
    start,
    live_n,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    BITS: tl.constexpr,
    FLIP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Decode BK columns of rows [BN] of the stack, from `start` on, to fp32; constants as `nf4_stack.decode_kernel`.

    Beyond K they are any finite numbers.
    """
    SCALES: tl.constexpr = BK // BLOCK
    lane = tl.arange(0, 8)
    word = start // 8 + tl.arange(0, BK // 8)
    live = live_n[:, None] & (word < K // 8)[None, :]
    words = tl.load(packed + row[:, None] * (K // 8) + word[None, :], mask=live, other=0)
    index = (words[:, :, None] >> ((lane ^ FLIP) * 4)[None, None, :]) & 15
    block = start // BLOCK + tl.arange(0, SCALES)
    live = live_n[:, None] & (block < K // BLOCK)[None, :]
    blocks = row[:, None] * (K // BLOCK) + block[None, :]
    scale = block_scales(absmax, nested_code, nested_absmax, offset, blocks, live, NESTED)
    value = tl.reshape(look_up(index, BN * BK, BITS), [BN, SCALES, BLOCK]) * scale[:, :, None]
    return tl.reshape(value, [BN, BK])


@kernel()
def _product(
    x,
    packed,
    absmax,
    nested_code,
    nested_absmax,
    offset,
    bias,
    offsets,
    out,
    x_stride,
    bias_stride,
    out_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    BITS: tl.constexpr,
    FLIP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute a tile of y. WIDE: as `rlft.kernels.low_rank`; compile without fp fusion."""
    expert, first, stop, _ = expert_tile(tl.program_id(1), offsets, BM, EXPERTS, BINS)
    if first < stop:
        m = first + tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        live_m, live_n = m < stop, n < N
        row = expert.to(tl.int64) * N + n
        acc = tl.zeros([BN, BM], tl.float32)
        for start in range(0, K, BK):
            wt = _weights(
                *(packed, absmax, nested_code, nested_absmax, offset, row, start, live_n),
                *(K, BLOCK, NESTED, BITS, FLIP, BN, BK),
            ).to(x.dtype.element_ty)
            k = start + tl.arange(0, BK)
            xt = tl.load(
                x + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=live_m[:, None] & (k < K)[None, :], other=0.0
            )
            if WIDE:
                xt, wt = xt.to(tl.float32), wt.to(tl.float32)
            acc = tl.dot(wt, tl.trans(xt), acc, input_precision="ieee")
        if bias is not None:
            acc += tl.load(bias + expert.to(tl.int64) * bias_stride + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
        place = out + m.to(tl.int64)[None, :] * out_stride + n[:, None]
        tl.store(place, acc.to(out.dtype.element_ty), mask=live_n[:, None] & live_m[None, :])


def tile_of(rows: int, element_size: int) -> Tile:
    """Choose the tile. rows: average per expert; those of one expert are often twice as many."""
    BM = max(16, min(64, power_of_2(2 * rows)))
    # Steps of 128 take all 255 registers of a thread, these 128: four programs share a multiprocessor.
    return Tile(BM, 64, 64, 4, 4) if element_size == 2 else Tile(min(32, BM), 32, 64, 4, 2)


def packed_launch(
    x: Tensor,
    pointers: tuple[Tensor | None, ...],
    offsets: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile | None,
    BLOCK: int,
    **constants: Any,
) -> Tensor:
    """Launch the kernel. pointers, BLOCK, constants: as `rlft.kernels.nf4_stack.decode_launch`."""
    M, K = x.shape
    experts, N = offsets.numel() - 1, out.shape[1]
    if not out.numel():
        return out
    tile = tile or tile_of(-(-M // experts), x.element_size())
    launch(
        _product,
        (-(-N // tile.columns), most_tiles(M, tile.rows, experts)),
        x,
        *pointers,
        bias,
        offsets,
        out,
        x.stride(0),
        0 if bias is None else bias.stride(0),
        out.stride(0),
        N=N,
        K=K,
        EXPERTS=experts,
        BINS=bins(experts),
        BLOCK=BLOCK,
        **constants,
        BM=tile.rows,
        BN=tile.columns,
        BK=max(tile.depth, BLOCK),
        WIDE=not x.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    return out


def nf4_grouped_launch(
    x: Tensor, weight: Nf4Weight, offsets: Tensor, bias: Tensor | None, out: Tensor, tile: Tile | None = None
) -> Tensor:
    """Compute `nf4_grouped` by the kernel."""
    nested = weight.nested_blocksize if weight.nested_code is not None else 0
    constants = {"NESTED": nested, "BITS": NF4_BITS, "FLIP": 1}
    return packed_launch(x, stack_pointers(weight), offsets, bias, out, tile, weight.blocksize, **constants)


def check_rows(op: str, x: Tensor, N: int, offsets: Tensor, out: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError unless rows, offsets, output and bias fit weights of N rows per expert."""
    experts = offsets.numel() - 1
    check_args(
        op,
        x.dim() == 2
        and experts >= 1
        and fits(offsets, experts)
        and (out is None or (tuple(out.shape) == (x.shape[0], N) and out.dtype == x.dtype))
        and (bias is None or (tuple(bias.shape) == (experts, N) and bias.dtype == x.dtype))
        and all(rows is None or rows.stride(1) == 1 or rows.shape[1] <= 1 for rows in (x, out, bias))
        and (not x.is_cuda or x.dtype in KERNEL_DTYPES),
        f"x [M, K] (float32, bfloat16 or float16 on a GPU), offsets [E + 1] int32, out [M, {N}] and bias [E, {N}] of "
        f"x's dtype, the last dimension adjacent",
        x=x,
        offsets=offsets,
        out=out,
        bias=bias,
    )


def nf4_grouped(
    x: Tensor, weight: Nf4Weight, offsets: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Compute y [M, N] = x w_e^T + bias_e from the packed weights, e the expert of each row.

    x: [M, K], sorted by expert, at most some 64 rows each. weight: of E N K elements in rows of K, in blocks of 32, 64
    or 128 that divide K. offsets: [E + 1] int32 of `sort_by_expert`. out: [M, N] of x's dtype to write to, or None.
    bias: [E, N] or None. Rows of x, out and bias may have any stride. Raises ValueError on shapes and dtypes that do
    not fit.
    """
    experts = max(1, offsets.numel() - 1)
    N = weight.numel // (experts * max(1, x.shape[-1]))
    check_rows("nf4_grouped", x, N, offsets, out, bias)
    check_stack("nf4_grouped", weight, (experts, N, x.shape[1]))
    if weight.blocksize > 128:
        raise ValueError(f"nf4_grouped: want weights in blocks of at most 128, got blocks of {weight.blocksize}")
    if on_gpu("nf4_grouped", x=x, packed=weight.packed, offsets=offsets, out=out, bias=bias):
        return nf4_grouped_launch(x, weight, offsets, bias, x.new_empty(x.shape[0], N) if out is None else out)
    y = nf4_grouped_reference(x, weight, (experts, N, x.shape[1]), offsets, bias)
    return y if out is None else out.copy_(y)
