"""Compute y += (x A^T) B^T of one adapter, in place, for decoding: few rows, projections side by side.

For projections that share x, with a [n r, K] their A stacked, and b [out, r] their B stacked, already scaled. x A^T has
too few tiles to fill a GPU, so K is split into parts, whose sums p are stored in fp32 and added in fixed order by the
kernel that multiplies with B: two launches, no atomics, two runs are bitwise equal. There is no gradient.

Bytes per row, with element size e: e (K + 2 out), and 8 n r per part of K; A and B once. Source: the sums in two
kernels as in `rlft.kernels.low_rank`; the formula is LoRA's (arXiv 2106.09685).

Names: T rows, n projections, r ranks, t, k, c, r indices of rows, columns of x, columns of y and ranks, s = x A^T.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from rlft.kernels.launch import KERNEL_DTYPES, check_args, kernel, launch, on_gpu, power_of_2, tl

MIN_RANK = 16
"""Least rank; ranks are powers of two, and an adapter of lower rank is padded with zeros."""
COLUMNS = 128
"""Columns of y per program."""
LEAST_SHARE, MOST_PARTS, PROGRAMS = 256, 32, 128
"""Least columns of x per part, most parts, and the number of programs that splitting aims at."""


def lora_add_reference(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int]) -> None:
    """Compute `lora_add` in plain PyTorch."""
    rank = b.shape[1]
    parts = (x @ a.T).split(rank, dim=1)
    for columns, s, matrix in zip(y.split(list(sizes), dim=1), parts, b.split(list(sizes)), strict=True):
        columns.addmm_(s, matrix.T)


@kernel(varying=("T",))
def _shrink(
    p,
    x,
    x_stride,
    a,
    T,
    K,
    share,
    RANKS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute p [parts, T, RANKS] = x a^T over each part's share of the columns."""
    part = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    live_t, live_r = t < T, r < RANKS
    acc = tl.zeros([BT, BR], tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, K), BK):
        k = start + tl.arange(0, BK)
        xt = tl.load(x + t[:, None] * x_stride + k[None, :], mask=live_t[:, None] & (k < K)[None, :], other=0.0)
        at = tl.load(a + r[:, None].to(tl.int64) * K + k[None, :], mask=live_r[:, None] & (k < K)[None, :], other=0.0)
        if WIDE:
            xt, at = xt.to(tl.float32), at.to(tl.float32)
        acc = tl.dot(xt, tl.trans(at), acc, input_precision="ieee")
    place = (part.to(tl.int64) * T + t)[:, None] * RANKS + r[None, :]
    tl.store(p + place, acc, mask=live_t[:, None] & live_r[None, :])


