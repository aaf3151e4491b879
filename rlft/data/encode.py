"""Encode one row: token ids with the chat template applied exactly once, and recorded completions.

A string prompt becomes one user turn where the tokenizer has a chat template (`data.chat = "never"`: encoded as it is).
Prompt and completion are encoded separately and concatenated, so that the trained tokens are those an engine would
sample after the prompt. In a chat a completion ends with the template's end of turn (<|im_end|>, <end_of_turn>), which
is not always tokenizer.eos_token. Plain text ends with EOS, and so does a completion outside a chat, or in a chat whose
turns end without a token.

Faults of templates do not show in the parity check, since engine and trainer see the same tokens. They are therefore
errors here: a prompt that is already rendered, two BOS tokens, a template that opens no assistant turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlft.config.data import Data
from rlft.data.chat import (
    encode_completion,
    encode_marked,
    encode_turns,
    ids_of,
    marks_generation,
    render,
    turn_is_open,
)
from rlft.data.kinds import kind_of
from rlft.errors import DataError
from rlft.types import Prompt, Recorded


def encode_prompt(row: dict[str, Any], index: int, data: Data, tokenizer: Any) -> Prompt:
    """Convert one row to a Prompt. Raises DataError naming the row."""
    kind = kind_of(row)
    try:
        if kind == "text":
            return _text(row, index, tokenizer)
        if kind == "messages":
            return _conversation(row, index, data, tokenizer)
        if kind == "preference" and row.get("prompt") is None:
            row = row | _implicit_prompt(row)
        prompt = _prompt(row, index, data, tokenizer)
        if kind in ("completion", "label"):
            reward = -1.0 if kind == "label" and not row["label"] else 1.0
            return replace(prompt, recorded=(_recorded(prompt, row["completion"], reward, data, tokenizer),))
        if kind == "preference":
            sides = (("chosen", 1.0), ("rejected", -1.0))
            return replace(
                prompt, recorded=tuple(_recorded(prompt, row[side], reward, data, tokenizer) for side, reward in sides)
            )
        return prompt
    except DataError as error:
        raise DataError(f"row {index}: {error}") from None


def _prompt(row: dict[str, Any], index: int, data: Data, tokenizer: Any) -> Prompt:
    prompt = row["prompt"]
    chat = bool(tokenizer.chat_template) and data.chat == "auto"
    if isinstance(prompt, str):
        if not chat:
            if data.system:
                raise DataError("data.system needs a chat template, and this tokenizer has none or data.chat is never")
            return Prompt(_encoded(prompt, tokenizer), row, index)
        _check_not_rendered(prompt, tokenizer)
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    else:
        if not tokenizer.chat_template:
            raise DataError("the prompt is messages, but the tokenizer has no chat template; give strings")
        messages = list(prompt)
        if messages[-1]["role"] == "assistant":
            raise DataError("the prompt ends with an assistant message; end it with the user's, or use completion")
        for message in messages:
            if isinstance(message["content"], str):
                _check_not_rendered(message["content"], tokenizer)
    if data.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system}, *messages]
    text = render(messages, data, tokenizer, open_turn=True)
    if text == render(messages, data, tokenizer, open_turn=False) and not turn_is_open(messages, data, tokenizer):
        raise DataError(
            "the chat template opens no assistant turn (add_generation_prompt changes nothing), so the model would go "
            "on with the user's; use the template of an instruct model"
        )
    ids = ids_of(text, tokenizer)
    if _two_bos(ids, tokenizer):
        raise DataError("the rendered prompt begins with two BOS tokens; remove the one in the text or the template")
    return Prompt(ids, row, index, tuple(messages))


def _encoded(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Encode a text without a chat template. Raises DataError when the tokenizer adds a second BOS."""
    ids = tuple(tokenizer.encode(text))
    if _two_bos(ids, tokenizer):
        raise DataError(
            f"the text begins with two BOS tokens, since the tokenizer adds one; remove {tokenizer.bos_token} from it"
        )
    return ids


