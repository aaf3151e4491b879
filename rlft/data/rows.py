"""Rows of a dataset in little memory: sequences of dicts that are built when they are read.

A store has `len` and `block(start, stop)`, whose items are rows or, for a row that cannot be read, the DataError that
says why. Every call builds new dicts, so nobody who changes a row changes the dataset.
"""

from __future__ import annotations

import copy
import itertools
import marshal
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from rlft.errors import DataError

BLOCK = 1024
"""Rows that are read and encoded at a time."""

Row = dict[str, Any]


class Store(Protocol):
    """All rows of a source, by their number in it."""

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> list[Row | DataError]:
        """Return new dicts of the rows from `start` to before `stop`, a DataError in place of an unreadable one."""
        ...


def blocks(store: Store) -> Iterator[tuple[int, list[Row | DataError]]]:
    """Iterate over all rows of a store: the number of the first row of a block, and its rows."""
    for start in range(0, len(store), BLOCK):
        yield start, store.block(start, min(start + BLOCK, len(store)))


class Packed:
    """A growing list of Python values, each kept as bytes: equal when read, a tenth of the memory, never shared.

    The bytes are those of `marshal`, which keeps exactly what JSON has, tuples, sets and bytes, and refuses the rest.
    A value that it refuses (a date, an image) is kept as the object it is.
    """

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        self._objects: dict[int, Any] = {}
        for value in values:
            self.append(value)

    def append(self, value: Any) -> None:
        """Add a value at the end."""
        try:
            self._bytes += marshal.dumps(value)
        except ValueError:  # of a type that marshal does not know, or nested too deeply
            self._objects[len(self)] = value
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Any]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: int) -> Any:
        start, stop = self._ends[place], self._ends[place + 1]
        if start == stop:  # marshal makes at least one byte of every value
            return _copy(self._objects[place])
        return marshal.loads(memoryview(self._bytes)[start:stop])

    def block(self, start: int, stop: int) -> list[Any]:
        """See `Store.block`."""
        view, ends = memoryview(self._bytes), self._ends[start : stop + 1]
        return [
            marshal.loads(view[first:last]) if first < last else self[place]
            for place, (first, last) in enumerate(itertools.pairwise(ends), start)
        ]


class Columns:
    """A store over a table of columns, such as one of Arrow, which stays as it is."""

    def __init__(self, name: str, count: int, columns: Callable[[int, int], Mapping[str, Sequence[Any]]]) -> None:
        """Wrap a table. columns: (start, stop) -> column name -> values. name: of the source, for errors."""
        self._name, self._count, self._columns = name, count, columns

    def __len__(self) -> int:
        return self._count

    def block(self, start: int, stop: int) -> list[Row | DataError]:
        """See `Store.block`."""
        try:
            columns = self._columns(start, stop)
        except Exception as error:  # a value that is no text, no date, no image: whatever its decoder raises
            if stop - start > 1:
                return [self.block(i, i + 1)[0] for i in range(start, stop)]
            text = f"row {start}: a value of {self._name} cannot be read: {type(error).__name__}: {error}"
            return [DataError(text, reason="unreadable value")]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Mixed:
    """A store over several others, in a given order."""

    def __init__(self, parts: Sequence[Store], order: np.ndarray) -> None:
        """Join the parts. order: [rows] int64, numbers into all rows of the parts, one part after the other."""
        self._parts, self._order = parts, order
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return len(self._order)

    def block(self, start: int, stop: int) -> list[Row | DataError]:
        """See `Store.block`."""
        rows = []
        for number in self._order[start:stop]:
            part = int(np.searchsorted(self._starts, number, "right")) - 1
            place = int(number - self._starts[part])
            rows += self._parts[part].block(place, place + 1)
        return rows


class Renamed:
    """A store whose columns have other names."""

    def __init__(self, store: Store, columns: Mapping[str, str]) -> None:
        """Rename columns. columns: {ours: theirs}; a column that a row lacks is missing under our name too."""
        self._store, self._columns = store, columns

    def __len__(self) -> int:
        return len(self._store)

    def block(self, start: int, stop: int) -> list[Row | DataError]:
        """See `Store.block`."""
        rows = self._store.block(start, stop)
        return [row if isinstance(row, DataError) else self._renamed(row) for row in rows] if self._columns else rows

    def _renamed(self, row: Row) -> Row:
        mapping = {ours: row[theirs] for ours, theirs in self._columns.items() if theirs in row}
        hidden = {*self._columns.values(), *self._columns}
        return {name: value for name, value in row.items() if name not in hidden} | mapping


class Replaced:
    """A store some of whose rows are replaced by others."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows, self._places = Packed(), dict[int, int]()

    def replace(self, number: int, row: Row) -> None:
        """Replace a row. number: of the row."""
        self._places[number] = len(self._rows)
        self._rows.append(row)

    def __len__(self) -> int:
        return len(self._store)

    def block(self, start: int, stop: int) -> list[Row | DataError]:
        """See `Store.block`."""
        rows = self._store.block(start, stop)
        if self._places:
            for i, number in enumerate(range(start, stop)):
                if number in self._places:
                    rows[i] = self._rows[self._places[number]]
        return rows


def _copy(value: Any) -> Any:
    try:
        return value if isinstance(value, DataError) else copy.deepcopy(value)
    except Exception:  # an object of the user that cannot be copied is shared
        return value
