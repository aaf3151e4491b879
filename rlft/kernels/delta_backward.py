"""The gated delta rule's backward in three kernels: per chunk, back over the chunks, and per chunk again.

With the names of `delta_chunks`, dS' the gradient of the state after a chunk and C the chunk's last row,

    dn = P^T do + exp(G_C - G) k dS'                        dr = M^T dn         dv = beta dr
    dS = exp(G_C) dS' + scale (exp(G) q)^T do - (beta exp(G) k)^T dr

    dP = do n^T, i >= j     dA = -dr n^T, i > j             F_ij = dA_ij beta_i E_ij
    dq = scale exp(G) do S^T + scale (dP E) k
    dk = exp(G_C - G) n dS'^T + scale (dP E)^T q + (F + F^T) k - beta exp(G) dr S^T
    dbeta_i = dr_i . (v_i - exp(G_i) S^T k_i) + sum_j dA_ij (k_i . k_j) E_ij
    dG_i = scale exp(G_i) q_i . do_i S^T - exp(G_C - G_i) k_i . n_i dS'^T - beta_i exp(G_i) k_i . dr_i S^T
           + sum_j (dP_ij P_ij + dA_ij A_ij) - sum_j (dP_ji P_ji + dA_ji A_ji)
    dG_C = as the others, + exp(G_C) <S, dS'> + sum_i exp(G_C - G_i) k_i . n_i dS'^T        dg_t = sum_{i >= t} dG_i

and dx = f (da - a (a . da)) for a = f x, the vector x divided by its length. The kernels:

    local      P^T do
    back       dr, dv and dS, with programs as in the forward's walk. The gradient of a continuation's first state is
               stored; the launch for the other sequences starts from the sum over the continuations of each, in order
    gradients  the rest, for each chunk and head of k; heads of v that share it follow each other in one program

So nothing is added with atomics, and two runs are bitwise equal. DK, DV: sizes of heads; BK: DK rounded up to a power
of two; BV: columns of a block; C: also the rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.delta_chunks import CHUNK, Chunks
from rlft.kernels.delta_forward import Prepared, column, columns_of_block, decays, dot, products, tile
from rlft.kernels.launch import jit, kernel, launch, power_of_2, tl


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
        at = rows.to(tl.int64)[:, None] * (HV * DV) + (h * DV + e)[None, :]
        tl.store(local_ptr + at, local, mask=live[:, None] & (e < DV)[None, :])


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
    mask = live[:, None] & (e < DV)[None, :]
    column_at = (h * DV + e)[None, :]
    tl.store(drest_ptr + rows.to(tl.int64)[:, None] * (HV * DV) + column_at, drest, mask=mask)
    drest *= beta[:, None]
    tl.store(dv_ptr + rows.to(tl.int64)[:, None] * stride_dv + column_at, drest, mask=mask)
    drest *= (k_factor * tl.exp(sums))[:, None]
    q = tile(q_ptr, rows, live, stride_q, hk * DK, d, DK)
    dout = tile(dout_ptr, rows, live, stride_dout, h * DV, e, DV).to(tl.float32)
    dout *= (column(q_factor_ptr, rows, live, HK, hk) * tl.exp(sums))[:, None]
    dstate = tl.exp(last) * dstate + dot(tl.trans(q), dout.to(k.dtype))
    return dstate - dot(tl.trans(k), drest.to(k.dtype))


@jit
def _through_states(
    q,
    k,
    dq,
    dk,
    where,
    pointers,
    strides,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    """Add to dq and dk of a head what comes through S and dS', by blocks of columns; return dP and -dA without masks,
    the products of rows that dbeta and dG need, and <S, dS'>. Factors of q and k are the caller's."""
    rows, live, d, h, chunk, from_first, to_last, written = where
    dout_ptr, v_ptr, new_ptr, drest_ptr, states_ptr, dstates_ptr = pointers
    stride_dout, stride_v = strides
    dp, da = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    q_read, k_written = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    k_read, v_rest, both = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), 0.0
    for start in range(0, DV, BV):
        e = start + tl.arange(0, BV)
        dout = tile(dout_ptr, rows, live, stride_dout, h * DV, e, DV)
        new = tile(new_ptr, rows, live, HV * DV, h * DV, e, DV)
        drest = tile(drest_ptr, rows, live, HV * DV, h * DV, e, DV)
        v = tile(v_ptr, rows, live, stride_v, h * DV, e, DV).to(tl.float32)
        v_rest += tl.sum(v * drest.to(tl.float32), axis=1)
        dp += dot(dout, tl.trans(new))
        da += dot(drest, tl.trans(new))
        at = chunk * DK * DV + d[:, None] * DV + e[None, :]
        mask = (d < DK)[:, None] & (e < DV)[None, :]
        state = tl.load(states_ptr + at, mask=mask, other=0.0)
        dstate = tl.load(dstates_ptr + at, mask=mask, other=0.0)
        both += tl.sum(state * dstate)
        state = tl.trans(state.to(k.dtype))
        part = dot(dout, state)
        q_read += tl.sum(q.to(tl.float32) * part, axis=1)
        dq += from_first[:, None] * part
        part = dot(drest, state)
        k_read += tl.sum(k.to(tl.float32) * part, axis=1)
        dk -= written[:, None] * part
        part = dot(new, tl.trans(dstate.to(k.dtype)))
        k_written += tl.sum(k.to(tl.float32) * part, axis=1)
        dk += to_last[:, None] * part
    return dq, dk, dp, da, q_read, k_read, k_written, v_rest, both


@kernel()
def gradients_kernel(
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
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_beta,
    stride_dq,
    stride_dk,
    scale,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    L2NORM: tl.constexpr,
):
    n, hk = tl.program_id(0) // HK, tl.program_id(0) % HK
    rows = tl.load(rows_ptr + 2 * n) + tl.arange(0, C)
    live = rows < tl.load(rows_ptr + 2 * n + 1)
    d = tl.arange(0, BK)
    q, k = (tile(q_ptr, rows, live, stride_q, hk * DK, d, DK), tile(k_ptr, rows, live, stride_k, hk * DK, d, DK))
    q_factor = column(q_factor_ptr, rows, live, HK, hk)
    k_factor = column(k_factor_ptr, rows, live, HK, hk)
    dq, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for i in range(HV // HK):
        h = hk * (HV // HK) + i
        sums, beta = column(sums_ptr, rows, live, HV, h), column(beta_ptr, rows, live, stride_beta, h)
        dq, dk, dg, dbeta = _one_head(
            q,
            k,
            dq,
            dk,
            (rows, live, d, h, n.to(tl.int64) * HV + h),
            (sums, beta, q_factor, k_factor),
            (dout_ptr, v_ptr, new_ptr, drest_ptr, states_ptr, dstates_ptr),
            (stride_dout, stride_v),
            HV,
            DK,
            DV,
            BV,
            C,
        )
        at = rows.to(tl.int64) * HV + h
        tl.store(dg_ptr + at, dg, mask=live)
        tl.store(dbeta_ptr + at, dbeta, mask=live)
    dq *= scale
    if L2NORM:
        length = q_factor / scale
        along = length * length * tl.sum(q.to(tl.float32) * dq, axis=1)
        dq = length[:, None] * (dq - along[:, None] * q.to(tl.float32))
        along = k_factor * k_factor * tl.sum(k.to(tl.float32) * dk, axis=1)
        dk = k_factor[:, None] * (dk - along[:, None] * k.to(tl.float32))
    mask = live[:, None] & (d < DK)[None, :]
    tl.store(dq_ptr + rows.to(tl.int64)[:, None] * stride_dq + (hk * DK + d)[None, :], dq, mask=mask)
    tl.store(dk_ptr + rows.to(tl.int64)[:, None] * stride_dk + (hk * DK + d)[None, :], dk, mask=mask)


@jit
def _one_head(
    q,
    k,
    dq,
    dk,
    where,
    columns,
    pointers,
    strides,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
):
    """Add one head of v to dq (without the scale) and dk, of the normalised vectors; return its dg and dbeta too."""
    rows, live, d, h, chunk = where
    sums, beta, q_factor, k_factor = columns
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    # Beyond the end of the sequence the sums are 0, and last - sums is set to 0 there.
    last = tl.sum(tl.where(tl.arange(0, C) == tl.sum(live.to(tl.int32), axis=0) - 1, sums, 0.0), axis=0)
    from_first, to_last = tl.exp(sums), tl.exp(tl.where(live, last - sums, 0.0))
    dq, dk, dp, da, q_read, k_read, k_written, v_rest, both = _through_states(
        q,
        k,
        dq,
        dk,
        (rows, live, d, h, chunk, from_first, to_last, beta * from_first),
        pointers,
        strides,
        HV,
        DK,
        DV,
        BV,
        C,
    )
    decay = decays(sums, live, C)
    k_read *= k_factor * from_first
    k_written *= k_factor * to_last
    dsums = q_factor * from_first * q_read - beta * k_read - k_written
    dp *= decay
    dq += dot((dp * k_factor[None, :]).to(k.dtype), k)
    dk += dot(tl.trans((dp * q_factor[:, None]).to(k.dtype)), q)
    dp *= dot(q, tl.trans(k)) * q_factor[:, None] * k_factor[None, :]
    dsums += tl.sum(dp, axis=1) - tl.sum(dp, axis=0)
    da = tl.where(i > j, -da * decay, 0.0)
    scores = dot(k, tl.trans(k)) * k_factor[:, None] * k_factor[None, :]
    dbeta = v_rest - k_read + tl.sum(da * scores, axis=1)
    da *= beta[:, None]
    dk += dot((da * k_factor[None, :] + tl.trans(da * k_factor[:, None])).to(k.dtype), k)
    da *= scores
    dsums += tl.sum(da, axis=1) - tl.sum(da, axis=0)
    dg = tl.sum(tl.where(i >= j, dsums[:, None], 0.0), axis=0) + tl.exp(last) * both + tl.sum(k_written, axis=0)
    return dq, dk, dg, dbeta


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
    """Launch the kernels of this file. inputs: q, k, v, g, beta; the rest as `delta.delta_backward`."""
    q, k, v, g, beta = inputs
    (_, hk, dk), (hv, dv), n = k.shape, v.shape[1:], chunks.rows.shape[0]
    sizes = (hk, hv, dk, dv)
    drest, dvalues = torch.empty_like(new), torch.empty_like(new)
    block = min(64, power_of_2(dv))
    strides = (q.stride(0), k.stride(0), dout.stride(0))
    arguments = (q, k, dout, *prepared[:3], drest, chunks.rows, *strides)
    launch(local_kernel, (n * hv,), *arguments, *sizes, block, CHUNK, num_warps=4, num_stages=1)
    dstates = torch.empty_like(states)
    dstarts = torch.empty(chunks.continued.shape[0], hv, dk, dv, dtype=torch.float32, device=v.device)
    block, wide = columns_of_block(dk, dv, v.dtype), power_of_2(dk)
    for table, continued in ((chunks.continued, True), (chunks.roots, False)):
        if table.shape[0]:
            grid = (table.shape[0] * hv * -(-dv // block),)
            arguments = (q, k, dout, beta, *prepared, drest, dvalues, dstates, dstarts, table, *strides)
            more = (beta.stride(0), dvalues.stride(0), *sizes, wide, block, CHUNK, continued)
            launch(back_kernel, grid, *arguments, *more, num_warps=4, num_stages=1)
    dq, dkeys = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    dg, dbeta = (torch.empty(g.shape, dtype=one.dtype, device=g.device) for one in (g, beta))
    block = min(power_of_2(dv), 32 if k.dtype.itemsize * wide <= 512 else 16)
    arguments = (q, k, v, dout, beta, *prepared[:3], new, drest, states, dstates, dq, dkeys, dg, dbeta, chunks.rows)
    strides = (q.stride(0), k.stride(0), v.stride(0), dout.stride(0), beta.stride(0), dq.stride(0), dkeys.stride(0))
    more = (float(scale), *sizes, wide, block, CHUNK, l2norm)
    launch(gradients_kernel, (n * hk,), *arguments, *strides, *more, num_warps=8, num_stages=1)
    return dq, dkeys, dvalues, dg, dbeta
