"""How many bytes a training pass takes, by closed formulae, and what each layer may keep within a budget.

Every buffer of `rlft.models.layer` is counted where it is alive. With T rows, element size e, tile t:

    saved     per layer and level: what lies between forward and backward
    forward   the layer in progress beyond what it keeps
    backward  the layer in progress beyond what it kept
    head      gathered rows, their norm and jacobian, one chunk of logits

and the peak is the largest of: all saved + forward, all saved + head, and for each layer, saved up to it + backward.
Levels rise from the last layer to the first, since the last is needed first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

TILE = 8192
"""Rows that a layer runs at a time outside attention."""
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder: of the largest layer where they differ."""

    layers: int
    hidden: int
    qkv: int
    q: int
    """Columns of q: heads times head size."""
    kv: int
    """Columns of k, and of v."""
    q_heads: int
    intermediate: int
    element: int
    """Bytes of an activation."""
    tails: tuple[int, int, int, int]
    """Columns behind qkv, o, gate_up, down."""
    ranks: tuple[int, int, int, int]
    rotated_apart: bool
    """q and k have norms, so their rotated form is a tensor of its own."""
    flash: bool
    """A flash attention with a workspace of its own."""


def saved(shape: Shape, level: int) -> int:
    """Device bytes per row that a layer keeps at `level`."""
    s, e = shape, shape.element
    x, s_down = e * s.hidden, e * s.ranks[3]
    attention = e * s.q + (4 * s.q_heads if s.flash else 0)
    qkv = e * (s.qkv + s.tails[0] + s.ranks[0])
    mlp = e * (s.hidden + 2 * s.intermediate + s.tails[2])
    return s_down + (x + attention + qkv + mlp, x + attention + qkv, x + attention, x, 0, 0)[level]


def on_host(shape: Shape, level: int) -> int:
    """Host bytes per row of a layer at `level`."""
    x, attention = shape.element * shape.hidden, shape.element * shape.q + 4 * shape.q_heads
    return (0, 0, 0, 0, x + attention, x)[level]


def forward_work(shape: Shape, rows: int, tile: int) -> int:
    """Bytes of a layer's forward beyond its input and what it keeps at L2."""
    s, e, t = shape, shape.element, min(rows, tile)
    attention = rows * e * (s.qkv + s.tails[0] + s.q + (s.q + s.kv if s.rotated_apart else 0))
    n = e * (s.hidden + max(s.tails[0], s.tails[2]))
    mlp = rows * e * (s.hidden + s.q) + t * e * (2 * s.intermediate + s.intermediate + s.tails[3])
    return max(attention + t * n, mlp, rows * e * (s.hidden + s.q) + t * (n + e * (s.hidden + 2 * s.intermediate)))


def backward_work(shape: Shape, rows: int, tile: int, level: int) -> int:
    """Bytes of a layer's backward beyond what it kept at `level`."""
    s, e, t = shape, shape.element, min(rows, tile)
    x = e * s.hidden if level in (4, 5) else 0
    attention = 0 if level in (0, 1, 2) else e * s.q + 4 * s.q_heads
    always = rows * (x + attention + e * (s.hidden + s.hidden + s.tails[1] + s.q))  # dout, dmid, dattended
    n, dy = e * (s.hidden + s.tails[2]), e * (s.hidden + s.tails[3])
    kept_gates = 0 if level == 0 else e * (2 * s.intermediate + s.tails[2] + s.hidden + s.tails[1])
    partial = 4 * 16 * (2 * s.intermediate // 256) if max(s.ranks) else 0
    mlp = t * (n + dy + kept_gates + e * s.intermediate + partial)
    qkv = 0 if level in (0, 1) else e * (s.qkv + s.tails[0] + s.ranks[0])
    rotated = e * (s.q + s.kv) if s.rotated_apart else 0
    # fp32 sums of dq, dk and dv, and the gradients themselves.
    flash = 4 * (s.q + 2 * s.kv + 2 * s.q_heads) if s.flash else 4 * s.q
    attended = rows * (qkv + rotated + e * s.qkv + flash)
    return always + max(mlp, attended, rows * qkv + t * 2 * n)


def peak(shape: Shape, levels: tuple[int, ...], rows: int, tile: int = TILE, head: int = 0) -> int:
    """Bytes at the highest point of a pass with its backward. head: bytes of the head."""
    kept = [rows * saved(shape, level) for level in levels]
    hidden = rows * shape.element * shape.hidden
    highest = sum(kept) + hidden + max(head, forward_work(shape, rows, tile))
    below = 0
    for level, own in zip(levels, kept, strict=True):
        below += own
        highest = max(highest, below + backward_work(shape, rows, tile, level))
    return highest


def levels(shape: Shape, rows: int, tile: int, budget: float, head: int = 0, host: float = 0) -> tuple[int, ...]:
    """Levels of all layers, the cheapest in time whose peak is within `budget` bytes and `host` bytes of host memory.

    The last resort where nothing fits is the smallest.
    """
    order = (0, 1, 2, 4, 5) if host else (0, 1, 2, 3)
    smallest = (order[-1],) * shape.layers
    for upper, lower in pairwise(order):
        for count in range(shape.layers + 1):
            mixed = (lower,) * count + (upper,) * (shape.layers - count)
            if rows * sum(on_host(shape, level) for level in mixed) > host:
                break
            if peak(shape, mixed, rows, tile, head) <= budget:
                return mixed
    return smallest


def free(device: torch.device) -> float:
    """Bytes that a pass may take now: what the driver has free and what PyTorch holds unused. On a CPU no limit."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
