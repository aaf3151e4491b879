"""The gated delta rule's backward within the chunks: gradients of q, k, g and beta.

With the names of `delta_chunks`, dS' the gradient of the state after a chunk, C the chunk's last row, and dr as in
`delta_backward`,

    dP = do n^T, i >= j     dA = -dr n^T, i > j             F_ij = dA_ij beta_i E_ij
    dq = scale exp(G) do S^T + scale (dP E) k
    dk = exp(G_C - G) n dS'^T + scale (dP E)^T q + (F + F^T) k - beta exp(G) dr S^T
    dbeta_i = dr_i . (v_i - exp(G_i) S^T k_i) + sum_j dA_ij (k_i . k_j) E_ij
    dG_i = scale exp(G_i) q_i . do_i S^T - exp(G_C - G_i) k_i . n_i dS'^T - beta_i exp(G_i) k_i . dr_i S^T
           + sum_j (dP_ij P_ij + dA_ij A_ij) - sum_j (dP_ji P_ji + dA_ji A_ji)
    dG_C = as the others, + exp(G_C) <S, dS'> + sum_i exp(G_C - G_i) k_i . n_i dS'^T        dg_t = sum_{i >= t} dG_i

and dx = f (da - a (a . da)) for a = f x, the vector x divided by its length. The kernels:

    scores  for each chunk and head of v: dP E twice, with the factors of k and of q, and F + F^T with those of k; and
            what they contribute to dg and dbeta
    parts   for each chunk, head of k and block of its columns d: dq and dk, and what else dg and dbeta sum over d.
            Heads of v that share a head of k follow each other in one program
    finish  adds dg and dbeta of all blocks, applies the scale and the lengths to dq and dk, and rounds once

N, T: numbers of chunks and rows; h: a head of v. DK, DV: sizes of heads; BD: columns of a block of q and k; BV: of v;
C: also the rows of a chunk; e columns of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.delta_chunks import CHUNK, Chunks
from rlft.kernels.delta_forward import Prepared, block_of, column, decays, dot, products, put, tile, warps
from rlft.kernels.launch import jit, kernel, launch, power_of_2, tl


@jit
def _unmasked(pointers, strides, rows, live, h, HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr):
    """Compute dP and dA without their masks, and v_i . dr_i."""
    v_ptr, dout_ptr, new_ptr, drest_ptr = pointers
    stride_v, stride_dout = strides
    dp, da, along = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        new = tl.trans(tile(new_ptr, rows, live, HV * DV, h * DV, e, DV))
        dp += dot(tile(dout_ptr, rows, live, stride_dout, h * DV, e, DV), new)
        drest = tile(drest_ptr, rows, live, HV * DV, h * DV, e, DV)
        da -= dot(drest, new)
        v = tile(v_ptr, rows, live, stride_v, h * DV, e, DV).to(tl.float32)
        along += tl.sum(v * drest.to(tl.float32), axis=1)
    return dp, da, along


@kernel(varying=("N", "T"))
def scores_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    beta_ptr,
    sums_ptr,
    q_factor_ptr,
    k_factor_ptr,
    new_ptr,
    drest_ptr,
    scores_ptr,
    dg_ptr,
    dbeta_ptr,
    rows_ptr,
    N,
    T,
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_beta,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    PARTS: tl.constexpr = (DK + BD - 1) // BD
    n, h = tl.program_id(0) // HV, tl.program_id(0) % HV
    hk = h // (HV // HK)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    rows = tl.load(rows_ptr + 2 * n) + tl.arange(0, C)
    live = rows < tl.load(rows_ptr + 2 * n + 1)
    pointers, strides = (v_ptr, dout_ptr, new_ptr, drest_ptr), (stride_v, stride_dout)
    dp, da, dbeta = _unmasked(pointers, strides, rows, live, h, HV, DV, BV, C)
    decay = decays(column(sums_ptr, rows, live, HV, h), live, C)
    q_factor, k_factor = (column(q_factor_ptr, rows, live, HK, hk), column(k_factor_ptr, rows, live, HK, hk))
    at = scores_ptr + tl.program_id(0).to(tl.int64) * C * C + i * C + j
    size = N.to(tl.int64) * HV * C * C
    dp *= decay
    tl.store(at, dp * k_factor[None, :])
    tl.store(at + size, dp * q_factor[:, None])
    scores, _ = products(q_ptr, stride_q, hk * DK, k_ptr, stride_k, hk * DK, rows, live, DK, C)
    dp *= scores * q_factor[:, None] * k_factor[None, :]
    dsums = tl.sum(dp, axis=1) - tl.sum(dp, axis=0)
    da = tl.where(i > j, da * decay, 0.0)
    scores, _ = products(k_ptr, stride_k, hk * DK, k_ptr, stride_k, hk * DK, rows, live, DK, C)
    scores *= k_factor[:, None] * k_factor[None, :]
    dbeta += tl.sum(da * scores, axis=1)
    da *= column(beta_ptr, rows, live, stride_beta, h)[:, None]
    tl.store(at + 2 * size, (da + tl.trans(da)) * k_factor[None, :])
    da *= scores
    dsums += tl.sum(da, axis=1) - tl.sum(da, axis=0)
    at = (PARTS * T.to(tl.int64) + rows) * HV + h
    tl.store(dg_ptr + at, tl.sum(tl.where(i >= j, dsums[:, None], 0.0), axis=0), mask=live)
    tl.store(dbeta_ptr + at, dbeta, mask=live)


@jit
def _read(
    x, a_ptr, stride_a, states_ptr, where, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr
):
    """Compute a S^T for a block of d, and its products with the rows of x. a: dout, dr or n; S: a state or dS'."""
    rows, live, d, h, chunk = where
    total = tl.zeros([rows.shape[0], d.shape[0]], tl.float32)
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        a = tile(a_ptr, rows, live, stride_a, h * DV, e, DV)
        at = chunk * DK * DV + d[:, None] * DV + e[None, :]
        state = tl.load(states_ptr + at, mask=(d < DK)[:, None] & (e < DV)[None, :], other=0.0)
        total += dot(a, tl.trans(state))
    return total, tl.sum(x.to(tl.float32) * total, axis=1)


