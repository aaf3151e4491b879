"""Copy rows for several readers each, and sum the gradients of the copies of a row.

    copy_i = x_{index_i}, i < N                 dx_t = sum of d_i over the i with index_i = t

The copies use PyTorch's gather, which runs at the speed of a copy. Its scatter is slower and adds with atomics in the
dtype of the rows. Here the copies of each row are listed beforehand, so that one program sums them in fp32 and rounds
once: two runs are bitwise equal. A row without copies gets 0. Bytes of the sum: 2 C per copy of a row of C 2-byte
elements, and 2 C per row. x [T, ...] are the rows, d [N, ...] the gradients of the copies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.kernels.launch import kernel, launch, on_gpu, power_of_2, tl
from rlft.upload import upload

ELEMENTS = 2048
"""Elements of the tile of one program."""
ALIGN = 32
"""Alignment of each table, in indices."""


class Copies(NamedTuple):
    """Which row each copy is taken from, and where the copies of each row are."""

    index: Tensor
    """[N] int64: the row that each copy is taken from."""
    starts: Tensor
    """[T + 1] int32: the copies of row t are `order[starts[t]:starts[t + 1]]`."""
    order: Tensor
    """[N] int32: indices of copies, grouped by row, in ascending order."""

    @classmethod
    def of(cls, index: np.ndarray, rows: int, device: torch.device) -> Copies:
        """Build from index [N], the row of each copy. rows: number of rows."""
        starts = np.zeros(rows + 1, np.int32)
        np.cumsum(np.bincount(index, minlength=rows), out=starts[1:])
        parts = (starts, np.argsort(index, kind="stable"))
        # One upload for both tables, aligned so that Triton does not recompile for another alignment.
        sizes = [-(-part.size // ALIGN) * ALIGN for part in parts]
        tables = np.zeros(sum(sizes), np.int32)
        for part, start in zip(parts, np.cumsum([0, *sizes]), strict=False):
            tables[start : start + part.size] = part
        uploaded = upload(torch.from_numpy(tables), device).split(sizes)
        index_on_device = upload(torch.from_numpy(index.astype(np.int64)), device)
        return cls(index_on_device, *(table[: part.size] for table, part in zip(uploaded, parts, strict=True)))


def summed_reference(d: Tensor, copies: Copies) -> Tensor:
    """Compute `summed` in plain PyTorch, in the dtype of the gradients."""
    return d.new_zeros(copies.starts.numel() - 1, *d.shape[1:]).index_add(0, copies.index, d)


@kernel(varying=("T",))
def _sum_rows(d, starts, order, out, T, d_stride, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sum the copies of ROWS rows."""
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
    """Compute `summed` by the kernel."""
    rows = copies.starts.numel() - 1
    if not d.numel():
        return d.new_zeros(rows, *d.shape[1:])
    flat, out = d.flatten(1), d.new_empty(rows, *d.shape[1:])
    block = power_of_2(flat.shape[1])
    rows_per_program = max(1, ELEMENTS // block)
    launch(
        _sum_rows,
        (-(-rows // rows_per_program),),
        flat,
        copies.starts,
        copies.order,
        out,
        rows,
        flat.stride(0),
        C=flat.shape[1],
        BLOCK=block,
        ROWS=rows_per_program,
    )
    return out


def gather_copies(x: Tensor, copies: Copies) -> Tensor:
    """Gather the copies [N, ...] from the rows x [T, ...].

    Rows of x may have a stride. Raises ValueError for tensors on different devices.
    """
    on_gpu("copied", x=x, index=copies.index)
    return x[copies.index]


def sum_copies(d: Tensor, copies: Copies) -> Tensor:
    """Sum gradients d of the copies [N, ...] to gradients of the rows [T, ...]."""
    return launch_summed(d, copies) if on_gpu("summed", d=d, index=copies.index) else summed_reference(d, copies)
