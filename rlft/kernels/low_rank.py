"""The thin products of LoRA: x and dY times a factor of rank r, each reading its wide operand once.

For a group of projections (`rlft.kernels.lora_group`: b [out, tail] holds scale_i B_i in blocks, a [tail, H] A):

    shrink     S = x a^T                                 [T, tail], one product of cuBLAS
    gradients  dS = dY b,   dB_i += scale_i dY_i^T S_i,   dA_i += dS_i^T x

`gradients` computes dS and dB in one pass over dY, up to rank 32. dB and dA sum over T and have too few output tiles to
fill a GPU: T is split, each part writes fp32 partial sums, and a second kernel adds them in fixed order (no atomics:
two runs are bitwise equal) into the caller's gradients.

Source: the split at S and the single pass over dY follow LoRAFusion (arXiv 2510.00206). Bytes per token, with element
size e: shrink reads e H, gradients e (out + H), each once, plus the partial sums.

Names in kernels: z the wide operand, u, v thin ones, q, p partial sums (of a gradient; of dS), t, c, r indices of rows,
columns, ranks; constants K, P as in `_columns`; s a split.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlft.kernels.launch import check_args, jit, kernel, launch, on_gpu, power_of_2, tl
from rlft.kernels.lora_group import TOGETHER, LoraGroup, pad_to_three


class Launch(NamedTuple):
    """Tile [rows of T, columns], least number of programs (T or the columns are split to reach it), warps, stages."""

    rows: int
    columns: int
    programs: int
    warps: int
    stages: int


GRAD_B = Launch(32, 256, 264, 4, 3)
GRAD_A = Launch(32, 128, 132, 4, 4)
"""For the two passes with 16-bit elements (32-bit ones take half the columns). The fastest of a sweep on an H100."""
MAX_SPLITS = 16
FUSED_RANK = 32
"""Up to this rank the pass for dB also computes dS. Its partial sums are written and read again: 4 rank / columns of
dY's bytes, a quarter at rank 16. Above, cuBLAS reads dY once more."""


def gradients_b_reference(
    group: LoraGroup, dy: Tensor, s: Tensor, b: Tensor, ds: Tensor, grad_B: Sequence[Tensor]
) -> None:
    """Compute `gradients_b` in plain PyTorch."""
    ds.copy_(dy @ b)
    for i in group.adapted:
        wide = grad_B[i].dtype
        grad_B[i].add_(dy[:, group.rows(i)].to(wide).T @ s[:, group.columns(i)].to(wide), alpha=group.scales[i])


def gradients_a_reference(group: LoraGroup, ds: Tensor, x: Tensor, grad_A: Sequence[Tensor]) -> None:
    """Compute `gradients_a` in plain PyTorch."""
    for i in group.adapted:
        wide = grad_A[i].dtype
        grad_A[i].add_(ds[:, group.columns(i)].to(wide).T @ x.to(wide))


# In the kernels below a tuple of constants holds, per projection with an adapter: FIRST tile, COLUMN (first of Y),
# WIDTH (columns of Y), K (first column of S), RANK. WIDE casts to fp32 after loading, for the interpreter.


