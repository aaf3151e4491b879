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

    parts   for each chunk, head of k and block of its columns d; heads of v that share it follow each other in one
            program. All sums over d (of <S, dS'>, of q . k in P, of the products of rows) are over the block only
    finish  adds dg and dbeta of the blocks, applies the scale and the lengths to dq and dk, and rounds once

DK, DV: sizes of heads; BD: columns of a block of q and k; BV: of v; C: also the rows of a chunk; e columns of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.delta_chunks import CHUNK, Chunks
from rlft.kernels.delta_forward import Prepared, column, decays, dot, tile
from rlft.kernels.launch import jit, kernel, launch, power_of_2, tl


@jit
def _through_states(
    q,
    k,
    where,
    factors,
    pointers,
    stride_dout,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    """Compute what comes to dq and dk of a head through S and dS', by blocks of columns of v.

    Also returns dP and -dA without masks, and the sums over the block's d that dG needs: of q, twice of k, and of
    <S, dS'>. factors: exp(G), exp(G_C - G) and beta exp(G). Factors of q and k themselves are the caller's.
    """
    rows, live, d, h, chunk = where
    from_first, to_last, written = factors
    dout_ptr, new_ptr, drest_ptr, states_ptr, dstates_ptr = pointers
    dq, dk = tl.zeros([C, d.shape[0]], tl.float32), tl.zeros([C, d.shape[0]], tl.float32)
    dp, da = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    q_read, k_written = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    k_read, both = tl.zeros([C], tl.float32), 0.0
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        dout = tile(dout_ptr, rows, live, stride_dout, h * DV, e, DV)
        new = tile(new_ptr, rows, live, HV * DV, h * DV, e, DV)
        drest = tile(drest_ptr, rows, live, HV * DV, h * DV, e, DV)
        dp += dot(dout, tl.trans(new))
        da += dot(drest, tl.trans(new))
        at = chunk * DK * DV + d[:, None] * DV + e[None, :]
        mask = (d < DK)[:, None] & (e < DV)[None, :]
        state = tl.load(states_ptr + at, mask=mask, other=0.0)
        dstate = tl.load(dstates_ptr + at, mask=mask, other=0.0)
        both += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        state = tl.trans(state)
        part = dot(dout, state)
        q_read += tl.sum(q.to(tl.float32) * part, axis=1)
        dq += from_first[:, None] * part
        part = dot(drest, state)
        k_read += tl.sum(k.to(tl.float32) * part, axis=1)
        dk -= written[:, None] * part
        part = dot(new, tl.trans(dstate))
        k_written += tl.sum(k.to(tl.float32) * part, axis=1)
        dk += to_last[:, None] * part
    return dq, dk, dp, da, (q_read, k_read, k_written, both)


@jit
def _within_chunk(q, k, dp, da, columns, live, C: tl.constexpr):
    """Compute what comes to dq, dk, dG and dbeta of a head through P and A, from dP and -dA without masks."""
    sums, beta, q_factor, k_factor = columns
    decay = decays(sums, live, C)
    dp *= decay
    da = tl.where(tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :], -da * decay, 0.0)
    dq = dot((dp * k_factor[None, :]).to(k.dtype), k)
    dk = dot(tl.trans((dp * q_factor[:, None]).to(k.dtype)), q)
    dp *= dot(q, tl.trans(k)) * q_factor[:, None] * k_factor[None, :]
    dsums = tl.sum(dp, axis=1) - tl.sum(dp, axis=0)
    scores = dot(k, tl.trans(k)) * k_factor[:, None] * k_factor[None, :]
    dbeta = tl.sum(da * scores, axis=1)
    da *= beta[:, None]
    dk += dot((da * k_factor[None, :] + tl.trans(da * k_factor[:, None])).to(k.dtype), k)
    da *= scores
    dsums += tl.sum(da, axis=1) - tl.sum(da, axis=0)
    return dq, dk, dsums, dbeta


@jit
def _values(v_ptr, drest_ptr, rows, live, stride_v, h, HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr):
    """Compute v_i . dr_i for the rows of a chunk."""
    total = tl.zeros([rows.shape[0]], tl.float32)
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        v = tile(v_ptr, rows, live, stride_v, h * DV, e, DV).to(tl.float32)
        total += tl.sum(v * tile(drest_ptr, rows, live, HV * DV, h * DV, e, DV).to(tl.float32), axis=1)
    return total


@kernel(varying=("T",))
def parts_kernel(
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
    states_ptr,
    dstates_ptr,
    dq_ptr,
    dk_ptr,
    dg_ptr,
    dbeta_ptr,
    rows_ptr,
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
    part = tl.program_id(0) % PARTS
    n, hk = tl.program_id(0) // (PARTS * HK), tl.program_id(0) // PARTS % HK
    rows, end = tl.load(rows_ptr + 2 * n) + tl.arange(0, C), tl.load(rows_ptr + 2 * n + 1)
    live, d = rows < end, part * BD + tl.arange(0, BD)
    q, k = (tile(q_ptr, rows, live, stride_q, hk * DK, d, DK), tile(k_ptr, rows, live, stride_k, hk * DK, d, DK))
    q_factor, k_factor = (column(q_factor_ptr, rows, live, HK, hk), column(k_factor_ptr, rows, live, HK, hk))
    dq, dk = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
    pointers = (dout_ptr, new_ptr, drest_ptr, states_ptr, dstates_ptr)
    for i in range(HV // HK):
        h = hk * (HV // HK) + i
        sums, beta = column(sums_ptr, rows, live, HV, h), column(beta_ptr, rows, live, stride_beta, h)
        last = tl.load(sums_ptr + (end - 1).to(tl.int64) * HV + h)
        # Beyond the end of the sequence the sums are 0 and nothing is read.
        factors = (tl.exp(sums), tl.exp(last - sums), beta * tl.exp(sums))
        where = (rows, live, d, h, n.to(tl.int64) * HV + h)
        dq_1, dk_1, dp, da, read = _through_states(q, k, where, factors, pointers, stride_dout, HV, DK, DV, BV, C)
        columns = (sums, beta, q_factor, k_factor)
        dq_2, dk_2, dsums, dbeta = _within_chunk(q, k, dp, da, columns, live, C)
        dq += dq_1 + dq_2
        dk += dk_1 + dk_2
        k_written = k_factor * factors[1] * read[2]
        dsums += q_factor * factors[0] * read[0] - k_factor * factors[2] * read[1] - k_written
        later = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
        dg = tl.sum(tl.where(later, dsums[:, None], 0.0), axis=0) + tl.exp(last) * read[3] + tl.sum(k_written, axis=0)
        dbeta -= k_factor * factors[0] * read[1]
        if part == 0:
            dbeta += _values(v_ptr, drest_ptr, rows, live, stride_v, h, HV, DV, BV)
        at = (part * T + rows).to(tl.int64) * HV + h
        tl.store(dg_ptr + at, dg, mask=live)
        tl.store(dbeta_ptr + at, dbeta, mask=live)
    at = rows.to(tl.int64)[:, None] * (HK * DK) + (hk * DK + d)[None, :]
    tl.store(dq_ptr + at, dq, mask=live[:, None] & (d < DK)[None, :])
    tl.store(dk_ptr + at, dk, mask=live[:, None] & (d < DK)[None, :])


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
    at = rows.to(tl.int64)[:, None] * (HK * DK) + (hk * DK + d)[None, :]
    tl.store(out_ptr + at, dx, mask=live[:, None] & (d < DK)[None, :])


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
    width = 64
    parts = -(-dk // width)
    partial = torch.empty(2, t, hk, dk, dtype=torch.float32, device=k.device)
    columns = torch.empty(2, parts, t, hv, dtype=torch.float32, device=k.device)
    arguments = (q, k, v, dout, beta, *prepared[:3], *walked, *partial, *columns, chunks.rows, t)
    strides = (q.stride(0), k.stride(0), v.stride(0), dout.stride(0), beta.stride(0))
    sizes = (hk, hv, dk, dv, width, min(power_of_2(dv), 64 if k.dtype.itemsize == 2 else 32), CHUNK)
    launch(parts_kernel, (chunks.rows.shape[0] * hk * parts,), *arguments, *strides, *sizes, num_warps=4, num_stages=1)
    results = (*(torch.empty_like(one, memory_format=torch.contiguous_format) for one in (q, k, g, beta)),)
    rows = max(1, 2048 // power_of_2(dk))
    arguments = (q, k, *prepared[1:3], *partial, *columns, *results, t, q.stride(0), k.stride(0), float(scale))
    sizes = (hk, hv, dk, power_of_2(dk), power_of_2(hv // hk), parts, rows, l2norm)
    launch(finish_kernel, (-(-t // rows) * hk,), *arguments, *sizes, num_warps=4)
    return results
