"""Timing of small GPU kernels side by side: interleaved, cold L2, median with p20 and p80, beside a copy.

Three clocks:
    device  CUDA events around one call. A 256 MB write before it empties the L2, and a pause on the GPU lets the host
            queue the whole call first, so that no launch gap is inside.
    host    wall time of 50 calls back to back, with one synchronisation at the end: what a loop pays.
    graph   one CUDA graph of calls on input sets that together exceed the L2, per call. Only where a call moves under
            150 MB (about 50 us).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

Thunk = Callable[[], Any]
Row = dict[str, Any]

FLUSH_BYTES = 256 * 2**20
PAUSE_CYCLES = 600_000
"""About 0.35 ms on an H100: more than any call here needs on the host."""
SETS_BYTES = 200 * 2**20
GRAPH_BYTES = 150 * 2**20


class Stack(NamedTuple):
    """One side of a comparison."""

    name: str
    run: Callable[..., Any]
    """The differentiable function: run(*inputs) gives a tensor or several."""
    draw: Callable[[], tuple[list[Any], list[Tensor]]]
    """Fresh inputs (those that want a gradient say so) and the gradients of the outputs."""
    note: str = ""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape at a time, so that no number of shapes meets its limit of recompilations."""
    torch._dynamo.reset()
    # Backward runs more than once here; compiled code would otherwise give its saved buffers away the first time.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False)


def device_ms(thunks: dict[str, Thunk], rounds: int = 40) -> dict[str, list[float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in thunks}
    for thunk in thunks.values():
        for _ in range(3):
            thunk()
    for _ in range(rounds):
        for name, thunk in thunks.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(PAUSE_CYCLES)
            start.record()
            thunk()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end))
    return found


def host_ms(thunks: dict[str, Thunk], rounds: int = 9, calls: int = 50) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in thunks}
    for _ in range(rounds):
        for name, thunk in thunks.items():
            thunk()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                thunk()
            torch.cuda.synchronize()
            found[name].append((time.perf_counter() - begin) * 1e3 / calls)
    return found


def graph_ms(thunks: dict[str, Sequence[Thunk]], rounds: int = 40) -> dict[str, list[float]]:
    """Each name has a thunk per input set; their results stay alive, so that every call writes cold memory too."""
    graphs, kept = {}, []
    for name, sets in thunks.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for thunk in sets:
                thunk()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            kept.append([thunk() for thunk in sets])
    found: dict[str, list[float]] = {name: [] for name in thunks}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(PAUSE_CYCLES)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) / len(thunks[name]))
    return found


def copy_of(bytes_moved: int) -> Thunk:
    """A device-to-device copy that reads and writes `bytes_moved` together."""
    source = torch.randint(0, 255, (bytes_moved // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def sets_for(bytes_moved: int) -> int:
    return max(2, min(24, -(-SETS_BYTES // bytes_moved)))


def to_rows(work: str, samples: dict[str, list[float]], bytes_moved: int | None, notes: dict[str, str]) -> list[Row]:
    """Milliseconds of every stack, and GB/s with the share of the copy where the bytes are known."""
    found: list[Row] = []
    copy = statistics.median(samples["copy"]) if "copy" in samples else None
    for stack, values in samples.items():
        middle, ordered = statistics.median(values), sorted(values)
        spread = f"p20 {ordered[len(ordered) // 5]:.4f}, p80 {ordered[len(ordered) * 4 // 5]:.4f}"
        note = "; ".join(n for n in (spread, notes.get(stack, "")) if n)
        row = {"work": work, "stack": stack}
        found.append(row | {"metric": "ms", "value": round(middle, 5), "unit": "ms", "note": note})
        if bytes_moved and copy:
            share = f"{copy / middle:.3f} of a copy of the same bytes"
            rate = round(bytes_moved / middle / 1e6)
            found.append(row | {"metric": "GBs", "value": rate, "unit": "GB/s", "note": share})
    return found


def _backward(stack: Stack) -> Thunk:
    """Backward alone, repeatable: the graph is kept."""
    inputs, grads = stack.draw()
    outs = stack.run(*inputs)
    outs = list(outs) if isinstance(outs, tuple | list) else [outs]
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return lambda: torch.autograd.grad(outs, wanted, grads, retain_graph=True)


def _forward(stack: Stack) -> Thunk:
    inputs, _ = stack.draw()
    return lambda: stack.run(*inputs)


def compare(
    work: str,
    stacks: list[Stack],
    forward_bytes: int,
    backward_bytes: int,
    raw_forward: Callable[[], Thunk],
    raw_backward: Callable[[], Thunk],
) -> list[Row]:
    """Rows of one shape: forward and backward of every stack on each clock.

    raw_forward, raw_backward: make a thunk of our launcher on fresh inputs, for the graphs and as stack "rlft-raw"
    (without autograd), which is what the fused layer calls.
    """
    notes = {s.name: s.note for s in stacks}
    found: list[Row] = []
    for direction, make, raw, size in (
        ("forward", _forward, raw_forward, forward_bytes),
        ("backward", _backward, raw_backward, backward_bytes),
    ):
        thunks = {s.name: make(s) for s in stacks} | {"rlft-raw": raw()}
        found += to_rows(f"{work}/{direction}/host", host_ms(thunks), None, notes)
        found += to_rows(f"{work}/{direction}/device", device_ms(thunks | {"copy": copy_of(size)}), size, notes)
        if size < GRAPH_BYTES:
            makers: dict[str, Callable[[], Thunk]] = {"rlft-raw": raw, "copy": lambda size=size: copy_of(size)}
            if direction == "forward":
                makers |= {s.name: lambda s=s: _forward(s) for s in stacks if s.name != "rlft"}
            sets = {name: [maker() for _ in range(sets_for(size))] for name, maker in makers.items()}
            found += to_rows(f"{work}/{direction}/graph", graph_ms(sets), size, notes)
        torch.cuda.empty_cache()
    return found


def sweep(work: str, candidates: dict[str, Callable[[], Thunk]], bytes_moved: int) -> list[Row]:
    """Launch parameters against each other: graph time for each candidate, best first."""
    makers = candidates | {"copy": lambda: copy_of(bytes_moved)}
    sets = {name: [maker() for _ in range(sets_for(bytes_moved))] for name, maker in makers.items()}
    found = to_rows(work, graph_ms(sets, rounds=25), bytes_moved, {})
    torch.cuda.empty_cache()
    return sorted((r for r in found if r["metric"] == "GBs"), key=lambda r: -r["value"])
