"""Read the rows of a dataset: each row is checked without a tokenizer."""

from __future__ import annotations

from typing import Any

from rlft.config.data import Data
from rlft.data.kinds import check_row, kind_of


class Reader:
    """Reads the rows of one dataset. The first row that is read decides the kind of all rows."""

    def __init__(self, data: Data, purpose: str = "") -> None:
        """purpose: what the run's algorithm does with the rows."""
        self.kind: str | None = None
        """Key of KINDS; None before the first row."""

    def decide(self, row: dict[str, Any]) -> str:
        """Return the kind that this row would decide. Raises DataError naming the columns it has."""
        return kind_of(row)

    def read(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Return the row with rlft's columns. Raises DataError naming row and column."""
        self.kind = self.kind or kind_of(row)
        check_row(row, index, self.kind)
        return row

    def notes(self) -> list[str]:
        """Return what the start of a run says about the columns."""
        return []
