"""Split recorded conversations into pieces of text, of which the assistant's are trained.

A template that marks the assistant's part itself (`{% generation %}` of transformers) renders the whole conversation
once, and its marks are the mask. Any other template is rendered turn by turn: the text that an assistant message adds
to the opened turn is trained, up to the token that ends the turn. Anything after that token (a newline, a second token
at the end of the conversation) is not trained, since sampling stops at the end of turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlft.config.data import Data
from rlft.data.messages import UNTRAINED
from rlft.data.template import TAG, ChatTemplate, Messages, Tools, TurnEnd, encoding_fault
from rlft.errors import DataError
from rlft.types import Recorded


class Piece(NamedTuple):
    """A part of a recorded completion, which is encoded by itself."""

    text: str
    train: bool


class Side(NamedTuple):
    """A recorded completion before it is encoded."""

    pieces: tuple[Piece, ...]
    reward: float
    text: str
    """What rewards and displays show."""
    eos: bool = False
    """Whether EOS is added where the ids do not end with it."""


def end_id(tokenizer: Any) -> int | None:
    """Return the id of the token with which the chat template ends a turn; None without a template or such a token.

    Also None for a template that cannot render a question and an answer; rendering rows with it raises the error.
    """
    template = ChatTemplate(Data("no rows"), tokenizer)
    if not template.source:
        return None
    try:
        end = template.turn_end([{"role": "user", "content": "?"}])
    except DataError:
        return None
    return None if end is None else tokenizer.convert_tokens_to_ids(end.token)


def split_turns(
    template: ChatTemplate, before: str, history: Messages, rest: Messages, tools: Tools
) -> tuple[tuple[Piece, ...], str]:
    """Split the messages `rest`, which follow the text `before`, and return the pieces and the last trained answer.

    Assistant turns are trained, including their end of turn, except those marked with `UNTRAINED`. The text between
    them is what opening the next turn adds; text after the last one is dropped. Raises DataError for a template that
    rewrites earlier turns when a message is added.
    """
    pieces: list[Piece] = []
    encoded, last, history = before, "", list(history)
    end = template.turn_end(history, tools)
    for message in rest:
        if message["role"] == "assistant":
            opened = template.render(history, tools, open_turn=True)
            pieces += _added_piece(encoded, opened, False)
            after = template.render([*history, message], tools)
            _check_shown(message, opened, after)
            encoded = after[: _end_of_turn(after, len(opened), end, template)]
            train = UNTRAINED not in message
            pieces += _added_piece(opened, encoded, train)
            last = str(message.get("content", "")) if train else last
        history = [*history, message]
    if not any(piece.train for piece in pieces):
        raise DataError("no assistant message to train on")
    # What follows the last trained turn teaches nothing.
    while not pieces[-1].train:
        pieces.pop()
    return tuple(pieces), last


def _added_piece(encoded: str, longer: str, train: bool) -> list[Piece]:
    if not longer.startswith(encoded):
        raise DataError(
            "the chat template changes earlier turns when a message is added (it drops reasoning, say), so the tokens "
            "of the turns cannot be told apart; train on prompt + completion rows instead",
            reason="template",
        )
    return [Piece(longer[len(encoded) :], train)] if len(longer) > len(encoded) else []


def _check_shown(message: dict[str, Any], opened: str, after: str) -> None:
    """Raise DataError for a template that shows an answer otherwise than it opens the turn, as that of R1 does."""
    tag = TAG.search(opened)
    if tag is not None and not after.startswith(opened) and after.startswith(opened[: tag.start()]):
        raise DataError(
            f"the chat template opens the assistant's turn with {tag[1]} and does not show it in an answer, so what is "
            f"sampled and what is shown differ; give the answer as a string completion (prompt + completion)",
            reason="template",
        )


def _end_of_turn(text: str, start: int, end: TurnEnd | None, template: ChatTemplate) -> int:
    """Return the position after the end of turn of the last assistant turn in `text`, which begins at `start`."""
    if end is None:
        return len(text)
    if text.endswith(end.token + end.behind):
        return len(text) - len(end.behind)
    # A tool call may end with another token than an answer (<|eom_id|> of Llama 3.1).
    matches = list(template.added.finditer(text, start))
    return matches[-1].end() if matches else len(text)


def ended(template: ChatTemplate, completion: str, history: Messages, tools: Tools) -> tuple[str, bool]:
    """Return a string completion with the template's end of turn, and whether EOS has to end it instead.

    The string is used unchanged, whatever the template would do to it (strip it, drop its reasoning). No end is added
    if it already ends with the end of turn or EOS.
    """
    end = template.turn_end(history, tools)
    if end is None:
        return completion, True
    stripped = completion.rstrip()
    if stripped.endswith((end.token, template.tokenizer.eos_token or end.token)):
        return stripped, False
    return completion + end.text, False


def encode_marked(
    template: ChatTemplate, messages: Messages, tools: Tools, kwargs: dict[str, Any]
) -> tuple[tuple[int, ...], Recorded]:
    """Return the ids before the first token that the template marks as the assistant's, and the rest with its mask.

    Marked white space after the end of a turn is not trained, nor is a turn with `UNTRAINED`. Raises DataError when the
    template marks no token, or marks the first one.
    """
    text = template.render(messages, tools)  # raises what the template refuses
    given = {} if tools is None else {"tools": list(tools)}
    try:
        encoding = template.tokenizer.apply_chat_template(
            template.shaped(messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **given,
            **kwargs,
        )
    except Exception as error:  # each tokenizer raises other errors
        raise encoding_fault(text, error) from error
    ids, mask = tuple(encoding["input_ids"]), [bool(flag) for flag in encoding["assistant_masks"]]
    first = mask.index(True) if True in mask else 0
    if not first:
        raise DataError(
            "the chat template marks no assistant token after a prompt ({% generation %} is there, and is around "
            "nothing or everything); fix the template, or take the marks out",
            reason="template",
        )
    turns = [message for message in messages if message["role"] == "assistant"]
    _unmark(mask, [UNTRAINED not in message for message in turns])
    end = template.turn_end(messages[: list(messages).index(turns[0])], tools)
    end_token = None if end is None else template.tokenizer.convert_tokens_to_ids(end.token)
    after_end = False
    for i, token in enumerate(ids):
        blank = after_end and not template.tokenizer.decode([token]).strip()
        mask[i] = mask[i] and not blank
        after_end = token == end_token or blank
    return ids[:first], Recorded(ids[first:], tuple(mask[first:]), 1.0, str(turns[-1].get("content", "")))


def _unmark(mask: list[bool], trained: Sequence[bool]) -> None:
    """Clear the runs of a mask that belong to turns that are not trained."""
    if all(trained):
        return
    if not any(trained):
        raise DataError("no assistant message to train on")
    starts = [i for i, flag in enumerate(mask) if flag and not (i and mask[i - 1])]
    if len(starts) != len(trained):
        raise DataError(
            f"{len(trained)} turns of the assistant, and the chat template marks {len(starts)}, so it is unclear "
            f"which have weight 0; leave the row out",
            reason="template",
        )
    for start, train in zip(starts, trained, strict=True):
        i = start
        while not train and i < len(mask) and mask[i]:
            mask[i] = False
            i += 1