@jit
def _inner(a_ptr, b_ptr, d, chunk, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr):
    """Compute <S, dS'> over a block of d."""
    total = 0.0
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        at = chunk * DK * DV + d[:, None] * DV + e[None, :]
        mask = (d < DK)[:, None] & (e < DV)[None, :]
        a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(a * tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32))
    return total


@jit
def _through_states(
    vectors,
    where,
    end,
    pointers,
    strides,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    """Compute what comes to dq, dk, dg and dbeta of a head through S and dS', over a block of d."""
    q, k, q_factor, k_factor = vectors
    rows, live, d, h, chunk = where
    dout_ptr, beta_ptr, sums_ptr, new_ptr, drest_ptr, states_ptr, dstates_ptr = pointers
    stride_dout, stride_beta = strides
    sums, beta = column(sums_ptr, rows, live, HV, h), column(beta_ptr, rows, live, stride_beta, h)
    last = tl.load(sums_ptr + (end - 1).to(tl.int64) * HV + h)
    read, along = _read(q, dout_ptr, stride_dout, states_ptr, where, HV, DK, DV, BV)
    dq = tl.exp(sums)[:, None] * read
    dsums = q_factor * tl.exp(sums) * along
    read, along = _read(k, drest_ptr, HV * DV, states_ptr, where, HV, DK, DV, BV)
    dk = -(beta * tl.exp(sums))[:, None] * read
    dbeta = -k_factor * tl.exp(sums) * along
    # Beyond the end of the sequence the sums are 0, and nothing is read.
    read, along = _read(k, new_ptr, HV * DV, dstates_ptr, where, HV, DK, DV, BV)
    dk += tl.exp(last - sums)[:, None] * read
    along *= k_factor * tl.exp(last - sums)
    dsums += beta * dbeta - along
    later = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    dg = tl.sum(tl.where(later, dsums[:, None], 0.0), axis=0) + tl.sum(along, axis=0)
    return dq, dk, dg + tl.exp(last) * _inner(states_ptr, dstates_ptr, d, chunk, DK, DV, BV), dbeta


@kernel(varying=("N", "T"))
def parts_kernel(
    q_ptr,
    k_ptr,
    dout_ptr,
    beta_ptr,
    sums_ptr,
    q_factor_ptr,
    k_factor_ptr,
    new_ptr,
    drest_ptr,
    states_ptr,
    dstates_ptr,
    scores_ptr,
    dq_ptr,
    dk_ptr,
    dg_ptr,
    dbeta_ptr,
    rows_ptr,
    N,
    T,
    stride_q,
    stride_k,
    stride_dout,
    stride_beta,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    PARTS: tl.constexpr = (DK + BD - 1) // BD
    part = tl.program_id(0) % PARTS
    n, hk = tl.program_id(0) // (PARTS * HK), tl.program_id(0) // PARTS % HK
    rows, end = tl.load(rows_ptr + 2 * n) + tl.arange(0, C), tl.load(rows_ptr + 2 * n + 1)
    live, d = rows < end, part * BD + tl.arange(0, BD)
    q, k = (tile(q_ptr, rows, live, stride_q, hk * DK, d, DK), tile(k_ptr, rows, live, stride_k, hk * DK, d, DK))
    q_factor, k_factor = (column(q_factor_ptr, rows, live, HK, hk), column(k_factor_ptr, rows, live, HK, hk))
    dq, dk = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
    square, size = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :], N.to(tl.int64) * HV * C * C
    pointers = (dout_ptr, beta_ptr, sums_ptr, new_ptr, drest_ptr, states_ptr, dstates_ptr)
    for i in range(HV // HK):
        h = hk * (HV // HK) + i
        where = (rows, live, d, h, n.to(tl.int64) * HV + h)
        vectors, strides = (q, k, q_factor, k_factor), (stride_dout, stride_beta)
        from_q, from_k, dg, dbeta = _through_states(vectors, where, end, pointers, strides, HV, DK, DV, BV, C)
        at = (part * T.to(tl.int64) + rows) * HV + h
        tl.store(dg_ptr + at, dg, mask=live)
        tl.store(dbeta_ptr + at, dbeta, mask=live)
        scores = scores_ptr + (n.to(tl.int64) * HV + h) * C * C + square
        dq += from_q + dot(tl.load(scores), k)
        dk += from_k + dot(tl.trans(tl.load(scores + size)), q)
        dk += dot(tl.load(scores + 2 * size), k)
    put(dq_ptr, rows, live, HK * DK, hk * DK, d, DK, dq)
    put(dk_ptr, rows, live, HK * DK, hk * DK, d, DK, dk)


@jit
def _finished(
    rows,
    live,
    part_ptr,
    x_ptr,
    out_ptr,
    stride,
    hk,
    factor,
    scale,
    L2NORM: tl.constexpr,
    HK: tl.constexpr,
    DK: tl.constexpr,
    BK: tl.constexpr,
):
    """Write the gradient of q or k from that of the vector with length 1; factor [ROWS]: one by its length."""
    d = tl.arange(0, BK)
    dx = scale * tile(part_ptr, rows, live, HK * DK, hk * DK, d, DK)
    if L2NORM:
        x = factor[:, None] * tile(x_ptr, rows, live, stride, hk * DK, d, DK).to(tl.float32)
        dx = factor[:, None] * (dx - tl.sum(x * dx, axis=1)[:, None] * x)
    put(out_ptr, rows, live, HK * DK, hk * DK, d, DK, dx)


@kernel(varying=("T",))
def finish_kernel(
    q_ptr,
    k_ptr,
    q_factor_ptr,
    k_factor_ptr,
    dq_part_ptr,
    dk_part_ptr,
    dg_part_ptr,
    dbeta_part_ptr,
    dq_ptr,
    dk_ptr,
    dg_ptr,
    dbeta_ptr,
    T,
    stride_q,
    stride_k,
    scale,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    L2NORM: tl.constexpr,
):
    hk = tl.program_id(0) % HK
    rows = tl.program_id(0) // HK * ROWS + tl.arange(0, ROWS)
    live = rows < T
    factor = column(k_factor_ptr, rows, live, HK, hk)
    _finished(rows, live, dk_part_ptr, k_ptr, dk_ptr, stride_k, hk, factor, 1.0, L2NORM, HK, DK, BK)
    factor = column(q_factor_ptr, rows, live, HK, hk) / scale
    _finished(rows, live, dq_part_ptr, q_ptr, dq_ptr, stride_q, hk, factor, scale, L2NORM, HK, DK, BK)
    heads = tl.arange(0, GROUP)
    mask = live[:, None] & (heads < HV // HK)[None, :]
    at = rows.to(tl.int64)[:, None] * HV + (hk * (HV // HK) + heads)[None, :]
    dg, dbeta = tl.zeros([ROWS, GROUP], tl.float32), tl.zeros([ROWS, GROUP], tl.float32)
    for part in range(PARTS):
        dg += tl.load(dg_part_ptr + part * T.to(tl.int64) * HV + at, mask=mask, other=0.0)
        dbeta += tl.load(dbeta_part_ptr + part * T.to(tl.int64) * HV + at, mask=mask, other=0.0)
    tl.store(dg_ptr + at, dg, mask=mask)
    tl.store(dbeta_ptr + at, dbeta, mask=mask)


def gradients(
    dout: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    prepared: Prepared,
    walked: tuple[Tensor, Tensor, Tensor, Tensor],
    chunks: Chunks,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dg, dbeta. inputs: q, k, v, g, beta; walked: n, dr, S before and dS' after each chunk."""
    q, k, v, g, beta = inputs
    (t, hk, dk), (hv, dv) = k.shape, v.shape[1:]
    n, width = chunks.rows.shape[0], 64
    parts = -(-dk // width)
    scores = torch.empty(3, n, hv, CHUNK, CHUNK, dtype=k.dtype, device=k.device)
    partial = torch.empty(2, t, hk, dk, dtype=torch.float32, device=k.device)
    columns = torch.empty(2, parts + 1, t, hv, dtype=torch.float32, device=k.device)
    block = min(block_of(dv), 64 if k.dtype.itemsize == 2 else 32)
    sizes, options = (hk, hv, dk, dv, width, block, CHUNK), {"num_warps": warps(k.dtype, block), "num_stages": 1}
    arguments = (q, k, v, dout, beta, *prepared[:3], *walked[:2], scores, *columns, chunks.rows, n, t)
    strides = (q.stride(0), k.stride(0), v.stride(0), dout.stride(0), beta.stride(0))
    launch(scores_kernel, (n * hv,), *arguments, *strides, *sizes, **options)
    arguments = (q, k, dout, beta, *prepared[:3], *walked, scores, *partial, *columns, chunks.rows, n, t)
    strides = (q.stride(0), k.stride(0), dout.stride(0), beta.stride(0))
    launch(parts_kernel, (n * hk * parts,), *arguments, *strides, *sizes, **options)
    dq, dkeys = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    dg, dbeta = (torch.empty(g.shape, dtype=one.dtype, device=g.device) for one in (g, beta))
    rows = max(1, 2048 // block_of(dk))
    arguments = (
        q,
        k,
        *prepared[1:3],
        *partial,
        *columns,
        dq,
        dkeys,
        dg,
        dbeta,
        t,
        q.stride(0),
        k.stride(0),
        float(scale),
    )
    sizes = (hk, hv, dk, block_of(dk), power_of_2(hv // hk), parts + 1, rows, l2norm)
    launch(finish_kernel, (-(-t // rows) * hk,), *arguments, *sizes, num_warps=4)
    return dq, dkeys, dg, dbeta
