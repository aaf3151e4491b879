"""Rollouts as Arrow tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlft.batch import group_ids
from rlft.types import Prompt, Rollout


def read_table(path: Path, groups: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file of rollouts. groups: only those of the first so many groups."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # One file: read_table on a path would also look for partitions in the folder names.
    table = pq.ParquetFile(path).read()
    return (table if groups is None else table.filter(pc.field("group") < groups)).to_pylist()


def shown_prompt(prompt: Prompt) -> str:
    """The prompt as its row has it: the text, or the messages as JSON."""
    text = prompt.row.get("prompt")
    if isinstance(text, str):
        return text
    return json.dumps(list(prompt.messages), ensure_ascii=False, default=str) if prompt.messages else ""


def rollout_table(
    pa: Any,
    step: int,
    rollouts: Sequence[Rollout],
    scores: Mapping[str, Sequence[Any]],
    tokens: Mapping[str, Sequence[Any]],
) -> Any:
    """The Arrow table of a step. pa: pyarrow. tokens: the columns of an entry per token that are no rollout's own."""
    integers = pa.int64()
    columns = {
        "step": pa.array([step] * len(rollouts), integers),
        "row": pa.array([r.prompt.index for r in rollouts], integers),
        "group": pa.array(group_ids(rollouts).tolist(), integers),
        "sample": pa.array([r.sample_index for r in rollouts], integers),
        "prompt": pa.array([shown_prompt(r.prompt) for r in rollouts], pa.string()),
        "completion": pa.array([r.text for r in rollouts], pa.string()),
        "completion_ids": pa.array([r.completion_ids for r in rollouts], pa.list_(integers)),
        "sampler_logprobs": _floats(pa, [r.sampler_logprobs for r in rollouts]),
        **{
            name: pa.array(rows, pa.list_(pa.string())) if name == "pieces" else _floats(pa, rows)
            for name, rows in tokens.items()
        },
        **{name: _scores(pa, name, values, len(rollouts)) for name, values in scores.items()},
        "finish_reason": pa.array([r.finish_reason for r in rollouts], pa.string()),
        "tokens": pa.array([len(r.completion_ids) for r in rollouts], integers),
        "policy_version": pa.array([r.policy_version for r in rollouts], integers),
    }
    return pa.table(columns)


def _floats(pa: Any, rows: Sequence[Any]) -> Any:
    """A column of lists of float32 from sequences and tensors; null for None, nan within a list is null too."""
    ends = np.cumsum([0, *(0 if row is None else len(row) for row in rows)], dtype=np.int32)
    flat = [np.asarray(row, dtype=np.float32) for row in rows if row is not None]
    values = pa.array(np.concatenate(flat) if flat else np.empty(0, np.float32), pa.float32(), from_pandas=True)
    missing = np.array([*(row is None for row in rows), False])
    return pa.ListArray.from_arrays(pa.array(ends, mask=missing), values)


def _scores(pa: Any, name: str, values: Sequence[Any], rows: int) -> Any:
    """A column of numbers, null for nan; of text when a value is neither number nor None."""
    assert len(values) == rows, f"{name}: {len(values)} values for {rows} rollouts"
    if all(v is None or isinstance(v, int | float) for v in values):
        return pa.array([None if v is None or math.isnan(v) else float(v) for v in values], pa.float64())
    return pa.array([None if v is None else str(v) for v in values], pa.string())
