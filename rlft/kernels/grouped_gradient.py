"""The gradient of a factor of each expert: products of two sets of sorted rows, summed over the rows of the expert.

    out_e (+)= scale sum over rows m of e of a_m^T b_m              [E, P, Q] fp32

One of a and b is thin (a rank of LoRA), so an expert has few output tiles, and experts have unlike numbers of rows:
rows are cut into shares of one expert each. An expert of one share adds to `out` directly; of several, each writes fp32
sums q that a second kernel adds in fixed order, without atomics: two runs are bitwise equal. Offsets stay on the device
(`rlft.kernels.expert_tiles`). Bytes: a and b once, out once or twice, q twice for experts of several shares.

M rows. In the kernels z is the wide operand and v the thin one, c and r index their columns, C and R count them, t
indexes rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rlft.kernels.expert_tiles import bins, expert_tile, fits, most_tiles, tiles_before
from rlft.kernels.launch import KERNEL_DTYPES, check_args, kernel, launch, on_gpu, power_of_2, tl
from rlft.kernels.low_rank import GRAD_B, Launch

LEAST_SHARE, MOST_SHARE = 256, 2048
"""Rows of a share, powers of two."""
ELEMENTS = 1024
"""Elements of out per program that adds shares."""


def grouped_gradient_reference(
    a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, accumulate: bool = False, scale: float = 1.0
) -> Tensor:
    """Compute `grouped_gradient` in plain PyTorch, an expert after the other."""
    if not accumulate:
        out.zero_()
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        if end > start:
            out[e].addmm_(a[start:end].to(out.dtype).T, b[start:end].to(out.dtype), alpha=scale)
    return out


@kernel(varying=("T_share",))
def _shares(
    z,
    v,
    offsets,
    q,
    out,
    T_share,
    z_stride,
    v_stride,
    out_expert,
    out_c,
    out_r,
    scale,
    C: tl.constexpr,
    R: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute z^T v of a share of rows for a tile [BC, BR], into out or into q [shares, C, R]."""
    share = tl.program_id(1)
    expert, first, stop, count = expert_tile(share, offsets, T_share, EXPERTS, BINS)
    if first < stop:
        c = tl.program_id(0) * BC + tl.arange(0, BC)
        r = tl.program_id(2) * BR + tl.arange(0, BR)
        live_c, live_r = c < C, r < R
        acc = tl.zeros([BC, BR], tl.float32)
        end = tl.minimum(first + T_share, stop)
        for start in range(first, end, BT):
            t = (start + tl.arange(0, BT)).to(tl.int64)
            live_t = t < end
            zt = tl.load(z + t[:, None] * z_stride + c[None, :], mask=live_t[:, None] & live_c[None, :], other=0.0)
            vt = tl.load(v + t[:, None] * v_stride + r[None, :], mask=live_t[:, None] & live_r[None, :], other=0.0)
            if WIDE:
                zt, vt = zt.to(tl.float32), vt.to(tl.float32)
            acc = tl.dot(tl.trans(zt), vt, acc, input_precision="ieee")
        live = live_c[:, None] & live_r[None, :]
        if count == 1:
            place = out + expert.to(tl.int64) * out_expert + c.to(tl.int64)[:, None] * out_c + r[None, :] * out_r
            acc = acc * scale
            if ACCUMULATE:
                acc += tl.load(place, mask=live, other=0.0)
            tl.store(place, acc, mask=live)
        else:
            tl.store(q + (share.to(tl.int64) * C + c[:, None]) * R + r[None, :], acc, mask=live)


