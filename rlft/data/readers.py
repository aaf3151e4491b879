"""Read dataset files: JSON lines, JSON, CSV and Parquet, also compressed (.gz, .bz2, .zst).

Values arrive as the file has them. In particular all columns of a CSV file are text, since a guess at types changes
answers ("007" to 7, "true" to True). The exception is a column of labels, see `read_csv`.

A reader raises what its library raises; `rlft.data.sources` turns it into a DataError that names the source.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rlft.data.rows import Columns, Packed, Row, Store
from rlft.errors import DataError

COMPRESSED = (".gz", ".bz2", ".zst")
JSON = (".jsonl", ".ndjson", ".json")
FILES = (*JSON, ".parquet", ".csv", ".tsv")
DECODER = json.JSONDecoder()
BOM = b"\xef\xbb\xbf"
LARGEST_BLOCK = 2**30
"""Bytes of a CSV file that are parsed at a time at most; Arrow counts them in 32 bits."""


def kind_of_file(path: Path) -> str:
    """Return the suffix that says how a file is read, without that of a compression: ".jsonl" for a.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def read_file(path: Path, label: str) -> Store:
    """Read a file by its suffix. label: the name of its column of labels, see `read_csv`."""
    kind = kind_of_file(path)
    if kind in JSON:
        return Packed(_json_rows(path))
    return read_csv(path, label) if kind in (".csv", ".tsv") else _read_parquet(path)


def _open(path: Path) -> IO[bytes]:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="detect"))  # type: ignore[arg-type]


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _json_rows(path: Path) -> Iterator[Row | DataError]:
    """Yield the rows of a file that is one list, or has one object in each line, whatever its name says."""
    with _open(path) as file:
        lines = enumerate(file, start=1)
        number, head = next(((i, line) for i, line in lines if line.removeprefix(BOM).strip()), (1, b""))
        head = head.removeprefix(BOM)
        if head.lstrip()[:1] == b"[":
            yield from _json_list(path, head + file.read())
        elif kind_of_file(path) == ".json" and head and not _is_object(head):
            raise DataError(f"{path}: want a list of objects, or one object in each line{_why(head + file.read())}")
        else:
            yield from _json_lines(path, itertools.chain([(number, head)], lines))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _why(data: bytes) -> str:
    """Return what is wrong with the JSON of a file, after a colon; nothing where it is valid."""
    try:
        json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        return f": {error}"
    return ""


def _json_list(path: Path, data: bytes) -> list[Row]:
    try:
        rows = json.loads(data.decode())
    except RecursionError:
        raise DataError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: want a list of objects, one per row; item {i} is {type(row).__name__}")
    return rows


def _json_lines(path: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[Row | DataError]:
    for number, line in lines:
        if not line.strip():
            continue
        row = parsed_line(line)
        yield row if isinstance(row, dict) else DataError(f"{path}, line {number}: {row}", reason="unreadable line")


def parsed_line(line: bytes) -> Row | str:
    """Return the object in a line of JSON, or what is wrong with the line."""
    try:
        row = DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error}"
    except RecursionError:
        return "not valid JSON: nested too deeply"
    except ValueError as error:
        return f"not valid JSON: {error}"
    return row if isinstance(row, dict) else f"want an object with columns, got {type(row).__name__}"


# ---- tables --------------------------------------------------------------------------------------------------------


def read_csv(path: Path, label: str) -> Store:
    """Read a CSV or TSV file with a header: all columns as text, an empty cell as an empty string.

    label: a column that is read as truth values where it holds nothing but true and false, since labels of completions
    are truth values.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv

    with _open(path) as file:
        data = file.read()
    delimiter = "\t" if kind_of_file(path) == ".tsv" else ","
    head = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    names = next(csv.reader(head, delimiter=delimiter), [])
    if not names:
        return Packed()
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        # One block, so that a cell of any size is read, and one with line ends wherever it lies.
        read_options=pyarrow.csv.ReadOptions(block_size=min(len(data) + 1, LARGEST_BLOCK)),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    if label in names:
        lower = pc.utf8_lower(table[label])  # type: ignore[attr-defined]
        if set(lower.unique().to_pylist()) <= {"true", "false"}:
            table = table.set_column(names.index(label), label, pc.equal(lower, "true"))  # type: ignore[attr-defined]
    return store_of_table(table, str(path))


def _read_parquet(path: Path) -> Store:
    import pyarrow.parquet

    return store_of_table(pyarrow.parquet.ParquetFile(path).read(), str(path))


def store_of_table(table: Any, name: str) -> Store:
    """Wrap a table of Arrow. name: of its source, for errors."""
    twice = sorted({column for column in table.column_names if table.column_names.count(column) > 1})
    if twice:
        raise DataError(f"{name}: two columns are called {twice[0]}; rename one of them")
    return Columns(name, len(table), lambda start, stop: table.slice(start, stop - start).to_pydict())