@kernel(varying=("T",))
def _expand(
    y,
    y_stride,
    p,
    b,
    T,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute y [T, out] += (sum of p over its parts) b^T. Tuples hold first tile, column and width per projection."""
    tile = tl.program_id(0)
    first, column, width, k0 = 0, 0, WIDTH[0], 0
    for i in tl.static_range(1, COUNT):  # type: ignore[reportGeneralTypeIssues]
        here = tile >= FIRST[i]
        first = tl.where(here, FIRST[i], first)
        column = tl.where(here, COLUMN[i], column)
        width = tl.where(here, WIDTH[i], width)
        k0 = tl.where(here, i * RANK, k0)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    c = (tile - first) * BC + tl.arange(0, BC)
    live_t, live_c = t < T, c < width
    update = tl.zeros([BT, BC], tl.float32)
    for k in tl.static_range(0, RANK, BR):  # type: ignore[reportGeneralTypeIssues]
        r = k + tl.arange(0, BR)
        s = tl.zeros([BT, BR], tl.float32)
        for start in tl.static_range(0, PARTS, TOGETHER):  # type: ignore[reportGeneralTypeIssues]
            part = (start + tl.arange(0, TOGETHER)).to(tl.int64)
            place = (part[:, None, None] * T + t[None, :, None]) * (COUNT * RANK) + (k0 + r)[None, None, :]
            s += tl.sum(tl.load(p + place, mask=live_t[None, :, None], other=0.0), axis=0)
        bt = tl.load(b + (column + c).to(tl.int64)[:, None] * RANK + r[None, :], mask=live_c[:, None], other=0.0)
        if WIDE:
            bt = bt.to(tl.float32)
        update = tl.dot(s.to(bt.dtype), tl.trans(bt), update, input_precision="ieee")
    place = t[:, None] * y_stride + (column + c)[None, :]
    live = live_t[:, None] & live_c[None, :]
    yt = tl.load(y + place, mask=live, other=0.0)
    tl.store(y + place, (yt.to(tl.float32) + update).to(yt.dtype), mask=live)


def lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int]) -> None:
    """Compute y [T, sum of sizes] += x a_i^T b_i^T for each projection i, side by side.

    x: [T, K], rows of any stride. a: [n r, K], b: [sum of sizes, r], contiguous, of x's dtype, r a power of two of at
    least 16. Raises ValueError on shapes or dtypes that do not fit.
    """
    T, out, count, rank = x.shape[0], sum(sizes), len(sizes), b.shape[1]
    check_args(
        "lora_add",
        x.dim() == 2
        and tuple(y.shape) == (T, out)
        and tuple(a.shape) == (count * rank, x.shape[1])
        and tuple(b.shape) == (out, rank)
        and rank >= MIN_RANK
        and rank == power_of_2(rank)
        and x.dtype in KERNEL_DTYPES
        and {y.dtype, a.dtype, b.dtype} == {x.dtype}
        and a.is_contiguous()
        and b.is_contiguous()
        and (not T or (x.stride(1) == 1 and y.stride(1) == 1)),
        f"x [T, K], y [T, {out}], a [{count * rank}, K], b [{out}, {rank}] of one dtype, {rank} a power of two >= 16",
        x=x,
        y=y,
        a=a,
        b=b,
    )
    if on_gpu("lora_add", y=y, x=x, a=a, b=b):
        lora_add_kernel(y, x, a, b, sizes)
    else:
        lora_add_reference(y, x, a, b, sizes)


def lora_add_kernel(y: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int]) -> None:
    """Launch the kernels of `lora_add`."""
    (T, K), (ranks, rank) = x.shape, (a.shape[0], b.shape[1])
    if not T:
        return
    BT = 16 if T <= 64 else 32 if T <= 1024 else 64
    BR = min(64, power_of_2(ranks))
    tiles = -(-T // BT) * -(-ranks // BR)
    most_parts = max(1, min(MOST_PARTS, -(-K // LEAST_SHARE), PROGRAMS // tiles))
    parts = 1 << (most_parts.bit_length() - 1)
    BK = 128 if x.element_size() == 2 else 64
    share = -(-K // (parts * BK)) * BK
    first = (0, *itertools.accumulate(-(-size // COLUMNS) for size in sizes))
    column = (0, *itertools.accumulate(sizes))
    # The interpreter's bf16 products are wrong, so operands are cast to fp32 there.
    wide = not x.is_cuda
    p = torch.empty(parts, T, ranks, dtype=torch.float32, device=x.device)
    launch(
        _shrink,
        (parts, -(-T // BT), -(-ranks // BR)),
        p,
        x,
        x.stride(0),
        a,
        T,
        K,
        share,
        RANKS=ranks,
        BT=BT,
        BK=BK,
        BR=BR,
        WIDE=wide,
        num_warps=4,
        num_stages=3,
    )
    launch(
        _expand,
        (first[-1], -(-T // BT)),
        y,
        y.stride(0),
        p,
        b,
        T,
        COUNT=len(sizes),
        FIRST=first,
        COLUMN=column,
        WIDTH=tuple(sizes),
        RANK=rank,
        PARTS=parts,
        TOGETHER=min(parts, 8 if BT == 16 else 2),
        BT=BT,
        BC=COLUMNS,
        BR=min(32, rank),
        WIDE=wide,
        num_warps=4,
    )
