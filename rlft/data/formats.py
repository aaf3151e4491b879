"""Formats that datasets come in, converted to the columns of rlft: one pure function per format.

Each takes a row after the mapping by `data.columns` and returns the converted row, or None for a row of another format.
All columns that are not converted stay, since rewards may ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlft.data.images import text_of
from rlft.data.messages import is_messages, is_sharegpt
from rlft.errors import DataError

Convert = Callable[[dict[str, Any], Mapping[str, str]], dict[str, Any] | None]
"""(row, data.columns) -> converted row, or None."""


def sharegpt(row: dict[str, Any], _: Mapping[str, str]) -> dict[str, Any] | None:
    """Read ShareGPT's `conversations` as messages, and as the prompt beside chosen and rejected.

    The format is that of https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered and of
    LLaMA-Factory's "sharegpt" (https://github.com/hiyouga/LLaMA-Factory, data/README.md), whose pairs are one message.
    """
    turns = row.get("conversations")
    if not is_messages(turns) or "messages" in row or "prompt" in row:
        return None
    row = {name: value for name, value in row.items() if name != "conversations"}
    if "chosen" in row and "rejected" in row:
        sides = {side: [row[side]] if isinstance(row[side], dict) else row[side] for side in ("chosen", "rejected")}
        return {**row, "prompt": turns, **sides}
    return {**row, "messages": turns}


def alpaca(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any] | None:
    """Read Alpaca's instruction, input and output as prompt and completion; history becomes earlier turns.

    The format is that of https://github.com/tatsu-lab/stanford_alpaca; the input follows the instruction after an empty
    line. LLaMA-Factory's `history` is a list of [question, answer].
    """
    if columns.get("prompt") == "instruction":
        task = row.get("prompt")
    elif "instruction" in row and "output" in row and "prompt" not in row and "messages" not in row:
        task = row["instruction"]
    else:
        return None
    if not isinstance(task, str):
        return None
    context = row.get("input")
    if isinstance(context, str) and context.strip():
        task = f"{task}\n\n{context}"
    prompt: Any = task
    if row.get("history"):
        prompt = [*_earlier(row["history"]), {"role": "user", "content": task}]
    completion = {"completion": row["output"]} if "output" in row and "completion" not in row else {}
    return {**row, "prompt": prompt, **completion}


def _earlier(history: Any) -> list[dict[str, Any]]:
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"column history is {history!r:.80}: want a list of [question, answer]")
    return [
        {"role": role, "content": said}
        for pair in history
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def openai_preference(row: dict[str, Any], _: Mapping[str, str]) -> dict[str, Any] | None:
    """Read OpenAI's preference format: input.messages, preferred_output and non_preferred_output.

    It is described at https://platform.openai.com/docs/guides/direct-preference-optimization.
    """
    given = row.get("input")
    if not isinstance(given, dict) or "preferred_output" not in row or "non_preferred_output" not in row:
        return None
    sides = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    rest = {name: row[name] for name in row.keys() - {"input", "preferred_output", "non_preferred_output"}}
    return {**rest, "prompt": given.get("messages"), **sides, "tools": given.get("tools")}


def openai_functions(row: dict[str, Any], _: Mapping[str, str]) -> dict[str, Any] | None:
    """Read OpenAI's older `functions` column beside messages as tools."""
    if not row.get("functions") or row.get("tools") or "messages" not in row:
        return None
    return {**{name: value for name, value in row.items() if name != "functions"}, "tools": row["functions"]}


FORMATS: dict[str, Convert] = {
    "OpenAI preferences": openai_preference,
    "ShareGPT": sharegpt,
    "OpenAI functions": openai_functions,
    "Alpaca": alpaca,
}
"""Format -> its function, in the order in which they are tried. One of them converts a row."""
TRACES = frozenset(("conversations", "instruction", "preferred_output", "functions"))
"""A row without any of these columns has none of the formats, unless its prompt is mapped from `instruction`."""


def convert(row: dict[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """Return the row with rlft's columns, and the format it had; None for a row that has them already."""
    if TRACES.isdisjoint(row) and columns.get("prompt") != "instruction":
        return row, None
    for name, function in FORMATS.items():
        converted = function(row, columns)
        if converted is not None:
            return converted, name
    return row, None


# ---- prompts in the sides of a pair ------------------------------------------------------------------------------


def split_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Return a pair with its prompt apart from its sides, which are strings or messages.

    Without a prompt column the prompt is the common prefix: whole messages, or a string up to a space. With one, sides
    that are whole conversations (UltraFeedback binarized) must contain it.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise DataError("chosen and rejected are the same", reason="equal sides")
    if row.get("prompt") is not None and not any(_begins_with_prompt(side) for side in (chosen, rejected)):
        return row
    prefix = 0
    while prefix < min(len(chosen), len(rejected)) and chosen[prefix] == rejected[prefix]:
        prefix += 1
    if isinstance(chosen, str):
        prefix = chosen.rfind(" ", 0, prefix) + 1  # a word that is only partly equal belongs to the completions
    if not prefix or prefix == len(chosen) or prefix == len(rejected):
        raise DataError("chosen and rejected must begin alike and then differ, or come with a prompt column")
    prompt = _agreed(row.get("prompt"), chosen[:prefix], "chosen and rejected")
    return row | {"prompt": prompt, "chosen": chosen[prefix:], "rejected": rejected[prefix:]}


def split_completion(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its prompt apart from a completion that is a whole conversation."""
    completion = row["completion"]
    if not _begins_with_prompt(completion):
        return row
    first = next((i for i, message in enumerate(completion) if message["role"] == "assistant"), len(completion))
    prompt = _agreed(row["prompt"], completion[:first], "the completion")
    if not completion[first:]:
        raise DataError("the completion has no assistant message")
    return row | {"prompt": prompt, "completion": completion[first:]}


def _begins_with_prompt(side: Any) -> bool:
    return isinstance(side, list) and side[0]["role"] in ("system", "developer", "user")


def _agreed(prompt: Any, shared: Any, where: str) -> Any:
    """Return the prompt of sides that begin with `shared`. Raises DataError unless the column `prompt` agrees."""
    if prompt is None:
        return shared
    if isinstance(prompt, str):
        asked = (text_of(message["content"]) for message in shared if message["role"] == "user")
        if any(text.strip() == prompt.strip() for text in asked):
            return shared
    elif shared[: len(prompt)] == prompt:
        return shared
    elif prompt[-len(shared) :] == shared:
        return prompt
    raise DataError(f"{where} begin with other messages than the prompt: {shared[0]!r:.80}; leave out one of them")


def is_foreign(row: dict[str, Any]) -> bool:
    """Return True where a column of conversations has ShareGPT's keys."""
    return any(is_sharegpt(row.get(column)) for column in ("messages", "prompt", "completion", "chosen", "rejected"))
