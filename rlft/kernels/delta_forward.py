"""The gated delta rule's forward in three kernels: per chunk, over the chunks of a sequence, and per chunk again.

The formulae and names are those of `delta_chunks`.

    prepare   G, the factors of q and k, and M, for each chunk and head of v
    walk      n, and the state before each chunk: one program for each sequence, head and block of columns of the state,
              which holds it in fp32. One launch for the sequences without prefix, one for those that continue them
    outputs   o, for each chunk, head and block of columns

M is found by substitution in its four diagonal blocks of 16 rows at once, which gives B, and from B and the blocks
below, L = B A, as (I + L)^-1 B = (I - L) (I + L^2) B, exact since L^4 = 0. This takes four products and 15 steps
instead of 63, and no power above the third, whose entries would grow.

q and k enter every product as they are; their lengths, like exp(G), are factors of rows, applied in fp32. Operands of
products have the dtype of the inputs, sums are fp32; fp32 operands are split in three TF32 ("tf32x3"), which has the
error of fp32. Bytes per row and head of a 2-byte dtype: 2 (Hk / Hv) (Dk + Dk) + 4 Dv for q, k, v, o, twice 2 Dv + 128
for n and M, and 4 Dk Dv / 64 for the states.

t: number of rows; n, h, d, e: a chunk, a head of v, rows and columns of its state; D: a head's size; g, a, b, x as in
the formulae or any tile; r: a row of a block. DK, DV: sizes of heads; BK: DK rounded up to a power of two; BV: columns
of a block; C: rows of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlft.kernels.delta_chunks import CHUNK, NORM_EPS, Chunks
from rlft.kernels.launch import jit, kernel, launch, power_of_2, tl


class Prepared(NamedTuple):
    """Results of the first kernel."""

    sums: Tensor
    """G, [T, Hv] fp32."""
    q_factor: Tensor
    """[T, Hk] fp32: the scale, divided by the length of q if that is normalised."""
    k_factor: Tensor
    """[T, Hk] fp32: likewise, without the scale."""
    inverse: Tensor
    """M, [N, Hv, C, C], dtype of the inputs."""


@jit
def dot(a, b):
    """Multiply two tiles of one dtype and sum in fp32."""
    return tl.dot(a, b, input_precision="tf32x3")


@jit
def tile(pointer, rows, live, stride, first, d, D: tl.constexpr):
    """Load [rows, d] of a head that begins at column `first`; 0 outside."""
    at = rows.to(tl.int64)[:, None] * stride + (first + d)[None, :]
    return tl.load(pointer + at, mask=live[:, None] & (d < D)[None, :], other=0.0)


@jit
def put(pointer, rows, live, stride, first, d, D: tl.constexpr, value):
    """Store [rows, d] of a head that begins at column `first`; nothing outside."""
    at = rows.to(tl.int64)[:, None] * stride + (first + d)[None, :]
    tl.store(pointer + at, value, mask=live[:, None] & (d < D)[None, :])


@jit
def column(pointer, rows, live, stride, h):
    """Load one number for each row, as fp32; 0 outside."""
    return tl.load(pointer + rows.to(tl.int64) * stride + h, mask=live, other=0.0).to(tl.float32)


@jit
def decays(sums, live, C: tl.constexpr):
    """Compute E [C, C]; beyond the end of the sequence only the diagonal is not 0."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    causal = (i >= j) & live[:, None]
    # The mask comes first: above the diagonal the exponent is positive and may overflow.
    return tl.where(causal, tl.exp(tl.where(causal, sums[:, None] - sums[None, :], 0.0)), 0.0)


@jit
def products(a_ptr, stride_a, first_a, b_ptr, stride_b, first_b, rows, live, DK: tl.constexpr, C: tl.constexpr):
    """Compute a b^T [C, C] for the rows of a chunk, and the squared lengths [C] of the rows of a."""
    scores, squares = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for start in range(0, DK, 64):
        d = start + tl.arange(0, 64)
        a = tile(a_ptr, rows, live, stride_a, first_a, d, DK)
        scores += dot(a, tl.trans(tile(b_ptr, rows, live, stride_b, first_b, d, DK)))
        squares += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
    return scores, squares


