"""Collect the experts that vLLM chose for each token of the requests of a call.

Every layer of experts writes the choice of its rows into a buffer, inside of CUDA graphs too. Behind each pass the
worker adds a copy to the log, with the tokens that the rows are, as spans of positions of a request. What is exact in
the end:

- a token of a completion has the experts of the pass that sampled the token behind it. After a preemption that is the
  pass before it: what vLLM computes again to fill its cache does not count, except where it samples;
- a token of a prompt has those of the first pass over it. Later requests read that pass's keys and values from the
  cache; the last tokens of a prompt they run themselves, and other experts there, by rounding, do not count;
- a prompt whose beginning another prompt had filled the cache with has that one's experts there.

Shapes: N rows of all passes, R requests, S spans, P tokens of a prompt, L of a completion, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.errors import EngineError
from rlft.routes import type_of
from rlft.types import Prompt, Rollout

HELD = 2**25
"""Bytes of copies on the device above which they move to the host."""
FAULT = "a fault of rlft or of vLLM: set engine.routing_replay = false, and report it"


class Span(NamedTuple):
    """Rows of a pass that are neighbouring tokens of a request."""

    request: int
    start: int
    """Position of the first, from the start of the prompt."""
    count: int


class RouteLog:
    """The experts of every row of every pass since the last `take`."""

    def __init__(self, rows: int, layers: int, k: int, experts: int, device: torch.device) -> None:
        """Allocate the buffer. rows: of the largest pass. experts: of a layer, at most `rlft.routes.MOST`."""
        kind = torch.uint8 if type_of(experts) is np.uint8 else torch.int16
        self.buffer = torch.empty(rows, layers, k, dtype=kind, device=device)
        """[rows, layers, k]: of the pass that runs, or ran last."""
        self._experts = experts
        self.clear()

    def clear(self) -> None:
        """Drop what was collected, and write no expert into the buffer, which sleep leaves undefined."""
        self.drop()
        self.buffer.fill_(torch.iinfo(self.buffer.dtype).max)

    def drop(self) -> None:
        """Drop what was collected. For an engine that sleeps, whose buffer has no memory."""
        self._spans: list[np.ndarray] = []
        self._copies: list[Tensor] = []
        self._moved: list[np.ndarray] = []
        self._held = 0

    def add(self, spans: Sequence[Span]) -> None:
        """Copy the rows of a pass that was launched. spans: of its first rows, in their order. Does not wait for it."""
        rows = self.buffer[: sum(span.count for span in spans)].clone()
        self._spans.append(np.array(spans, np.int64))
        self._copies.append(rows)
        self._held += rows.nbytes
        if self._held > HELD:
            self._move()

    def _move(self) -> None:
        """Move the copies to the host. Raises EngineError for rows that are no choice of experts."""
        moved = torch.cat(self._copies).cpu().numpy()
        if moved.max() >= self._experts:
            raise EngineError(f"vLLM did not report the experts of every layer, {FAULT}")
        self._moved.append(moved)
        self._copies, self._held = [], 0

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all spans [S, 3] and the experts of their rows [N, layers, k], and drop them."""
        if self._copies:
            self._move()
        spans = np.concatenate([np.empty((0, 3), np.int64), *self._spans])
        rows = np.concatenate(self._moved) if self._moved else self.buffer[:0].cpu().numpy()
        self.drop()
        return spans, rows


