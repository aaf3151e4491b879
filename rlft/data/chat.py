"""Encode conversations with a mask of the assistant's tokens, which are trained.

A template that marks the assistant's part itself (`{% generation %}` of transformers) renders the whole conversation
once, and its marks are the mask. Any other template is rendered turn by turn: the text that an assistant message adds
to the opened turn is trained, up to the token that ends the turn. Anything after that token (a newline, a second token
at the end of the conversation) is not trained, since sampling stops at the end of turn.
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
"""Content of the assistant message that is rendered to find how a turn ends."""


def ids_of(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Encode a text without adding special tokens."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def render(messages: Sequence[dict[str, Any]], data: Data, tokenizer: Any, open_turn: bool) -> str:
    """Render the conversation as text. open_turn: append the start of the assistant's turn."""
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=open_turn, **data.chat_template_kwargs
    )


class TurnEnd(NamedTuple):
    """How a chat template ends an assistant turn."""

    text: str
    """Text after the content up to and including `token`; usually `token` alone."""
    token: str
    """The added token of the tokenizer that ends the turn, as text: <|im_end|>, <end_of_turn>, </s>."""
    behind: str
    """Text after the token at the end of a conversation: nothing, a newline, EOS."""


def turn_end(history: Sequence[dict[str, Any]], data: Data, tokenizer: Any) -> TurnEnd | None:
    """Find how the template ends an assistant turn after `history`: with the first added token after the content.

    None if no added token follows. Raises DataError when the template does not render the assistant's content.
    """
    whole = render([*history, {"role": "assistant", "content": PROBE}], data, tokenizer, open_turn=False)
    _, separator, rest = whole.rpartition(PROBE)
    if not separator:
        raise DataError("the chat template does not show what the assistant says; use that of an instruct model")
    match = _added(tokenizer).search(rest)
    return None if match is None else TurnEnd(rest[: match.end()], match[0], rest[match.end() :])


def turn_is_open(messages: Sequence[dict[str, Any]], data: Data, tokenizer: Any) -> bool:
    """Return whether the assistant's turn begins right after the messages, without a generation prompt.

    An example is [/INST] of Mistral: it closes the last message, and at most white space comes before the answer.
    """
    probed = render([*messages[:-1], {**messages[-1], "content": PROBE}], data, tokenizer, open_turn=False)
    whole = render([*messages, {"role": "assistant", "content": PROBE}], data, tokenizer, open_turn=False)
    text = render(messages, data, tokenizer, open_turn=False)
    before_answer = whole.rpartition(PROBE)[0]
    return (
        bool(probed.rpartition(PROBE)[2].strip())
        and before_answer.startswith(text)
        and not before_answer[len(text) :].strip()
    )


