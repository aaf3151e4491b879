"""Rows that are handed over from Python: which objects hold rows, and their copy in the run folder.

A run trains on the copy, and reading it gives the rows of the object, so its first start and every resume see the same.
Rows that are dicts are copied as JSON lines, tables of Arrow and pandas as Parquet, datasets as `datasets` saves them.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlft.config.data import ROWS, Data
from rlft.data.images import data_url, png_of
from rlft.data.readers import store_of_table
from rlft.data.rows import Columns, Packed, Row, Store, blocks
from rlft.errors import ConfigError, DataError

NAME = "data.rows"


def is_stream(rows: Any) -> bool:
    """Return whether rows come from an iterable of unknown length, such as a generator."""
    table = hasattr(rows, "__arrow_c_stream__")
    return isinstance(rows, Iterable) and not hasattr(rows, "__len__") and not table


def store_of(rows: Any, split: str) -> Store:
    """Return the rows that an object of known length holds.

    split: of a DatasetDict. Raises ConfigError for an object that holds no rows or is an iterable of unknown length,
    DataError when it is empty.
    """
    if is_stream(rows):
        raise ConfigError(f"{NAME} is an iterable of unknown length, which rlft.train reads; give it a list here")
    source = _source(rows, split)
    if _is(source, "datasets", "Dataset"):
        store: Store = store_of_dataset(source, split, NAME)
    elif _is(source, "pyarrow", "Table"):
        store = store_of_table(source, NAME)
    else:
        store = source if isinstance(source, Packed) else packed(source)
    if not len(store):
        raise DataError(f"{NAME}: the dataset is empty")
    return store


def write(rows: Any, split: str, folder: Path, name: str) -> Path:
    """Copy rows into a folder as NAME.jsonl, NAME.parquet or a folder NAME, and return its path.

    rows, split: see `store_of`. Replaces an earlier copy. Raises DataError for a table that Parquet cannot hold, and
    OSError.
    """
    source = _source(rows, split)
    if _is(source, "datasets", "Dataset"):
        path = folder / name
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        source.save_to_disk(str(temporary))
        shutil.rmtree(path, ignore_errors=True)
    elif _is(source, "pyarrow", "Table"):
        path = folder / f"{name}.parquet"
        temporary = path.with_name(f".{path.name}.tmp")
        _write_parquet(source, temporary)
    else:
        path = folder / f"{name}.jsonl"
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            for _, block in blocks(store_of(source, split)):
                # A row that is left out keeps its number: its line is null.
                file.writelines(json_line(None if isinstance(row, DataError) else row) for row in block)
    temporary.rename(path)
    return path


def copied(data: Data, folder: Path, name: str) -> Data:
    """Copy the rows of a section into a folder, and return the section that reads the copy. See `write`."""
    return replace(data, rows=None, path=str(write(data.rows, data.split, folder, name)))


def json_line(row: Row | None) -> bytes:
    """Return a row as a line of JSON."""
    return json.dumps(row).encode() + b"\n"


def _source(rows: Any, split: str) -> Any:
    """Return rows as a datasets.Dataset, a pyarrow.Table or an iterable of dicts. Raises ConfigError for others."""
    if _is(rows, "datasets", "Dataset", "DatasetDict"):
        return _dataset(rows, split, NAME)
    if _is(rows, "pandas", "DataFrame"):
        return _of_frame(rows)
    if _is(rows, "pyarrow", "Table"):
        return rows
    if hasattr(rows, "__arrow_c_stream__"):  # a table of polars, DuckDB and others
        import pyarrow as pa

        return pa.table(rows)
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise ConfigError(f"{NAME} is a {type(rows).__name__}: want {ROWS}")
    return rows


def _is(value: Any, module: str, *names: str) -> bool:
    """Return whether a value is of a class of a library, without importing a library that is not in use."""
    library = sys.modules.get(module)
    return library is not None and isinstance(value, tuple(getattr(library, name) for name in names))


def _dataset(dataset: Any, split: str, name: str) -> Any:
    """Return the split of a DatasetDict, or the dataset, with values as it stores them."""
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise DataError(f'data.split = "{split}": {name} has {", ".join(sorted(map(str, dataset)))}')
        dataset = dataset[split]
    if dataset.format["type"] == "custom":
        raise DataError(
            f"{name}: the dataset has a function that changes rows when they are read (set_transform), which is not "
            f"kept in a run folder; apply it with dataset.map, or give it as data.template"
        )
    return dataset.with_format(None)


def store_of_dataset(dataset: Any, split: str, name: str) -> Store:
    """Wrap a datasets.Dataset, or the split of a DatasetDict. name: of its source, for errors."""
    dataset = _dataset(dataset, split, name)
    if _has_images(dataset):
        # As Arrow holds them, in bytes and path: reading a row would decode its images.
        tables = dataset.with_format("arrow")
        return Columns(name, len(dataset), lambda start, stop: tables[start:stop].to_pydict())
    return Columns(name, len(dataset), lambda start, stop: dataset[start:stop])


def _has_images(dataset: Any) -> bool:
    """Return whether a column of a datasets.Dataset is images, or lists of images."""
    import datasets

    return any(
        isinstance(getattr(feature, "feature", feature), datasets.Image) for feature in dataset.features.values()
    )


def _of_frame(frame: Any) -> Any:
    """Return a pandas.DataFrame as a table, or as dicts where columns hold Python objects; missing values are None."""
    import pyarrow as pa

    if any(str(dtype) == "object" for dtype in frame.dtypes):
        return frame.astype(object).where(frame.notna(), None).to_dict("records")
    return pa.Table.from_pandas(frame, preserve_index=False)


def _write_parquet(table: Any, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        pyarrow.parquet.write_table(table, path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise DataError(f"{NAME}: a column cannot be kept in the run folder as Parquet: {error}") from error


# ---- rows that are dicts -------------------------------------------------------------------------------------------


def packed(rows: Iterable[Any]) -> Packed:
    """Return rows as `plain_row` gives them. Raises DataError when the iterable raises."""
    plain = Packed()
    try:
        for number, row in enumerate(rows):
            plain.append(plain_row(row, number))
    except Exception as error:  # whatever the user's iterable raises
        what = traceback.format_exception_only(error)[-1].strip()
        raise DataError(f"{NAME}: the iterable raised {what} after row {len(plain) - 1}") from error
    return plain


def plain_row(row: Any, number: int) -> Row | DataError:
    """Return a row as JSON holds it, or what is wrong with it.

    Tuples become lists, NumPy's values Python's, and images data URLs, which hold their bytes as text.
    """
    if not isinstance(row, Mapping):
        return DataError(f"row {number} is a {type(row).__name__}: want a dict of columns", reason="no dict")
    try:
        return _plain(row)
    except (TypeError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        return DataError(
            f"row {number} cannot be kept in the run folder: {why}; give plain values, or a datasets.Dataset or "
            f"pyarrow.Table",
            reason="no plain values",
        )


IMAGE_KEYS = ("image", "images", "bytes")
"""Keys under which bytes are those of an image."""


def _plain(value: Any, key: str = "") -> Any:
    """Return a value as JSON holds it. key: that it is under in a dict. Raises TypeError for what JSON lacks."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"a key is a {type(name).__name__}, and JSON has texts")
        return {str(name): _plain(part, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, key) for part in value]
    if isinstance(value, str):  # a subclass, such as an Enum
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if _is(value, "PIL.Image", "Image"):
        return data_url(png_of(value))
    if hasattr(value, "tolist"):  # NumPy's and PyTorch's numbers and arrays
        return _plain(value.tolist())
    if isinstance(value, bytes) and key in IMAGE_KEYS:
        return data_url(value)
    raise TypeError(f"a value is a {type(value).__name__}, which JSON does not have")
