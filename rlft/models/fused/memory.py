"""Estimate the memory of a training pass by closed formulae, and choose what each layer saves within a budget.

Every buffer of `rlft.models.fused.layer` and of the head is counted while it exists. With T rows, tiles of t rows:

    saved     per layer and level: what exists between forward and backward
    forward   of the layer in progress, beyond what it saves
    backward  of the layer in progress, beyond what it saved
    head      gathered rows, their norm and Jacobian (two with an entropy bonus), one chunk of logits
    scratch   what the frozen weights are decoded or copied into

The peak is the largest of: all saved + forward, all saved + head, and per layer, saved up to it + backward. Early
layers save less than late ones, since the backward frees the last layer first. The base, the adapter and its optimizer
exist before and after a pass and are not counted.

In the formulae: s sizes of the decoder, e bytes of an activation, x [T, H] the input of a layer, n a norm's output, T
and t rows and rows of a tile, H bytes of a row of the residual stream, q columns of q.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import nn

from rlft.kernels.logprobs import CHUNK_BYTES, chunk_rows
from rlft.models.fused.levels import L0, L3, L5, LEVELS, Level
from rlft.models.fused.offload import AHEAD, BEHIND
from rlft.models.fused.projection import Mode

TILES = (8192, 4096, 2048, 1024)
"""Rows that a layer runs at a time, except in attention."""
GIB = 2**30


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder: those of the largest layer where layers differ."""

    layers: int
    hidden: int
    q: int
    """Columns of q: heads times head size."""
    kv: int
    """Columns of k, and of v."""
    q_heads: int
    intermediate: int
    vocab: int
    dtype: torch.dtype
    """Dtype of activations."""
    tails: tuple[int, int, int, int]
    """Columns behind qkv, o, gate_up, down that hold the low-rank product S."""
    ranks: tuple[int, int, int, int]
    qk_norm: bool
    """q and k have norms, so that their rotated form is a separate tensor."""
    post_norm: bool
    """There are norms behind attention and MLP."""
    attention: str
    """Name of the attention back end."""
    gated: bool = True
    """The MLP has a gate, so that two projections as wide as `intermediate` come before its activation, not one."""
    embedding_factor: bool = False
    """Embedded tokens are multiplied by a constant, into a second tensor."""
    residual_factor: bool = False
    """The outputs of attention and MLP are multiplied by a constant."""
    entropy_grad: bool = False
    """The loss has an entropy bonus, so that the head holds a second Jacobian."""

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize

    @property
    def qkv(self) -> int:
        """Columns of the qkv buffer, tail included."""
        return self.q + 2 * self.kv + self.tails[0]

    @property
    def gates(self) -> int:
        """Columns of gate and up."""
        return (1 + self.gated) * self.intermediate

    @property
    def gate_up(self) -> int:
        """Columns of the gate_up buffer, tail included."""
        return self.gates + self.tails[2]

    @property
    def weights(self) -> int:
        """Elements of a layer's matrices."""
        return self.hidden * (2 * self.q + 2 * self.kv + self.gates + self.intermediate)

    @property
    def lse(self) -> int:
        """Bytes of the log-sum-exp per row."""
        return 4 * self.q_heads if self.attention in ("fa4", "fa2") else 0


@dataclass(frozen=True)
class MemoryPlan:
    """What a pass saves, and how it runs."""

    levels: tuple[Level, ...]
    """The level of each layer."""
    tile: int
    store: Mode
    """Mode of `rlft.models.fused.projection.Store`."""
    chunk_bytes: int
    """Bytes of one chunk of logits in the head."""
    saved: int
    """Bytes on the device between forward and backward, in the layers."""
    work: int
    """Bytes at the peak beyond `saved`, scratch included."""
    host: int
    """Bytes in host memory."""
    padded: int = 0
    """Rows that a pass is padded to for a CUDA graph; 0: not padded."""

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak."""
        return self.saved + self.work

    def __str__(self) -> str:
        counts = [(level, self.levels.count(level)) for level in sorted(set(self.levels))]
        levels = ", ".join(f"{count} at {level}" for level, count in counts)
        host = f", {self.host / GIB:.2f} GiB on the host" if self.host else ""
        return (
            f"{levels}; {self.saved / GIB:.2f} GiB kept, {self.work / GIB:.2f} at work, tiles of {self.tile} rows{host}"
        )


def _movable(s: DecoderShape, level: Level) -> int:
    """Return the bytes per row of x and of attention's results, which a level keeps on the device or on the host."""
    return s.element * s.hidden + (s.element * s.q + s.lse if level.keep_attention else 0)