@jit
def _inverse(scores, C: tl.constexpr, PRECISION: tl.constexpr):
    """Compute (I + A)^-1 for A [C, C], which is 0 on and above the diagonal; see the head of the file."""
    B: tl.constexpr = C // 16
    block, i = tl.arange(0, B), tl.arange(0, 16)
    same = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(scores, [B, 16, B, 16]), 0.0), axis=2)
    x = tl.where(i[None, :, None] == i[None, None, :], 1.0, 0.0) + tl.zeros([B, 16, 16], tl.float32)
    for r in range(1, 16):
        here = i[None, :, None] == r
        row = tl.sum(tl.where(here, diagonal, 0.0), axis=1)
        x -= tl.where(here, tl.sum(row[:, :, None] * x, axis=1)[:, None, :], 0.0)
    near = tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [C, C])
    rows, cols = tl.arange(0, C)[:, None] // 16, tl.arange(0, C)[None, :] // 16
    low = tl.dot(near, tl.where(rows == cols, 0.0, scores), input_precision=PRECISION)
    both = tl.dot(tl.dot(low, low, input_precision=PRECISION), near, near, input_precision=PRECISION)
    return both - tl.dot(low, both, input_precision=PRECISION)


@kernel()
def prepare_kernel(
    q_ptr,
    k_ptr,
    g_ptr,
    beta_ptr,
    rows_ptr,
    sums_ptr,
    q_factor_ptr,
    k_factor_ptr,
    inverse_ptr,
    stride_q,
    stride_k,
    stride_g,
    stride_beta,
    scale,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    C: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    n, h = tl.program_id(0) // HV, tl.program_id(0) % HV
    hk = h // (HV // HK)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    rows = tl.load(rows_ptr + 2 * n) + tl.arange(0, C)
    live = rows < tl.load(rows_ptr + 2 * n + 1)
    g = column(g_ptr, rows, live, stride_g, h)
    sums = tl.sum(tl.where(i >= j, g[None, :], 0.0), axis=1)
    tl.store(sums_ptr + rows.to(tl.int64) * HV + h, sums, mask=live)
    scores, squares = products(k_ptr, stride_k, hk * DK, k_ptr, stride_k, hk * DK, rows, live, DK, C)
    k_factor = tl.rsqrt(squares + EPS) if L2NORM else tl.full([C], 1.0, tl.float32)
    if h % (HV // HK) == 0:
        at = rows.to(tl.int64) * HK + hk
        tl.store(k_factor_ptr + at, k_factor, mask=live)
        q_factor = tl.full([C], 1.0, tl.float32)
        if L2NORM:
            squares = tl.zeros([C], tl.float32)
            for start in range(0, DK, 64):
                q = tile(q_ptr, rows, live, stride_q, hk * DK, start + tl.arange(0, 64), DK).to(tl.float32)
                squares += tl.sum(q * q, axis=1)
            q_factor = tl.rsqrt(squares + EPS)
        tl.store(q_factor_ptr + at, scale * q_factor, mask=live)
    factor = column(beta_ptr, rows, live, stride_beta, h) * k_factor
    scores *= factor[:, None] * k_factor[None, :] * decays(sums, live, C)
    # A product in TF32 has four times the precision of bf16, to which M is rounded.
    PRECISION: tl.constexpr = "tf32" if k_ptr.dtype.element_ty == tl.bfloat16 else "tf32x3"
    inverse = _inverse(tl.where(i > j, scores, 0.0), C, PRECISION)
    tl.store(inverse_ptr + tl.program_id(0).to(tl.int64) * C * C + i * C + j, inverse)


@kernel()
def walk_kernel(
    k_ptr,
    v_ptr,
    beta_ptr,
    sums_ptr,
    k_factor_ptr,
    inverse_ptr,
    states_ptr,
    new_ptr,
    finals_ptr,
    table,
    stride_k,
    stride_v,
    stride_beta,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    PARTS: tl.constexpr = (DV + BV - 1) // BV
    h = tl.program_id(0) // PARTS % HV
    hk = h // (HV // HK)
    table += tl.program_id(0) // (PARTS * HV) * 8
    start, end, first, count = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    before, after = tl.load(table + 4), tl.load(table + 5)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    d, e = tl.arange(0, BK), tl.program_id(0) % PARTS * BV + tl.arange(0, BV)
    inside = (d < DK)[:, None] & (e < DV)[None, :]
    at = d[:, None] * DV + e[None, :]
    state = tl.load(finals_ptr + (before.to(tl.int64) * HV + h) * DK * DV + at, mask=inside & (before >= 0), other=0.0)
    for b in range(count):
        place = (first + b).to(tl.int64) * HV + h
        tl.store(states_ptr + place * DK * DV + at, state, mask=inside)
        rows = start + b * C + tl.arange(0, C)
        live = rows < end
        sums = column(sums_ptr, rows, live, HV, h)
        last = tl.load(sums_ptr + (tl.minimum(start + b * C + C, end) - 1).to(tl.int64) * HV + h)
        factor = column(k_factor_ptr, rows, live, HK, hk)
        k = tile(k_ptr, rows, live, stride_k, hk * DK, d, DK)
        seen = (factor * tl.exp(sums))[:, None] * dot(k, state.to(k.dtype))
        v = tile(v_ptr, rows, live, stride_v, h * DV, e, DV).to(tl.float32)
        rest = column(beta_ptr, rows, live, stride_beta, h)[:, None] * (v - seen)
        inverse = tl.load(inverse_ptr + place * C * C + i * C + j)
        new = dot(inverse, rest.to(k.dtype))
        put(new_ptr, rows, live, HV * DV, h * DV, e, DV, new)
        new *= (factor * tl.exp(last - sums))[:, None]
        state = tl.exp(last) * state + dot(tl.trans(k), new.to(k.dtype))
    tl.store(finals_ptr + (after.to(tl.int64) * HV + h) * DK * DV + at, state, mask=inside & (after >= 0))


@kernel()
def outputs_kernel(
    q_ptr,
    k_ptr,
    sums_ptr,
    q_factor_ptr,
    k_factor_ptr,
    states_ptr,
    new_ptr,
    out_ptr,
    rows_ptr,
    stride_q,
    stride_k,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    PARTS: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0) // PARTS
    n, h = program // HV, program % HV
    hk = h // (HV // HK)
    e = tl.program_id(0) % PARTS * BV + tl.arange(0, BV)
    rows = tl.load(rows_ptr + 2 * n) + tl.arange(0, C)
    live = rows < tl.load(rows_ptr + 2 * n + 1)
    scores, out = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)
    for start in range(0, DK, 64):
        d = start + tl.arange(0, 64)
        q = tile(q_ptr, rows, live, stride_q, hk * DK, d, DK)
        scores += dot(q, tl.trans(tile(k_ptr, rows, live, stride_k, hk * DK, d, DK)))
        at = program.to(tl.int64) * DK * DV + d[:, None] * DV + e[None, :]
        state = tl.load(states_ptr + at, mask=(d < DK)[:, None] & (e < DV)[None, :], other=0.0)
        out += dot(q, state)
    sums = column(sums_ptr, rows, live, HV, h)
    q_factor = column(q_factor_ptr, rows, live, HK, hk)
    k_factor = column(k_factor_ptr, rows, live, HK, hk)
    scores *= q_factor[:, None] * k_factor[None, :] * decays(sums, live, C)
    new = tile(new_ptr, rows, live, HV * DV, h * DV, e, DV)
    out = (q_factor * tl.exp(sums))[:, None] * out + dot(scores.to(new.dtype), new)
    put(out_ptr, rows, live, HV * DV, h * DV, e, DV, out)


def block_of(size: int) -> int:
    """Return the smallest power of two that holds `size` columns and that `tl.dot` sums over."""
    return max(16, power_of_2(size))


def columns_of_block(dk: int, dv: int, dtype: torch.dtype) -> int:
    """Return the columns of a block of the state, so that two of [Dk, columns] and a chunk of k fit in 99 KiB."""
    wide = block_of(dk) * dtype.itemsize
    return min(block_of(dv), 64 if wide <= 256 else 32 if wide <= 512 else 16)


def warps(dtype: torch.dtype, *columns: int, most: int = 4) -> int:
    """Return the warps of a kernel with tiles of these columns: `most`, or 2 if one has less than 128 bytes a row.

    Such a tile is swizzled otherwise than the rest in shared memory, and where both meet in one kernel ptxas 12.8 makes
    descriptors of Hopper's wgmma from a register that it never sets (tests/kernels/test_cross_compile.py looks for
    that). Two warps do without wgmma. Heads of the models that have this layer are wider.
    """
    return most if min(columns) * dtype.itemsize >= 128 else 2


def prepare(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunks: Chunks, scale: float, l2norm: bool) -> Prepared:
    """Launch the first kernel. q, k: [T, Hk, Dk]; g, beta: [T, Hv]; see `delta.delta_forward`."""
    (t, hk, dk), hv, n = k.shape, g.shape[1], chunks.rows.shape[0]
    sums = torch.empty(t, hv, dtype=torch.float32, device=k.device)
    q_factor, k_factor = torch.empty(2, t, hk, dtype=torch.float32, device=k.device).unbind()
    inverse = torch.empty(n, hv, CHUNK, CHUNK, dtype=k.dtype, device=k.device)
    launch(
        prepare_kernel,
        (n * hv,),
        q,
        k,
        g,
        beta,
        chunks.rows,
        sums,
        q_factor,
        k_factor,
        inverse,
        q.stride(0),
        k.stride(0),
        g.stride(0),
        beta.stride(0),
        float(scale),
        hk,
        hv,
        dk,
        CHUNK,
        l2norm,
        NORM_EPS,
        num_warps=4,
        num_stages=1,
    )
    return Prepared(sums, q_factor, k_factor, inverse)


def walk(k: Tensor, v: Tensor, beta: Tensor, prepared: Prepared, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Launch the walk. Returns the state before each chunk [N, Hv, Dk, Dv] and n [T, Hv, Dv], in v's dtype."""
    (t, hk, dk), (hv, dv), n = k.shape, v.shape[1:], chunks.rows.shape[0]
    states = torch.empty(n, hv, dk, dv, dtype=v.dtype, device=v.device)
    finals = torch.empty(chunks.prefixes, hv, dk, dv, dtype=torch.float32, device=v.device)
    new = torch.empty(t, hv, dv, dtype=v.dtype, device=v.device)
    block = columns_of_block(dk, dv, v.dtype)
    for table in (chunks.roots, chunks.continued):
        if table.shape[0]:
            launch(
                walk_kernel,
                (table.shape[0] * hv * -(-dv // block),),
                k,
                v,
                beta,
                prepared.sums,
                prepared.k_factor,
                prepared.inverse,
                states,
                new,
                finals,
                table,
                k.stride(0),
                v.stride(0),
                beta.stride(0),
                hk,
                hv,
                dk,
                dv,
                block_of(dk),
                block,
                CHUNK,
                num_warps=warps(k.dtype, block_of(dk), block),
                num_stages=1,
            )
    return states, new


def outputs(q: Tensor, k: Tensor, states: Tensor, new: Tensor, prepared: Prepared, chunks: Chunks) -> Tensor:
    """Launch the last kernel. Returns o [T, Hv, Dv]."""
    (_, hk, dk), (hv, dv), out = k.shape, new.shape[1:], torch.empty_like(new)
    block = min(64, block_of(dv))
    grid = (chunks.rows.shape[0] * hv * -(-dv // block),)
    arguments = (q, k, *prepared[:3], states, new, out, chunks.rows, q.stride(0), k.stride(0))
    launch(
        outputs_kernel, grid, *arguments, hk, hv, dk, dv, block, CHUNK, num_warps=warps(k.dtype, block), num_stages=1
    )
    return out
