"""How the GPU benchmarks measure: interleaved, with a cold cache, medians with their spread, and host time apart."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch


def flush() -> None:
    """Write 256 MB, so that nothing of the last call is left in the L2 cache."""
    torch.empty(64 * 2**20, dtype=torch.int32, device="cuda").zero_()


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int = 21, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each call by events, A B C A B C ..., the cache flushed before each."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            flush()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end))
    return found


def host_inclusive(calls: dict[str, Callable[[], Any]], repeats: int = 5, inner: int = 20) -> dict[str, list[float]]:
    """Milliseconds per call on the host's clock, `inner` calls one after the other and one synchronisation."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            torch.cuda.synchronize()
            found[name].append((time.perf_counter() - start) * 1e3 / inner)
    return found


def graphed(calls: dict[str, Callable[[], Any]], repeats: int = 15, inner: int = 10) -> dict[str, list[float]]:
    """Milliseconds per call of device time alone: `inner` calls captured in a CUDA graph, replayed. Only for calls that
    can be captured; their inputs should be larger than the cache."""
    graphs = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(inner):
                call()
        graphs[name] = graph
    found = interleaved({name: graph.replay for name, graph in graphs.items()}, repeats)
    return {name: [ms / inner for ms in times] for name, times in found.items()}


def peak_gib(call: Callable[[], Any]) -> float:
    """GiB allocated at most during the call, beyond what was before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


class Watch:
    """Seconds and GiB of phases, where the most of the card that was in use is looked up every few milliseconds on a
    thread: of the driver, since what vLLM takes does not all go through PyTorch's allocator."""

    def __init__(self) -> None:
        self.most: dict[str, float] = {}
        self._phase, self._began = "start", time.perf_counter()
        if torch.cuda.is_available():
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            free, total = torch.cuda.mem_get_info()
            self.most[self._phase] = max(self.most.get(self._phase, 0.0), (total - free) / 2**30)
            time.sleep(0.005)

    def enter(self, name: str) -> float:
        """Go on to a phase; returns the seconds of the one before."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self._phase, self._began = now - self._began, name, now
        return seconds

    def phase(self, name: str, call: Callable[[], Any], seconds: dict[str, float]) -> Any:
        self.enter(name)
        result = call()
        seconds[name] = self.enter(name)
        print(f"  {name}: {seconds[name]:.1f} s", flush=True)  # what a run that is cut off has shown
        return result


def row(work: str, stack: str, metric: str, values: list[float] | float, unit: str, note: str = "") -> dict[str, Any]:
    """A row of a results file: the median of the repeats, with p20 and p80 in the note."""
    if isinstance(values, list):
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5]
        spread = f"p20 {low:.4g}, p80 {high:.4g}, {len(values)} repeats"
        values, note = statistics.median(values), f"{note}; {spread}" if note else spread
    return {"work": work, "stack": stack, "metric": metric, "value": float(f"{values:.5g}"), "unit": unit, "note": note}
