"""Conversations -> token ids with a mask of what the assistant said: which tokens of the chat template are trained.

A template that marks the assistant's part itself (`{% generation %}`, as transformers has it) is asked; whatever it
does to earlier turns, the whole conversation is rendered once. Any other one is rendered turn by turn: what the
assistant's message adds to the opened turn is trained, up to the token that ends the turn. Nothing after that token is
(a newline, a second token at the end of the conversation): the policy stops there when it samples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from rlft.config.data import Data
from rlft.errors import DataError
from rlft.types import Recorded

PROBE = "rlft-content"
"""What an assistant says in the conversation that is rendered to see how a turn ends."""


def ids_of(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def render(messages: Sequence[dict[str, Any]], data: Data, tokenizer: Any, open_turn: bool) -> str:
    """The conversation as text. open_turn: with the start of the assistant's turn."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=open_turn, **data.chat_template_kwargs
    )


class TurnEnd(NamedTuple):
    """How a chat template ends what the assistant says."""

    text: str
    """What follows the content, `token` included: mostly `token` alone."""
    token: str
    """The added token of the tokenizer that ends the turn, as text: <|im_end|>, <end_of_turn>, </s>."""
    behind: str
    """What follows the token at the end of a conversation: nothing, a newline, EOS."""


def turn_end(history: Sequence[dict[str, Any]], data: Data, tokenizer: Any) -> TurnEnd | None:
    """How the template ends an assistant's turn after `history`: with the first added token behind its content.

    None where the template puts none there. Raises DataError when it does not show what the assistant says.
    """
    whole = render([*history, {"role": "assistant", "content": PROBE}], data, tokenizer, open_turn=False)
    _, shown, rest = whole.rpartition(PROBE)
    if not shown:
        raise DataError("the chat template does not show what the assistant says; use that of an instruct model")
    found = _added(tokenizer).search(rest)
    return None if found is None else TurnEnd(rest[: found.end()], found[0], rest[found.end() :])


def turn_is_open(messages: Sequence[dict[str, Any]], data: Data, tokenizer: Any) -> bool:
    """Whether the assistant's turn begins where the messages end, although no generation prompt opens it.

    So it is with [/INST] of Mistral: it closes the last message, and at most white space comes before the answer.
    """
    asked = render([*messages[:-1], {**messages[-1], "content": PROBE}], data, tokenizer, open_turn=False)
    whole = render([*messages, {"role": "assistant", "content": PROBE}], data, tokenizer, open_turn=False)
    text = render(messages, data, tokenizer, open_turn=False)
    said = whole.rpartition(PROBE)[0]
    return bool(asked.rpartition(PROBE)[2].strip()) and said.startswith(text) and not said[len(text) :].strip()


def _added(tokenizer: Any) -> re.Pattern[str]:
    """Matches any token that was added to the vocabulary: special tokens, and tags such as </think>."""
    return _pattern(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _pattern(tokenizer: Any, _size: int) -> re.Pattern[str]:
    # Some tokenizers have thousands, and every row asks. The size changes when tokens are added.
    contents = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(re.escape(c) for c in sorted(contents, key=len, reverse=True) if c) or "(?!)")


