"""Read the rows of a dataset: known formats become the columns of rlft, and each row is checked without a tokenizer."""

from __future__ import annotations

from typing import Any

from rlft.config.data import Data
from rlft.data import images
from rlft.data.formats import convert, is_foreign, split_completion, split_pair
from rlft.data.kinds import IDS, KINDS, Purpose, check_row, columns_of, kind_of
from rlft.data.messages import is_messages, messages_of, parsed_messages, tools_of
from rlft.data.tokens import check_ids
from rlft.errors import DataError

CONVERSATIONS = ("prompt", "completion", "messages", "chosen", "rejected")
"""Columns that may be messages."""
MEDIA = ("video", "videos", "audio", "audios")
"""Columns that a reader may expect to reach the model, and that do not."""


class Reader:
    """Reads the rows of one dataset. The first row that is read decides the kind of all rows."""

    def __init__(self, data: Data, purpose: Purpose = "") -> None:
        """purpose: what the run's algorithm does with the rows, see `kind_of`."""
        self.kind: str | None = None
        """Key of KINDS; None before the first row."""
        self._columns = data.columns
        self._purpose: Purpose = purpose
        self._formats: dict[str, None] = {}
        self._unread: list[str] = []
        self._read_columns: set[str] = set()
        self._system = False

    def decide(self, row: dict[str, Any]) -> str:
        """Return the kind that this row would decide. Raises DataError naming the columns it has."""
        return kind_of(convert(row, self._columns)[0], self._columns, self._purpose)

    def read(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Return the row with rlft's columns. Raises DataError naming row and column."""
        try:
            return self._read(row)
        except DataError as error:
            where = "" if self.kind is None else f"row {index}: "
            raise DataError(f"{where}{error}", reason=error.reason) from None
        except RecursionError:
            raise DataError(f"row {index}: a column is nested too deeply to be read") from None

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        row, name = convert(row, self._columns)
        if self.kind is None:
            kind = kind_of(row, self._columns, self._purpose)
            self._unread = [
                column for column in row if column not in columns_of(kind) and _means_something(column, row)
            ]
            self._system = isinstance(row.get("system"), str) and kind not in (*IDS, "text")
            if is_foreign(row):
                name = "ShareGPT"
            self.kind, self._read_columns = kind, columns_of(kind)
        if name is not None:
            self._formats[name] = None
        kind = self.kind
        if kind in IDS:
            check_row(row, kind)
            check_ids(row, kind)
            return row
        read = self._conversations(row, kind)
        check_row(read, kind)
        if kind == "preference":
            read = split_pair(read)
        elif kind in ("completion", "label"):
            read = split_completion(read)
        _check_images(read, kind)
        return read

    def _conversations(self, row: dict[str, Any], kind: str) -> dict[str, Any]:
        """Return the row with the messages and tools of the columns that its kind reads, and the images in them."""
        changed: dict[str, Any] = {}
        held: dict[str, list[Any]] = {}
        for column in CONVERSATIONS:
            value = row.get(column)
            if column in self._read_columns and (column == "messages" or is_messages(value)):
                try:
                    value = parsed_messages(value)
                    if is_messages(value):
                        changed[column], held[column] = messages_of(value)
                except DataError as error:
                    raise DataError(f"column {column}: {error}", reason=error.reason) from None
        if row.get("tools") is not None and kind != "text":
            try:
                changed["tools"] = tools_of(row["tools"])
            except DataError as error:
                raise DataError(f"column tools: {error}", reason=error.reason) from None
        if found := _held(held):
            if images.images_in(row):
                raise DataError("parts of messages hold images, and a column too: leave out one of them")
            changed["images"] = found
        return row | changed if changed else row

    def notes(self) -> list[str]:
        """Return what the start of a run says about the columns: formats, and what is not read."""
        notes = []
        if self.kind is None:
            return notes
        for name in self._formats:
            notes.append(f"data: {name} rows, read as {' + '.join(KINDS[self.kind])}")
        if self._unread:
            one = len(self._unread) == 1
            notes.append(
                f"data: rows are read as {' + '.join(KINDS[self.kind])}; the column{'' if one else 's'} "
                f"{', '.join(self._unread)} {'is' if one else 'are'} not read (data.columns chooses what is)"
            )
        if self._system:
            notes.append(
                "data: the column system is the system message of its row; where it means something else, rename it by "
                'data.columns, for example {topic = "system"}'
            )
        return notes


def _held(held: dict[str, list[Any]]) -> list[Any]:
    """Return the images that the messages of a row hold, by column. Both sides of a pair have those of the prompt."""
    sides = [held.pop(column) for column in ("chosen", "rejected") if column in held]
    if len(sides) == 2 and sides[0] != sides[1]:
        raise DataError(
            "chosen and rejected have different images: both sides of a pair continue one prompt; give the images in "
            "it, or leave the row out",
            reason="images",
        )
    return [image for found in (*held.values(), *sides[:1]) for image in found]


def _check_images(row: dict[str, Any], kind: str) -> None:
    """Raise DataError for images where no prompt has them: in what is trained, and behind it."""
    recorded = {column: row[column] for column in ("completion", "chosen", "rejected") if column in columns_of(kind)}
    if kind == "messages":
        answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        recorded = {"messages": row["messages"][answers[0] :] if answers else []}
    for column, said in recorded.items():
        if isinstance(said, list) and any(map(images.has_image, said)):
            raise DataError(
                f"column {column} has an image in an answer or behind one; images are supported in the turns before "
                f"the first answer",
                reason="images",
            )
    if kind == "text" and images.images_in(row):
        raise DataError(
            "rows of plain text have no prompt to show images in; give messages, or prompt + completion, or rename a "
            'column that means something else, for example data.columns = {picture = "image"}',
            reason="images",
        )


def _means_something(column: str, row: dict[str, Any]) -> bool:
    """Return True for a column that another kind of row reads, or that a reader may expect to reach the model."""
    other = any(column in columns for columns in KINDS.values()) and column != "label"
    return row[column] is not None and (other or column in MEDIA)
