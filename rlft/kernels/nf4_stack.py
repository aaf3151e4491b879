"""Decode the NF4 weights of all experts of a layer, or of those that have rows, in one launch.

A stack [E, N, K] is one NF4 matrix [E N, K] of `rlft.kernels.nf4`, with its formula and its bits. Here the output has a
stride between experts too, so that each is decoded into a buffer [N + tail, K + tail] with room for its adapter, and
blocks do not cross rows. With offsets [E + 1] int32 on the device (`rlft.kernels.route`) only experts with rows are
decoded: the grid has room for as many experts as there can be, and a program beyond them does nothing. Bytes per
element as there. In the kernels block counts the blocks of the whole stack, r is a row of an expert e.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlft.kernels.expert_tiles import bins, expert_tile, fits
from rlft.kernels.launch import check_args, jit, kernel, launch, on_gpu, tl
from rlft.kernels.nf4 import DTYPES, NF4_CODE, Nf4Weight, decode_reference

TILE, WARPS = 1024, 1
"""Elements that a warp decodes together: the fastest of the sweep for `rlft.kernels.nf4`."""
TILES = 8
"""Tiles per program where it has to find its expert first."""
ANY_ROWS = 2**30
"""More rows than an expert has, so that it is one tile or none."""


def bits_of(code: Sequence[float]) -> tuple[int, ...]:
    """Return the bits of fp32 numbers as int32: constants of a kernel lose the sign of -0."""
    return tuple(torch.tensor(code, dtype=torch.float32).view(torch.int32).tolist())


NF4_BITS = bits_of(NF4_CODE)


@jit
def look_up(index, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Return the fp32 number BITS[index] in the shape of the index, which has SIZE elements."""
    i = tl.arange(0, 16)
    bits = tl.zeros([16], tl.int32)
    for entry in tl.static_range(16):
        bits = tl.where(i == entry, BITS[entry], bits)
    return tl.reshape(tl.gather(bits.to(tl.float32, bitcast=True), tl.reshape(index, [SIZE]), 0), index.shape)


