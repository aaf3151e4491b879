"""A dataset by name -> its rows, as dicts with our column names. No tokenizer, no model.

A file, a `datasets` folder, a hub id or a reasoning-gym task; a mixture of them; a user's function over raw rows; and
the column mapping, in that order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rlft.config import resolve
from rlft.config.data import Data, Source
from rlft.errors import DataError

GYM = "reasoning_gym:"
FILES = (".jsonl", ".json", ".parquet", ".csv")


def load_rows(data: Data, seed: int) -> list[dict[str, Any]]:
    """All rows, templated and mapped. seed: the run's, for generated tasks and mixtures.

    Raises DataError for a dataset that is missing, empty or unreadable, and for a column that is not there; ConfigError
    for a template that cannot be found.
    """
    if data.sources:
        rows = _mixture([_rows_of(s, seed) for s in data.sources], [s.weight for s in data.sources], seed)
    else:
        rows = _rows_of(Source(data.path, split=data.split, subset=data.subset, args=data.args), seed)
    if data.template:
        rows = _templated(rows, data.template)
    return [_mapped(row, data.columns, i) for i, row in enumerate(rows)]


def _rows_of(source: Source, seed: int) -> list[dict[str, Any]]:
    path = Path(source.path).expanduser()
    if source.path.startswith(GYM):
        rows = _generated(source.path.removeprefix(GYM), source.args, seed)
    elif source.args:
        raise DataError(f'data.args = {source.args}: only "{GYM}TASK" takes arguments, not data.path = "{source.path}"')
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
    # Not splitlines: a string in a row may hold a line separator of Unicode's.
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
    """A folder written by `datasets` or a hub id."""
    import datasets

    if path.is_dir():
        try:
            found = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise DataError(
                f'data.path = "{path}": not a folder written by datasets.save_to_disk ({error}); give a file '
                f"({', '.join(FILES)}) in it"
            ) from error
        if isinstance(found, datasets.DatasetDict):
            if source.split not in found:
                raise DataError(f'data.split = "{source.split}": {path} has {", ".join(sorted(map(str, found)))}')
            found = found[source.split]
        return [dict(row) for row in found]  # type: ignore[arg-type]
    if source.path.startswith((".", "/", "~")) or source.path.count("/") > 1:
        raise DataError(f'data.path = "{source.path}": no such file or folder')
    try:
        return [dict(row) for row in datasets.load_dataset(source.path, source.subset, split=source.split)]  # type: ignore[arg-type]
    except Exception as error:  # datasets raises what its many back ends raise; the user needs one sentence
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f'data.path = "{source.path}": no such file here, and the hub did not give it ({first}). Check the name, '
            f"data.split, data.subset and the network, or give a local file ({', '.join(FILES)})"
        ) from error


def _generated(task: str, args: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Rows of a reasoning-gym task: prompt, answer, task, metadata. Seeded, offline."""
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
    return [{"prompt": e["question"], "answer": e["answer"], "task": task, "metadata": e["metadata"]} for e in entries]


def _mixture(parts: list[list[dict[str, Any]]], weights: list[float], seed: int) -> list[dict[str, Any]]:
    """The parts mixed in the asked shares, no row twice: as many rows as the scarcest part allows.

    With shares w and sizes n the mix has m = min(n_i / w_i) rows, w_i m of part i drawn without repetition, in an order
    drawn from the seed.
    """
    shares = [w / sum(weights) for w in weights]
    total = min(len(rows) / share for rows, share in zip(parts, shares, strict=True))
    rng = np.random.default_rng([seed, 1])
    mixed = []
    for rows, share in zip(parts, shares, strict=True):
        chosen = rng.permutation(len(rows))[: round(share * total)]
        mixed += [rows[i] for i in sorted(chosen)]
    if not mixed:
        raise DataError("data.sources: the mixture is empty; the smallest source has too few rows for its weight")
    return [mixed[i] for i in rng.permutation(len(mixed))]


def _templated(rows: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    function = resolve.attribute(template, "data.template")
    made = []
    for i, row in enumerate(rows):
        new = function(row)
        if not isinstance(new, dict):
            raise DataError(f'data.template = "{template}": row {i} gave {type(new).__name__}, want a dict of columns')
        made.append(new)
    return made


def _mapped(row: dict[str, Any], columns: dict[str, str], index: int) -> dict[str, Any]:
    """`row` with our names: columns = {ours: theirs}."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(
                f'data.columns: {ours} = "{theirs}", but row {index} has no such column; it has {", ".join(row)}'
            )
    renamed = {ours: row[theirs] for ours, theirs in columns.items()}
    return {k: v for k, v in row.items() if k not in columns.values() and k not in columns} | renamed
