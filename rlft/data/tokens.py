"""Rows that are token ids already: input_ids with labels or masks, or the ids of a prompt and its completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlft.data.kinds import KINDS
from rlft.errors import DataError

IGNORED = -100
"""Label of a token that is not trained, as in transformers."""
SIDES = {
    "completion_ids": (("completion_ids", 1.0),),
    "preference_ids": (("chosen_ids", 1.0), ("rejected_ids", -1.0)),
    "prompt_ids": (),
}
"""Kind of row -> its columns of completions, and their rewards."""


def check_ids(row: dict[str, Any], kind: str) -> None:
    """Raise DataError naming the column for ids that are no whole numbers from 0, and for masks that do not fit."""
    for column in KINDS[kind]:
        ids = row[column]
        if not isinstance(ids, Sequence) or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"column {column} is {ids!r:.80}: want a list of token ids, whole numbers from 0")
        if not ids:
            raise DataError(f"column {column} is empty", reason="empty")
    if kind == "preference_ids" and row["chosen_ids"] == row["rejected_ids"]:
        raise DataError("chosen_ids and rejected_ids are the same", reason="equal sides")
    whole = {"input_ids": "input_ids", "completion_ids": "completion_ids"}.get(kind)
    for mask in ("labels", "attention_mask", "completion_mask", "assistant_masks"):
        values = row.get(mask)
        if whole is None or values is None or (kind == "completion_ids" and mask != "completion_mask"):
            continue
        if not isinstance(values, Sequence) or len(values) != len(row[whole]):
            raise DataError(f"column {mask} is {values!r:.80}: want a list as long as {whole} ({len(row[whole])})")
        if mask != "labels" and any(value not in (0, 1) for value in values):
            raise DataError(f"column {mask} is {values!r:.80}: want zeros and ones")
    if kind == "input_ids":
        prompt, completion, mask = split_ids(row)
        if not any(mask if prompt else mask[1:]):
            raise DataError("no token of input_ids is to be trained (labels and masks leave out all of them)")
        assert len(completion) == len(mask)


def split_ids(row: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """Return the ids before the first trained token, the other ids, and their mask of trained tokens.

    Padding (attention_mask 0) is left out. Without labels and masks every token except the first is trained; the ids
    before it are then empty, as in a row of plain text.
    """
    ids, trained = list(row["input_ids"]), [True] * len(row["input_ids"])
    if (labels := row.get("labels")) is not None:
        wrong = [i for i, label in enumerate(labels) if label not in (IGNORED, ids[i])]
        if wrong:
            raise DataError(
                f"column labels has {labels[wrong[0]]} at position {wrong[0]}, where input_ids has {ids[wrong[0]]}: "
                f"want {IGNORED} or the same id (labels are not shifted)"
            )
        trained = [label != IGNORED for label in labels]
    for name in ("completion_mask", "assistant_masks"):
        if (mask := row.get(name)) is not None:
            trained = [flag and bool(value) for flag, value in zip(trained, mask, strict=True)]
    if (attended := row.get("attention_mask")) is not None and not all(attended):
        kept = [i for i, value in enumerate(attended) if value]
        if not kept or kept[-1] - kept[0] + 1 != len(kept):
            raise DataError("column attention_mask has zeros between ones: give one row per sequence")
        ids, trained = [ids[i] for i in kept], [trained[i] for i in kept]
    first = trained.index(True) if True in trained else 0
    mask = tuple(trained[first:]) if first else (False, *trained[1:])
    return tuple(ids[:first]), tuple(ids[first:]), mask


def mask_of(row: dict[str, Any], column: str) -> tuple[bool, ...]:
    """Return the mask of a column of completion ids: `completion_mask` of one completion, else all True."""
    mask = row.get("completion_mask") if column == "completion_ids" else None
    return (True,) * len(row[column]) if mask is None else tuple(bool(value) for value in mask)