@jit
def block_scales(absmax, nested_code, nested_absmax, offset, block, live, NESTED: tl.constexpr):
    """Load the scales of blocks, fp32.

    NESTED: nested block size of `rlft.kernels.nf4`, compiled without fp fusion; 0: plain fp32; -1: the powers of two of
    `rlft.kernels.mxfp4`.
    """
    if NESTED == -1:
        e8m0 = tl.load(absmax + block, mask=live, other=127).to(tl.int32)
        # 2^-127 is subnormal, and 255 is NaN.
        bits = tl.where(e8m0 == 0, 0x400000, tl.where(e8m0 == 255, 0x7FC00000, e8m0 << 23))
        return bits.to(tl.float32, bitcast=True)
    elif NESTED:
        quantized = tl.load(absmax + block, mask=live, other=0).to(tl.int32)
        scale = tl.load(nested_absmax + block // NESTED, mask=live, other=0.0)
        return tl.load(nested_code + quantized) * scale + tl.load(offset)
    else:
        return tl.load(absmax + block, mask=live, other=0.0)


@kernel()
def decode_kernel(
    packed,
    absmax,
    nested_code,
    nested_absmax,
    offset,
    offsets,
    out,
    out_expert,
    out_row,
    N: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    BITS: tl.constexpr,
    FLIP: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ANY_ROWS: tl.constexpr,
):
    """Decode TILES tiles of an expert: of expert i, or with offsets of the i-th that has rows.

    Element j of eight is the nibble j ^ FLIP of a little-endian word: bitsandbytes has the first in the high one.
    """
    NB: tl.constexpr = TILE // BLOCK
    WORDS: tl.constexpr = BLOCK // 8
    BLOCKS: tl.constexpr = N * K // BLOCK
    PROGRAMS: tl.constexpr = (BLOCKS + NB * TILES - 1) // (NB * TILES)
    expert = tl.program_id(0) // PROGRAMS
    if offsets is not None:
        expert, first, stop, _ = expert_tile(expert, offsets, ANY_ROWS, EXPERTS, BINS)
        if first >= stop:
            return
    lane = tl.arange(0, 8)
    for i in range(TILES):
        inside = (tl.program_id(0) % PROGRAMS * TILES + i) * NB + tl.arange(0, NB)
        live = inside < BLOCKS
        block = expert.to(tl.int64) * BLOCKS + inside
        word = tl.arange(0, WORDS)[None, :]
        words = tl.load(
            packed + block[:, None] * WORDS + word, mask=live[:, None], other=0, eviction_policy="evict_first"
        )
        index = (words[:, :, None] >> ((lane ^ FLIP) * 4)[None, None, :]) & 15
        scale = block_scales(absmax, nested_code, nested_absmax, offset, block, live, NESTED)
        value = look_up(index, TILE, BITS) * scale[:, None, None]
        r = inside // (K // BLOCK)
        column = (inside % (K // BLOCK) * BLOCK)[:, None] + word * 8
        place = out + expert.to(tl.int64) * out_expert + r.to(tl.int64)[:, None] * out_row + column
        tl.store(
            place[:, :, None] + lane[None, None, :],
            value.to(out.dtype.element_ty),
            mask=live[:, None, None] & (lane >= 0)[None, None, :],
        )


def stack_pointers(weight: Nf4Weight) -> tuple[Tensor | None, ...]:
    """Return the tensors that kernels read: packed as int32, absmax, nested_code, nested_absmax, offset."""
    packed = weight.packed[: weight.numel // 2].view(torch.int32)
    return packed, weight.absmax, weight.nested_code, weight.nested_absmax, weight.offset


def check_stack(op: str, weight: Nf4Weight, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless the kernels read this weight as a stack [E, N, K]: rows of whole blocks, and on a GPU
    16-byte addresses."""
    check_args(
        op,
        weight.numel == shape[0] * shape[1] * shape[2]
        and weight.shape[-1] == shape[2]
        and shape[2] % weight.blocksize == 0
        and not (weight.packed.is_cuda and weight.packed.data_ptr() % 16),
        f"{shape[0]} experts of [{shape[1]}, {shape[2]}], rows of whole blocks of {weight.blocksize}; the weight has "
        f"shape {tuple(weight.shape)}",
        packed=weight.packed,
    )


def decode_launch(
    pointers: tuple[Tensor | None, ...], offsets: Tensor | None, out: Tensor, most: int, BLOCK: int, **constants: Any
) -> None:
    """Launch `decode_kernel`. most: experts that can have rows. constants: NESTED, BITS, FLIP."""
    experts, N, K = out.shape
    if not out.numel() or not most:
        return
    tile = max(TILE, BLOCK)
    tiles = 1 if offsets is None else TILES
    launch(
        decode_kernel,
        (most * -(-N * K // (tile * tiles)),),
        *pointers,
        offsets,
        out,
        out.stride(0),
        out.stride(1),
        N=N,
        K=K,
        EXPERTS=experts,
        BINS=bins(experts),
        BLOCK=BLOCK,
        **constants,
        TILE=tile,
        TILES=tiles,
        ANY_ROWS=ANY_ROWS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def decode_stack_launch(weight: Nf4Weight, out: Tensor, offsets: Tensor | None, most: int) -> None:
    """Compute `decode_stack` by the kernel. most: experts that can have rows."""
    nested = weight.nested_blocksize if weight.nested_code is not None else 0
    pointers = stack_pointers(weight)
    decode_launch(pointers, offsets, out, most, weight.blocksize, NESTED=nested, BITS=NF4_BITS, FLIP=1)


def check_out(op: str, out: Tensor, offsets: Tensor | None) -> None:
    """Raise ValueError unless `decode_kernel` writes this output."""
    check_args(
        op,
        out.dim() == 3
        and out.dtype in DTYPES
        and (out.stride(2) == 1 or out.shape[2] <= 1)
        and out.stride(0) % 8 == out.stride(1) % 8 == out.data_ptr() % 16 == 0
        and (offsets is None or fits(offsets, out.shape[0])),
        "out [E, N, K], bf16, fp16 or fp32, strides that are multiples of 8, and offsets [E + 1] int32",
        out=out,
        offsets=offsets,
    )


def copy_experts(decoded: Tensor, out: Tensor, offsets: Tensor | None) -> None:
    """Copy all experts, or those with rows, in plain PyTorch."""
    if offsets is None:
        out.copy_(decoded)
        return
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        if end > start:
            out[e] = decoded[e]


def decode_stack(weight: Nf4Weight, out: Tensor, offsets: Tensor | None = None, rows: int | None = None) -> None:
    """Decode a stack into out [E, N, K]: all experts, or with offsets only those that have rows.

    weight: of E N K elements in rows of K, K a multiple of its block size. out: bf16, fp16 or fp32; rows and experts at
    strides that are multiples of 8, the last dimension adjacent. offsets: [E + 1] int32 of `sort_by_expert`; other
    experts of out are left as they are. rows: their last, if the host knows it; the grid is then no larger than it has
    to be. Raises ValueError on shapes, dtypes, strides and devices that do not fit.
    """
    check_out("decode_stack", out, offsets)
    experts, N, K = out.shape
    check_stack("decode_stack", weight, (experts, N, K))
    if on_gpu("decode_stack", out=out, packed=weight.packed, offsets=offsets):
        decode_stack_launch(weight, out, offsets, experts if offsets is None or rows is None else min(rows, experts))
    else:
        copy_experts(decode_reference(weight, out.dtype).view(out.shape), out, offsets)
