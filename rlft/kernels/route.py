"""Sort the expert choices of a batch by expert: a stable counting sort in one launch.

Token t chooses k experts, chosen [T, k]; choice i = t k + j is the flat index of its j-th. Rows of the grouped products
(`rlft.kernels.grouped`) lie expert by expert, within an expert in the order of i:

    offsets_e = number of i with chosen_i < e
    inverse_i = offsets_{chosen_i} + number of i' < i with chosen_i' = chosen_i,     order_{inverse_i} = i

Each program counts all choices by itself, those before its share and the others, so that no program waits for another
and nothing depends on the order of atomics: two runs are bitwise equal. It then places its share. Bytes: reads chosen
once per program, from the L2 cache, and writes 8 per choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlft.kernels.launch import check_args, kernel, launch, on_gpu, power_of_2, tl

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
MOST_EXPERTS = 1024
"""Most experts: their counts lie in the registers of one program."""
PROGRAMS = 128
"""Most programs. Each reads all choices, so that more of them read more."""
BLOCK, ROWS = 4096, 128
"""Choices that are counted together, and choices that are placed together."""


class Sorted(NamedTuple):
    """Where the rows of each expert are, from `sort_by_expert`."""

    order: Tensor
    """[T k] int32: the flat index token * k + choice of each sorted row."""
    inverse: Tensor
    """[T k] int32: the sorted row of each flat index."""
    offsets: Tensor
    """[experts + 1] int32: the rows of expert e are `offsets[e]:offsets[e + 1]`."""


def sort_reference(chosen: Tensor, experts: int) -> Sorted:
    """Compute `sort_by_expert` in plain PyTorch."""
    flat = chosen.reshape(-1).long()
    values, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(flat.numel(), device=flat.device)
    bounds = torch.arange(experts + 1, device=flat.device)
    return Sorted(order.int(), inverse.int(), torch.searchsorted(values, bounds, out_int32=True))


@kernel(varying=("T", "T_share"))
def _sort(
    chosen,
    order,
    inverse,
    offsets,
    T,
    T_share,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Place T_share of T choices; the first program also writes the offsets."""
    first = tl.program_id(0) * T_share
    before = tl.zeros([BINS], tl.int32)
    for start in range(0, first, BLOCK):
        i = start + tl.arange(0, BLOCK)
        expert = tl.load(chosen + i, mask=i < first, other=0).to(tl.int32)
        before += tl.histogram(expert, BINS, mask=i < first)
    total = before
    for start in range(first, T, BLOCK):
        i = start + tl.arange(0, BLOCK)
        expert = tl.load(chosen + i, mask=i < T, other=0).to(tl.int32)
        total += tl.histogram(expert, BINS, mask=i < T)
    begin = tl.cumsum(total, 0) - total
    if first == 0:
        e = tl.arange(0, BINS)
        tl.store(offsets + e, begin, mask=e < EXPERTS)
        tl.store(offsets + EXPERTS, T)
    next_row = begin + before
    lane = tl.arange(0, ROWS)
    for start in range(first, tl.minimum(first + T_share, T), ROWS):
        i = start + lane
        live = i < T
        expert = tl.load(chosen + i, mask=live, other=0).to(tl.int32)
        earlier = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        place = tl.gather(next_row, expert, 0) + tl.sum(earlier.to(tl.int32), axis=1)
        tl.store(order + place, i, mask=live)
        tl.store(inverse + i, place, mask=live)
        next_row += tl.histogram(expert, BINS, mask=live)


def sort_launch(chosen: Tensor, experts: int, programs: int = PROGRAMS) -> Sorted:
    """Compute `sort_by_expert` by the kernel."""
    flat = chosen.reshape(-1)
    T = flat.numel()
    # One allocation, its parts aligned so that Triton does not compile again for another address.
    sizes = [-(-size // 64) * 64 for size in (T, T, experts + 1)]
    parts = torch.empty(sum(sizes), dtype=torch.int32, device=chosen.device).split(sizes)
    order, inverse, offsets = parts[0][:T], parts[1][:T], parts[2][: experts + 1]
    share = max(1, -(-T // (programs * ROWS))) * ROWS
    bins = max(16, power_of_2(experts))
    launch(
        _sort,
        (max(1, -(-T // share)),),
        flat,
        order,
        inverse,
        offsets,
        T,
        share,
        EXPERTS=experts,
        BINS=bins,
        BLOCK=BLOCK,
        ROWS=ROWS,
        num_warps=8,
    )
    return Sorted(order, inverse, offsets)


def sort_by_expert(chosen: Tensor, experts: int) -> Sorted:
    """Sort choices by expert, stable: rows of one expert stay in the order of tokens.

    chosen: [T, k] integers in [0, experts), of any integer dtype but int8; on a GPU their range is the caller's to
    guarantee, since looking at them would wait for it. Raises ValueError for other dtypes and for more than 1,024
    experts, and on a CPU for a choice out of range.
    """
    check_args(
        "sort_by_expert",
        chosen.dim() == 2
        and chosen.dtype in INTEGERS
        and 1 <= experts <= MOST_EXPERTS
        and chosen.numel() < 2**31 - BLOCK,
        f"chosen [T, k], uint8, int16, int32 or int64, of 1 to {MOST_EXPERTS} experts (not {experts})",
        chosen=chosen,
    )
    if on_gpu("sort_by_expert", chosen=chosen):
        return sort_launch(chosen, experts)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < experts:
        raise ValueError(
            f"sort_by_expert: want choices in [0, {experts}), got {int(chosen.min())} to {int(chosen.max())}"
        )
    return sort_reference(chosen, experts)
