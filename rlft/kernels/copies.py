"""Rows of which several readers get a copy each, and the gradient of a row as the sum of its copies'.

    copy_i = x_{index_i}, i < N                 dx_t = sum of dcopy_i over the i with index_i = t

The copies are PyTorch's own gather, which runs at a copy's speed. Its scatter does not, and adds up with atomics in the
rows' type. Here it is listed beforehand where each row's copies are, so that one program adds them up, in fp32, rounded
once: two runs give the same bits. A row without a copy gets 0. Bytes of the sum: 2 C per copy of a row of C 2-byte
elements, and 2 C per row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.kernels.launch import jit, launch, on_gpu, power_of_2, tl
from rlft.upload import upload

ELEMENTS = 2048
"""Elements of a program's tile."""
ALIGN = 32
"""Indices that the place of each table is a multiple of."""


class Copies(NamedTuple):
    """Which row each copy is of, and where each row's copies are."""

    index: Tensor
    """[N] int64: the row that a copy is of."""
    starts: Tensor
    """[T + 1] int32: the copies of row t are `order[starts[t]:starts[t + 1]]`."""
    order: Tensor
    """[N] int32: copies, those of a row side by side, first ones first."""

    @classmethod
    def of(cls, index: np.ndarray, rows: int, device: torch.device) -> Copies:
        """index: [N], the row of each copy. rows: how many there are."""
        starts = np.zeros(rows + 1, np.int32)
        np.cumsum(np.bincount(index, minlength=rows), out=starts[1:])
        parts = (starts, np.argsort(index, kind="stable"))
        # One copy to the device, each part at an address for which nothing is compiled anew.
        room = [-(-part.size // ALIGN) * ALIGN for part in parts]
        together = np.zeros(sum(room), np.int32)
        for part, start in zip(parts, np.cumsum([0, *room]), strict=False):
            together[start : start + part.size] = part
        places = upload(torch.from_numpy(together), device).split(room)
        own = upload(torch.from_numpy(index.astype(np.int64)), device)
        return cls(own, *(place[: part.size] for place, part in zip(places, parts, strict=True)))


def summed_reference(d: Tensor, copies: Copies) -> Tensor:
    """`summed` in plain PyTorch, added up in the gradients' own type."""
    return d.new_zeros(copies.starts.numel() - 1, *d.shape[1:]).index_add(0, copies.index, d)


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


def launch_summed(d: Tensor, copies: Copies) -> Tensor:
    """`summed` by the kernel."""
    rows = copies.starts.numel() - 1
    if not d.numel():
        return d.new_zeros(rows, *d.shape[1:])
    flat, out = d.flatten(1), d.new_empty(rows, *d.shape[1:])
    block = power_of_2(flat.shape[1])
    each = max(1, ELEMENTS // block)
    launch(
        _sum_rows,
        (-(-rows // each),),
        flat,
        copies.starts,
        copies.order,
        out,
        rows,
        flat.stride(0),
        C=flat.shape[1],
        BLOCK=block,
        ROWS=each,
    )
    return out


def copied(x: Tensor, copies: Copies) -> Tensor:
    """x [T, ...] -> the copies [N, ...]. Rows may lie apart. Raises ValueError for tensors on different devices."""
    on_gpu("copied", x=x, index=copies.index)
    return x[copies.index]


def summed(d: Tensor, copies: Copies) -> Tensor:
    """Gradients of the copies [N, ...] -> of the rows [T, ...]."""
    return launch_summed(d, copies) if on_gpu("summed", d=d, index=copies.index) else summed_reference(d, copies)
