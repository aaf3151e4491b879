"""Convert dataset rows to Prompts: token ids with the chat template applied exactly once, and recorded completions.

Kinds of rows, distinguished by their columns as in TRL:

    prompt                         a string or messages; every other column goes to the rewards
    prompt, completion             supervised: train on the completion
    prompt, completion, label      completion labelled good (true, reward 1) or bad (false, reward -1): KTO
    messages                       supervised: train on every assistant turn (rlft.data.chat)
    text                           supervised: train on every token except the first
    chosen, rejected [, prompt]    pairs; the prompt defaults to the common prefix of both sides

A string prompt becomes one user turn where the tokenizer has a chat template (`data.chat = "never"`: encoded as it is).
Prompt and completion are encoded separately and concatenated, so that the trained tokens are those an engine would
sample after the prompt. In a chat a completion ends with the template's end of turn (<|im_end|>, <end_of_turn>), which
is not always tokenizer.eos_token. Plain text ends with EOS, and so does a completion outside a chat, or in a chat whose
turns end without a token.

Faults of templates do not show in the parity check, since engine and trainer see the same tokens. They are therefore
errors here: a prompt that is already rendered, two BOS tokens, a template that opens no assistant turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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


def check_rows(data: Data, seed: int) -> list[dict[str, Any]]:
    """Load the rows of a dataset and check them without a tokenizer. Raises DataError naming row and column."""
    rows = load_rows(data, seed)
    kind = kind_of(rows[0])
    answer_type: type | None = None
    for i, row in enumerate(rows):
        missing = [column for column in KINDS[kind] if row.get(column) is None]
        if missing:
            raise DataError(
                f"row {i}: column {missing[0]} is missing or null, but row 0 has {', '.join(KINDS[kind])}; fix the "
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
class LoadedPrompts:
    """Result of `load_prompts`."""

    prompts: list[Prompt]
    dropped: int
    """Number of rows dropped because their prompt is longer than `data.max_prompt_tokens`."""


def load_prompts(data: Data, tokenizer: Any, seed: int, rows: Sequence[dict[str, Any]] | None = None) -> LoadedPrompts:
    """Load all prompts of a dataset, in order.

    seed: the run's, for generated tasks and mixtures. rows: the result of `check_rows`, if it was called before. Raises
    DataError for any fault of a row, and when every prompt is too long.
    """
    prompts, dropped = [], 0
    for index, row in enumerate(check_rows(data, seed) if rows is None else rows):
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
    return LoadedPrompts(prompts, dropped)


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


# ---- order -------------------------------------------------------------------------------------------------------


class Prompts:
    """Iterates over the prompts. Its state is `consumed`, the data cursor, and `solved`."""

    def __init__(self, rows: list[Prompt], seed: int, shuffle: bool = True) -> None:
        """Start at the first prompt. shuffle: permute the rows of each epoch by (seed, epoch)."""
        assert rows
        self.rows, self.consumed = rows, 0
        self.solved: set[int] = set()
        """Row numbers of prompts to skip."""
        self._seed, self._shuffle = seed, shuffle
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def take(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts that are not solved, continuing into the next epoch.

        Raises TrainError when all prompts are solved.
        """
        if all(row.index in self.solved for row in self.rows):
            raise TrainError(
                f"curriculum.solved_share: all {len(self.rows)} prompts are solved, so there is nothing left to draw; "
                f"the last checkpoint is the result, or give harder data"
            )
        prompts: list[Prompt] = []
        while len(prompts) < count:
            epoch, place = divmod(self.consumed, len(self.rows))
            row = self.rows[self._order_of(epoch)[place]]
            self.consumed += 1
            prompts += [row] if row.index not in self.solved else []
        return prompts

    @property
    def epoch(self) -> float:
        """Number of passes over the data so far."""
        return self.consumed / len(self.rows)

    def steps(self, prompts_per_step: int, epochs: float) -> int:
        """Return the number of steps that use every row `epochs` times; the last may continue into the next epoch."""
        return max(1, math.ceil(round(epochs * len(self.rows), 6) / prompts_per_step))

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            count = len(self.rows)
            self._order = (epoch, rng.permutation(count).tolist() if self._shuffle else range(count))
        return self._order[1]


def hold_out(prompts: list[Prompt], rows: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Hold out `rows` distinct prompts chosen by the seed. Returns (rest, held-out); the rest has no equal prompts.

    Raises DataError when there are not enough distinct prompts, or nothing would be left to train on.
    """
    order = np.random.default_rng([seed, 2]).permutation(len(prompts))
    # Recorded rows may share an empty prompt (plain text); they are then distinguished by their completions.
    by_key: dict[tuple[Any, ...], Prompt] = {}
    for i in order:
        if len(by_key) == rows:
            break
        by_key.setdefault(_key(prompts[i]), prompts[i])
    rest = exclude_prompts(prompts, list(by_key.values()))
    if len(by_key) < rows or not rest:
        distinct = len({_key(prompt) for prompt in prompts})
        raise DataError(
            f"eval.rows = {rows}: the data has {distinct} distinct prompts, and some must be left to train on; lower "
            f"eval.rows or give eval.data"
        )
    return rest, list(by_key.values())


def exclude_prompts(prompts: list[Prompt], held: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that are not equal, token by token, to any of `held`."""
    keys = {_key(prompt) for prompt in held}
    return [prompt for prompt in prompts if _key(prompt) not in keys]


def digest(prompts: Sequence[Prompt]) -> str:
    """Return 16 hex digits that depend on all tokens of the prompts and recorded completions, and on their order."""
    whole = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        for ids in (prompt.ids, *(completion.ids for completion in prompt.recorded)):
            whole.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
    return whole.hexdigest()


def _key(prompt: Prompt) -> tuple[Any, ...]:
    return prompt.ids or prompt.recorded[0].ids
