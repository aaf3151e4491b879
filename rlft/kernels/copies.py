"""Rows of which several readers get a copy each, and the gradient of a row as the sum of its copies'.

    copy_i = x_{index_i}, i < N                 dx_t = sum of dcopy_i over the i with index_i = t

Where each row's copies are is listed beforehand, so that one program adds them up, in fp32, rounded once and without
atomics: two runs give the same bits. A row without a copy gets 0. Bytes per copy of a row of C 2-byte elements: 4 C
forward; backward 2 C, and 2 C per row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.kernels.launch import jit, on_device, on_gpu, power_of_2, tl

ELEMENTS = 2048
"""Elements of a program's tile."""
ALIGN = 32
"""Indices that the place of each table is a multiple of."""


class Copies(NamedTuple):
    """Which row each copy is of, and where each row's copies are."""

    index: Tensor
    """[N] int32: the row that a copy is of."""
    starts: Tensor
    """[T + 1] int32: the copies of row t are `order[starts[t]:starts[t + 1]]`."""
    order: Tensor
    """[N] int32: copies, those of a row side by side, first ones first."""

    @classmethod
    def of(cls, index: np.ndarray, rows: int, device: torch.device) -> Copies:
        """index: [N], the row of each copy. rows: how many there are."""
        starts = np.zeros(rows + 1, np.int32)
        np.cumsum(np.bincount(index, minlength=rows), out=starts[1:])
        parts = (index, starts, np.argsort(index, kind="stable"))
        # One copy to the device, for which the host waits; each part at an address for which nothing is compiled anew.
        room = [-(-part.size // ALIGN) * ALIGN for part in parts]
        together = np.zeros(sum(room), np.int32)
        for part, start in zip(parts, np.cumsum([0, *room]), strict=False):
            together[start : start + part.size] = part
        places = torch.from_numpy(together).to(device).split(room)
        return cls(*(place[: part.size] for place, part in zip(places, parts, strict=True)))


def copied_reference(x: Tensor, copies: Copies) -> Tensor:
    """`copied` in plain PyTorch."""
    return x[copies.index.long()]


def summed_reference(d: Tensor, copies: Copies) -> Tensor:
    """`summed` in plain PyTorch, added up in the gradients' own type."""
    return d.new_zeros(copies.starts.numel() - 1, *d.shape[1:]).index_add(0, copies.index.long(), d)


@jit
def _copy_rows(x, index, out, N, x_stride, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    of = tl.load(index + rows, mask=rows < N, other=0).to(tl.int64)[:, None]
    mask = (rows < N)[:, None] & (columns < C)
    tl.store(out + rows[:, None] * C + columns, tl.load(x + of * x_stride + columns, mask=mask), mask=mask)


@jit
def _sum_rows(d, starts, order, out, T, d_stride, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    first = tl.load(starts + rows, mask=rows < T, other=0)
    last = tl.load(starts + rows + 1, mask=rows < T, other=0)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for i in range(tl.max(last - first, 0)):
        live = first + i < last
        copy = tl.load(order + first + i, mask=live, other=0).to(tl.int64)[:, None]
        total += tl.load(d + copy * d_stride + columns, mask=live[:, None] & (columns < C), other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * C + columns, total, mask=(rows < T)[:, None] & (columns < C))


def _launch(kernel: object, rows: int, x: Tensor, *rest: Tensor, out: Tensor) -> None:
    flat, width = x.flatten(1), x[0].numel() if x.shape[0] else 0
    if rows and width:
        block = power_of_2(width)
        each = max(1, ELEMENTS // block)
        with on_device(x):
            kernel[(-(-rows // each),)](flat, *rest, out, rows, flat.stride(0), C=width, BLOCK=block, ROWS=each)  # type: ignore[index]


def launch_copied(x: Tensor, copies: Copies) -> Tensor:
    """`copied` by the kernel."""
    out = x.new_empty(copies.index.numel(), *x.shape[1:])
    _launch(_copy_rows, out.shape[0], x, copies.index, out=out)
    return out


def launch_summed(d: Tensor, copies: Copies) -> Tensor:
    """`summed` by the kernel."""
    shape = (copies.starts.numel() - 1, *d.shape[1:])
    # Without a copy there is no launch.
    out = d.new_empty(shape) if d.numel() else d.new_zeros(shape)
    _launch(_sum_rows, out.shape[0], d, copies.starts, copies.order, out=out)
    return out


def copied(x: Tensor, copies: Copies) -> Tensor:
    """x [T, ...] -> the copies [N, ...]. Rows may lie apart; inside they are contiguous, or x is copied first."""
    return launch_copied(x, copies) if on_gpu("copied", x=x, index=copies.index) else copied_reference(x, copies)


def summed(d: Tensor, copies: Copies) -> Tensor:
    """Gradients of the copies [N, ...] -> of the rows [T, ...]."""
    return launch_summed(d, copies) if on_gpu("summed", d=d, index=copies.index) else summed_reference(d, copies)
