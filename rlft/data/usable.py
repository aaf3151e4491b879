"""The rows of a dataset that a run can use, and those that it leaves out, with a reason each.

The checks here need no tokenizer. What a chat template refuses shows when the rows are encoded (rlft.data.prompts).
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from rlft.config.data import Data
from rlft.data.kinds import Purpose
from rlft.data.reader import Reader
from rlft.data.rows import BLOCK, Packed, Replaced, Row, Store, blocks
from rlft.data.sources import NO_ROW, load_rows
from rlft.errors import DataError

ADVICE = 'data.on_error = "drop" leaves such rows out'


class Dropped(NamedTuple):
    """A row that is left out."""

    row: int
    """Its number in the dataset."""
    reason: str
    """The same text for all rows that are left out for one reason."""
    message: str
    values: Row | None
    """The row; None where it could not be read."""


class Drops:
    """The rows of one dataset that are left out."""

    def __init__(self, others: Drops | None = None) -> None:
        """Begin with those of `others`."""
        self._packed = Packed(tuple(dropped) for dropped in others or ())
        self.counts: Counter[str] = Counter(others.counts if others else ())
        """Number of rows by reason."""

    def add(self, number: int, error: DataError, row: Row | None) -> None:
        """Add a row. number: in the dataset. error: what is wrong with it."""
        reason = error.reason
        self.counts[reason] += 1
        self._packed.append((number, reason, str(error), row))

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, place: int) -> Dropped:
        return Dropped(*self._packed[place])

    def __iter__(self) -> Iterator[Dropped]:
        return (self[place] for place in range(len(self)))

    def write(self, path: Path) -> None:
        """Write one JSON object per row: row (its number), reason, message, values. Values that JSON lacks are text."""
        with path.open("w", encoding="utf-8") as file:
            for dropped in self:
                file.write(json.dumps(dropped._asdict(), default=repr) + "\n")

    def note(self, name: str) -> str:
        """Return the counts as a sentence. name: of the setting that holds the dataset."""
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.counts.most_common())
        return f"{name}: {len(self)} row{'s are' if len(self) > 1 else ' is'} left out: {reasons}"


class Rows(Sequence[Row]):
    """The rows of a dataset that can be used, as new dicts, with rlft's column names."""

    def __init__(
        self, store: Store, numbers: np.ndarray, columns: Sequence[str], drops: Drops, kind: str, notes: Sequence[str]
    ) -> None:
        """Select rows of a store. numbers: [rows] int64, their numbers in the dataset. drops: the others.

        kind: a key of rlft.data.kinds.KINDS. notes: what the start of a run says about the rows.
        """
        self._store, self.numbers, self.drops, self.kind, self.notes = store, numbers, drops, kind, notes
        self.columns = tuple(columns)
        """Every column that at least one row has."""

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> Row | Rows:
        if isinstance(place, slice):
            return Rows(self._store, self.numbers[place], self.columns, self.drops, self.kind, self.notes)
        number = int(self.numbers[place])
        (row,) = self._store.block(number, number + 1)
        assert not isinstance(row, DataError), "only rows that could be read are selected"
        return row

    def __iter__(self) -> Iterator[Row]:
        for _, rows in self.runs():
            yield from rows

    def runs(self) -> Iterator[tuple[int, list[Row]]]:
        """Iterate over runs of consecutive rows of the dataset: the number of the first of a run, and its rows."""
        cuts = np.flatnonzero(np.diff(self.numbers) != 1) + 1
        for part in np.split(self.numbers, cuts) if len(self.numbers) else ():
            for start in range(0, len(part), BLOCK):
                first, last = int(part[start]), int(part[min(start + BLOCK, len(part)) - 1])
                yield first, self._store.block(first, last + 1)  # type: ignore[misc]


def check_rows(data: Data, seed: int, purpose: Purpose = "") -> Rows:
    """Load the rows of a dataset and read them without a tokenizer.

    seed: the run's. purpose: what the algorithm does with the rows. Raises DataError naming row and column for the
    first row that cannot be used, unless `data.on_error` leaves such rows out, and for a dataset without any other row.
    """
    store, reader = Replaced(load_rows(data, seed)), Reader(data, purpose)
    drops, numbers, columns = Drops(), array("q"), dict[str, None]()
    first, wrong = None, 0
    if data.on_error == "drop":
        _decide_by_most(reader, store)
    for start, rows in blocks(store):
        for number, row in enumerate(rows, start):
            read = _read(reader, row, number)
            if isinstance(read, dict):
                if read is not row:
                    store.replace(number, read)
                numbers.append(number)
                if not read.keys() <= columns.keys():
                    columns.update(dict.fromkeys(read))
            elif data.on_error == "drop" or read.reason == NO_ROW:
                drops.add(number, read, None if isinstance(row, DataError) else row)
            elif reader.kind is None and isinstance(row, dict):
                raise _unmapped(data, row, number) or read
            else:
                first, wrong = first or read, wrong + 1
    if first is not None:
        raise stopped(first, wrong - 1, bool(numbers))
    if not numbers:
        raise nothing_left(drops)
    for ours, theirs in data.columns.items():
        if ours not in columns:
            raise DataError(
                f'data.columns: {ours} = "{theirs}", but no row has such a column; they have {", ".join(columns)}'
            )
    assert reader.kind is not None, "a row was read"
    return Rows(store, np.array(numbers), list(columns), drops, reader.kind, reader.notes())


def _read(reader: Reader, row: Row | DataError, number: int) -> Row | DataError:
    try:
        return row if isinstance(row, DataError) else reader.read(row, number)
    except DataError as error:
        return error


def _unmapped(data: Data, row: Row, number: int) -> DataError | None:
    """Return the error of a mapped column that the first row lacks, which is why it is of no kind."""
    for ours, theirs in data.columns.items():
        if ours not in row:
            return DataError(
                f'data.columns: {ours} = "{theirs}", but row {number} has no such column; it has {", ".join(row)}'
            )
    return None


def _decide_by_most(reader: Reader, store: Store) -> None:
    """Make the reader read the first row of the kind that most rows are of, which decides the kind of all."""
    counts: Counter[str] = Counter()
    firsts: dict[str, tuple[int, Row]] = {}
    for start, rows in blocks(store):
        for number, row in enumerate(rows, start):
            with contextlib.suppress(DataError):
                if isinstance(row, dict):
                    kind = reader.decide(row)
                    counts[kind] += 1
                    firsts.setdefault(kind, (number, row))
    if counts:
        number, row = firsts[counts.most_common(1)[0][0]]
        _read(reader, row, number)


def stopped(error: DataError, more: int, some_good: bool) -> DataError:
    """Return the error that ends a run at a wrong row.

    more: how many other rows are known to be wrong. some_good: whether any row is right, since the advice to leave rows
    out makes no sense otherwise.
    """
    others = f" ({more} more row{'s are' if more > 1 else ' is'} wrong)" if more else ""
    advised = "data.on_error" in str(error)
    return DataError(f"{error}{others}" + (f"; {ADVICE}" if some_good and not advised else ""))


def nothing_left(drops: Drops) -> DataError:
    """Return the error of a dataset whose rows are all left out."""
    first = drops[0]
    return DataError(f"no row of the dataset can be used; {drops.note('of its rows')}. {first.message}")
