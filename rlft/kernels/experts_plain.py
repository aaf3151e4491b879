"""Route rows to experts and multiply them there, in plain PyTorch: exact in float64, on any device.

The functions are the operations of a layer of experts, and what kernels of the same interface are compared with. T
tokens choose k of E experts each, so there are M = T * k rows. They are sorted by expert: the rows of expert e are
offsets[e] to offsets[e + 1]. In names, a and b are rows of any width.

    order, inverse, offsets = sort_by_expert(chosen, E)
    y = combine(grouped(gather(x, order, k), w, offsets), inverse, weights, k)
    y_t = sum_j weights_tj W_chosen[t, j] x_t

Sums over choices and over the rows of an expert are in fp32, or in float64 where the operands are. The gradients are in
`rlft.models.experts_function`. Every product waits for the device once, to read the offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Sorted(NamedTuple):
    """Rows sorted by expert."""

    order: Tensor
    """[M] int32: sorted position -> token * k + choice; stable."""
    inverse: Tensor
    """[M] int32: token * k + choice -> sorted position."""
    offsets: Tensor
    """[E + 1] int32: where the rows of each expert begin, and where the last one's end."""


def sort_by_expert(chosen: Tensor, experts: int) -> Sorted:
    """Sort the choices of tokens by expert. chosen: [T, k] of any integer type, 0 to `experts` - 1."""
    values, order = chosen.reshape(-1).sort(stable=True)
    places = torch.arange(len(order), dtype=torch.int32, device=order.device)
    inverse = torch.empty_like(places).index_copy_(0, order, places)
    bounds = torch.arange(experts + 1, dtype=values.dtype, device=values.device)
    return Sorted(order.int(), inverse, torch.searchsorted(values, bounds, out_int32=True))


def gather(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Copy the rows of tokens to their sorted places: [T, H] -> [M, H]."""
    return x.index_select(0, order // k)


def combine(y: Tensor, inverse: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """Sum the k rows of each token in the order of its choices: [M, N] -> [T, N] in the dtype of y.

    weights: [T, k], of any floating dtype; None: 1. The transpose of `gather` where it is None.
    """
    places = inverse.view(-1, k)
    wide = torch.promote_types(y.dtype, torch.float32)
    out = torch.zeros(len(places), y.shape[1], dtype=wide, device=y.device)
    for choice in range(k):
        rows = y.index_select(0, places[:, choice]).to(wide)
        out += rows if weights is None else rows * weights[:, choice, None].to(wide)
    return out.to(y.dtype)


def grouped(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Multiply each row with its expert's matrix: x [M, K], w [E, N, K], bias [E, N] -> [M, N] = x W_e^T + bias_e.

    out: written in place of a new tensor.
    """
    out = _zeros(out, x, w.shape[1])
    for expert, rows in _groups(offsets):
        out[rows] = x[rows] @ w[expert].T if bias is None else torch.addmm(bias[expert], x[rows], w[expert].T)
    return out


def grouped_transposed(dy: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply each row with its expert's matrix, transposed: dy [M, N], w [E, N, K] -> [M, K] = dy W_e.

    out: written in place of a new tensor.
    """
    out = _zeros(out, dy, w.shape[2])
    for expert, rows in _groups(offsets):
        out[rows] = dy[rows] @ w[expert]
    return out


def grouped_gradient(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """Sum the outer products of the rows of each expert: a [M, P], b [M, Q] -> out [E, P, Q] = a_e^T b_e.

    out: fp32 or float64; products are in its dtype. accumulate: add to what it holds. Returns it.
    """
    if not accumulate:
        out.zero_()
    for expert, rows in _groups(offsets):
        out[expert].addmm_(a[rows].T.to(out.dtype), b[rows].to(out.dtype))
    return out


def _zeros(out: Tensor | None, rows: Tensor, width: int) -> Tensor:
    """Return `out` as zeros, or a new tensor [M, width] of zeros."""
    return rows.new_zeros(len(rows), width) if out is None else out.zero_()


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and the rows."""
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield expert, slice(start, end)
