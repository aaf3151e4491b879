"""Aggregate the statistics of a step over micro-batches and ranks.

Every `Stat` defines how it is merged, so a mean is over the whole step and never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlft.types import Stat, Stats


class Metrics:
    """Stats of a step. `stats` has the sums and extremes so far, so that ranks can merge theirs before `values`."""

    def __init__(self) -> None:
        self._pending: list[tuple[Stats, list[tuple[list[int], Tensor]]]] = []
        """Micro-batches not merged yet: their stats, and per dtype the places of tensors among them, with a copy."""
        self._merged: Stats = {}

    def add(self, stats: Stats) -> None:
        """Add the stats of a micro-batch, without waiting for the GPU."""
        # One copy per dtype: a caller may reuse its tensors, and a count in float32 would be rounded. A conversion and
        # a sum per number costs a millisecond in a step of 20 micro-batches.
        numbers = [number for stat in stats.values() for number in (stat.value, stat.count)]
        places: dict[torch.dtype, list[int]] = {}
        for i, number in enumerate(numbers):
            if isinstance(number, Tensor):
                places.setdefault(number.dtype, []).append(i)
        copies = [(indices, torch.stack([numbers[i] for i in indices]).detach()) for indices in places.values()]  # type: ignore[union-attr]
        self._pending.append((stats, copies))

    @property
    def stats(self) -> Stats:
        """All stats merged over the micro-batches so far, in float64."""
        pending, self._pending = self._pending, []
        numbers_by_dtype = _read([copy for _, copies in pending for _, copy in copies])
        for stats, copies in pending:
            numbers = [number for stat in stats.values() for number in (stat.value, stat.count)]
            for indices, copy in copies:
                for i in indices:
                    numbers[i] = next(numbers_by_dtype[copy.dtype])
            for k, (name, stat) in enumerate(stats.items()):
                value, count = float(numbers[2 * k]), float(numbers[2 * k + 1])
                previous = self._merged.get(name)
                assert previous is None or previous.how == stat.how, (
                    f"{name} is a {previous and previous.how} and a {stat.how}"
                )
                if previous is not None:
                    value, count = _merge(stat.how, float(previous.value), value), float(previous.count) + count
                self._merged[name] = Stat(stat.how, value, count)
        return self._merged

    def values(self) -> dict[str, float]:
        """Return the numbers to log. A mean over nothing is left out."""
        values = {}
        for name, stat in self.stats.items():
            count = float(stat.count)
            if stat.how == "mean" and count == 0:
                continue
            values[name] = float(stat.value) / (count if stat.how == "mean" else 1.0)
        return values


def _read(copies: list[Tensor]) -> dict[torch.dtype, Iterator[float]]:
    """Read the numbers in `copies` by dtype, in order, as float64. Waits for the GPU once."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for copy in copies:
        by_dtype.setdefault(copy.dtype, []).append(copy)
    if not by_dtype:
        return {}
    float64 = [torch.cat(group).double() for group in by_dtype.values()]
    parts = torch.cat(float64).cpu().split([len(values) for values in float64])
    return {dtype: iter(part.tolist()) for dtype, part in zip(by_dtype, parts, strict=True)}


def _merge(how: str, first: float, second: float) -> float:
    if how in ("mean", "sum"):
        return first + second
    if math.isnan(first) or math.isnan(second):
        return math.nan  # Python's min and max may drop a nan
    return min(first, second) if how == "min" else max(first, second)
