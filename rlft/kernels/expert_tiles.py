"""Find the rows that a program works on, where rows lie expert by expert and only the device knows how many each has.

offsets [experts + 1] int32 (`rlft.kernels.route`) stay on the device, so the host never waits for them: the grid is the
most tiles that any offsets of M rows can give, and a program beyond the last tile does nothing. A tile has rows of one
expert only. e indexes experts.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rlft.kernels.launch import jit, power_of_2, tl


@jit
def expert_tile(program, offsets, ROWS, EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """Return the expert of a tile, its first row, the end of the expert's rows, and the tiles of the expert.

    ROWS: rows of a tile. BINS: a power of two, at least EXPERTS. Beyond the last tile, first row and end are 0.
    """
    e = tl.arange(0, BINS)
    begin = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    end = tl.load(offsets + e + 1, mask=e < EXPERTS, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    passed = tl.cumsum(tiles, 0)
    expert = tl.sum((passed <= program).to(tl.int32), 0)
    first_tile = tl.max(tl.where(passed <= program, passed, 0), 0)
    live = expert < EXPERTS
    start = tl.load(offsets + expert, mask=live, other=0)
    stop = tl.load(offsets + expert + 1, mask=live, other=0)
    first = tl.where(live, start + (program - first_tile) * ROWS, 0)
    return expert, first, stop, (stop - start + ROWS - 1) // ROWS


@jit
def tiles_before(expert, offsets, ROWS, EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """Return the number of tiles of all experts before one."""
    e = tl.arange(0, BINS)
    begin = tl.load(offsets + e, mask=e < expert, other=0)
    end = tl.load(offsets + e + 1, mask=e < expert, other=0)
    return tl.sum((end - begin + ROWS - 1) // ROWS, 0)


def most_tiles(rows: int, rows_of_tile: int, experts: int) -> int:
    """Return the most tiles that `rows` rows of so few experts can take.

    >>> most_tiles(8, 16, 128), most_tiles(256, 16, 1), most_tiles(256, 16, 3)
    (8, 16, 18)
    """
    full = min(rows, experts)
    return (rows - full) // rows_of_tile + full


@cache
def bins(experts: int) -> int:
    """Return BINS of these functions."""
    return max(16, power_of_2(experts))


def fits(offsets: Tensor, experts: int) -> bool:
    """Return whether offsets are those of a number of experts."""
    return offsets.dtype == torch.int32 and tuple(offsets.shape) == (experts + 1,) and offsets.is_contiguous()
