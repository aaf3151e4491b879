"""The gated delta rule's backward: the gradients that walk back over the chunks of each sequence, and that of v.

With the names of `delta_chunks`, dS' the gradient of the state after a chunk and C the chunk's last row,

    dn = P^T do + exp(G_C - G) k dS'                        dr = M^T dn         dv = beta dr
    dS = exp(G_C) dS' + scale (exp(G) q)^T do - (beta exp(G) k)^T dr

from which `delta_gradients` computes the rest, chunk by chunk. The kernels:

    local      P^T do
    back       dr, dv and dS, with programs as in the forward's walk. The gradient of a continuation's first state is
               stored; the launch for the other sequences starts from the sum over the continuations of each, in order

So nothing is added with atomics, and two runs are bitwise equal. DK, DV: sizes of heads; n, h, d, e: a chunk, a head of
v, rows and columns of its state; BK: DK rounded up to a power of two; BV: columns of a block; C: also the rows of a
chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.delta_chunks import CHUNK, Chunks
from rlft.kernels.delta_forward import (
    Prepared,
    block_of,
    column,
    columns_of_block,
    decays,
    dot,
    products,
    put,
    tile,
    warps,
)
from rlft.kernels.delta_gradients import gradients
from rlft.kernels.launch import jit, kernel, launch, tl


@kernel()
def local_kernel(
    q_ptr,
    k_ptr,
    dout_ptr,
    sums_ptr,
    q_factor_ptr,
    k_factor_ptr,
    local_ptr,
    rows_ptr,
    stride_q,
    stride_k,
    stride_dout,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    n, h = tl.program_id(0) // HV, tl.program_id(0) % HV
    hk = h // (HV // HK)
    rows = tl.load(rows_ptr + 2 * n) + tl.arange(0, C)
    live = rows < tl.load(rows_ptr + 2 * n + 1)
    scores, _ = products(q_ptr, stride_q, hk * DK, k_ptr, stride_k, hk * DK, rows, live, DK, C)
    q_factor = column(q_factor_ptr, rows, live, HK, hk)
    k_factor = column(k_factor_ptr, rows, live, HK, hk)
    sums = column(sums_ptr, rows, live, HV, h)
    scores *= q_factor[:, None] * k_factor[None, :] * decays(sums, live, C)
    scores = tl.trans(scores.to(q_ptr.dtype.element_ty))
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        local = dot(scores, tile(dout_ptr, rows, live, stride_dout, h * DV, e, DV))
        put(local_ptr, rows, live, HV * DV, h * DV, e, DV, local)


@kernel()
def back_kernel(
    q_ptr,
    k_ptr,
    dout_ptr,
    beta_ptr,
    sums_ptr,
    q_factor_ptr,
    k_factor_ptr,
    inverse_ptr,
    drest_ptr,
    dv_ptr,
    dstates_ptr,
    dstarts_ptr,
    table,
    stride_q,
    stride_k,
    stride_dout,
    stride_beta,
    stride_dv,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    CONTINUED: tl.constexpr,
):
    PARTS: tl.constexpr = (DV + BV - 1) // BV
    h = tl.program_id(0) // PARTS % HV
    hk = h // (HV // HK)
    table += tl.program_id(0) // (PARTS * HV) * 8
    start, end, first, count = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    d, e = tl.arange(0, BK), tl.program_id(0) % PARTS * BV + tl.arange(0, BV)
    inside = (d < DK)[:, None] & (e < DV)[None, :]
    at = d[:, None] * DV + e[None, :]
    dstate = tl.zeros([BK, BV], tl.float32)
    place = tl.load(table + 6).to(tl.int64)
    if not CONTINUED:
        for i in range(tl.load(table + 7) - tl.load(table + 6)):
            dstate += tl.load(dstarts_ptr + ((place + i) * HV + h) * DK * DV + at, mask=inside, other=0.0)
    for i in range(count):
        chunk = (first + count - 1 - i).to(tl.int64) * HV + h
        tl.store(dstates_ptr + chunk * DK * DV + at, dstate, mask=inside)
        top = start + (count - 1 - i) * C
        dstate = _back_over_chunk(
            dstate,
            (top, end, d, e, h, hk, chunk),
            (q_ptr, k_ptr, dout_ptr, beta_ptr, sums_ptr, q_factor_ptr, k_factor_ptr, inverse_ptr, drest_ptr, dv_ptr),
            (stride_q, stride_k, stride_dout, stride_beta, stride_dv),
            HK,
            HV,
            DK,
            DV,
            C,
        )
    if CONTINUED:
        tl.store(dstarts_ptr + (place * HV + h) * DK * DV + at, dstate, mask=inside)


@jit
def _back_over_chunk(
    dstate,
    where,
    pointers,
    strides,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
):
    """Store dr and dv of a chunk, and return the gradient of the state before it from that of the state after it."""
    top, end, d, e, h, hk, chunk = where
    q_ptr, k_ptr, dout_ptr, beta_ptr, sums_ptr, q_factor_ptr, k_factor_ptr, inverse_ptr, drest_ptr, dv_ptr = pointers
    stride_q, stride_k, stride_dout, stride_beta, stride_dv = strides
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    rows = top + tl.arange(0, C)
    live = rows < end
    sums = column(sums_ptr, rows, live, HV, h)
    last = tl.load(sums_ptr + (tl.minimum(top + C, end) - 1).to(tl.int64) * HV + h)
    k_factor = column(k_factor_ptr, rows, live, HK, hk)
    beta = column(beta_ptr, rows, live, stride_beta, h)
    k = tile(k_ptr, rows, live, stride_k, hk * DK, d, DK)
    dnew = (k_factor * tl.exp(last - sums))[:, None] * dot(k, dstate.to(k.dtype))
    dnew += tile(drest_ptr, rows, live, HV * DV, h * DV, e, DV).to(tl.float32)
    inverse = tl.load(inverse_ptr + chunk * C * C + i * C + j)
    drest = dot(tl.trans(inverse), dnew.to(k.dtype))
    put(drest_ptr, rows, live, HV * DV, h * DV, e, DV, drest)
    drest *= beta[:, None]
    put(dv_ptr, rows, live, stride_dv, h * DV, e, DV, drest)
    drest *= (k_factor * tl.exp(sums))[:, None]
    q = tile(q_ptr, rows, live, stride_q, hk * DK, d, DK)
    dout = tile(dout_ptr, rows, live, stride_dout, h * DV, e, DV).to(tl.float32)
    dout *= (column(q_factor_ptr, rows, live, HK, hk) * tl.exp(sums))[:, None]
    dstate = tl.exp(last) * dstate + dot(tl.trans(q), dout.to(k.dtype))
    return dstate - dot(tl.trans(k), drest.to(k.dtype))


def launch_backward(
    dout: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    prepared: Prepared,
    states: Tensor,
    new: Tensor,
    chunks: Chunks,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dg, dbeta, dv. inputs: q, k, v, g, beta; the rest as `delta.delta_backward`."""
    q, k, v, _, beta = inputs
    (_, hk, dk), (hv, dv), n = k.shape, v.shape[1:], chunks.rows.shape[0]
    sizes = (hk, hv, dk, dv)
    drest, dvalues = torch.empty_like(new), torch.empty_like(new)
    block = min(64, block_of(dv))
    strides = (q.stride(0), k.stride(0), dout.stride(0))
    arguments = (q, k, dout, *prepared[:3], drest, chunks.rows, *strides)
    launch(local_kernel, (n * hv,), *arguments, *sizes, block, CHUNK, num_warps=warps(k.dtype, block), num_stages=1)
    dstates = torch.empty_like(states)
    dstarts = torch.empty(chunks.continued.shape[0], hv, dk, dv, dtype=torch.float32, device=v.device)
    block, wide = columns_of_block(dk, dv, v.dtype), block_of(dk)
    for table, continued in ((chunks.continued, True), (chunks.roots, False)):
        if table.shape[0]:
            grid = (table.shape[0] * hv * -(-dv // block),)
            arguments = (q, k, dout, beta, *prepared, drest, dvalues, dstates, dstarts, table, *strides)
            more = (beta.stride(0), dvalues.stride(0), *sizes, wide, block, CHUNK, continued)
            launch(back_kernel, grid, *arguments, *more, num_warps=warps(k.dtype, wide, block, most=8), num_stages=1)
    return *gradients(dout, inputs, prepared, (new, drest, states, dstates), chunks, scale, l2norm), dvalues
