"""Conversations -> token ids with a mask of what the assistant said: which tokens of the chat template are trained.

A template that marks the assistant's part itself (`{% generation %}`, as transformers has it) is asked; whatever it
does to earlier turns, the whole conversation is rendered once. Any other one is rendered message by message, and what a
message adds is its own, the end of the assistant's turn included and what only opens the next turn left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlft.config import Data
from rlft.errors import DataError
from rlft.types import Recorded


def ids_of(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def render(messages: Sequence[dict[str, Any]], data: Data, tokenizer: Any, open_turn: bool) -> str:
    """The conversation as text. open_turn: with the start of the assistant's turn."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=open_turn, **data.chat_template_kwargs
    )


def turns(before: str, history: list[dict[str, Any]], rest: list[dict[str, Any]], reward: float, data: Data,
           tokenizer: Any) -> Recorded:  # fmt: skip
    """The messages `rest` after the text `before`: trained where the assistant speaks, its end of turn included.

    Each message is what rendering one more message adds; a template that rewrites earlier turns has no such addition.
    """
    ids: list[int] = []
    mask: list[bool] = []
    shown = before
    for message in rest:
        history = [*history, message]
        if message["role"] == "assistant":
            opened = render(history[:-1], data, tokenizer, open_turn=True)
            ids, mask, shown = _append(ids, mask, shown, opened, False, tokenizer)
        after = render(history, data, tokenizer, open_turn=False)
        if message["role"] == "assistant":
            # What follows the end of the turn (a newline) opens the next one: the policy never samples it.
            turn = after[: after.rfind(tokenizer.eos_token) + len(tokenizer.eos_token)]
            after = turn if tokenizer.eos_token in after[len(shown) :] else after
        ids, mask, shown = _append(ids, mask, shown, after, message["role"] == "assistant", tokenizer)
    if not any(mask):
        raise DataError("no assistant message to train on")
    last = str(rest[-1].get("content", ""))
    return Recorded(tuple(ids), tuple(mask), reward, last)


def _append(ids: list[int], mask: list[bool], shown: str, longer: str, train: bool, tokenizer: Any):
    if not longer.startswith(shown):
        raise DataError(
            "the chat template changes earlier turns when a message is added (it drops reasoning, say), so the tokens "
            "of the turns cannot be told apart; train on prompt + completion rows instead"
        )
    new = ids_of(longer[len(shown) :], tokenizer)
    return ids + list(new), mask + [train] * len(new), longer


def marks_generation(tokenizer: Any) -> bool:
    """True when the chat template says itself which tokens are the assistant's."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or "") is not None


def marked(messages: Sequence[dict[str, Any]], data: Data, tokenizer: Any) -> tuple[tuple[int, ...], Recorded]:
    """Ids before the first token that the template marks as the assistant's, and the rest with the mask.

    Raises DataError when it marks none, or nothing comes before.
    """
    made = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **data.chat_template_kwargs
    )
    ids, mask = tuple(made["input_ids"]), tuple(bool(m) for m in made["assistant_masks"])
    first = mask.index(True) if True in mask else 0
    if not first:
        raise DataError(
            "the chat template marks no assistant token after a prompt ({% generation %} is there, and is around "
            "nothing or everything); mend the template, or take the marks out"
        )
    last = next(message for message in reversed(messages) if message["role"] == "assistant")
    return ids[:first], Recorded(ids[first:], mask[first:], 1.0, str(last.get("content", "")))
