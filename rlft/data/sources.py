"""Load the rows of a dataset with rlft's column names, without a tokenizer or a model.

A source is a file, a `datasets` folder, a hub id, a reasoning-gym task, or rows handed over from Python. Sources are
mixed, then the user's template function is applied to raw rows, then the columns are mapped.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlft.config import resolve, secrets
from rlft.config.data import Data, Source
from rlft.config.paths import user_path
from rlft.data import given
from rlft.data.readers import FILES, kind_of_file, read_file
from rlft.data.rows import Mixed, Packed, Renamed, Row, Store, blocks
from rlft.environment import install
from rlft.errors import DataError, RlftError

GYM = "reasoning_gym:"
NO_ROW = "template returned None"
"""Reason of a row that `data.template` leaves out."""


def load_rows(data: Data, seed: int) -> Store:
    """Load all rows, with template and column mapping applied. seed: the run's, for generated tasks and mixtures.

    A row that cannot be read, or that the template refuses, is a DataError among the rows. Raises DataError for a
    dataset that is missing, empty or unreadable as a whole; ConfigError for a template that cannot be found.
    """
    if data.sources:
        parts = [_load(source, data, seed) for source in data.sources]
        store: Store = Mixed(parts, _mixture([len(part) for part in parts], data.sources, seed))
    elif data.rows is not None:
        with reading(given.NAME):
            store = given.store_of(data.rows, data.split)
    else:
        store = _load(Source(data.path, split=data.split, subset=data.subset, args=data.args), data, seed)
    if data.template:
        function = template_of(data.template)
        store = Packed(
            row if isinstance(row, DataError) else function(row, start + i)
            for start, rows in blocks(store)
            for i, row in enumerate(rows)
        )
    return Renamed(store, data.columns)


def template_of(template: str) -> Callable[[Row, int], Row | DataError]:
    """Return the function (raw row, its number) -> row that `data.template` names; a row it refuses is a DataError."""
    function = resolve.attribute(template, "data.template")

    def apply(row: Row, number: int) -> Row | DataError:
        where = f'row {number}: data.template = "{template}"'
        try:
            new = function(row)
        except DataError as error:
            return DataError(f"{where}: {error}", reason="template refused")
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
            # format_exception_only, since str of a user's exception may itself raise.
            what = traceback.format_exception_only(error)[-1].strip()
            return DataError(f"{where} raised {what} ({place})", reason=f"template raised {type(error).__name__}")
        if new is None:
            return DataError(f"{where} returned None, which leaves the row out", reason=NO_ROW)
        if not isinstance(new, dict) or not all(isinstance(name, str) for name in new):
            kind = type(new).__name__
            return DataError(f"{where} returned {kind}, want a dict of columns", reason="template returned no dict")
        return new

    return apply


def _load(source: Source, data: Data, seed: int) -> Store:
    label = data.columns.get("label", "label")
    with reading(f'data.path = "{source.path}"'):
        store = _store_of(source, label, seed)
    if not len(store):
        raise DataError(f'data.path = "{source.path}": the dataset is empty')
    return store


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a reader raises into a DataError that begins with `what`."""
    try:
        yield
    except (RlftError, MemoryError):
        raise
    except Exception as error:  # readers propagate any error of Arrow, codecs, file systems and damaged metadata
        first = (str(error).strip() or "no message").splitlines()[0]
        raise DataError(f"{what}: cannot be read: {type(error).__name__}: {first}") from error


def _store_of(source: Source, label: str, seed: int) -> Store:
    path = user_path(source.path, "data.path")
    if source.path.startswith(GYM):
        return _generate(source.path.removeprefix(GYM), source.args, seed)
    if source.args:
        raise DataError(
            f'data.args = {secrets.masked(source.args)}: only "{GYM}TASK" takes arguments, not data.path = '
            f'"{source.path}"'
        )
    if kind_of_file(path) not in FILES or path.is_dir():
        return _dataset(source, path)
    if not path.is_file():
        raise DataError(f'data.path = "{path}": no such file (looked for it from {Path.cwd()})')
    return read_file(path, label)


def _dataset(source: Source, path: Path) -> Store:
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
        return given.store_of_dataset(dataset, source.split, str(path))
    if source.path.startswith((".", "/", "~")) or source.path.count("/") > 1:
        raise DataError(
            f'data.path = "{source.path}": no such file or folder (looked for it from {Path.cwd()}); a file ends in '
            f"{', '.join(FILES)}"
        )
    try:
        dataset = datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # datasets propagates any error of its back ends
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f'data.path = "{source.path}": no such file here, and the hub did not give it ({first}). Check the name, '
            f"data.split, data.subset and the network, or give a local file ({', '.join(FILES)})"
        ) from error
    return given.store_of_dataset(dataset, source.split, source.path)


def _generate(task: str, args: dict[str, Any], seed: int) -> Store:
    """Generate rows of a reasoning-gym task, offline and seeded: prompt, answer, task, metadata."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(f'data.path = "{GYM}{task}" needs reasoning-gym: {install("tasks")}') from error
    if task not in DATASETS:
        raise DataError(f'data.path = "{GYM}{task}": no such task.{resolve.did_you_mean(task, sorted(DATASETS))}')
    try:
        entries = reasoning_gym.create_dataset(task, **{"seed": seed, "size": 1000, **args})
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"data.args = {args}: {task} does not take them: {error}") from error
    return Packed(
        {"prompt": entry["question"], "answer": entry["answer"], "task": task, "metadata": entry["metadata"]}
        for entry in entries
    )


def _mixture(sizes: Sequence[int], sources: Sequence[Source], seed: int) -> np.ndarray:
    """Mix the sources in their shares, without repeating rows; the scarcest source limits the number of rows.

    With shares w_i and sizes n_i the mixture has m = min(n_i / w_i) rows, w_i m of them sampled from source i without
    replacement, in an order determined by the seed. Returns [m] int64, numbers into the rows of all sources.
    """
    shares = [source.weight / sum(source.weight for source in sources) for source in sources]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    rng = np.random.default_rng([seed, 1])
    selections, start = [], 0
    for size, share in zip(sizes, shares, strict=True):
        selections.append(start + np.sort(rng.permutation(size)[: round(share * total)]))
        start += size
    mixture = np.concatenate(selections)
    if not len(mixture):
        raise DataError("data.sources: the mixture is empty; the smallest source has too few rows for its weight")
    return mixture[rng.permutation(len(mixture))]
