"""Run passes of few tokens as CUDA graphs, since launching their kernels takes the host longer than running them.

Shapes: x residual stream [T, H], T rows, H hidden size, R rotary columns.

A pass over the decoder is two graphs, forward and backward, over buffers of fixed size: rows are padded to a bucket by
one more sequence, and the list of sequences by empty ones. Shared prefixes are copied for their continuations, since a
second attention call over them would have sizes that change. No autograd runs inside; the backward adds into the
adapter's gradient buffers, whose addresses are fixed. All graphs share one memory pool, since at most one of them is
between its forward and its backward: while a forward waits for its backward, the next pass is launched kernel by
kernel. So is the first pass of a bucket: capturing takes as long as two or three passes and does not pay off for
lengths that occur once.
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
from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.layer import Forward, check_versions, versions
from rlft.models.fused.layer_backward import Backward
from rlft.models.fused.layer_modules import FusedLayer
from rlft.models.fused.layer_steps import Pass, SavedActivations
from rlft.models.fused.memory import MemoryPlan
from rlft.models.fused.projection import Store
from rlft.models.fused.token_budget import LAUNCH_SECONDS, device_seconds

ROWS = 256
"""Rows are padded to a multiple of this, and large counts more coarsely (`padded`): the changing lengths of steps then
fall into the same buckets."""
SEQUENCES = 16
"""Numbers of sequences are padded to a multiple of this, as in `ROWS`."""
COPIED = 4
"""Keys per row, copies of prefixes included, above which a pass is launched kernel by kernel."""
GRAPHS = 16
"""Maximum number of graphs; the least recently used one is dropped first."""


def launch_bound(shape: DecoderShape, rows: int, keys: int) -> bool:
    """Return whether launches bound the time of a pass and it copies few enough keys.

    rows: before padding. keys: as `count_keys` counts them.
    """
    return keys <= COPIED * rows and 0 < device_seconds(shape, round_up(rows)) < LAUNCH_SECONDS


def round_up(count: int, least: int = ROWS) -> int:
    """Round a count (by default of rows) up to a multiple of `least`, and of a quarter of a power of two."""
    step = max(least, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def count_keys(sequences: Sequences, rows: int) -> int:
    """Count the keys of all sequences, with a copy of a shared prefix for each; 0 if no prefix is shared."""
    bounds = sequences.bounds
    shared = sum(bounds[parent + 1] - bounds[parent] for parent in sequences.prefix if parent >= 0)
    return rows + shared if shared else 0


def copied_keys(sequences: Sequences, rows: int) -> int:
    """Count the keys that a pass launched kernel by kernel copies: of shared prefixes, and of blocks."""
    blocks = 0 if sequences.blocks is None else sequences.blocks.count_keys(sequences.bounds, sequences.prefix)
    return blocks + (count_keys(sequences, rows) if sequences.copies else 0)


def key_capacity(keys: int, rows: int) -> int:
    """Return the number of keys that a bucket of `rows` rows has room for: a multiple of half the rows."""
    half = rows // 2
    return -(-keys // half) * half


class _Size(NamedTuple):
    """The sizes of a bucket."""

    rows: int
    sequences: int
    longest: int
    """Rows of the longest sequence."""
    keys: tuple[tuple[int | None, int, int], ...]
    """Per window, if prefixes are shared: (window, number of keys, most keys that a sequence attends to)."""


class Bucket:
    """A pass padded to a bucket's sizes, by one more sequence whose result is ignored and by empty sequences.

    Launched and captured passes of a bucket run over the same shapes, so that both round alike.
    """

    def __init__(self, like: Tensor, tables: dict[str | None, tuple[Tensor, ...]], size: _Size) -> None:
        rows, count, longest, keys = size
        device = like.device
        self.size = size
        self.x = like.new_zeros(rows, like.shape[1])
        self.tables = {
            layer_type: tuple(table.new_zeros(rows, table.shape[1]) for table in of_type)
            for layer_type, of_type in tables.items()
        }
        self.cu_seqlens = torch.full((count + 1,), rows, dtype=torch.int32, device=device)
        self.cu_seqlens[0] = 0
        self.keys: dict[int | None, Keys] = {}
        for window, number, longest_keys in keys:
            index = torch.zeros(number, dtype=torch.int64, device=device)
            sizes = (rows + 1, number, count + 1)
            starts, order, cu_k = (torch.zeros(length, dtype=torch.int32, device=device) for length in sizes)
            self.keys[window] = Keys(Copies(index, starts, order), cu_k, longest_keys)
        self.sequences = Sequences((0, rows), (-1,), self.cu_seqlens, longest, None, False, dict(self.keys))

    def fill(self, batch: Padded) -> None:
        """Copy a pass into the buffers."""
        rows = batch.x.shape[0]
        self.x[:rows].copy_(batch.x)
        # Values of an earlier pass would stay here, and 0 * inf is not 0 in the adapter's gradient.
        self.x[rows:].zero_()
        for layer_type, pair in batch.tables.items():
            for buffer, table in zip(self.tables[layer_type], pair, strict=True):
                buffer[:rows].copy_(table)
        bounds = batch.sequences.cu_seqlens
        self.cu_seqlens[: bounds.numel()].copy_(bounds)
        self.cu_seqlens[bounds.numel() :].fill_(self.x.shape[0])
        for window, keys in batch.keys.items():
            padded_keys, number = self.keys[window], keys.copies.index.numel()
            for buffer, values in zip((*padded_keys.copies, padded_keys.cu_k), (*keys.copies, keys.cu_k), strict=True):
                buffer[: values.numel()].copy_(values)
            padded_keys.cu_k[keys.cu_k.numel() :].fill_(number)


class Padded(NamedTuple):
    """The inputs of a pass, to copy into a bucket."""

    x: Tensor
    """[T, H]."""
    tables: dict[str | None, tuple[Tensor, ...]]
    """Type of layer -> rotary cos and sin [T, R]."""
    sequences: Sequences
    keys: dict[int | None, Keys]
    """Window -> copies of shared prefixes, including the padding rows; empty if no prefix is shared."""
    size: _Size

    @classmethod
    def of(
        cls,
        layers: Sequence[FusedLayer],
        x: Tensor,
        tables: dict[str | None, tuple[Tensor, ...]],
        sequences: Sequences,
        rows: int,
    ) -> Padded:
        """Prepare a pass of T rows for a bucket.

        rows: what `padded` returns for T.
        """
        extended = sequences._replace(bounds=(*sequences.bounds, rows), prefix=(*sequences.prefix, -1))
        windows = dict.fromkeys(layer.attention.window for layer in layers) if max(sequences.prefix) >= 0 else ()
        seen = {window: Keys.seen(extended, window) for window in windows}
        keys = {window: Keys.made(*host, rows, x.device) for window, host in seen.items()}
        return cls(x, tables, sequences, keys, _bucket(extended, rows, seen))

    def launched(self) -> Bucket:
        """Return new buffers for one launched pass, filled."""
        bucket = Bucket(self.x, self.tables, self.size)
        bucket.fill(self)
        return bucket


class _Graph:
    """A bucket with the forward and backward graph over it."""

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

        def run(buffers: dict[Tensor, Tensor]) -> tuple[Callable[[], Tensor], Callable[[], None]]:
            pass_ = Pass(bucket.sequences, bucket.tables, store, adapter, plan.levels, plan.tile, True, buffers)  # type: ignore[arg-type]
            saved: list[SavedActivations] = []

            def forward() -> Tensor:
                x = bucket.x
                for layer in layers:
                    saved.append(SavedActivations(x))
                    x = Forward(layer, pass_, layer.bind(adapter), x)(x, saved[-1])
                return x

            def backward() -> None:
                dout: Tensor | None = self.dout
                for layer in reversed(layers):
                    layer_saved = saved.pop()
                    assert dout is not None and layer_saved.x is not None
                    dout = Backward(layer, pass_, layer.bind(adapter), layer_saved.x)(
                        dout, layer_saved, layer.index > 0
                    )

            return forward, backward

        # Run once by launches, for what is compiled or allocated at the first use; its gradients are discarded. It
        # runs on the stream of every pass, since cuBLAS keeps 32 MiB for each stream that it has run on.
        keys = bucket.keys.values()
        length = min(bucket.size.longest, *(window_keys.max_k for window_keys in keys)) if keys else bucket.size.longest
        for bounds in (bucket.cu_seqlens, *(window_keys.cu_k for window_keys in keys)):
            bounds[1:] = length
        for step in run({parameter: torch.zeros_like(gradient) for parameter, gradient in gradients.items()}):
            step()
        forward, backward = run(gradients)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, pool=pool):
            self.out = forward()
        with torch.cuda.graph(self.backward_graph, pool=pool):
            backward()
        self.store, self.version, self.write_tables = store, store.version, store.write_tables
        self.adapter = tuple(gradients)


class Graphs:
    """The CUDA graphs of a decoder, by bucket."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._seen: set[tuple] = set()
        """Buckets of which a pass has run."""
        self._pool: Any = None
        self._anchor: Tensor | None = None
        self._under_way: weakref.ref | None = None
        self._pooled = 0
        """Bytes of the pool; dropped graphs leave their memory to later ones."""

    @property
    def bytes(self) -> int:
        """Memory that the graphs hold between passes: their pool and the buffers of the existing graphs."""
        return self._pooled + sum(_bytes(graph) for graph in self._graphs.values())

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
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
        """Compute the residual stream after the last layer, [T, H], by a CUDA graph.

        Returns None, for a pass that the caller launches, at the first pass of a bucket and while another pass waits
        for its backward. Without grad the same forward graph is replayed.

        plan: for `padded` rows, and `capturable`. most: bytes that graphs may hold before another one is captured;
        above, all are dropped.
        """
        if self._under_way is not None and self._under_way() is not None:
            return None
        parameter, gradient = next(iter(gradients.items()))
        addresses = (parameter.data_ptr(), gradient.data_ptr())
        key = (given.size, plan.levels, plan.tile, plan.store, adapter, addresses, given.x.dtype)
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
            graph = self._capture(layers, store, adapter, plan, gradients, given)
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
        return _GraphPass.apply(self._anchor, graph, token, rows)  # type: ignore[return-value]

    def _capture(
        self,
        layers: Sequence[FusedLayer],
        store: Store,
        adapter: str | None,
        plan: MemoryPlan,
        gradients: dict[Tensor, Tensor],
        given: Padded,
    ) -> _Graph:
        """Capture the graphs of a bucket."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Capturing releases the allocator's cached blocks, which would hide the memory that the graph takes.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(given.x.device)
        bucket = Bucket(given.x, given.tables, given.size)
        with torch.no_grad():
            graph = _Graph(layers, store, adapter, plan, gradients, bucket, self._pool)
        self._pooled += max(0, torch.cuda.memory_reserved(given.x.device) - before - _bytes(graph))
        return graph


def _bytes(graph: _Graph) -> int:
    """Bytes of a graph's buffers, which lie outside the pool."""
    bucket = graph.bucket
    tensors = [bucket.x, graph.dout, bucket.cu_seqlens, *(tensor for pair in bucket.tables.values() for tensor in pair)]
    tensors += [tensor for keys in bucket.keys.values() for tensor in (*keys.copies, keys.cu_k)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Token:
    """Exists as long as a pass may still run its backward."""


class _GraphPass(torch.autograd.Function):
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
        # A loss that outlives the step would otherwise keep the graph, and its weight buffers, alive after `clear`.
        ctx.graph = ctx.token = ctx.versions = None
        return None, None, None, None


def _bucket(sequences: Sequences, rows: int, keys_by_window: dict[int | None, tuple[np.ndarray, list[int]]]) -> _Size:
    """Return the sizes of the bucket of a pass.

    sequences: including the padding sequence. keys_by_window: `Keys.seen` per window.
    """
    longest = max(end - start for start, end in pairwise(sequences.bounds))
    keys = []
    for window, (index, bounds) in keys_by_window.items():
        longest_keys = max(end - start for start, end in pairwise(bounds))
        keys.append((window, key_capacity(index.size, rows), power_of_2(longest_keys)))
    longest = min(rows, max(ROWS, power_of_2(longest)))
    return _Size(rows, round_up(len(sequences.prefix), SEQUENCES), longest, tuple(keys))