def fill(log: RouteLog, rollouts: Sequence[Rollout], size: int) -> None:
    """Set the routes of all rollouts of a call, which are its requests in their order, `size` of each prompt.

    Raises EngineError for a token whose experts are not in the log.
    """
    spans, rows = log.take()
    lengths = [len(rollout.prompt.ids) + len(rollout.completion_ids) - 1 for rollout in rollouts]
    places = places_of(spans, lengths)
    prompts = [rollout.prompt for rollout in rollouts[::size]]
    of_prompts, sampled = [], []
    for slot, prompt in enumerate(prompts):
        members, end = range(slot * size, (slot + 1) * size), len(prompt.ids)
        of_prompts.append(_first([places[i][:end] for i in members]))
        sampled.append([(rollouts[i].completion_ids, places[i][end:]) for i in members])
    _fill_beginnings(prompts, of_prompts, sampled)
    shared = [rows[of_prompt] for of_prompt in of_prompts]
    for i, rollout in enumerate(rollouts):
        own = places[i][len(rollout.prompt.ids) :]
        if (own < 0).any() or rollout.routes is None:
            raise EngineError(f"vLLM did not report the experts of every token of row {rollout.prompt.index}, {FAULT}")
        completion = np.empty((len(own) + 1, *rows.shape[1:]), rows.dtype)
        completion[:-1], completion[-1] = rows[own], np.arange(rows.shape[2])
        rollout.routes.prompt, rollout.routes.completion = shared[i // size], completion


def places_of(spans: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """Return the row of each position of each request, -1 where it has none; int64 [tokens] each.

    spans: [S, 3] int64, rows in their order. lengths: tokens of each request that count. A position that was run again
    keeps its first row, except where that pass sampled the token behind it: it was the last, and no earlier pass had
    run the token behind it.
    """
    request, start, count = spans.T
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    span = np.repeat(np.arange(len(spans)), count)
    within = np.arange(len(span)) - (np.cumsum(count) - count)[span]
    position = start[span] + within
    counts = position < np.asarray(lengths, np.int64)[request[span]]
    key, row = bounds[request[span]] + position, np.arange(len(span))
    places = np.full(bounds[-1], -1, np.int64)
    # Of several values for one place NumPy keeps the last: backwards, the first.
    backwards = np.flatnonzero(counts)[::-1]
    places[key[backwards]] = row[backwards]
    # The largest end of a request's earlier passes, with room between requests for all ends.
    order = np.argsort(request, kind="stable")
    ends = (start + count)[order] + request[order] * ((start + count).max(initial=0) + 1)
    newest = np.empty(len(spans), bool)
    newest[order] = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) <= ends if len(spans) else True
    samples = counts & (within == count[span] - 1) & newest[span]
    places[key[samples]] = row[samples]
    return np.split(places, bounds[1:-1])


def _first(places: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smallest row of each position over the requests of a prompt; -1 where none has one."""
    most = np.iinfo(np.int64).max
    rows = np.min([np.where(place < 0, most, place) for place in places], axis=0)
    return np.where(rows == most, -1, rows)


def _fill_beginnings(
    prompts: Sequence[Prompt],
    places: Sequence[np.ndarray],
    sampled: Sequence[Sequence[tuple[tuple[int, ...], np.ndarray]]],
) -> None:
    """Fill in the beginnings of prompts that vLLM had in its cache from other sequences.

    places: rows of each prompt, [P]. sampled: its completions with their rows. Raises EngineError for a prompt whose
    beginning no other sequence has.
    """
    missing = [int((rows < 0).sum()) for rows in places]
    lengths = sorted(set(missing) - {0})
    known: dict[object, np.ndarray] = {}
    # The prompt that filled the cache up to a token ran that token itself, so it misses less.
    for slot in sorted(range(len(prompts)), key=missing.__getitem__):
        prompt, count = prompts[slot], missing[slot]
        if count:
            source = known.get(_beginning(prompt, prompt.ids, count))
            if source is None or (places[slot][count:] < 0).any():
                raise EngineError(f"vLLM did not report the experts of every token of row {prompt.index}, {FAULT}")
            places[slot][:count] = source[:count]
        for ids, rows in sampled[slot] if lengths else ():
            whole = np.concatenate([places[slot], rows])
            for length in lengths:
                if length <= len(whole) and (whole[:length] >= 0).all():
                    known.setdefault(_beginning(prompt, prompt.ids + ids, length), whole)


def _beginning(prompt: Prompt, ids: tuple[int, ...], tokens: int) -> object:
    """Return what the keys and values of the first tokens depend on. ids: of the prompt, and of a completion."""
    return ids[:tokens], tuple(image.digest for image in prompt.images if image.start < tokens)
