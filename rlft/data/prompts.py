"""The prompts of a run: all rows of a dataset encoded, the order in which they are drawn, and held-out rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlft.config.data import Data
from rlft.data.encode import Encoder
from rlft.data.image_readers import advice
from rlft.data.limits import NO_LIMITS, Limits
from rlft.data.table import Encoded, PromptTable
from rlft.data.usable import Drops, Rows, check_rows, nothing_left, stopped
from rlft.errors import DataError, TrainError
from rlft.types import Prompt

TOO_LONG = "prompt longer than max_prompt_tokens"
"""Reason of a row that is left out for its length."""


@dataclass(frozen=True)
class LoadedPrompts:
    """Result of `load_prompts`."""

    prompts: PromptTable
    drops: Drops
    """The rows that are left out: those that cannot be used, and those whose prompt is too long."""
    notes: list[str]
    """What the start of a run says about the other rows."""


def load_prompts(
    data: Data, tokenizer: Any, seed: int, rows: Rows | None = None, limits: Limits = NO_LIMITS
) -> LoadedPrompts:
    """Load all prompts of a dataset, in order.

    seed: the run's, for generated tasks and mixtures. rows: the result of `check_rows`, if it was called before.
    limits: what the model takes. Raises
    DataError for a row that cannot be used, unless `data.on_error` leaves such rows out, and when no row is left.
    """
    rows = check_rows(data, seed) if rows is None else rows
    encoder, encoded, drops, place = Encoder(data, tokenizer, rows.kind, limits), Encoded(rows), Drops(rows.drops), 0
    for start, run in rows.runs():
        for number, row, prompt in zip(itertools.count(start), run, encoder.encode_many(run, start)):
            outcome = prompt if isinstance(prompt, DataError) else too_long(prompt, data) or prompt
            if isinstance(outcome, Prompt):
                encoded.append(outcome, row, place)
            elif (data.long_prompts if outcome.reason == TOO_LONG else data.on_error) == "drop":
                drops.add(number, outcome, row)
            elif outcome.reason == TOO_LONG:
                raise outcome
            else:
                raise stopped(outcome, 0, len(encoded) > 0)
            place += 1
    if not len(encoded):
        long = drops.counts[TOO_LONG]
        if long == len(rows):
            raise DataError(
                f"every prompt is longer than data.max_prompt_tokens = {data.max_prompt_tokens} ({long} rows): raise it"
            )
        raise nothing_left(drops)
    return LoadedPrompts(PromptTable(encoded), drops, [*rows.notes, *encoder.notes()])


def too_long(prompt: Prompt, data: Data) -> DataError | None:
    """Return the error of a prompt longer than `data.max_prompt_tokens`."""
    if data.max_prompt_tokens is None or len(prompt.ids) <= data.max_prompt_tokens:
        return None
    return DataError(
        f"row {prompt.index}: the prompt has {len(prompt.ids)} tokens{advice(prompt)}, data.max_prompt_tokens is "
        f'{data.max_prompt_tokens}; raise it, or set data.long_prompts = "drop"',
        reason=TOO_LONG,
    )


class Prompts:
    """Iterates over the prompts. Its state is `consumed`, the data cursor, and `solved`."""

    def __init__(self, rows: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
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
        if len(self.solved) >= len(self.rows) and all(row.index in self.solved for row in self.rows):
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


def hold_out(prompts: PromptTable, rows: int, seed: int) -> tuple[PromptTable, PromptTable]:
    """Hold out `rows` distinct prompts chosen by the seed. Returns (rest, held-out); the rest has no equal prompts.

    Raises DataError when there are not enough distinct prompts, or nothing would be left to train on.
    """
    keys = prompts.keys()
    by_key: dict[bytes, int] = {}
    for place in np.random.default_rng([seed, 2]).permutation(len(prompts)):
        if len(by_key) == rows:
            break
        by_key.setdefault(keys[place], int(place))
    rest = [place for place, key in enumerate(keys) if key not in by_key]
    if len(by_key) < rows or not rest:
        raise DataError(
            f"eval.rows = {rows}: the data has {len(set(keys))} distinct prompts, and some must be left to train on; "
            f"lower eval.rows or give eval.data"
        )
    return prompts.select(rest), prompts.select(list(by_key.values()))


def exclude_prompts(prompts: PromptTable, held: PromptTable) -> PromptTable:
    """Return the prompts that are not equal, token by token and image by image, to any of `held`."""
    keys = set(held.keys())
    return prompts.select([place for place, key in enumerate(prompts.keys()) if key not in keys])
