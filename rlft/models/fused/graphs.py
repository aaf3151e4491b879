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
from rlft.models.fused.layer import Forward, check_versions, versions
from rlft.models.fused.layer_backward import Backward
from rlft.models.fused.layer_modules import FusedLayer
from rlft.models.fused.layer_steps import Kept, Pass
from rlft.models.fused.memory import DecoderShape, MemoryPlan
from rlft.models.fused.projection import Store
from rlft.models.fused.token_budget import LAUNCHING, device_seconds

ROWS = 256
"""Rows are padded to a multiple of this, and many of them more coarsely (`padded`): lengths change from step to step,
and a bucket is to be used again."""
SEQUENCES = 16
"""The same of sequences."""
COPIED = 4
"""Keys per row, copies of prefixes included, beyond which a pass is launched."""
GRAPHS = 16
"""Graphs that are kept at most; the one unused for longest goes first."""


def short(shape: DecoderShape, rows: int, keys: int) -> bool:
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


class Bucket:
    """A pass padded to a bucket's sizes: by one more sequence of rows, which nobody reads, and by empty sequences.

    Launched and captured passes of a bucket run over the same shapes, so that both round alike.
    """

    def __init__(self, like: Tensor, tables: dict[str | None, tuple[Tensor, Tensor]], size: _Size) -> None:
        rows, count, longest, keys = size
        device = like.device
        self.size = size
        self.x = like.new_zeros(rows, like.shape[1])
        self.tables = {
            k: (cos.new_zeros(rows, cos.shape[1]), sin.new_zeros(rows, sin.shape[1]))
            for k, (cos, sin) in tables.items()
        }
        self.cu_seqlens = torch.full((count + 1,), rows, dtype=torch.int32, device=device)
        self.cu_seqlens[0] = 0
        self.keys: dict[int | None, Keys] = {}
        for window, number, most in keys:
            index = torch.zeros(number, dtype=torch.int64, device=device)
            sizes = (rows + 1, number, count + 1)
            starts, order, cu_k = (torch.zeros(n, dtype=torch.int32, device=device) for n in sizes)
            self.keys[window] = Keys(Copies(index, starts, order), cu_k, most)
        self.sequences = Sequences((0, rows), (-1,), self.cu_seqlens, longest, None, False, dict(self.keys))

    def fill(self, given: Padded) -> None:
        """Copy a pass in."""
        rows = given.x.shape[0]
        self.x[:rows].copy_(given.x)
        # What an earlier pass left here would stay forever, and 0 * inf is not 0 in the adapter's gradient.
        self.x[rows:].zero_()
        for key, pair in given.tables.items():
            for mine, theirs in zip(self.tables[key], pair, strict=True):
                mine[:rows].copy_(theirs)
        bounds = given.sequences.cu_seqlens
        self.cu_seqlens[: bounds.numel()].copy_(bounds)
        self.cu_seqlens[bounds.numel() :].fill_(self.x.shape[0])
        for window, seen in given.keys.items():
            mine, number = self.keys[window], seen.copies.index.numel()
            for place, values in zip((*mine.copies, mine.cu_k), (*seen.copies, seen.cu_k), strict=True):
                place[: values.numel()].copy_(values)
            mine.cu_k[seen.cu_k.numel() :].fill_(number)


class Padded(NamedTuple):
    """A pass on its way into a bucket."""

    x: Tensor
    """[T, H]."""
    tables: dict[str | None, tuple[Tensor, Tensor]]
    """Type of layer -> rotary cos and sin [T, R]."""
    sequences: Sequences
    keys: dict[int | None, Keys]
    """Window -> copies of shared prefixes, the padding's rows among them; empty where nothing is shared."""
    size: _Size

    @classmethod
    def of(
        cls,
        layers: Sequence[FusedLayer],
        x: Tensor,
        tables: dict[str | None, tuple[Tensor, Tensor]],
        sequences: Sequences,
        rows: int,
    ) -> Padded:
        """rows: what `padded` gives for T."""
        whole = sequences._replace(bounds=(*sequences.bounds, rows), prefix=(*sequences.prefix, -1))
        windows = dict.fromkeys(layer.attention.window for layer in layers) if max(sequences.prefix) >= 0 else ()
        seen = {window: Keys.seen(whole, window) for window in windows}
        keys = {window: Keys.made(*host, rows, x.device) for window, host in seen.items()}
        return cls(x, tables, sequences, keys, _bucket(whole, rows, seen))

    def launched(self) -> Bucket:
        """Buffers for one pass."""
        bucket = Bucket(self.x, self.tables, self.size)
        bucket.fill(self)
        return bucket


