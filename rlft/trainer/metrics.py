"""The numbers of a step, added up over micro-batches and ranks.

Every `Stat` says how it adds up, so a mean is over the whole step and never a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlft.types import Stat, Stats


class Metrics:
    """Stats of a step. `stats` holds the sums and extremes so far, so that ranks can add theirs before `values`."""

    def __init__(self) -> None:
        self._added: list[tuple[Stats, list[tuple[list[int], Tensor]]]] = []
        """Micro-batches not merged yet: their stats, and per dtype which of their numbers are tensors, with a copy."""
        self._merged: Stats = {}

    def add(self, stats: Stats) -> None:
        """Merge the stats of a micro-batch. Nothing waits for a GPU here."""
        # One copy per dtype (a caller may reuse its tensors, and a count in float32 would be rounded), instead of
        # a conversion and a sum per number: that came to a millisecond in a step of 20 micro-batches.
        numbers = [x for stat in stats.values() for x in (stat.value, stat.count)]
        places: dict[torch.dtype, list[int]] = {}
        for i, x in enumerate(numbers):
            if isinstance(x, Tensor):
                places.setdefault(x.dtype, []).append(i)
        copies = [(at, torch.stack([numbers[i] for i in at]).detach()) for at in places.values()]  # type: ignore[union-attr]
        self._added.append((stats, copies))

    @property
    def stats(self) -> Stats:
        """Every stat merged over what was added, in float64."""
        added, self._added = self._added, []
        read = _read([copy for _, found in added for _, copy in found])
        for stats, found in added:
            numbers = [x for stat in stats.values() for x in (stat.value, stat.count)]
            for at, copy in found:
                for i in at:
                    numbers[i] = next(read[copy.dtype])
            for k, (name, stat) in enumerate(stats.items()):
                value, count = float(numbers[2 * k]), float(numbers[2 * k + 1])
                before = self._merged.get(name)
                assert before is None or before.how == stat.how, f"{name} is a {before and before.how} and a {stat.how}"
                if before is not None:
                    value, count = _merge(stat.how, float(before.value), value), float(before.count) + count
                self._merged[name] = Stat(stat.how, value, count)
        return self._merged

    def values(self) -> dict[str, float]:
        """The numbers to log. A mean over nothing is left out."""
        values = {}
        for name, stat in self.stats.items():
            count = float(stat.count)
            if stat.how == "mean" and count == 0:
                continue
            values[name] = float(stat.value) / (count if stat.how == "mean" else 1.0)
        return values


def _read(copies: list[Tensor]) -> dict[torch.dtype, Iterator[float]]:
    """The numbers in `copies` by dtype, in order, in float64. One conversion per dtype and one wait for a GPU."""
    of: dict[torch.dtype, list[Tensor]] = {}
    for copy in copies:
        of.setdefault(copy.dtype, []).append(copy)
    if not of:
        return {}
    wide = [torch.cat(some).double() for some in of.values()]
    parts = torch.cat(wide).cpu().split([len(x) for x in wide])
    return {dtype: iter(part.tolist()) for dtype, part in zip(of, parts, strict=True)}


def _merge(how: str, a: float, b: float) -> float:
    if how in ("mean", "sum"):
        return a + b
    if math.isnan(a) or math.isnan(b):
        return math.nan  # min and max of Python would lose it
    return min(a, b) if how == "min" else max(a, b)
