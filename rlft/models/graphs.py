"""CUDA graphs for passes of few tokens, whose launches take the host longer than the kernels take the GPU.

A pass over the decoder is two graphs, forward and backward, over buffers of fixed size: rows are padded to a bucket by
one more sequence, and sequences by empty ones. Shared prefixes are copied for their continuations, since what a second
call runs over would have to be fixed. Nothing of autograd is inside; the backward adds into the adapter's gradient
buffers, whose addresses are fixed. All graphs share one pool of memory, since no two of their passes are ever under
way: while a forward waits for its backward, the next pass runs launch by launch. So does the first pass of a bucket:
capturing takes as long as two or three, and lengths that come once are not worth it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.attention import Keys, Sequences
from rlft.kernels.copies import Copies
from rlft.kernels.launch import power_of_2
from rlft.models.layer import Forward
from rlft.models.layer_backward import Backward
from rlft.models.layer_modules import FusedLayer
from rlft.models.layer_steps import Kept, Pass
from rlft.models.memory import Plan, Shape
from rlft.models.projection import Store
from rlft.models.token_budget import LAUNCHING, device_seconds

ROWS = 256
"""Rows are padded to a multiple of this, and many of them more coarsely (`padded`): lengths change from step to step,
and a bucket is to be used again."""
SEQUENCES = 16
"""The same of sequences."""
COPIED = 4
"""Keys per row, copies of prefixes included, beyond which a pass is launched."""
GRAPHS = 16
"""Graphs that are kept at most; the one unused for longest goes first."""


def short(shape: Shape, rows: int, keys: int) -> bool:
    """Whether a pass is held up by its launches, padded as it would be, and copies no more than it may. keys: as
    `copied_keys` counts them."""
    return keys <= COPIED * rows and 0 < device_seconds(shape, padded(rows)) < LAUNCHING


def padded(count: int, least: int = ROWS) -> int:
    """What a count (by default of rows) is padded to: a multiple of `least`, and of a quarter of a power of two."""
    step = max(least, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def copied_keys(sequences: Sequences, rows: int) -> int:
    """Keys that all sequences see, with a copy for each of what is shared; 0 where nothing is."""
    bounds = sequences.bounds
    shared = sum(bounds[p + 1] - bounds[p] for p in sequences.prefix if p >= 0)
    return rows + shared if shared else 0


def room(keys: int, rows: int) -> int:
    """Keys that a bucket of so many rows has room for: a multiple of half of the rows."""
    half = rows // 2
    return -(-keys // half) * half


class _Size(NamedTuple):
    """A bucket."""

    rows: int
    sequences: int
    longest: int
    """Rows of the longest sequence."""
    keys: tuple[tuple[int | None, int, int], ...]
    """Where prefixes are shared, of each window: its keys, and those that a sequence sees at most."""


class _Graph:
    """One bucket: static buffers, and the two graphs over them."""

    def __init__(
        self, layers: Sequence[FusedLayer], store: Store, adapter: str | None, plan: Plan,
        gradients: dict[Tensor, Tensor], like: Tensor, tables: dict[str | None, tuple[Tensor, Tensor]], size: _Size,
        pool: Any,
    ) -> None:  # fmt: skip
        rows, count, longest, keys = size
        device = like.device
        self.x = like.new_zeros(rows, like.shape[1])
        self.dout = torch.zeros_like(self.x)
        self.tables = {k: tuple(t.new_zeros(rows, t.shape[1]) for t in pair) for k, pair in tables.items()}
        self.cu_seqlens = torch.full((count + 1,), rows, dtype=torch.int32, device=device)
        self.cu_seqlens[0] = 0
        self.keys: dict[int | None, Keys] = {}
        for window, number, most in keys:
            index = torch.zeros(number, dtype=torch.int64, device=device)
            sizes = (rows + 1, number, count + 1)
            starts, order, cu_k = (torch.zeros(n, dtype=torch.int32, device=device) for n in sizes)
            self.keys[window] = Keys(Copies(index, starts, order), cu_k, most)
        sequences = Sequences((0, rows), (-1,), self.cu_seqlens, longest, None, False, dict(self.keys))

        def run(into: dict[Tensor, Tensor]) -> tuple[Callable[[], Tensor], Callable[[], None]]:
            pass_ = Pass(sequences, self.tables, store, adapter, plan.levels, plan.tile, True, into)  # type: ignore[arg-type]
            kept: list[Kept] = []

            def forward() -> Tensor:
                x = self.x
                for layer in layers:
                    kept.append(Kept(x))
                    x = Forward(layer, pass_, layer.bind(adapter), x)(x, kept[-1])
                return x

            def backward() -> None:
                dout: Tensor | None = self.dout
                for layer in reversed(layers):
                    last = kept.pop()
                    assert dout is not None
                    dout = Backward(layer, pass_, layer.bind(adapter), last.x)(dout, last, layer.index > 0)

            return forward, backward

        # Once by launches, for what is compiled or allocated at the first use; its gradients are thrown away. On the
        # stream of every pass: cuBLAS keeps 32 MiB for each stream that it has run on.
        one = min(longest, *(k.max_k for k in self.keys.values())) if self.keys else longest
        for bounds in (self.cu_seqlens, *(k.cu_k for k in self.keys.values())):
            bounds[1:] = one
        for step in run({p: torch.zeros_like(g) for p, g in gradients.items()}):
            step()
        forward, backward = run(gradients)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, pool=pool):
            self.out = forward()
        with torch.cuda.graph(self.backward_graph, pool=pool):
            backward()
        self.store, self.version, self.fills = store, store.version, store.fills

    def fill(
        self, x: Tensor, tables: dict[str | None, tuple[Tensor, Tensor]], sequences: Sequences,
        keys: dict[int | None, Keys],
    ) -> None:  # fmt: skip
        """Copy a pass's rows in; the rest of the bucket becomes one sequence that nobody reads."""
        rows = x.shape[0]
        self.x[:rows].copy_(x)
        for key, pair in tables.items():
            for mine, theirs in zip(self.tables[key], pair, strict=True):
                mine[:rows].copy_(theirs)
        bounds = sequences.cu_seqlens
        self.cu_seqlens[: bounds.numel()].copy_(bounds)
        self.cu_seqlens[bounds.numel() :].fill_(self.x.shape[0])
        for window, seen in keys.items():
            mine, number = self.keys[window], seen.copies.index.numel()
            for place, values in zip((*mine.copies, mine.cu_k), (*seen.copies, seen.cu_k), strict=True):
                place[: values.numel()].copy_(values)
            mine.cu_k[seen.cu_k.numel() :].fill_(number)
        self.dout[rows:].zero_()


