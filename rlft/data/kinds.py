"""Which columns make which kind of row, and the checks of a row that need no tokenizer.

Kinds of rows, distinguished by their columns as in TRL:

    prompt                         a string or messages; every other column goes to the rewards
    prompt, completion             supervised: train on the completion
    prompt, completion, label      completion labelled good (true, reward 1) or bad (false, reward -1): KTO
    messages                       supervised: train on every assistant turn (rlft.data.chat)
    text                           supervised: train on every token except the first
    chosen, rejected [, prompt]    pairs; the prompt defaults to the common prefix of both sides
"""

from __future__ import annotations

from typing import Any

from rlft.errors import DataError

KINDS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "label": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""Kind of row -> its required columns; the first match counts."""
ROLES = ("system", "user", "assistant", "tool", "developer")


def kind_of(row: dict[str, Any]) -> str:
    """Return the kind of a row, a key of KINDS. Raises DataError naming the columns it has."""
    for kind, columns in KINDS.items():
        if all(column in row for column in columns):
            return kind
        if kind == "preference" and any(column in row for column in columns):
            side, other = ("chosen", "rejected") if "chosen" in row else ("rejected", "chosen")
            raise DataError(f"the dataset has a column {side} and none called {other}: a pair needs both")
    raise DataError(
        f"the dataset has the columns {', '.join(row) or '(none)'}; want prompt, prompt + completion, messages, text, "
        f'or chosen + rejected. Map yours with data.columns, for example {{prompt = "question"}}'
    )


def check_row(row: dict[str, Any], index: int, kind: str) -> None:
    """Raise DataError naming row and column for a row that is not of the kind."""
    missing = [column for column in KINDS[kind] if row.get(column) is None]
    if missing:
        raise DataError(
            f"row {index}: column {missing[0]} is missing or null, but row 0 has {', '.join(KINDS[kind])}; fix the "
            f"row or leave it out"
        )
    if kind == "label" and not isinstance(row["label"], bool):
        raise DataError(
            f"row {index}: column label is {row['label']!r:.80}: want true or false, for a good or a bad completion; "
            f"rename the column by data.columns if it means something else"
        )
    for column in ("prompt", *KINDS[kind]):
        if row.get(column) is not None and column != "label":
            _check_text(row[column], index, column, messages_only=column == "messages")
    if kind == "preference" and isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise DataError(f"row {index}: chosen and rejected must both be strings or both be messages")


def _check_text(value: Any, row: int, column: str, messages_only: bool) -> None:
    if isinstance(value, str) and not messages_only:
        if not value:
            raise DataError(f"row {row}: column {column} is an empty string")
        return
    if not isinstance(value, list) or not value:
        want = "messages" if messages_only else "a string or messages"
        raise DataError(f"row {row}: column {column} is {value!r:.80}: want {want}")
    for message in value:
        fits = isinstance(message, dict) and message.get("role") in ROLES and "content" in message
        if not fits:
            raise DataError(f'row {row}: column {column} holds {message!r:.80}: want {{"role": ..., "content": ...}}')