def saved(s: DecoderShape, level: Level) -> int:
    """Return the device bytes per row that a layer saves at `level`."""
    e = s.element
    s_down, movable = e * s.ranks[3], 0 if level.on_host else _movable(s, level)
    qkv = e * (s.qkv + s.ranks[0]) if level.keep_qkv else 0
    mlp = e * (s.hidden + s.gate_up) if level.keep_mlp else 0
    return s_down + movable + qkv + mlp


def host_bytes(s: DecoderShape, level: Level) -> int:
    """Return the host bytes per row of a layer at `level`."""
    return _movable(s, level) if level.on_host else 0


def forward_work(s: DecoderShape, rows: int, tile: int, level: Level, keys: int = 0) -> int:
    """Return the bytes of a layer's forward beyond its input and what it saves at `level`. keys: keys that are copied
    for sequences behind shared prefixes."""
    e, t = s.element, min(rows, tile)
    qkv = 0 if level.keep_qkv else e * s.qkv
    rotated = e * (s.q + s.kv) if s.qk_norm else 0
    attended = 0 if level.attention_on_device else e * s.q + s.lse
    n = e * (s.hidden + max(s.tails))
    gates = 0 if level.keep_mlp else e * s.gates
    post = e * 2 * s.hidden if s.post_norm else 0
    if s.residual_factor and level.keep_mlp and not s.post_norm:
        post = e * s.hidden  # the down projection's output, which is otherwise added as it is computed
    mlp = max(e * s.hidden + n, gates + max(n, e * (s.intermediate + s.tails[3])) + post)
    # Layers that do not save x still hold it while they run, and copies to the host are in flight.
    x = e * s.hidden + BEHIND * host_bytes(s, level) if level.on_host else 0
    attention = rows * (qkv + rotated + attended) + keys * 2 * e * s.kv
    return rows * x + max(attention, rows * (attended + e * s.hidden) + t * mlp)