@kernel(varying=("T", "T_share"))
def _columns(
    z, z_stride, v, v_stride, u, u_stride, q, p, T, T_share, q_size, COUNT: tl.constexpr, FIRST: tl.constexpr,
    COLUMN: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, BASE: tl.constexpr,
    P: tl.constexpr, P_STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pass once over a share of T rows of z: q[split] = z^T v, and with P also p[tile] = z u of those rows.

    For dB, z is dY, v is S, u is b: q holds the dB_i [WIDTH, RANK] one after the other, p [tiles, T, P_STRIDE] the dS
    of each tile's columns. For dA, TRANSPOSED, z is x, v is dS: q holds dA [RANK, WIDTH].
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first, column, width, k0, rank, base = 0, COLUMN[0], WIDTH[0], K[0], RANK[0], 0
    for i in tl.static_range(1, COUNT):  # type: ignore[reportGeneralTypeIssues]
        here = tile >= FIRST[i]
        first = tl.where(here, FIRST[i], first)
        column = tl.where(here, COLUMN[i], column)
        width = tl.where(here, WIDTH[i], width)
        k0 = tl.where(here, K[i], k0)
        rank = tl.where(here, RANK[i], rank)
        base = tl.where(here, BASE[i], base)
    c = (tile - first) * BC + tl.arange(0, BC)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    live_c, live_r = c < width, r < rank
    if P:
        ut = tl.load(
            u + (column + c).to(tl.int64)[:, None] * u_stride + (k0 + r)[None, :],
            mask=live_c[:, None] & live_r[None, :], other=0.0,
        )  # fmt: skip
        if WIDE:
            ut = ut.to(tl.float32)
    acc = tl.zeros([BC, BR], tl.float32)
    for start in range(split * T_share, tl.minimum((split + 1) * T_share, T), BT):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        live_t = t < T
        zt = tl.load(
            z + t[:, None] * z_stride + (column + c)[None, :], mask=live_t[:, None] & live_c[None, :], other=0.0
        )
        vt = tl.load(v + t[:, None] * v_stride + (k0 + r)[None, :], mask=live_t[:, None] & live_r[None, :], other=0.0)
        if WIDE:
            zt, vt = zt.to(tl.float32), vt.to(tl.float32)
        acc = tl.dot(tl.trans(zt), vt, acc, input_precision="ieee")
        if P:
            part = tl.dot(zt, ut, input_precision="ieee")
            tl.store(p + (tile.to(tl.int64) * T + t)[:, None] * P_STRIDE + r[None, :], part, mask=live_t[:, None])
    place = r[None, :] * width + c[:, None] if TRANSPOSED else base + c[:, None] * rank + r[None, :]
    tl.store(q + split.to(tl.int64) * q_size + place, acc, mask=live_c[:, None] & live_r[None, :])


@jit
def _sum_tiles(
    pid, p, out, out_stride, T, COUNT: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
    MOST: tl.constexpr, TAIL: tl.constexpr, P_STRIDE: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Compute out [T, TAIL] = sum of p [tiles, T, P_STRIDE] over the tiles of a projection; other columns are zero."""
    blocks: tl.constexpr = (TAIL + BR - 1) // BR
    t = (pid // blocks).to(tl.int64) * BT + tl.arange(0, BT)
    k = pid % blocks * BR + tl.arange(0, BR)
    first, tiles, local = tl.zeros([BR], tl.int32), tl.zeros([BR], tl.int32), tl.zeros([BR], tl.int32)
    for i in tl.static_range(COUNT):  # type: ignore[reportGeneralTypeIssues]
        here = (k >= K[i]) & (k < K[i] + RANK[i])
        first = tl.where(here, FIRST[i], first)
        tiles = tl.where(here, FIRST[i + 1] - FIRST[i], tiles)
        local = tl.where(here, k - K[i], local)
    acc = tl.zeros([BT, BR], tl.float32)
    for start in tl.static_range(0, MOST, 8):
        j = start + tl.arange(0, 8)
        place = ((first[None, None, :] + j[:, None, None]).to(tl.int64) * T + t[None, :, None]) * P_STRIDE
        live = (j[:, None, None] < tiles[None, None, :]) & (t < T)[None, :, None]
        acc += tl.sum(tl.load(p + place + local[None, None, :], mask=live, other=0.0), axis=0)
    live = (t < T)[:, None] & (k < TAIL)[None, :]
    tl.store(out + t[:, None] * out_stride + k[None, :], acc.to(out.dtype.element_ty), mask=live)


@jit
def _sum_splits(
    pid, q, g0, g1, g2, end0, end1, size, scale0, scale1, scale2, SPLITS, SPLITS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute g += scale * sum over splits of q [SPLITS, size]; elements up to end0 belong to g0, up to end1 to g1."""
    e = pid * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS_BLOCK)
    live = (s < SPLITS)[:, None] & (e < size)[None, :]
    total = tl.sum(tl.load(q + s.to(tl.int64)[:, None] * size + e[None, :], mask=live, other=0.0), axis=0)
    scale = tl.where(e < end0, scale0, tl.where(e < end1, scale1, scale2))
    place = tl.where(e < end0, g0 + e, tl.where(e < end1, g1 + (e - end0), g2 + (e - end1)))
    tl.store(place, tl.load(place, mask=e < size) + scale * total, mask=e < size)


@kernel(varying=("SPLITS",))
def _fold(
    q, g0, g1, g2, end0, end1, size, scale0, scale1, scale2, SPLITS, SPLITS_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum the splits in one launch."""
    _sum_splits(tl.program_id(0), q, g0, g1, g2, end0, end1, size, scale0, scale1, scale2, SPLITS, SPLITS_BLOCK, BLOCK)


@kernel(varying=("T", "SPLITS"))
def _fold_both(
    p, out, out_stride, T, q, g0, g1, g2, end0, end1, size, scale0, scale1, scale2, SPLITS, COUNT: tl.constexpr,
    FIRST: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, MOST: tl.constexpr, TAIL: tl.constexpr,
    P_STRIDE: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, SPLITS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the partial results of `_columns` for dS and dB in one launch: programs over rows, then over elements."""
    pid = tl.program_id(0)
    programs = (T + BT - 1) // BT * ((TAIL + BR - 1) // BR)
    if pid < programs:
        _sum_tiles(pid, p, out, out_stride, T, COUNT, FIRST, K, RANK, MOST, TAIL, P_STRIDE, BT, BR)
    else:
        _sum_splits(
            pid - programs, q, g0, g1, g2, end0, end1, size, scale0, scale1, scale2, SPLITS, SPLITS_BLOCK, BLOCK
        )


class _Tiles(NamedTuple):
    """How `_columns` tiles the columns, and its constants."""

    rank_block: int
    rank_blocks: int
    first: tuple[int, ...]
    base: tuple[int, ...]
    constants: dict[str, Any]
    folding: dict[str, Any]
    """Constants of `_sum_tiles`, except those of its output."""


@cache
def _tiles(spans: tuple[tuple[int, int, int, int], ...], wide: bool, how: Launch) -> _Tiles:
    """Choose the tiles.

    spans: (first column of z, width, first column of v, rank) per projection. wide: elements have 32 bits.
    """
    column, width, v_col, rank = (tuple(span) for span in zip(*spans, strict=True))
    # Without tensor cores, 32-bit elements, a block of 64 columns spills registers.
    rank_block = max(16, min(16 if wide else 64, power_of_2(max(rank))))
    rank_blocks = -(-max(rank) // rank_block)
    # 8,192 accumulators at most: 64 registers of a thread in 4 warps.
    columns = min(how.columns, 8192 // rank_block) // (2 if wide else 1)
    first = (0, *itertools.accumulate(-(-size // columns) for size in width))
    base = (0, *itertools.accumulate(size * ranks for size, ranks in zip(width, rank, strict=True)))
    constants = {
        "COUNT": len(spans), "FIRST": first, "COLUMN": column, "WIDTH": width, "K": v_col, "RANK": rank, "BASE": base,
        "P_STRIDE": rank_block * rank_blocks, "BT": how.rows, "BC": columns, "BR": rank_block,
        "num_warps": how.warps, "num_stages": how.stages,
    }  # fmt: skip
    folding = {name: constants[name] for name in ("COUNT", "FIRST", "K", "RANK", "P_STRIDE")}
    folding["MOST"] = max(end - start for start, end in itertools.pairwise(first))
    return _Tiles(rank_block, rank_blocks, first, base, constants, folding)


def _column_pass(
    z: Tensor, v: Tensor, u: Tensor | None, spans: tuple[tuple[int, int, int, int], ...], transposed: bool,
    how: Launch,
) -> tuple[Tensor, Tensor | None, _Tiles]:  # fmt: skip
    """Launch `_columns`; return q [splits, sum of width * rank], p [tiles, T, ranks] (None without u), and the tiles.

    spans: as `_tiles`.
    """
    T = z.shape[0]
    tiles = _tiles(spans, z.element_size() > 2, how)
    rank_block, rank_blocks, first, base, constants, _ = tiles
    splits = max(1, min(-(-how.programs // first[-1]), MAX_SPLITS, -(-T // how.rows)))
    share = -(-T // (splits * how.rows)) * how.rows
    q = z.new_empty(splits, base[-1], dtype=torch.float32)
    p = z.new_empty(first[-1], T, rank_block * rank_blocks, dtype=torch.float32) if u is not None else None
    # Without u the kernel reads neither u nor p; other tensors stand for them.
    factor, stride, sums = (v, 0, q) if u is None or p is None else (u, u.stride(0), p)
    launch(
        _columns, (first[-1], splits, rank_blocks),
        z, z.stride(0), v, v.stride(0), factor, stride, q, sums, T, share, base[-1],
        P=u is not None, TRANSPOSED=transposed, WIDE=not z.is_cuda, **constants,
    )  # fmt: skip
    return q, p, tiles


ELEMENTS = 256
"""Elements of q per program."""


def _sums(q: Tensor, grads: Sequence[Tensor], scales: Sequence[float]) -> tuple[int, tuple, dict[str, int]]:
    """Return programs, arguments and constants of `_sum_splits`: grads[i] += scales[i] * its elements of q."""
    ends = list(itertools.accumulate(grad.numel() for grad in grads))
    factors = pad_to_three([float(scale) for scale in scales])
    arguments = (q, *pad_to_three(grads), *pad_to_three(ends)[:2], q.shape[1], *factors, q.shape[0])
    return -(-q.shape[1] // ELEMENTS), arguments, {"SPLITS_BLOCK": power_of_2(q.shape[0]), "BLOCK": ELEMENTS}


def _add(q: Tensor, grads: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Run `_sum_splits` as a separate launch."""
    programs, arguments, constants = _sums(q, grads, scales)
    launch(_fold, (programs,), *arguments, **constants)


@cache
def _spans(group: LoraGroup) -> tuple[tuple[int, int, int, int], ...]:
    """Return the spans of dB."""
    places = ((i, group.rows(i), group.columns(i)) for i in group.adapted)
    return tuple((rows.start, group.out_features[i], columns.start, group.ranks[i]) for i, rows, columns in places)


def gradients_b_launch(
    group: LoraGroup, dy: Tensor, s: Tensor, b: Tensor, ds: Tensor, grad_B: Sequence[Tensor],
    how: Launch = GRAD_B, fused_rank: int = FUSED_RANK,
) -> None:  # fmt: skip
    """Compute `gradients_b` by the kernels."""
    if len(group.adapted) > TOGETHER:
        for part, projections, rows, columns in group.parts:
            operands = dy[:, rows], s[:, columns], b[rows, columns], ds[:, columns], grad_B[projections]
            gradients_b_launch(part, *operands, how, fused_rank)
        return
    fused = max(group.ranks) <= fused_rank
    q, p, tiles = _column_pass(dy, s, b if fused else None, _spans(group), False, how)
    grads, scales = [grad_B[i] for i in group.adapted], [group.scales[i] for i in group.adapted]
    if p is None:
        torch.mm(dy, b, out=ds)
        _add(q, grads, scales)
        return
    programs, arguments, constants = _sums(q, grads, scales)
    T, tail = ds.shape
    block = min(64, power_of_2(tail))
    rows = 1024 // block
    launch(
        _fold_both, (-(-T // rows) * -(-tail // block) + programs,),
        p, ds, ds.stride(0), T, *arguments, TAIL=tail, BT=rows, BR=block, **tiles.folding, **constants,
    )  # fmt: skip


def gradients_a_launch(group: LoraGroup, ds: Tensor, x: Tensor, grad_A: Sequence[Tensor], how: Launch = GRAD_A) -> None:
    """Compute `gradients_a` by the kernels."""
    if len(group.adapted) > TOGETHER:
        for part, projections, _, columns in group.parts:
            gradients_a_launch(part, ds[:, columns], x, grad_A[projections], how)
        return
    q, _, _ = _column_pass(x, ds, None, ((0, group.in_features, 0, group.rank),), True, how)
    _add(q, [grad_A[i] for i in group.adapted], [1.0 for _ in group.adapted])


def gradients_launch(
    group: LoraGroup, dy: Tensor, x: Tensor, s: Tensor, b: Tensor, ds: Tensor,
    grad_A: Sequence[Tensor], grad_B: Sequence[Tensor], launch_B: Launch = GRAD_B, launch_A: Launch = GRAD_A,
    fused_rank: int = FUSED_RANK,
) -> None:  # fmt: skip
    """Compute `gradients` by the kernels."""
    gradients_b_launch(group, dy, s, b, ds, grad_B, launch_B, fused_rank)
    gradients_a_launch(group, ds, x, grad_A, launch_A)


def shrink(group: LoraGroup, x: Tensor, a: Tensor, s: Tensor) -> None:
    """Compute s = x a^T.

    x: [T, H]. a: [tail, H], from `AdapterWriteTables`. s: [T, tail] (for example the tail of x), overwritten. Raises
    ValueError unless all have unit column stride.
    """
    check_args(
        "shrink",
        x.dim() == 2 and x.shape[1] == group.in_features and tuple(s.shape) == (x.shape[0], group.tail)
        and tuple(a.shape) == (group.tail, group.in_features) and {x.stride(1), s.stride(1), a.stride(1)} == {1}
        and x.dtype == s.dtype == a.dtype,
        f"x [T, {group.in_features}], a [{group.tail}, {group.in_features}], s [T, {group.tail}] of one dtype, rows of "
        f"unit column stride", x=x, a=a, s=s,
    )  # fmt: skip
    # Measured on an H100 with T = 4k and 48 columns: cuBLAS reads x at 1.5 TB/s, a Triton kernel was a third slower.
    torch.mm(x, a.T, out=s)


def gradients_b(group: LoraGroup, dy: Tensor, s: Tensor, b: Tensor, ds: Tensor, grad_B: Sequence[Tensor]) -> None:
    """Compute ds = dy b, and add the gradient of B to the caller's. Arguments and errors as `gradients`."""
    T = dy.shape[0]
    check_args(
        "gradients_b",
        tuple(dy.shape) == (T, group.out) and tuple(ds.shape) == (T, group.tail) and s.shape[0] == T
        and s.shape[1] >= group.rank and tuple(b.shape) == (group.out, group.tail)
        and dy.dtype == s.dtype == ds.dtype == b.dtype
        and all(tensor.stride(1) == 1 or not tensor.numel() for tensor in (dy, s, ds, b)),
        f"dy [T, {group.out}], ds [T, {group.tail}], s [T, {group.rank} or more], b [{group.out}, {group.tail}] of one "
        f"dtype, rows of unit column stride", dy=dy, s=s, ds=ds, b=b,
    )  # fmt: skip
    for i in group.adapted:
        _check_gradient("gradients_b", i, grad_B[i], (group.out_features[i], group.ranks[i]), dy)
    if on_gpu("gradients_b", dy=dy, s=s, b=b, ds=ds):
        if ds.numel():
            gradients_b_launch(group, dy, s, b, ds, grad_B)
    else:
        gradients_b_reference(group, dy, s, b, ds, grad_B)


def gradients_a(group: LoraGroup, ds: Tensor, x: Tensor, grad_A: Sequence[Tensor]) -> None:
    """Add the gradient of A to the caller's. Arguments and errors as `gradients`."""
    T = x.shape[0]
    check_args(
        "gradients_a",
        tuple(x.shape) == (T, group.in_features) and tuple(ds.shape) == (T, group.tail) and x.dtype == ds.dtype
        and all(tensor.stride(1) == 1 or not tensor.numel() for tensor in (x, ds)),
        f"x [T, {group.in_features}] and ds [T, {group.tail}] of one dtype, rows of unit column stride", x=x, ds=ds,
    )  # fmt: skip
    for i in group.adapted:
        _check_gradient("gradients_a", i, grad_A[i], (group.ranks[i], group.in_features), x)
    if on_gpu("gradients_a", x=x, ds=ds):
        if ds.numel():
            gradients_a_launch(group, ds, x, grad_A)
    else:
        gradients_a_reference(group, ds, x, grad_A)


def _check_gradient(op: str, i: int, grad: Tensor, shape: tuple[int, int], like: Tensor) -> None:
    """Raise ValueError for a gradient buffer that does not fit."""
    ok = grad.shape == shape and grad.is_contiguous() and grad.device == like.device
    # The message is built only on failure, since this runs 14 times per layer.
    if not ok or (like.is_cuda and grad.dtype != torch.float32):
        wanted = f"a gradient {list(shape)}, contiguous, float32 on a GPU, on {like.device}, for projection {i}"
        wanted += f", not on {grad.device}" if grad.device != like.device else ""
        check_args(op, False, wanted, gradient=grad)


def gradients(
    group: LoraGroup, dy: Tensor, x: Tensor, s: Tensor, b: Tensor, ds: Tensor,
    grad_A: Sequence[Tensor], grad_B: Sequence[Tensor],
) -> None:  # fmt: skip
    """Compute ds = dy b, and add the gradients of A and B to the caller's.

    dy: [T, out]. x: [T, H]. s: [T, rank or more] from the forward. b: [out, tail] from `AdapterWriteTables`. ds: [T,
    tail], overwritten (for example the tail of dy). grad_A: per projection [r_i, H], grad_B: [out_i, r_i], contiguous
    (views of a flat buffer are), float32 on a GPU. Raises ValueError otherwise.
    """
    gradients_b(group, dy, s, b, ds, grad_B)
    gradients_a(group, ds, x, grad_A)