def _two_bos(ids: tuple[int, ...], tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos


def _check_not_rendered(text: str, tokenizer: Any) -> None:
    """Raise DataError when a message contains special tokens of the template, as a rendered prompt does."""
    marks = [
        token
        for token in tokenizer.all_special_tokens
        if len(token) > 3 and token in tokenizer.chat_template and token in text
    ]
    if marks:
        raise DataError(
            f"the prompt contains {marks[0]}, a mark of the chat template: it was rendered already and would be put "
            f'into a user turn again. Give the plain text or messages, or set data.chat = "never"'
        )


def _recorded(prompt: Prompt, completion: Any, reward: float, data: Data, tokenizer: Any) -> Recorded:
    if isinstance(completion, str):
        ids = encode_completion(completion, prompt.messages, data, tokenizer)
        return Recorded(ids, (True,) * len(ids), reward, completion)
    if prompt.messages is None:
        raise DataError("the completion is messages but the prompt is a string that is not put into a chat template")
    before = render(prompt.messages, data, tokenizer, open_turn=True)
    return encode_turns(before, [*prompt.messages], list(completion), reward, data, tokenizer)


def _conversation(row: dict[str, Any], index: int, data: Data, tokenizer: Any) -> Prompt:
    messages = list(row["messages"])
    if not tokenizer.chat_template:
        raise DataError("the row is messages, but the tokenizer has no chat template")
    if data.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system}, *messages]
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if not first:
        raise DataError("messages need an assistant message after at least one other")
    if marks_generation(tokenizer):
        prompt, recorded = encode_marked(messages, data, tokenizer)
        return Prompt(prompt, row, index, tuple(messages[:first]), (recorded,))
    history = messages[:first]
    before = render(history, data, tokenizer, open_turn=True)
    recorded = encode_turns(before, history, messages[first:], 1.0, data, tokenizer)
    return Prompt(ids_of(before, tokenizer), row, index, tuple(history), (recorded,))


def _text(row: dict[str, Any], index: int, tokenizer: Any) -> Prompt:
    ids = _encoded(row["text"], tokenizer)
    ids += () if ids and ids[-1] == tokenizer.eos_token_id else (tokenizer.eos_token_id,)
    mask = (False, *(True,) * (len(ids) - 1))  # nothing precedes the first token to predict it from
    return Prompt((), row, index, None, (Recorded(ids, mask, 1.0, row["text"]),))


def _implicit_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Split the common prefix of two sides off as the prompt: whole messages, or a string up to a space."""
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    prefix = 0
    while prefix < min(len(chosen), len(rejected)) and chosen[prefix] == rejected[prefix]:
        prefix += 1
    if isinstance(chosen, str):
        prefix = chosen.rfind(" ", 0, prefix) + 1  # a word that is only partly equal belongs to the completions
    if not prefix or prefix == len(chosen) or prefix == len(rejected):
        raise DataError("chosen and rejected must begin alike and then differ, or come with a prompt column")
    return {"prompt": chosen[:prefix], "chosen": chosen[prefix:], "rejected": rejected[prefix:]}


class Encoder:
    """Encodes the rows of one dataset."""

    def __init__(self, data: Data, tokenizer: Any, kind: str) -> None:
        """kind: the reader's."""
        self._data, self._tokenizer = data, tokenizer

    def encode_many(self, rows: Sequence[dict[str, Any]], start: int) -> list[Prompt | DataError]:
        """Encode rows, numbered from `start`, with an error in place of a row that is at fault."""
        outcomes: list[Prompt | DataError] = []
        for number, row in enumerate(rows, start):
            try:
                outcomes.append(encode_prompt(row, number, self._data, self._tokenizer))
            except DataError as error:
                outcomes.append(error)
        return outcomes

    def notes(self) -> list[str]:
        """Return what the start of a run says about the rows encoded so far."""
        return []