def end_id(tokenizer: Any) -> int | None:
    """Id of the token by which the tokenizer's chat template ends a turn; None without a template or such a token.

    A template that cannot render a question and its answer gives None as well: a run that renders rows by it says why.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        end = turn_end([{"role": "user", "content": "?"}], Data("no rows"), tokenizer)
    except (TemplateError, DataError):
        return None
    return None if end is None else tokenizer.convert_tokens_to_ids(end.token)


def turns(
    before: str, history: list[dict[str, Any]], rest: list[dict[str, Any]], reward: float, data: Data, tokenizer: Any
) -> Recorded:
    """The messages `rest` after the text `before`: trained where the assistant speaks, its end of turn included.

    What comes before an assistant's turn is what opening the turn adds; after the last one nothing is kept. Raises
    DataError for a template that rewrites earlier turns, of which nothing is an addition.
    """
    ids: list[int] = []
    mask: list[bool] = []
    shown, last = before, ""
    end = turn_end(history, data, tokenizer)
    for message in rest:
        if message["role"] == "assistant":
            opened = render(history, data, tokenizer, open_turn=True)
            ids, mask = _append(ids, mask, shown, opened, False, tokenizer)
            after = render([*history, message], data, tokenizer, open_turn=False)
            shown = after[: _closed(after, len(opened), end, tokenizer)]
            ids, mask = _append(ids, mask, opened, shown, True, tokenizer)
            last = str(message.get("content", ""))
        history = [*history, message]
    if not any(mask):
        raise DataError("no assistant message to train on")
    return Recorded(tuple(ids), tuple(mask), reward, last)


def _closed(text: str, start: int, end: TurnEnd | None, tokenizer: Any) -> int:
    """Where the assistant's turn that begins at `start` and is the last of `text` is over: behind its end of turn."""
    if end is None:
        return len(text)
    if text.endswith(end.token + end.behind):
        return len(text) - len(end.behind)
    # A call of a tool may end by another token than an answer does (<|eom_id|> of Llama 3.1).
    found = list(_added(tokenizer).finditer(text, start))
    return found[-1].end() if found else len(text)


def _append(ids: list[int], mask: list[bool], shown: str, longer: str, train: bool, tokenizer: Any):
    if not longer.startswith(shown):
        raise DataError(
            "the chat template changes earlier turns when a message is added (it drops reasoning, say), so the tokens "
            "of the turns cannot be told apart; train on prompt + completion rows instead"
        )
    new = ids_of(longer[len(shown) :], tokenizer)
    return ids + list(new), mask + [train] * len(new)


def said(completion: str, history: Sequence[dict[str, Any]] | None, data: Data, tokenizer: Any) -> tuple[int, ...]:
    """Ids of a completion that is a string, with its end: of the turn in a chat, EOS elsewhere.

    history: the messages before it, None where nothing was put into a template. The string is taken as it is, whatever
    the template would do to it (strip it, drop its reasoning). One that ends as a turn does, or with EOS, has its end.
    """
    end = turn_end(history, data, tokenizer) if history is not None else None
    if end is None:
        ids = ids_of(completion, tokenizer)
        return ids if ids and ids[-1] == tokenizer.eos_token_id else (*ids, tokenizer.eos_token_id)
    closed = completion.rstrip()
    if closed.endswith((end.token, tokenizer.eos_token or end.token)):
        return ids_of(closed, tokenizer)
    return ids_of(completion + end.text, tokenizer)


def marks_generation(tokenizer: Any) -> bool:
    """True when the chat template says itself which tokens are the assistant's."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or "") is not None


def marked(messages: Sequence[dict[str, Any]], data: Data, tokenizer: Any) -> tuple[tuple[int, ...], Recorded]:
    """Ids before the first token that the template marks as the assistant's, and the rest with the mask.

    White space that is marked behind the end of a turn is not trained. Raises DataError when the template marks no
    token, or nothing comes before.
    """
    made = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **data.chat_template_kwargs
    )
    ids, mask = tuple(made["input_ids"]), [bool(m) for m in made["assistant_masks"]]
    first = mask.index(True) if True in mask else 0
    if not first:
        raise DataError(
            "the chat template marks no assistant token after a prompt ({% generation %} is there, and is around "
            "nothing or everything); mend the template, or take the marks out"
        )
    asked = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    end = turn_end(messages[:asked], data, tokenizer)
    ended = None if end is None else tokenizer.convert_tokens_to_ids(end.token)
    behind = False
    for at, token in enumerate(ids):
        blank = behind and not tokenizer.decode([token]).strip()
        mask[at] = mask[at] and not blank
        behind = token == ended or blank
    last = next(message for message in reversed(messages) if message["role"] == "assistant")
    return ids[:first], Recorded(ids[first:], tuple(mask[first:]), 1.0, str(last.get("content", "")))
