"""The numbers of a step: added up over micro-batches and ranks, then kept as one JSON object per line.

Every `Stat` says how it adds up, so a mean is over the whole step and never a mean of means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlft.errors import ConfigError
from rlft.types import Stat, Stats


class Metrics:
    """Stats of a step. `stats` holds the sums and extremes so far, so that ranks can add theirs before `values`."""

    def __init__(self) -> None:
        self.stats: Stats = {}

    def add(self, stats: Stats) -> None:
        """Merge the stats of a micro-batch. Tensors stay on their device: nothing waits for a GPU here."""
        for name, stat in stats.items():
            value, count = _number(stat.value), _number(stat.count)
            if name not in self.stats:
                self.stats[name] = Stat(stat.how, value, count)
                continue
            before = self.stats[name]
            assert before.how == stat.how, f"{name} is a {before.how} and a {stat.how}"
            merged = before.value + value if stat.how in ("mean", "sum") else _extreme(stat.how, before.value, value)
            self.stats[name] = Stat(stat.how, merged, before.count + count)

    def values(self) -> dict[str, float]:
        """The numbers to log. A mean over nothing is left out."""
        values = {}
        for name, stat in self.stats.items():
            count = float(stat.count)
            if stat.how == "mean" and count == 0:
                continue
            values[name] = float(stat.value) / (count if stat.how == "mean" else 1.0)
        return values


def _number(x: Tensor | float) -> Tensor | float:
    # float64: a sum over millions of tokens must not depend on how they were split. A copy: the caller may reuse its.
    return x.detach().to(torch.float64, copy=True) if isinstance(x, Tensor) else float(x)


def _extreme(how: str, a: Tensor | float, b: Tensor | float) -> Tensor | float:
    device = next((x.device for x in (a, b) if isinstance(x, Tensor)), None)
    pair = (torch.as_tensor(x, dtype=torch.float64, device=device) for x in (a, b))
    return torch.minimum(*pair) if how == "min" else torch.maximum(*pair)


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON object as a line. What is not finite becomes null: JSON has no NaN.

    It reaches the operating system before this returns, so killing the process loses no finished line.
    """
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None when it is torn or no object."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, null for what was not finite; [] when there is no file.

    The last line may be torn (the process was killed while writing) and is then left out. Raises ConfigError for any
    other line that is not a JSON object.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = [parse_line(line) for line in lines]
    if found and found[-1] is None:
        found.pop()
    if None in found:
        raise ConfigError(f"{path}: line {found.index(None) + 1} is not a JSON object: mend or remove the line")
    return [values for values in found if values is not None]
