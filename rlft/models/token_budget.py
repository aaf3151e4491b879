"""How many tokens a micro-batch should have: those that take the least time within the memory that there is.

A micro-batch takes what the GPU works, or what the host needs to launch it where that is more:

    products of the layers, what runs beside them, what levels run again and decoding, and the head;
    layers * LAUNCHING_MORE, unless a CUDA graph runs it.

Few tokens wait for their launches and decode the weights more often, many keep less for the backward. The constants are
for comparing sizes with each other, not for saying how long a step takes.
"""

from __future__ import annotations

import math

from rlft.models.memory import Shape, capturable, choose, cost_of

BUDGETS = (32768, 24576, 16384, 12288, 8192, 6144, 4096)
"""Tokens per micro-batch that are tried, from the most."""
LAUNCHING = 4.5e-3
"""Seconds of the host for launching a layer's forward and backward at L0, seen on an H100 machine."""
LAUNCHING_MORE = 9e-3
"""The same with shared prompts and with weights that are decoded anew, as seen at 4,096 tokens."""
FLOPS = 600e12
"""Speed of matrix products."""
BESIDE = 1.35
"""Time of a layer over that of its products, for sequences whose attention is little of it (recorded_tight)."""
SHORT = 5.0
"""How much more the levels cost of such sequences' time than of the 32,768 tokens that their costs are from: at 8,192
tokens of an 8B model three of eight layers at L4 took 17 to 25% of a step."""


def device_seconds(s: Shape, rows: int) -> float:
    """Of the products of a layer's forward and backward at L0."""
    return 4 * s.weights * rows / FLOPS


def head_seconds(s: Shape, trained: int) -> float:
    """Of the head's two products."""
    return 4 * s.hidden * s.vocab * trained / FLOPS


def token_budget(s: Shape, device_bytes: float, host_bytes: float) -> int:
    """Tokens per micro-batch that take the least time per token, the most among equals; the least of `BUDGETS` where
    none fits."""

    def seconds(rows: int) -> float:
        plan = choose(s, rows, rows, device_bytes, host_bytes)
        if plan.peak > device_bytes:
            return math.inf
        cost = cost_of(plan, plan.levels, rows, SHORT) / 100
        device = device_seconds(s, rows)
        captured = device < LAUNCHING and capturable(s, plan, device_bytes)
        busy = s.layers * BESIDE * device * (1 + cost) + head_seconds(s, rows)
        # To three digits, so that equal ones are equal.
        return float(f"{max(busy, 0.0 if captured else s.layers * LAUNCHING_MORE) / rows:.3g}")

    best = min(BUDGETS, key=seconds)
    return best if seconds(best) < math.inf else BUDGETS[-1]