class Graphs:
    """Graphs of a decoder by bucket."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._seen: set[tuple] = set()
        """Buckets that a pass has had."""
        self._pool: Any = None
        self.bytes = 0
        """Memory that the graphs hold between passes."""
        self._anchor: Tensor | None = None
        self._under_way: weakref.ref | None = None

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        self._graphs.clear()
        self._seen.clear()
        self._pool, self.bytes = None, 0

    def run(
        self, layers: Sequence[FusedLayer], store: Store, adapter: str | None, plan: Plan,
        gradients: dict[Tensor, Tensor], x: Tensor, tables: dict[str | None, tuple[Tensor, Tensor]],
        sequences: Sequences, most: float,
    ) -> Tensor | None:  # fmt: skip
        """The residual stream after the last layer, [T, H]; None, for a launched pass, at the first of a bucket and
        while another pass still waits for its backward. plan: for `padded` rows, and `capturable`. most: bytes that
        graphs may hold before another one is captured; beyond, all are given up."""
        if self._under_way is not None and self._under_way() is not None:
            return None
        rows = padded(x.shape[0])
        filled = sequences._replace(bounds=(*sequences.bounds, rows), prefix=(*sequences.prefix, -1))
        windows = dict.fromkeys(layer.attention.window for layer in layers) if max(sequences.prefix) >= 0 else ()
        seen = {window: Keys.seen(filled, window) for window in windows}
        size = _bucket(filled, rows, seen)
        parameter, gradient = next(iter(gradients.items()))
        where = (parameter.data_ptr(), gradient.data_ptr())
        key = (size, plan.levels, plan.tile, plan.store, adapter, where, x.dtype)
        if key not in self._seen:
            self._seen.add(key)
            return None
        graph = self._graphs.pop(key, None)
        if graph is None and self.bytes > most:
            self.clear()
            return None
        keys = {window: Keys.made(*host, rows, x.device) for window, host in seen.items()}
        if graph is None or graph.version != store.version:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            # Capturing gives back what the allocator caches, which would hide what the graph takes.
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(x.device)
            graph = _Graph(layers, store, adapter, plan, gradients, x, tables, size, self._pool)
            self.bytes += max(0, torch.cuda.memory_reserved(x.device) - before)
        self._graphs[key] = graph
        if len(self._graphs) > GRAPHS:
            self._seen.discard(self._graphs.popitem(last=False)[0])
        graph.fill(x, tables, sequences, keys)
        if self._anchor is None:
            self._anchor = torch.zeros((), device=x.device, requires_grad=True)
        token = _Token()
        self._under_way = weakref.ref(token)
        return _Graphed.apply(self._anchor, graph, token, x.shape[0])  # type: ignore[return-value]


class _Token:
    """Lives as long as a pass may still run its backward."""


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, graph, token, rows):  # type: ignore[override]
        graph.forward_graph.replay()
        ctx.graph, ctx.token, ctx.rows = graph, token, rows
        return graph.out[:rows].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        graph = ctx.graph
        if graph is None:
            raise RuntimeError("backward ran before, over buffers that it turned into gradients; run the forward again")
        if graph.version != graph.store.version:
            raise RuntimeError("another pass moved the weights' buffers after this forward; run the forward again")
        graph.dout[: ctx.rows].copy_(dout)
        graph.backward_graph.replay()
        # A loss that is held on to would hold the graph, and with it the weights' buffers, when they are given up.
        ctx.graph = ctx.token = None
        return None, None, None, None


def _bucket(s: Sequences, rows: int, seen: dict[int | None, tuple[np.ndarray, list[int]]]) -> _Size:
    """What a pass is padded to. s: with the sequence that nobody reads. seen: `Keys.seen` of each window."""
    longest = max(b - a for a, b in pairwise(s.bounds))
    keys = []
    for window, (index, bounds) in seen.items():
        most = max(b - a for a, b in pairwise(bounds))
        keys.append((window, room(index.size, rows), power_of_2(most)))
    longest = min(rows, max(ROWS, power_of_2(longest)))
    return _Size(rows, padded(len(s.prefix), SEQUENCES), longest, tuple(keys))
