"""Load the rows of a dataset as dicts with rlft's column names, without a tokenizer or a model.

A source is a file, a `datasets` folder, a hub id or a reasoning-gym task. Sources are mixed, then the user's template
function is applied to raw rows, then the columns are mapped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rlft.config import resolve, secrets
from rlft.config.data import Data, Source
from rlft.config.paths import user_path
from rlft.errors import DataError

GYM = "reasoning_gym:"
FILES = (".jsonl", ".json", ".parquet", ".csv")


def load_rows(data: Data, seed: int) -> list[dict[str, Any]]:
    """Load all rows, with template and column mapping applied. seed: the run's, for generated tasks and mixtures.

    Raises DataError for a dataset that is missing, empty or unreadable, and for a column that is not there; ConfigError
    for a template that cannot be found.
    """
    if data.sources:
        rows = _mixture(
            [_rows_of(source, seed) for source in data.sources], [source.weight for source in data.sources], seed
        )
    else:
        rows = _rows_of(Source(data.path, split=data.split, subset=data.subset, args=data.args), seed)
    if data.template:
        rows = _apply_template(rows, data.template)
    return [_rename(row, data.columns, i) for i, row in enumerate(rows)]


def _rows_of(source: Source, seed: int) -> list[dict[str, Any]]:
    path = user_path(source.path, "data.path")
    if source.path.startswith(GYM):
        rows = _generate(source.path.removeprefix(GYM), source.args, seed)
    elif source.args:
        raise DataError(
            f'data.args = {secrets.masked(source.args)}: only "{GYM}TASK" takes arguments, not data.path = '
            f'"{source.path}"'
        )
    elif path.suffix in FILES:
        rows = _file_rows(path)
    else:
        rows = _dataset_rows(source, path)
    if not rows:
        raise DataError(f'data.path = "{source.path}": the dataset is empty')
    return rows


def _file_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f'data.path = "{path}": no such file (looked for it from {Path.cwd()})')
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".json":
        try:
            rows = json.loads(_text(path))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path}: want a list of objects, one per row")
        return rows
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read() if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    return table.to_pylist()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'data.path = "{path}": cannot be read as UTF-8 text: {error}') from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines: a string in a row may contain a Unicode line separator.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: want an object with columns, got {type(row).__name__}")
        rows.append(row)
    return rows


def _dataset_rows(source: Source, path: Path) -> list[dict[str, Any]]:
    """Load a folder written by `datasets`, or a hub id."""
    import datasets

    if path.is_dir():
        try:
            dataset = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise DataError(
                f'data.path = "{path}": not a folder written by datasets.save_to_disk ({error}); give a file '
                f"({', '.join(FILES)}) in it"
            ) from error
        if isinstance(dataset, datasets.DatasetDict):
            if source.split not in dataset:
                raise DataError(f'data.split = "{source.split}": {path} has {", ".join(sorted(map(str, dataset)))}')
            dataset = dataset[source.split]
        return [dict(row) for row in dataset]  # type: ignore[arg-type]
    if source.path.startswith((".", "/", "~")) or source.path.count("/") > 1:
        raise DataError(f'data.path = "{source.path}": no such file or folder')
    try:
        return [dict(row) for row in datasets.load_dataset(source.path, source.subset, split=source.split)]  # type: ignore[arg-type]
    except Exception as error:  # datasets propagates any error of its back ends
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f'data.path = "{source.path}": no such file here, and the hub did not give it ({first}). Check the name, '
            f"data.split, data.subset and the network, or give a local file ({', '.join(FILES)})"
        ) from error


def _generate(task: str, args: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Generate rows of a reasoning-gym task, offline and seeded: prompt, answer, task, metadata."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(f'data.path = "{GYM}{task}" needs reasoning-gym: pip install "rlft[tasks]"') from error
    if task not in DATASETS:
        raise DataError(f'data.path = "{GYM}{task}": no such task.{resolve.did_you_mean(task, sorted(DATASETS))}')
    try:
        entries = reasoning_gym.create_dataset(task, **{"seed": seed, "size": 1000, **args})
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"data.args = {args}: {task} does not take them: {error}") from error
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "task": task, "metadata": entry["metadata"]}
        for entry in entries
    ]


def _mixture(parts: list[list[dict[str, Any]]], weights: list[float], seed: int) -> list[dict[str, Any]]:
    """Mix the parts in the given shares, without repeating rows; the scarcest part limits the number of rows.

    With shares w_i and sizes n_i the mixture has m = min(n_i / w_i) rows, w_i m of them sampled from part i without
    replacement, in an order determined by the seed.
    """
    shares = [weight / sum(weights) for weight in weights]
    total = min(len(rows) / share for rows, share in zip(parts, shares, strict=True))
    rng = np.random.default_rng([seed, 1])
    mixture = []
    for rows, share in zip(parts, shares, strict=True):
        selection = rng.permutation(len(rows))[: round(share * total)]
        mixture += [rows[i] for i in sorted(selection)]
    if not mixture:
        raise DataError("data.sources: the mixture is empty; the smallest source has too few rows for its weight")
    return [mixture[i] for i in rng.permutation(len(mixture))]


def _apply_template(rows: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    function = resolve.attribute(template, "data.template")
    new_rows = []
    for i, row in enumerate(rows):
        new = function(row)
        if not isinstance(new, dict):
            raise DataError(f'data.template = "{template}": row {i} gave {type(new).__name__}, want a dict of columns')
        new_rows.append(new)
    return new_rows


def _rename(row: dict[str, Any], columns: dict[str, str], index: int) -> dict[str, Any]:
    """Rename the columns of a row: columns = {ours: theirs}."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(
                f'data.columns: {ours} = "{theirs}", but row {index} has no such column; it has {", ".join(row)}'
            )
    mapping = {ours: row[theirs] for ours, theirs in columns.items()}
    return {
        name: value for name, value in row.items() if name not in columns.values() and name not in columns
    } | mapping
