"""The prompts of a run: all rows of a dataset encoded, the order in which they are drawn, and held-out rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlft.config.data import Data
from rlft.data.encode import Encoder
from rlft.data.kinds import Purpose
from rlft.data.limits import NO_LIMITS, Limits
from rlft.data.reader import Reader
from rlft.data.sources import load_rows
from rlft.errors import DataError, TrainError
from rlft.types import Prompt

BATCH = 1024
"""Rows that are encoded with one call of the tokenizer."""


class Rows(list[dict[str, Any]]):
    """The rows of a dataset, read by a `Reader`."""

    def __init__(self, rows: Iterable[dict[str, Any]], reader: Reader) -> None:
        """rows: all that the reader has read."""
        super().__init__(rows)
        assert reader.kind is not None, "an empty dataset is refused"
        self.kind, self.notes = reader.kind, reader.notes()


def check_rows(data: Data, seed: int, purpose: Purpose = "") -> Rows:
    """Load the rows of a dataset and read them without a tokenizer. Raises DataError naming row and column.

    purpose: what the algorithm does with the rows.
    """
    reader = Reader(data, purpose)
    rows = Rows([reader.read(row, i) for i, row in enumerate(load_rows(data, seed))], reader)
    if "answer" in rows[0]:
        _check_answers(rows)
    return rows


def _check_answers(rows: Sequence[dict[str, Any]]) -> None:
    answer_type: type | None = None
    for i, row in enumerate(rows):
        answer = row.get("answer")
        if answer is None:
            raise DataError(f"row {i}: column answer is missing or null; give every row one, or drop the column")
        answer_type = answer_type or type(answer)
        if type(answer) is not answer_type:
            raise DataError(
                f"row {i}: column answer is {type(answer).__name__} ({answer!r}), but "
                f"{answer_type.__name__} in row 0; give all of them one type"
            )


@dataclass(frozen=True)
class LoadedPrompts:
    """Result of `load_prompts`."""

    prompts: list[Prompt]
    dropped: int
    """Number of rows dropped because their prompt is longer than `data.max_prompt_tokens`."""
    notes: list[str]
    """What the start of a run says about the rows."""


def load_prompts(
    data: Data, tokenizer: Any, seed: int, rows: Rows | None = None, limits: Limits = NO_LIMITS
) -> LoadedPrompts:
    """Load all prompts of a dataset, in order.

    seed: the run's, for generated tasks and mixtures. rows: the result of `check_rows`, if it was called before.
    limits: what the model takes. Raises DataError for any fault of a row, and when every prompt is too long.
    """
    rows = check_rows(data, seed) if rows is None else rows
    encoder = Encoder(data, tokenizer, rows.kind, limits)
    prompts, dropped = [], 0
    for index, prompt in enumerate(_encoded(encoder, rows)):
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
    return LoadedPrompts(prompts, dropped, [*rows.notes, *encoder.notes()])


def _encoded(encoder: Encoder, rows: Sequence[dict[str, Any]]) -> Iterator[Prompt]:
    """Encode the rows in batches. Raises the DataError of the first row at fault."""
    for start in range(0, len(rows), BATCH):
        for result in encoder.encode_many(rows[start : start + BATCH], start):
            if isinstance(result, DataError):
                raise result
            yield result


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