def _added(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of all tokens added to the vocabulary: special tokens, and tags such as </think>."""
    return _pattern(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _pattern(tokenizer: Any, _size: int) -> re.Pattern[str]:
    # Cached, since some tokenizers have thousands of them. `_size` changes when tokens are added.
    contents = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return re.compile(
        "|".join(re.escape(content) for content in sorted(contents, key=len, reverse=True) if content) or "(?!)"
    )


def end_id(tokenizer: Any) -> int | None:
    """Return the id of the token with which the chat template ends a turn; None without a template or such a token.

    Also None for a template that cannot render a question and an answer; rendering rows with it raises the error.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        end = turn_end([{"role": "user", "content": "?"}], Data("no rows"), tokenizer)
    except (TemplateError, DataError):
        return None
    return None if end is None else tokenizer.convert_tokens_to_ids(end.token)


def encode_turns(
    before: str, history: list[dict[str, Any]], rest: list[dict[str, Any]], reward: float, data: Data, tokenizer: Any
) -> Recorded:
    """Encode the messages `rest` after the text `before`; assistant turns are trained, including their end of turn.

    The text between assistant turns is what opening the next turn adds; text after the last one is dropped. Raises
    DataError for a template that rewrites earlier turns when a message is added.
    """
    ids: list[int] = []
    mask: list[bool] = []
    encoded, last = before, ""
    end = turn_end(history, data, tokenizer)
    for message in rest:
        if message["role"] == "assistant":
            opened_turn = render(history, data, tokenizer, open_turn=True)
            ids, mask = _append(ids, mask, encoded, opened_turn, False, tokenizer)
            after = render([*history, message], data, tokenizer, open_turn=False)
            encoded = after[: _end_of_turn(after, len(opened_turn), end, tokenizer)]
            ids, mask = _append(ids, mask, opened_turn, encoded, True, tokenizer)
            last = str(message.get("content", ""))
        history = [*history, message]
    if not any(mask):
        raise DataError("no assistant message to train on")
    return Recorded(tuple(ids), tuple(mask), reward, last)


def _end_of_turn(text: str, start: int, end: TurnEnd | None, tokenizer: Any) -> int:
    """Return the position after the end of turn of the last assistant turn in `text`, which begins at `start`."""
    if end is None:
        return len(text)
    if text.endswith(end.token + end.behind):
        return len(text) - len(end.behind)
    # A tool call may end with another token than an answer (<|eom_id|> of Llama 3.1).
    matches = list(_added(tokenizer).finditer(text, start))
    return matches[-1].end() if matches else len(text)


def _append(ids: list[int], mask: list[bool], encoded: str, longer: str, train: bool, tokenizer: Any):
    if not longer.startswith(encoded):
        raise DataError(
            "the chat template changes earlier turns when a message is added (it drops reasoning, say), so the tokens "
            "of the turns cannot be told apart; train on prompt + completion rows instead"
        )
    new = ids_of(longer[len(encoded) :], tokenizer)
    return ids + list(new), mask + [train] * len(new)


def encode_completion(
    completion: str, history: Sequence[dict[str, Any]] | None, data: Data, tokenizer: Any
) -> tuple[int, ...]:
    """Encode a string completion with its end: the end of turn in a chat, EOS elsewhere.

    history: the messages before it, None without a chat template. The string is used unchanged, whatever the template
    would do to it (strip it, drop its reasoning). No end is added if it already ends with the end of turn or EOS.
    """
    end = turn_end(history, data, tokenizer) if history is not None else None
    if end is None:
        ids = ids_of(completion, tokenizer)
        return ids if ids and ids[-1] == tokenizer.eos_token_id else (*ids, tokenizer.eos_token_id)
    stripped = completion.rstrip()
    if stripped.endswith((end.token, tokenizer.eos_token or end.token)):
        return ids_of(stripped, tokenizer)
    return ids_of(completion + end.text, tokenizer)


def marks_generation(tokenizer: Any) -> bool:
    """Return True when the chat template itself marks the assistant's tokens."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or "") is not None


def encode_marked(messages: Sequence[dict[str, Any]], data: Data, tokenizer: Any) -> tuple[tuple[int, ...], Recorded]:
    """Return the ids before the first token that the template marks as the assistant's, and the rest with its mask.

    Marked white space after the end of a turn is not trained. Raises DataError when the template marks no token, or
    marks the first one.
    """
    encoding = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **data.chat_template_kwargs
    )
    ids, mask = tuple(encoding["input_ids"]), [bool(flag) for flag in encoding["assistant_masks"]]
    first = mask.index(True) if True in mask else 0
    if not first:
        raise DataError(
            "the chat template marks no assistant token after a prompt ({% generation %} is there, and is around "
            "nothing or everything); fix the template, or take the marks out"
        )
    first_answer = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    end = turn_end(messages[:first_answer], data, tokenizer)
    end_token = None if end is None else tokenizer.convert_tokens_to_ids(end.token)
    after_end = False
    for i, token in enumerate(ids):
        blank = after_end and not tokenizer.decode([token]).strip()
        mask[i] = mask[i] and not blank
        after_end = token == end_token or blank
    last = next(message for message in reversed(messages) if message["role"] == "assistant")
    return ids[:first], Recorded(ids[first:], tuple(mask[first:]), 1.0, str(last.get("content", "")))
