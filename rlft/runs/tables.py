"""Convert rollouts to Arrow tables and read them back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlft.batch import group_ids
from rlft.data.images import COLUMNS as IMAGE_COLUMNS
from rlft.data.images import thumbnail
from rlft.errors import ConfigError
from rlft.types import Prompt, Rollout

COLUMNS = ("row", "group", "sample", "prompt", "completion", "completion_ids", "reward", "finish_reason", "tokens")
"""Columns that every reader of a rollouts file relies on."""
TYPES = {
    **dict.fromkeys(("row", "group", "sample", "tokens"), "int64"),
    **dict.fromkeys(("prompt", "completion", "finish_reason", "data"), "string"),
    **dict.fromkeys(("sampler_logprobs", "logprobs"), "list of float"),
    "completion_ids": "list of int64",
    **dict.fromkeys(("pieces", "thumbnails"), "list of string"),
    "prompt_is_messages": "bool",
    "reward": "double",
}
"""Column -> Arrow's type of it, as `rollout_table` writes it."""
SHOWN_AS_PROMPT = ("prompt", "completion", "messages", "chosen", "rejected")
"""Columns of a dataset row that are not repeated in `dataset_columns`."""
PICTURED_GROUPS, PICTURES = 8, 4
"""Groups of a file whose images it has small pictures of, and the most of a prompt."""
MOST_VALUE = 10_000
"""Largest number of characters saved of one value of a dataset row."""


class Unreadable(ConfigError):
    """A file of a run folder is damaged, or something else."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(f"{path}: unreadable: {why}; move it out of the folder")
        self.path = path


def read_table(path: Path, groups: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a rollouts file. groups: read only this many of the first groups. Raises Unreadable."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        # ParquetFile reads one file; read_table on a path would also look for partitions in the folder names.
        table = pq.ParquetFile(path).read()
        _check_columns(path, table)
        return (table if groups is None else table.filter(pc.field("group") < groups)).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise error if isinstance(error, Unreadable) else Unreadable(path, first_line(error)) from error


def _check_columns(path: Path, table: Any) -> None:
    """Raise Unreadable for a table without the columns of a rollouts file, or with others under their names."""
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise Unreadable(path, f"no column {missing[0]}")
    for name in (name for name in table.column_names if name in TYPES):
        found = re.sub(r"list<\w+: (.+)>", r"list of \1", str(table.schema.field(name).type))
        if found != TYPES[name]:
            raise Unreadable(path, f"column {name} is {found}, want {TYPES[name]}")
        if name in COLUMNS and name != "reward" and table.column(name).null_count:
            raise Unreadable(path, f"column {name} has nulls")


def first_line(error: Exception) -> str:
    """Return the first sentence of an exception of a library, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")


def shown_prompt(prompt: Prompt) -> str:
    """Return the prompt of a row as text, with messages as JSON."""
    if has_messages(prompt):
        return json.dumps(prompt.messages, ensure_ascii=False, default=str)
    text = prompt.row.get("prompt")
    return text if isinstance(text, str) else ""


