"""How many tokens a micro-batch should have: those that take the least time within the memory that there is.

A micro-batch takes what the GPU works, or what the host needs to launch it where that is more:

    products of the layers, what runs beside them, what levels run again and decoding, and the head;
    layers * LAUNCHING_MORE, unless a CUDA graph runs it.

Few tokens wait for their launches, decode the weights more often and repeat prompts that completions elsewhere share;
many keep less for the backward. The constants are for comparing sizes with each other, not for saying how long a step
takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rlft.models.fused.memory import FLOPS, DecoderShape, capturable, choose_plan, cost_of

BUDGETS = (*range(32768, 16384, -4096), *range(16384, 8192, -2048), *range(8192, 6144, -1024), *range(6144, 4095, -512))
"""Tokens per micro-batch that are tried, from the most."""
LAUNCHING = 3.4e-3
"""Seconds of the host for launching a layer's forward and backward at L0: 4.5 ms seen on an H100 machine, by as much
less as benchmarks/host_time.py has found since."""
LAUNCHING_MORE = 5.9e-3
"""The same with shared prompts and weights that are decoded anew, at most: what a step of 56 micro-batches of 1,024
tokens, which waits for its launches, takes for each layer of each, head and loss included (recorded_tight, de06613)."""
BESIDE = 1.35
"""Time of a layer over that of its products, for sequences whose attention is little of it (recorded_tight)."""
SHORT = 1.5
"""How much more the levels cost of such sequences' time than of the 32,768 tokens that their costs are from. L4 runs
74% of a layer's forward products again (all but down), L1 52% (gate, up), and the layers' products are half of a step
of an 8B model (recorded_tight): 20 and 14% of it where every layer does."""


def device_seconds(s: DecoderShape, rows: int) -> float:
    """Of the products of a layer's forward and backward at L0."""
    return 4 * s.weights * rows / FLOPS


def head_seconds(s: DecoderShape, trained: int) -> float:
    """Of the head's two products."""
    return 4 * s.hidden * s.vocab * trained / FLOPS


class Group(NamedTuple):
    """Tokens of a prompt and of all its completions. Micro-batches that hold a part of them each repeat the prompt."""

    prompt: int
    completions: int

    def useful(self, rows: int) -> float:
        """Share of the completions in micro-batches of `rows` tokens."""
        held = min(rows, self.prompt + self.completions)
        # Where a prompt is longer than a micro-batch each row runs alone, whatever the budget is.
        return max(1 - self.prompt / held, 1 / 16)


ALONE = Group(0, 1)
"""Rows that share nothing."""


def token_budget(s: DecoderShape, device_bytes: float, host_bytes: float, group: Group = ALONE) -> int:
    """Tokens per micro-batch that take the least time per completion's token, the most among equals; the least of
    `BUDGETS` where none fits. group: a typical one, where its completions may be in several micro-batches."""

    def seconds(rows: int) -> float:
        plan = choose_plan(s, rows, rows, device_bytes, host_bytes)
        if plan.peak > device_bytes:
            return math.inf
        cost = cost_of(s, plan, plan.levels, rows, SHORT) / 100
        device = device_seconds(s, rows)
        captured = device < LAUNCHING and capturable(s, plan, device_bytes)
        busy = s.layers * BESIDE * device * (1 + cost) + head_seconds(s, rows)
        took = max(busy, 0.0 if captured else s.layers * LAUNCHING_MORE)
        # To three digits, so that equal ones are equal.
        return float(f"{took / (rows * group.useful(rows)):.3g}")

    best = min(BUDGETS, key=seconds)
    return best if seconds(best) < math.inf else BUDGETS[-1]
