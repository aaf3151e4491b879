"""Values of results files as the cells of a page's table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@cache
def newest(name: str) -> tuple[str, dict[str, Any]]:
    """Return the newest results file NAME_cpu_DATE.json or NAME_gpu_DATE.json: its file name and its content."""
    files = sorted(path for path in RESULTS.glob(f"{name}_*.json") if re.fullmatch(rf"{name}_[cg]pu_[\d-]+", path.stem))
    assert files, f"no results file of {name}"
    path = max(files, key=lambda path: path.stem.rpartition("_")[2])
    return path.name, json.loads(path.read_text(encoding="utf-8"))


def value(name: str, work: str, stack: str, metric: str, note: str = "") -> float | None:
    """Return a value of the newest file of a name; None if there is no such row.

    work: with "#2" behind it the second of several rows of equal names. note: what the row's note contains.
    """
    work, _, nth = work.partition("#")
    values = [
        row["value"]
        for row in newest(name)[1]["rows"]
        if (row["work"], row["stack"], row["metric"]) == (work, stack, metric) and note in row["note"]
    ]
    place = int(nth or 1) - 1
    return values[place] if place < len(values) else None


def link(name: str, folder: str = "../benchmarks/results") -> str:
    """Return a link to the newest file of a name, with the device it ran on."""
    file, content = newest(name)
    device = re.sub(r"NVIDIA | 80GB HBM3|\(R\)|, \d+ threads?", "", content["device"]).strip()
    return f"[{device}, {content['date']}]({folder}/{file})"


# ---- formats of a cell ---------------------------------------------------------------------------------------------


def seconds(number: float) -> str:
    """Three digits: 1.26, 23.8, 427."""
    return f"{number:,.{max(0, 3 - len(str(int(number))))}f}"


def whole(number: float) -> str:
    """A whole number with separators: 60,217."""
    return f"{number:,.0f}"


def gib(number: float) -> str:
    """One digit behind the point: 20.4."""
    return f"{number:.1f}"


def times(number: float) -> str:
    """A factor with two digits: 1.9x, 19x."""
    return f"{number:.1f}x" if number < 10 else f"{number:.0f}x"


def thousands(number: float) -> str:
    """A number of tokens in thousands: 137k; a dash for none."""
    return f"{number / 1000:,.0f}k" if number else "-"


def percent(number: float) -> str:
    """A share as percent: 56.5%."""
    return f"{100 * number:.1f}%"


def share(number: float) -> str:
    """Three digits behind the point: 0.565."""
    return f"{number:.3f}"


# ---- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column: where its values are found in the results file of a row."""

    head: str
    stack: str
    metric: str
    how: Callable[[float], str] = seconds
    work: str = "{}"
    """Work of a results file; {} is the key of the row."""
    note: str = ""
    """What the note of the value contains, where several rows of a file have the same names; {} is the key."""


@dataclass(frozen=True)
class Table:
    """A table: rows are works, columns are stacks and metrics."""

    first: str
    """Head of the first column."""
    rows: tuple[tuple[str, str, str], ...]
    """(label, name of the results file, key) of each row."""
    columns: tuple[Column, ...]
    bold: str = ""
    """Head of the column that is printed bold."""
    source: bool = True
    """The last column links the file that a row is from."""

    def lines(self, folder: str) -> list[str]:
        """Return the table as Markdown. folder: that of the results."""
        heads = [self.first, *(column.head for column in self.columns), *(["measured"] if self.source else [])]
        return [
            markdown_row(heads),
            markdown_row(["---"] * len(heads)),
            *(markdown_row(self._cells(row, folder)) for row in self.rows),
        ]

    def _cells(self, row: tuple[str, str, str], folder: str) -> list[str]:
        label, name, key = row
        cells = [label]
        for column in self.columns:
            number = value(name, column.work.format(key), column.stack, column.metric, column.note.format(key))
            cell = "" if number is None else column.how(number)
            cells.append(f"**{cell}**" if cell and column.head == self.bold else cell)
        assert any(cells[1:]), f"no value of {name}, {key}"
        return [*cells, link(name, folder)] if self.source else cells


def markdown_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