@kernel(varying=("T_share",))
def _add_shares(
    q,
    offsets,
    out,
    T_share,
    out_expert,
    out_c,
    out_r,
    scale,
    C: tl.constexpr,
    R: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the shares of an expert that has several; without ACCUMULATE write zeros for one that has none."""
    expert = tl.program_id(1)
    rows = tl.load(offsets + expert + 1) - tl.load(offsets + expert)
    count = (rows + T_share - 1) // T_share
    if (count > 1) | ((count == 0) & (not ACCUMULATE)):
        first = tiles_before(expert, offsets, T_share, EXPERTS, BINS)
        element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = element < C * R
        total = tl.zeros([BLOCK], tl.float32)
        q += first.to(tl.int64) * (C * R)
        for _ in range(count):
            total += tl.load(q + element, mask=live, other=0.0)
            q += C * R
        c = (element // R).to(tl.int64)
        place = out + expert.to(tl.int64) * out_expert + c * out_c + (element % R).to(tl.int64) * out_r
        total = total * scale
        if ACCUMULATE:
            total += tl.load(place, mask=live, other=0.0)
        tl.store(place, total, mask=live)


def grouped_gradient_launch(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
    scale: float = 1.0,
    how: Launch = GRAD_B,
    share: int | None = None,
) -> None:
    """Compute `grouped_gradient` by the kernels. share: rows of a share, for tests."""
    M, experts = a.shape[0], out.shape[0]
    if not out.numel() or (accumulate and not M):
        return
    z, v, target = (a, b, out) if a.shape[1] >= b.shape[1] else (b, a, out.transpose(1, 2))
    C, R = z.shape[1], v.shape[1]
    wide = z.element_size() == 4
    # As low_rank: without tensor cores wider blocks spill, and 8,192 accumulators are 64 registers of a thread.
    BR = max(16, min(16 if wide else 64, power_of_2(R)))
    BC = min(how.columns, 8192 // BR, max(16, power_of_2(C))) // (2 if wide and C > 16 else 1)
    tiles = -(-C // BC)
    wanted = max(1, how.programs // tiles)
    share = share or max(LEAST_SHARE, min(MOST_SHARE, power_of_2(max(1, M // wanted))))
    shares = most_tiles(M, share, experts)
    q = z.new_empty(shares, C, R, dtype=torch.float32)
    factor = float(scale)
    sizes = {"C": C, "R": R, "EXPERTS": experts, "BINS": bins(experts), "ACCUMULATE": accumulate}
    if M:
        launch(
            _shares,
            (tiles, shares, -(-R // BR)),
            *(z, v, offsets, q, target, share, z.stride(0), v.stride(0), *target.stride(), factor),
            **sizes,
            BT=how.rows,
            BC=BC,
            BR=BR,
            WIDE=not z.is_cuda,
            num_warps=how.warps,
            num_stages=how.stages,
        )
    programs = -(-C * R // ELEMENTS)
    launch(
        _add_shares,
        (programs, experts),
        *(q if M else target, offsets, target, share, *target.stride(), factor),
        **sizes,
        BLOCK=ELEMENTS,
    )


def grouped_gradient(
    a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, accumulate: bool = False, scale: float = 1.0
) -> Tensor:
    """Compute out_e = scale a^T b over the rows of each expert, or add it; return out.

    a: [M, P], b: [M, Q], sorted by expert, of one dtype, rows of any stride. offsets: [E + 1] int32 of
    `sort_by_expert`. out: [E, P, Q] float32 (or float64 on a CPU), of any strides, so that a view of a parameter's
    gradient fits. accumulate: add to out; else overwrite it, with zeros for experts without rows. Raises ValueError on
    shapes and dtypes that do not fit.
    """
    check_args(
        "grouped_gradient",
        a.dim() == b.dim() == 2
        and out.dim() == 3
        and out.shape[0] >= 1
        and a.shape[0] == b.shape[0]
        and tuple(out.shape[1:]) == (a.shape[1], b.shape[1])
        and a.dtype == b.dtype
        and all(rows.stride(1) == 1 or rows.shape[1] <= 1 for rows in (a, b))
        and fits(offsets, out.shape[0])
        and out.dtype in (torch.float32, torch.float64),
        "a [M, P], b [M, Q] of one dtype, unit column stride, offsets [E + 1] int32, out [E, P, Q] float32",
        a=a,
        b=b,
        offsets=offsets,
        out=out,
    )
    if not on_gpu("grouped_gradient", a=a, b=b, offsets=offsets, out=out):
        return grouped_gradient_reference(a, b, offsets, out, accumulate, scale)
    check_args(
        "grouped_gradient",
        a.dtype in KERNEL_DTYPES and out.dtype == torch.float32,
        "float32, bfloat16 or float16 rows and a float32 out on a GPU",
        a=a,
        out=out,
    )
    grouped_gradient_launch(a, b, offsets, out, accumulate, scale)
    return out
