"""Aggregate the statistics of a step over micro-batches and ranks.

Every `Stat` defines how it is merged, so a mean is over the whole step and never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rlft import dist
from rlft.types import Stat, Stats


class Metrics:
    """One dictionary of sums and extremes: name -> Stat, merged over the micro-batches of a step, then over ranks."""

    def __init__(self) -> None:
        self._sums: Stats = {}
        self._pending: list[Stats] = []
        """Micro-batches that are not in `_sums` yet, for their names and the order of their numbers."""
        self._copies: dict[torch.dtype, list[Tensor]] = {}
        """Copies of the tensors of all pending micro-batches in this order, one [N] tensor per micro-batch."""

    def add(self, stats: Stats) -> None:
        """Add the stats of a micro-batch, without waiting for the GPU."""
        # One copy per dtype: a caller may reuse its tensors, and a count in float32 would be rounded. A conversion and
        # a sum per number costs a millisecond in a step of 20 micro-batches.
        tensors: dict[torch.dtype, list[Tensor]] = {}
        for stat in stats.values():
            for number in (stat.value, stat.count):
                if isinstance(number, Tensor):
                    tensors.setdefault(number.dtype, []).append(number)
        for dtype, numbers in tensors.items():
            self._copies.setdefault(dtype, []).append(torch.stack(numbers).detach())
        self._pending.append(stats)

    def sums(self) -> Stats:
        """Return name -> Stat with Python floats (float64), merged over all micro-batches. Waits for the GPU once."""
        numbers = _read(self._copies)
        pending, self._pending, self._copies = self._pending, [], {}
        for stats in pending:
            for name, stat in stats.items():
                value, count = (
                    next(numbers[number.dtype]) if isinstance(number, Tensor) else float(number)
                    for number in (stat.value, stat.count)
                )
                self._merge(name, Stat(stat.how, value, count))
        return self._sums

    def reduce(self) -> Metrics:
        """Return the metrics merged over all ranks, the same on each; in a single process the object itself.

        Called once per step, by every rank. A rank may lack names that others have.
        """
        if dist.is_alone():
            return self
        merged = Metrics()
        for sums in dist.gather(self.sums()):  # in the order of ranks, so that all get the same bits
            for name, stat in sums.items():
                merged._merge(name, stat)
        return merged

    def values(self) -> dict[str, float]:
        """Return the numbers to log. A mean over nothing is left out."""
        return {
            name: float(stat.value) / (float(stat.count) if stat.how == "mean" else 1.0)
            for name, stat in self.sums().items()
            if stat.how != "mean" or stat.count != 0
        }

    def _merge(self, name: str, stat: Stat) -> None:
        """Merge a Stat of Python floats into the one of this name."""
        before = self._sums.get(name)
        if before is None:
            self._sums[name] = stat
            return
        assert before.how == stat.how, f"{name} is a {before.how} and a {stat.how}"
        value = _merged(stat.how, float(before.value), float(stat.value))
        self._sums[name] = Stat(stat.how, value, before.count + stat.count)


def _read(copies: Mapping[torch.dtype, list[Tensor]]) -> dict[torch.dtype, Iterator[float]]:
    """Read the numbers of each dtype, in order, as float64. Waits for the GPU once."""
    if not copies:
        return {}
    float64 = [torch.cat(tensors).double() for tensors in copies.values()]
    parts = torch.cat(float64).cpu().split([len(numbers) for numbers in float64])
    return {dtype: iter(part.tolist()) for dtype, part in zip(copies, parts, strict=True)}


def _merged(how: str, first: float, second: float) -> float:
    if how in ("mean", "sum"):
        return first + second
    if math.isnan(first) or math.isnan(second):
        return math.nan  # Python's min and max may drop a nan
    return min(first, second) if how == "min" else max(first, second)
