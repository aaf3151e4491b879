"""Choose what each layer saves, and how a pass runs, within the memory that is free.

The formulae of the bytes are in `rlft.models.fused.memory`. s: sizes of the decoder.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from functools import cache
from itertools import combinations

from rlft.kernels.logprobs import CHUNK_BYTES
from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.levels import L0, L3, L5, LEVELS, Level
from rlft.models.fused.memory import TILES, MemoryPlan, PassOptions, evaluate, host_bytes, scratch
from rlft.models.fused.mixer_shape import Recurrent


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
    copied = max(host_bytes(kind, level) for kind in s.layer_kinds)
    copy, forward = copied / HOST_BANDWIDTH, 2 * s.weights / FLOPS
    return 100 * (max(0.0, copy - forward) + max(0.0, copy - 2 * forward)) / (3 * forward)


def cost_of(
    s: DecoderShape, how: PassOptions | MemoryPlan, levels: tuple[Level, ...], rows: int, again: float = 1.0
) -> float:
    """Return the approximate cost of a plan, in percent of a step's time. Halving the tile costs one percent; decoding
    takes as long for few rows as for many. again: factor on the costs of the levels."""
    decode = s.decoded * {"shadow": 0, "layer": 16384, "group": 3 * 16384}[how.store] / max(1, rows)
    level_cost = sum(again * level.cost + exposed_copy_seconds(s, level) for level in levels) / len(levels)
    return level_cost + TILES.index(how.tile) + decode + (how.chunk_bytes < CHUNK_BYTES)


@cache
def choose_plan(
    s: DecoderShape,
    rows: int,
    trained: int,
    budget: float,
    host: float,
    keys: int = 0,
    shadow: bool = True,
    recurrent: Recurrent | None = None,
) -> MemoryPlan:
    """Choose the fastest plan within `budget` bytes on the device and `host` bytes on the host.

    Layers are at one of two levels, the first ones at the level that saves less. If no plan fits, the smallest plan
    that the host has room for is returned; its peak is above the budget. keys, recurrent: as in `evaluate`. shadow:
    whether the shadow store may be used.
    """
    # From the fastest to the one that saves least.
    order = [level for level in sorted(LEVELS, key=lambda level: level.cost) if host > 0 or not level.on_host]
    best: tuple[float, MemoryPlan] | None = None
    for how in _settings(shadow):
        if best is not None and cost_of(s, how, (L0,), rows) >= best[0]:
            continue  # a plan at least as fast exists

        def peak(level: Level, how: PassOptions = how) -> int:
            return evaluate(s, rows, trained, (s.layers, level, level), how, keys, recurrent).peak

        fits = {level for level in order if peak(level) <= budget}
        for upper, lower in combinations(order, 2):
            if lower not in fits:
                continue
            # No plan of this pair is faster than `upper` in every layer.
            if best is not None and cost_of(s, how, (upper,), rows) >= best[0]:
                continue

            def plan(count: int, lower: Level = lower, upper: Level = upper, how: PassOptions = how) -> MemoryPlan:
                return evaluate(s, rows, trained, (count, lower, upper), how, keys, recurrent)

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
    offloaded = int(host // max(1, rows * max(host_bytes(kind, L5) for kind in s.layer_kinds)))
    return evaluate(s, rows, trained, (min(s.layers, offloaded), L5, L3), smallest, keys, recurrent)


GRAPH_MEMORY_SHARE = 0.25
"""Share of the memory that CUDA graphs may hold, and that a pass in a graph may take, weight buffers excluded."""


def capturable(s: DecoderShape, plan: MemoryPlan, device_bytes: float) -> bool:
    """Return whether a CUDA graph may run a plan. Nothing may go to the host, no weight buffer may be refilled within a
    layer, and the memory of the graph, which stays allocated, must be small beside that of launched passes."""
    graph_bytes = plan.peak - scratch(s, plan.store)
    offloads = any(level.on_host for level in plan.levels)
    return not offloads and plan.store != "group" and graph_bytes <= GRAPH_MEMORY_SHARE * device_bytes