def backward_work(s: DecoderShape, rows: int, tile: int, level: Level, keys: int = 0) -> int:
    """Return the bytes of a layer's backward beyond what it saved at `level`. keys: as in `forward_work`."""
    e, t = s.element, min(rows, tile)
    H, T = e * s.hidden, e * s.tails[1]
    restored = (H if level.on_host else 0) + (0 if level.attention_on_device else e * s.q + s.lse)
    # Layers whose copies back from the host are in flight.
    restored += min(AHEAD, s.layers - 1) * host_bytes(s, level)
    qkv = 0 if level.keep_qkv else e * (s.qkv + s.ranks[0])
    gradients = H + H + T  # of the output and of mid
    # The MLP, tile by tile.
    mid, gate_up = (0, 0) if level.keep_mlp else (H + T, e * s.gate_up)
    n, post = H + e * s.tails[2], (e * (s.intermediate + 3 * s.hidden) if s.post_norm else 0)
    partial_sums = 4 * 16 * -(-s.gates // 256) if s.ranks[2] else 0
    tiled = n + mid + gate_up + post + max(H + e * (s.tails[3] + s.intermediate), H + partial_sums)
    mlp = rows * (e * s.q + (0 if level.keep_attention else qkv)) + t * tiled
    # Attention: rotated q and k, dq, dk, dv, and the back end's accumulators; mid, gate and up are freed.
    rotated = e * (s.q + s.kv) if s.qk_norm else 0
    accumulators = {"fa4": 4 * (s.q + 2 * s.q_heads), "fa2": 4 * (s.q + s.q_heads)}
    key_accumulators = {"fa4": 8 * s.kv, "fa2": 2 * e * s.q * (s.q > s.kv)}.get(s.attention, 0)
    freed = e * (s.hidden + s.gate_up + s.ranks[3]) if level.keep_mlp else 0
    attention = rows * (
        e * s.q + qkv + rotated + e * (s.q + 2 * s.kv) + accumulators.get(s.attention, 4 * e * s.q) - freed
    )
    # Copied keys and values, and their gradients in addition to those of the rows.
    attention += keys * (4 * e * s.kv + key_accumulators) if keys else rows * key_accumulators
    inputs = rows * (qkv - freed) + t * (n + H)
    return rows * (restored + gradients) + max(mlp, attention, inputs)


def head_work(s: DecoderShape, rows: int, trained: int, how: PassOptions) -> int:
    """Return the bytes from the last layer's output to the log-probs of `trained` of the decoder's `rows`. A chunk's
    buffers use the scratch of the weights as far as they fit. An entropy bonus needs no further chunk."""
    e, wide = s.element, max(4, s.element)
    chunk = min(chunk_rows(s.vocab, s.dtype, how.chunk_bytes), max(1, trained))
    columns = -(-s.vocab // 64) * 64
    left = scratch(s, how.store) if how.store != "shadow" else 0
    new = 0
    for size in (chunk * columns * wide, chunk * columns * e, chunk * s.hidden * wide):
        if size <= left:
            left -= size
        else:
            new += size
    jacobians = 1 + s.entropy_grad
    return e * s.hidden * (rows + (2 + jacobians) * trained + chunk) + new


def scratch(s: DecoderShape, mode: Mode) -> int:
    """Return the bytes of the buffers that hold the frozen weights in the dtype of activations."""
    groups = [
        (s.q + 2 * s.kv + s.tails[0]) * (s.hidden + s.tails[0]),
        (s.hidden + s.tails[1]) * (s.q + s.tails[1]),
        s.gate_up * (s.hidden + s.tails[2]),
        (s.hidden + s.tails[3]) * (s.intermediate + s.tails[3]),
    ]
    return s.element * {"layer": sum(groups), "group": max(groups), "shadow": s.layers * sum(groups)}[mode]


@dataclass(frozen=True)
class PassOptions:
    """How a pass runs, apart from the levels of its layers."""

    tile: int
    store: Mode
    chunk_bytes: int


def evaluate(
    s: DecoderShape, rows: int, trained: int, mixed: tuple[int, Level, Level], how: PassOptions, keys: int = 0
) -> MemoryPlan:
    """Return the plan with the first `count` layers at level `lower` and the others at `upper`. mixed: (count, lower,
    upper). keys: as in `forward_work`."""
    count, lower, upper = mixed
    levels = (lower,) * count + (upper,) * (s.layers - count)
    saved_below = rows * count * saved(s, lower)
    saved_total = saved_below + rows * (s.layers - count) * saved(s, upper)
    # The embedded tokens exist as given and multiplied.
    weights = scratch(s, how.store) + (rows * s.element * s.hidden if s.embedding_factor else 0)
    highest = saved_total + head_work(s, rows, trained, how) + weights
    for level, saved_here, layers in ((lower, saved_below, count), (upper, saved_total, s.layers - count)):
        if layers:
            highest = max(highest, weights + saved_here + backward_work(s, rows, how.tile, level, keys))
            highest = max(highest, weights + saved_here + forward_work(s, rows, how.tile, level, keys))
    # The layers right above those on the host run while copies back are in flight; where these layers are on the host
    # too, `backward_work` counts as many copies.
    for distance in range(0 if upper.on_host else min(AHEAD, s.layers - count)):
        saved_here = saved_below + rows * (distance + 1) * saved(s, upper)
        in_flight = rows * min(AHEAD - distance, count) * host_bytes(s, lower)
        highest = max(highest, weights + saved_here + in_flight + backward_work(s, rows, how.tile, upper, keys))
    work = highest - saved_total
    host = rows * (count * host_bytes(s, lower) + (s.layers - count) * host_bytes(s, upper))
    return MemoryPlan(levels, how.tile, how.store, how.chunk_bytes, saved_total, work, host)


def _settings(shadow: bool = True) -> Iterator[PassOptions]:
    """Yield the options from the fastest to the smallest. shadow: whether the shadow store may be used."""
    for store in ("shadow", "layer") if shadow else ("layer",):
        for tile in TILES:
            yield PassOptions(tile, store, CHUNK_BYTES)
    for store in ("layer", "group"):
        for tile in TILES[2:]:
            yield PassOptions(tile, store, CHUNK_BYTES // 2)


FLOPS = 600e12
"""Assumed speed of matrix products, in FLOP per second."""
HOST_BANDWIDTH = 50e9
"""Assumed bytes per second to or from registered host memory. Measured on an H200 machine: 55 GB/s."""


def exposed_copy_seconds(s: DecoderShape, level: Level) -> float:
    """Return the time of a layer's host copies that matrix products do not hide, in percent of the layer's time. A copy
    to the host overlaps one layer's forward, a copy back one layer's backward."""
    copy, forward = host_bytes(s, level) / HOST_BANDWIDTH, 2 * s.weights / FLOPS
    return 100 * (max(0.0, copy - forward) + max(0.0, copy - 2 * forward)) / (3 * forward)


def cost_of(
    s: DecoderShape, how: PassOptions | MemoryPlan, levels: tuple[Level, ...], rows: int, again: float = 1.0
) -> float:
    """Return the approximate cost of a plan, in percent of a step's time. Halving the tile costs one percent; decoding
    takes as long for few rows as for many. again: factor on the costs of the levels."""
    decode = {"shadow": 0, "layer": 16384, "group": 3 * 16384}[how.store] / max(1, rows)
    level_cost = sum(again * level.cost + exposed_copy_seconds(s, level) for level in levels) / len(levels)
    return level_cost + TILES.index(how.tile) + decode + (how.chunk_bytes < CHUNK_BYTES)


@cache
def choose_plan(
    s: DecoderShape, rows: int, trained: int, budget: float, host: float, keys: int = 0, shadow: bool = True
) -> MemoryPlan:
    """Choose the fastest plan within `budget` bytes on the device and `host` bytes on the host.

    Layers are at one of two levels, the first ones at the level that saves less. If no plan fits, the smallest plan
    that the host has room for is returned; its peak is above the budget. keys: as in `forward_work`. shadow: whether
    the shadow store may be used.
    """
    # From the fastest to the one that saves least.
    order = [level for level in sorted(LEVELS, key=lambda level: level.cost) if host > 0 or not level.on_host]
    best: tuple[float, MemoryPlan] | None = None
    for how in _settings(shadow):
        if best is not None and cost_of(s, how, (L0,), rows) >= best[0]:
            continue  # a plan at least as fast exists

        def peak(level: Level, how: PassOptions = how) -> int:
            return evaluate(s, rows, trained, (s.layers, level, level), how, keys).peak

        fits = {level for level in order if peak(level) <= budget}
        for upper, lower in combinations(order, 2):
            if lower not in fits:
                continue
            # No plan of this pair is faster than `upper` in every layer.
            if best is not None and cost_of(s, how, (upper,), rows) >= best[0]:
                continue

            def plan(count: int, lower: Level = lower, upper: Level = upper, how: PassOptions = how) -> MemoryPlan:
                return evaluate(s, rows, trained, (count, lower, upper), how, keys)

            count = bisect.bisect_left(range(s.layers + 1), True, key=lambda count: plan(count).peak <= budget)
            if count > s.layers or (candidate := plan(count)).host > host:
                continue
            cost = cost_of(s, how, candidate.levels, rows)
            if best is None or cost < best[0]:
                best = (cost, candidate)
            if count == 0:
                # Every further pair has the same upper level, or one that saves less.
                break
    if best is not None:
        return best[1]
    *_, smallest = _settings()
    offloaded = int(host // max(1, rows * host_bytes(s, L5)))
    return evaluate(s, rows, trained, (min(s.layers, offloaded), L5, L3), smallest, keys)


GRAPH_MEMORY_SHARE = 0.25
"""Share of the memory that CUDA graphs may hold, and that a pass in a graph may take, weight buffers excluded."""


def capturable(s: DecoderShape, plan: MemoryPlan, device_bytes: float) -> bool:
    """Return whether a CUDA graph may run a plan. Nothing may go to the host, no weight buffer may be refilled within a
    layer, and the memory of the graph, which stays allocated, must be small beside that of launched passes."""
    graph_bytes = plan.peak - scratch(s, plan.store)
    offloads = any(level.on_host for level in plan.levels)
    return not offloads and plan.store != "group" and graph_bytes <= GRAPH_MEMORY_SHARE * device_bytes


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Count the frozen weights of a model: {"bytes", "parameters"}, 4-bit weights with their scales."""
    size = count = 0
    for name, weight in model.named_parameters():
        if "lora_" in name:
            continue
        state: Any = getattr(weight, "quant_state", None)
        size += weight.numel() * weight.element_size()
        count += weight.numel() if state is None else math.prod(state.shape)
        if state is not None:
            size += state.absmax.numel() * state.absmax.element_size()
            size += state.state2.absmax.numel() * state.state2.absmax.element_size() if state.nested else 0
    return {"bytes": size, "parameters": count}