class _Graph:
    """One bucket with the two graphs over it."""

    def __init__(
        self,
        layers: Sequence[FusedLayer],
        store: Store,
        adapter: str | None,
        plan: MemoryPlan,
        gradients: dict[Tensor, Tensor],
        bucket: Bucket,
        pool: Any,
    ) -> None:
        self.bucket = bucket
        self.dout = torch.zeros_like(bucket.x)

        def run(into: dict[Tensor, Tensor]) -> tuple[Callable[[], Tensor], Callable[[], None]]:
            pass_ = Pass(bucket.sequences, bucket.tables, store, adapter, plan.levels, plan.tile, True, into)  # type: ignore[arg-type]
            kept: list[Kept] = []

            def forward() -> Tensor:
                x = bucket.x
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
        keys = bucket.keys.values()
        one = min(bucket.size.longest, *(k.max_k for k in keys)) if keys else bucket.size.longest
        for bounds in (bucket.cu_seqlens, *(k.cu_k for k in keys)):
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
        self.adapter = tuple(gradients)


class Graphs:
    """Graphs of a decoder by bucket."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._seen: set[tuple] = set()
        """Buckets that a pass has had."""
        self._pool: Any = None
        self._anchor: Tensor | None = None
        self._under_way: weakref.ref | None = None
        self._pooled = 0
        """Bytes of the pool, which graphs that were given up leave to later ones."""

    @property
    def bytes(self) -> int:
        """Memory that the graphs hold between passes: their pool, and the buffers of those that are there."""
        return self._pooled + sum(_bytes(graph) for graph in self._graphs.values())

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        self._graphs.clear()
        self._seen.clear()
        self._pool, self._pooled = None, 0

    def run(
        self,
        layers: Sequence[FusedLayer],
        store: Store,
        adapter: str | None,
        plan: MemoryPlan,
        gradients: dict[Tensor, Tensor],
        given: Padded,
        most: float,
    ) -> Tensor | None:
        """The residual stream after the last layer, [T, H]; None, for a launched pass, at the first of a bucket and
        while another pass still waits for its backward. Without grad it is the same graph, without its backward.

        plan: for `padded` rows, and `capturable`. most: bytes that graphs may hold before another one is captured;
        beyond, all are given up.
        """
        if self._under_way is not None and self._under_way() is not None:
            return None
        parameter, gradient = next(iter(gradients.items()))
        where = (parameter.data_ptr(), gradient.data_ptr())
        key = (given.size, plan.levels, plan.tile, plan.store, adapter, where, given.x.dtype)
        if key not in self._seen:
            self._seen.add(key)
            return None
        graph = self._graphs.pop(key, None)
        if graph is not None and graph.version != store.version:
            graph = None
        if graph is None:
            if self.bytes > most:
                self.clear()
                return None
            graph = self._captured(layers, store, adapter, plan, gradients, given)
        self._graphs[key] = graph
        if len(self._graphs) > GRAPHS:
            self._seen.discard(self._graphs.popitem(last=False)[0])
        graph.bucket.fill(given)
        rows = given.x.shape[0]
        if not torch.is_grad_enabled():
            graph.forward_graph.replay()
            return graph.out[:rows].clone()
        graph.dout[rows:].zero_()
        if self._anchor is None:
            self._anchor = torch.zeros((), device=given.x.device, requires_grad=True)
        token = _Token()
        self._under_way = weakref.ref(token)
        return _Graphed.apply(self._anchor, graph, token, rows)  # type: ignore[return-value]

    def _captured(
        self,
        layers: Sequence[FusedLayer],
        store: Store,
        adapter: str | None,
        plan: MemoryPlan,
        gradients: dict[Tensor, Tensor],
        given: Padded,
    ) -> _Graph:
        """A new graph of a bucket."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Capturing gives back what the allocator caches, which would hide what the graph takes.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(given.x.device)
        bucket = Bucket(given.x, given.tables, given.size)
        with torch.no_grad():
            graph = _Graph(layers, store, adapter, plan, gradients, bucket, self._pool)
        self._pooled += max(0, torch.cuda.memory_reserved(given.x.device) - before - _bytes(graph))
        return graph


def _bytes(graph: _Graph) -> int:
    """Of a graph's buffers, which lie outside of the pool."""
    bucket = graph.bucket
    tensors = [bucket.x, graph.dout, bucket.cu_seqlens, *(t for pair in bucket.tables.values() for t in pair)]
    tensors += [t for keys in bucket.keys.values() for t in (*keys.copies, keys.cu_k)]
    return sum(t.numel() * t.element_size() for t in tensors)


class _Token:
    """Lives as long as a pass may still run its backward."""


class _Graphed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, graph, token, rows):  # type: ignore[override]
        graph.forward_graph.replay()
        ctx.graph, ctx.token, ctx.rows, ctx.versions = graph, token, rows, versions(graph.adapter)
        return graph.out[:rows].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        graph = ctx.graph
        if graph is None:
            raise RuntimeError("backward ran before, over buffers that it turned into gradients; run the forward again")
        if graph.version != graph.store.version:
            raise RuntimeError("another pass moved the weights' buffers after this forward; run the forward again")
        check_versions(ctx.versions, "CUDA graph")
        graph.dout[: ctx.rows].copy_(dout)
        graph.backward_graph.replay()
        # A loss that is held on to would hold the graph, and with it the weights' buffers, when they are given up.
        ctx.graph = ctx.token = ctx.versions = None
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
