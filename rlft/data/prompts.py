"""Rows -> Prompt: token ids with the chat template applied exactly once, and the completions recorded with the row.

Kinds of rows, told apart by their columns as in TRL:

    prompt                         a string or messages; every other column goes to the rewards
    prompt, completion             supervised: train on the completion
    prompt, completion, label      the same, good (true, reward 1) or bad (false, reward -1): KTO
    messages                       supervised: train on every assistant turn (rlft.data.chat)
    text                           supervised: train on every token that has one before it
    chosen, rejected [, prompt]    pairs; without a prompt it is what both sides begin with

A string prompt becomes one user turn where the tokenizer has a chat template (`data.chat = "never"`: encoded as it is).
Prompt and completion are encoded apart and put side by side, so that what is trained is what an engine would have
sampled after the prompt. In a chat a completion ends as the template ends a turn (<|im_end|>, <end_of_turn>), which is
not always tokenizer.eos_token. Plain text ends with EOS, and so does a completion outside of a chat, or in one whose
turns end with no token.

Faults of templates are invisible to the comparison of engine and trainer, which see the same tokens; so they are errors
here: a prompt that was rendered before, two BOS, a template that opens no assistant turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlft.config.data import Data
from rlft.data.chat import ids_of, marked, marks_generation, render, said, turn_is_open, turns
from rlft.data.sources import load_rows
from rlft.errors import DataError, TrainError
from rlft.types import Prompt, Recorded

KINDS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "label": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""Kind of row -> the columns that make it; the first that fits."""
ROLES = ("system", "user", "assistant", "tool", "developer")


def kind_of(row: dict[str, Any]) -> str:
    """Which of KINDS a row is. Raises DataError naming the columns it has."""
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


def check_rows(data: Data, seed: int) -> list[dict[str, Any]]:
    """The rows of a dataset, each checked as far as that needs no tokenizer. Raises DataError naming row and column."""
    rows = load_rows(data, seed)
    kind = kind_of(rows[0])
    answer_type: type | None = None
    for i, row in enumerate(rows):
        missing = [column for column in KINDS[kind] if row.get(column) is None]
        if missing:
            raise DataError(
                f"row {i}: column {missing[0]} is missing or null, but row 0 has {', '.join(KINDS[kind])}; mend the "
                f"row or leave it out"
            )
        if kind == "label" and not isinstance(row["label"], bool):
            raise DataError(
                f"row {i}: column label is {row['label']!r:.80}: want true or false, for a good or a bad completion; "
                f"rename the column by data.columns if it means something else"
            )
        for column in ("prompt", *KINDS[kind]):
            if row.get(column) is not None and column != "label":
                _check_text(row[column], i, column, messages_only=column == "messages")
        if kind == "preference" and isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
            raise DataError(f"row {i}: chosen and rejected must both be strings or both be messages")
        if "answer" in rows[0]:
            answer = row.get("answer")
            if answer is None:
                raise DataError(f"row {i}: column answer is missing or null; give every row one, or drop the column")
            answer_type = answer_type or type(answer)
            if type(answer) is not answer_type:
                raise DataError(
                    f"row {i}: column answer is {type(answer).__name__} ({answer!r}), but "
                    f"{answer_type.__name__} in row 0; give all of them one type"
                )
    return rows


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


# ---- encoding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What `load_prompts` found."""

    prompts: list[Prompt]
    dropped: int
    """Rows left out because their prompt is longer than `data.max_prompt_tokens`."""


def load_prompts(data: Data, tokenizer: Any, seed: int) -> Loaded:
    """All prompts of a dataset, in its order. seed: the run's, for generated tasks and mixtures.

    Raises DataError for everything wrong with a row, and when every prompt is too long.
    """
    prompts, dropped = [], 0
    for index, row in enumerate(check_rows(data, seed)):
        prompt = encode_prompt(row, index, data, tokenizer)
        if data.max_prompt_tokens is not None and len(prompt.ids) > data.max_prompt_tokens:
            if data.long_prompts == "error":
                raise DataError(
                    f"row {index}: the prompt has {len(prompt.ids)} tokens, data.max_prompt_tokens is "
                    f'{data.max_prompt_tokens}; raise it, or set data.long_prompts = "drop"'
                )
            dropped += 1
            continue
        prompts.append(prompt)
    if not prompts:
        raise DataError(
            f"every prompt is longer than data.max_prompt_tokens = {data.max_prompt_tokens} ({dropped} rows): raise it"
        )
    return Loaded(prompts, dropped)


def encode_prompt(row: dict[str, Any], index: int, data: Data, tokenizer: Any) -> Prompt:
    """One row as a Prompt. Raises DataError naming the row."""
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
    given = row["prompt"]
    chat = bool(tokenizer.chat_template) and data.chat == "auto"
    if isinstance(given, str):
        if not chat:
            if data.system:
                raise DataError("data.system needs a chat template, and this tokenizer has none or data.chat is never")
            return Prompt(_encoded(given, tokenizer), row, index)
        _check_not_rendered(given, tokenizer)
        messages: list[dict[str, Any]] = [{"role": "user", "content": given}]
    else:
        if not tokenizer.chat_template:
            raise DataError("the prompt is messages, but the tokenizer has no chat template; give strings")
        messages = list(given)
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
    """Token ids of a text outside of a chat template. Raises DataError where the tokenizer adds a second BOS."""
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
    """Raise DataError when a message holds the template's own marks: it was rendered before."""
    marks = [t for t in tokenizer.all_special_tokens if len(t) > 3 and t in tokenizer.chat_template and t in text]
    if marks:
        raise DataError(
            f"the prompt contains {marks[0]}, a mark of the chat template: it was rendered already and would be put "
            f'into a user turn again. Give the plain text or messages, or set data.chat = "never"'
        )


