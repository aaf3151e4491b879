"""Which columns make which kind of row, and the checks of a row that need no tokenizer.

Kinds of rows, distinguished by their columns as in TRL:

    prompt                              a string or messages; every other column goes to the rewards
    prompt, completion                  supervised: train on the completion
    prompt, completion, label           completion labelled good (true, reward 1) or bad (false, reward -1): KTO
    messages                            supervised: train on every assistant turn (rlft.data.chat)
    text                                supervised: train on every token except the first
    chosen, rejected [, prompt]         pairs; the prompt defaults to the common prefix of both sides
    input_ids [, labels]                supervised, token ids (rlft.data.tokens); labels of -100 are not trained
    prompt_ids [, completion_ids]       token ids of a prompt, and of a completion
    prompt_ids, chosen_ids, rejected_ids
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from rlft.data.messages import is_messages
from rlft.errors import DataError

KINDS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "preference_ids": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "label": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "input_ids": ("input_ids",),
    "completion_ids": ("prompt_ids", "completion_ids"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
    "prompt_ids": ("prompt_ids",),
}
"""Kind of row -> its required columns; the first match counts, see `kind_of`."""
PAIRS = ("preference", "preference_ids")
"""Kinds with a better and a worse completion."""
SAMPLED = ("prompt", "prompt_ids")
"""Kinds without a recorded completion."""
IDS = tuple(kind for kind in KINDS if kind.endswith("_ids"))
"""Kinds whose rows are token ids."""
OPTIONAL = {
    "preference": ("prompt",),
    "input_ids": ("labels", "attention_mask", "completion_mask", "assistant_masks"),
    "completion_ids": ("completion_mask",),
}
"""Kind of row -> columns it reads besides the required ones."""

Purpose = Literal["sampling", "pairs", "supervised", ""]
"""What an algorithm does with rows; "" where no algorithm is known."""


def kind_of(row: dict[str, Any], mapped: Collection[str] = (), purpose: Purpose = "") -> str:
    """Return the kind of a row, a key of KINDS. Raises DataError naming the columns it has.

    mapped: our columns that `data.columns` maps; a kind that reads all of them comes before the others. purpose: an
    algorithm that samples takes `prompt` before messages, text and input_ids; a supervised one takes pairs last.
    """
    sides = [column for column in ("chosen", "rejected") if column in row]
    if len(sides) == 1:
        other = "rejected" if sides == ["chosen"] else "chosen"
        raise DataError(f"the dataset has a column {sides[0]} and none called {other}: a pair needs both")
    kinds = [kind for kind, columns in KINDS.items() if all(column in row for column in columns)]
    if not kinds:
        raise DataError(
            f"the dataset has the columns {', '.join(map(str, row)) or '(none)'}; want prompt, prompt + completion, "
            f"messages, text, or chosen + rejected (docs/data.md has all). Map yours with data.columns, for example "
            f'{{prompt = "question"}}'
        )
    wanted = {column for column in mapped if any(column in columns for columns in KINDS.values())}
    kinds = [kind for kind in kinds if wanted <= columns_of(kind)] or kinds
    if purpose == "sampling" and kinds[0] in ("messages", "text", "input_ids") and "prompt" in kinds:
        return "prompt"
    if purpose == "supervised" and kinds[0] in PAIRS:
        return next((kind for kind in kinds if kind not in (*PAIRS, *SAMPLED)), kinds[0])
    return kinds[0]


def columns_of(kind: str) -> set[str]:
    """Return the columns that a kind of row reads."""
    return {*KINDS[kind], *OPTIONAL.get(kind, ())}


def check_row(row: dict[str, Any], kind: str) -> None:
    """Raise DataError naming the column for a row, read by `rlft.data.reader`, that is not of the kind."""
    for column in KINDS[kind]:
        if row.get(column) is None:
            raise DataError(
                f"column {column} is missing or null, but row 0 has {', '.join(KINDS[kind])}; fix the row or leave it "
                f"out"
            )
    if kind == "label" and not isinstance(row["label"], bool):
        raise DataError(
            f"column label is {row['label']!r:.80}: want true or false, for a good or a bad completion; "
            f"rename the column by data.columns if it means something else"
        )
    for column in ("prompt", *KINDS[kind]) if kind not in IDS else ():
        value = row.get(column)
        if column == "prompt" and (value is None or column not in columns_of(kind)):
            continue
        if column == "label" or (value and isinstance(value, str) and column != "messages"):
            continue
        if value == "":
            raise DataError(f"column {column} is an empty string", reason="empty")
        if not is_messages(value):
            want = "messages" if column == "messages" else "a string" if column == "text" else "a string or messages"
            raise DataError(f"column {column} is {value!r:.80}: want {want}")
        if column == "text":
            raise DataError(f"column text is {value!r:.80}: want a string; call a column of messages messages")
    if kind == "preference" and isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise DataError("chosen and rejected must both be strings or both be messages")