def dataset_columns(prompt: Prompt) -> str | None:
    """Return the other columns of the dataset row (the answer, say) as a JSON object; None if it has none.

    Images are shown by name. A value whose text is longer than MOST_VALUE is saved as the beginning of that text. A
    lone surrogate, which UTF-8 has no bytes for, is saved as "?".
    """
    columns = {name: value for name, value in prompt.row.items() if name not in SHOWN_AS_PROMPT and value is not None}
    if prompt.images:
        columns = {name: value for name, value in columns.items() if name not in IMAGE_COLUMNS}
        columns["images"] = shown_images(prompt)
    for name, value in columns.items():
        written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if len(written) > MOST_VALUE:
            columns[name] = f"{written[:MOST_VALUE]} ... {len(written) - MOST_VALUE:,} more characters"
    text = json.dumps(columns, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8") if columns else None


def shown_images(prompt: Prompt) -> list[str]:
    """Return the images of a prompt by name: the path, or of bytes their number and the beginning of the digest."""
    return [
        image.source if isinstance(image.source, str) else f"{len(image.source):,} bytes, {image.digest[:8]}"
        for image in prompt.images
    ]


def thumbnails(rollouts: Sequence[Rollout], groups: Sequence[int]) -> list[list[str | None] | None]:
    """Return small pictures of the images of prompts, in the first row of each of the first groups; else None.

    groups: number of the group of each rollout.
    """
    shown: set[int] = set()
    found: list[list[str | None] | None] = []
    for rollout, group in zip(rollouts, groups, strict=True):
        first = group < PICTURED_GROUPS and group not in shown and bool(rollout.prompt.images)
        found.append([thumbnail(image) for image in rollout.prompt.images[:PICTURES]] if first else None)
        shown.add(group)
    return found


def read_columns(value: str | None) -> dict[str, Any]:
    """Return the result of `dataset_columns` as a dict; empty for None and for any other text."""
    try:
        columns = json.loads(value) if value else {}
    except (ValueError, RecursionError):
        return {}
    return columns if isinstance(columns, dict) else {}


def has_messages(prompt: Prompt) -> bool:
    """Return True where `shown_prompt` is JSON."""
    return bool(prompt.messages) and not isinstance(prompt.row.get("prompt"), str)


def rollout_table(
    pa: Any,
    step: int,
    rollouts: Sequence[Rollout],
    scores: Mapping[str, Sequence[Any]],
    tokens: Mapping[str, Sequence[Any]],
) -> Any:
    """Build the Arrow table of a step. pa: pyarrow. tokens: per-token columns besides those of the rollouts."""
    integers, groups = pa.int64(), group_ids(rollouts).tolist()
    pictures = thumbnails(rollouts, groups)
    data = {rollout.prompt.index: rollout.prompt for rollout in rollouts}
    data = {index: dataset_columns(prompt) for index, prompt in data.items()}
    columns = {
        "step": pa.array([step] * len(rollouts), integers),
        "row": pa.array([rollout.prompt.index for rollout in rollouts], integers),
        "group": pa.array(groups, integers),
        "sample": pa.array([rollout.sample_index for rollout in rollouts], integers),
        "prompt": pa.array([shown_prompt(rollout.prompt) for rollout in rollouts], pa.string()),
        "prompt_is_messages": pa.array([has_messages(rollout.prompt) for rollout in rollouts], pa.bool_()),
        "data": pa.array([data[rollout.prompt.index] for rollout in rollouts], pa.string()),
        **({"thumbnails": pa.array(pictures, pa.list_(pa.string()))} if any(pictures) else {}),
        "completion": pa.array([rollout.text for rollout in rollouts], pa.string()),
        "completion_ids": pa.array([rollout.completion_ids for rollout in rollouts], pa.list_(integers)),
        "sampler_logprobs": _floats(pa, [rollout.sampler_logprobs for rollout in rollouts]),
        **{
            name: pa.array(rows, pa.list_(pa.string())) if name == "pieces" else _floats(pa, rows)
            for name, rows in tokens.items()
        },
        **{name: _scores(pa, name, values, len(rollouts)) for name, values in scores.items()},
        "finish_reason": pa.array([rollout.finish_reason for rollout in rollouts], pa.string()),
        "tokens": pa.array([len(rollout.completion_ids) for rollout in rollouts], integers),
        "policy_version": pa.array([rollout.policy_version for rollout in rollouts], integers),
    }
    return pa.table(columns)


def _floats(pa: Any, rows: Sequence[Any]) -> Any:
    """Build a column of float32 lists from sequences and tensors; null for None, and for nan within a list."""
    ends = np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int32)
    flat = [np.asarray(row, dtype=np.float32) for row in rows if row is not None]
    values = pa.array(np.concatenate(flat) if flat else np.empty(0, np.float32), pa.float32(), from_pandas=True)
    missing = np.array([*(row is None for row in rows), False])
    return pa.ListArray.from_arrays(pa.array(ends, mask=missing), values)


def _scores(pa: Any, name: str, values: Sequence[Any], rows: int) -> Any:
    """Build a column of numbers, null for nan; of text when a value is neither a number nor None."""
    assert len(values) == rows, f"{name}: {len(values)} values for {rows} rollouts"
    if all(value is None or isinstance(value, int | float) for value in values):
        return pa.array(
            [None if value is None or math.isnan(value) else float(value) for value in values], pa.float64()
        )
    return pa.array([None if value is None else str(value) for value in values], pa.string())