def _recorded(prompt: Prompt, completion: Any, reward: float, data: Data, tokenizer: Any) -> Recorded:
    if isinstance(completion, str):
        ids = said(completion, prompt.messages, data, tokenizer)
        return Recorded(ids, (True,) * len(ids), reward, completion)
    if prompt.messages is None:
        raise DataError("the completion is messages but the prompt is a string that is not put into a chat template")
    before = render(prompt.messages, data, tokenizer, open_turn=True)
    return turns(before, [*prompt.messages], list(completion), reward, data, tokenizer)


def _conversation(row: dict[str, Any], index: int, data: Data, tokenizer: Any) -> Prompt:
    messages = list(row["messages"])
    if not tokenizer.chat_template:
        raise DataError("the row is messages, but the tokenizer has no chat template")
    if data.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system}, *messages]
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
    if not first:
        raise DataError("messages need an assistant message after at least one other")
    if marks_generation(tokenizer):
        prompt, recorded = marked(messages, data, tokenizer)
        return Prompt(prompt, row, index, tuple(messages[:first]), (recorded,))
    history = messages[:first]
    before = render(history, data, tokenizer, open_turn=True)
    recorded = turns(before, history, messages[first:], 1.0, data, tokenizer)
    return Prompt(ids_of(before, tokenizer), row, index, tuple(history), (recorded,))


def _text(row: dict[str, Any], index: int, tokenizer: Any) -> Prompt:
    ids = _encoded(row["text"], tokenizer)
    ids += () if ids and ids[-1] == tokenizer.eos_token_id else (tokenizer.eos_token_id,)
    mask = (False, *(True,) * (len(ids) - 1))  # nothing comes before the first token to predict it
    return Prompt((), row, index, None, (Recorded(ids, mask, 1.0, row["text"]),))


def _implicit_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """prompt, chosen and rejected from two sides that begin alike: messages by message, strings up to a space."""
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if isinstance(chosen, str):
        shared = chosen.rfind(" ", 0, shared) + 1  # a word that only begins alike belongs to the completions
    if not shared or shared == len(chosen) or shared == len(rejected):
        raise DataError("chosen and rejected must begin alike and then differ, or come with a prompt column")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


# ---- order -------------------------------------------------------------------------------------------------------


class Prompts:
    """The order in which prompts are consumed. `consumed`, the data cursor, and `solved` are its whole state."""

    def __init__(self, rows: list[Prompt], seed: int, shuffle: bool = True) -> None:
        """shuffle: visit the rows in an order drawn from (seed, epoch), another one each epoch."""
        assert rows
        self.rows, self.consumed = rows, 0
        self.solved: set[int] = set()
        """Row numbers of prompts that are passed over."""
        self._seed, self._shuffle = seed, shuffle
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts that are not solved, going on into the next epoch where one ends.

        Raises TrainError when every one is.
        """
        if all(row.index in self.solved for row in self.rows):
            raise TrainError(
                f"curriculum.solved_share: all {len(self.rows)} prompts are solved, so there is nothing left to draw; "
                f"the last checkpoint is the result, or give harder data"
            )
        taken: list[Prompt] = []
        while len(taken) < n:
            epoch, at = divmod(self.consumed, len(self.rows))
            row = self.rows[self._order_of(epoch)[at]]
            self.consumed += 1
            taken += [row] if row.index not in self.solved else []
        return taken

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.consumed / len(self.rows)

    def steps(self, prompts_per_step: int, epochs: float) -> int:
        """Steps that see every row `epochs` times; the last one may go on into the next epoch."""
        return max(1, math.ceil(round(epochs * len(self.rows), 6) / prompts_per_step))

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            n = len(self.rows)
            self._order = (epoch, rng.permutation(n).tolist() if self._shuffle else range(n))
        return self._order[1]


def hold_out(prompts: list[Prompt], rows: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """`rows` distinct prompts drawn by the seed, and the rest without any prompt equal to one of those: (rest, held).

    Raises DataError when there are not enough distinct prompts, or nothing would be left to train on.
    """
    order = np.random.default_rng([seed, 2]).permutation(len(prompts))
    # Recorded rows may share an empty prompt (plain text): what they record then tells them apart.
    held: dict[tuple[Any, ...], Prompt] = {}
    for i in order:
        if len(held) == rows:
            break
        held.setdefault(_key(prompts[i]), prompts[i])
    rest = without(prompts, list(held.values()))
    if len(held) < rows or not rest:
        distinct = len({_key(p) for p in prompts})
        raise DataError(
            f"eval.rows = {rows}: the data has {distinct} distinct prompts, and some must be left to train on; lower "
            f"eval.rows or give eval.data"
        )
    return rest, list(held.values())


def without(prompts: list[Prompt], held: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that equal none of `held`, token by token."""
    keys = {_key(p) for p in held}
    return [p for p in prompts if _key(p) not in keys]


def digest(prompts: Sequence[Prompt]) -> str:
    """16 hex digits that change with any token of the prompts and what they record, and with their order."""
    whole = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        for ids in (prompt.ids, *(recorded.ids for recorded in prompt.recorded)):
            whole.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
    return whole.hexdigest()


def _key(prompt: Prompt) -> tuple[Any, ...]:
    return prompt.ids or prompt.recorded[0].ids
