"""Choose how many tokens a micro-batch should have: the number that takes the least time within the memory.

A micro-batch takes the time of the GPU's work, or of the host's launches where that is longer:

    matrix products of the layers, the work around them, recomputation and decoding, and the head;
    layers * LAUNCHING_MORE, unless a CUDA graph runs it.

With few tokens, launches dominate, weights are decoded more often, and prompts are repeated whose completions are in
several micro-batches; with many, less is saved for the backward. The constants serve to compare sizes with each other,
not to predict the time of a step. s: sizes of the decoder.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.plan_search import FLOPS, capturable, choose_plan, cost_of

BUDGETS = (*range(32768, 16384, -4096), *range(16384, 8192, -2048), *range(8192, 6144, -1024), *range(6144, 4095, -512))
"""Tokens per micro-batch that are compared, largest first."""
LAUNCH_SECONDS = 3.4e-3
"""Seconds of host time to launch a layer's forward and backward at L0. Measured by benchmarks/host_time.py on an H100
machine."""
LAUNCH_SECONDS_MAX = 5.9e-3
"""Upper bound of the same with shared prompts and weights that are decoded every time. Measured (recorded_tight): time
per layer of a step of 56 micro-batches of 1,024 tokens, which is bound by launches; head and loss included."""
LAYER_OVERHEAD = 1.35
"""Time of a layer over that of its matrix products, for sequences with little attention. Measured (recorded_tight)."""
SHORT_SEQUENCE_FACTOR = 1.5
"""Factor on the costs of levels for short sequences, since `Level.cost` was measured at 32,768 tokens. L4 recomputes
74% of a layer's forward products (all but down), L1 52% (gate, up), and the layers' products are half of a step of an
8B model (recorded_tight): 20 and 14% of the step if every layer does."""


def device_seconds(s: DecoderShape, rows: int) -> float:
    """Return the time of the matrix products of a layer's forward and backward at L0."""
    return 4 * s.weights * rows / FLOPS


def head_seconds(s: DecoderShape, trained: int) -> float:
    """Return the time of the head's two matrix products."""
    return 4 * s.hidden * s.vocab * trained / FLOPS


class Group(NamedTuple):
    """Tokens of a prompt and of all its completions. Every micro-batch with a part of them repeats the prompt."""

    prompt: int
    completions: int

    def useful(self, rows: int) -> float:
        """Return the share of completion tokens in micro-batches of `rows` tokens."""
        tokens = min(rows, self.prompt + self.completions)
        # If a prompt is longer than a micro-batch, each row runs alone, whatever the budget is.
        return max(1 - self.prompt / tokens, 1 / 16)


ALONE = Group(0, 1)
"""Rows that share nothing."""


def token_budget(
    s: DecoderShape, device_bytes: float, host_bytes: float, group: Group = ALONE, graphs: bool = True
) -> int:
    """Return the tokens per micro-batch that take the least time per completion token, the most among equals.

    Returns the least of `BUDGETS` if none fits. group: a typical group, if its completions may be in several
    micro-batches. graphs: CUDA graphs may run the decoder.
    """

    def seconds(rows: int) -> float:
        plan = choose_plan(s, rows, rows, device_bytes, host_bytes)
        if plan.peak > device_bytes:
            return math.inf
        cost = cost_of(s, plan, plan.levels, rows, SHORT_SEQUENCE_FACTOR) / 100
        device = device_seconds(s, rows)
        captured = graphs and device < LAUNCH_SECONDS and capturable(s, plan, device_bytes)
        busy = s.layers * LAYER_OVERHEAD * device * (1 + cost) + head_seconds(s, rows)
        elapsed = max(busy, 0.0 if captured else s.layers * LAUNCH_SECONDS_MAX)
        # Rounded to three digits, so that nearly equal times count as equal.
        return float(f"{elapsed / (rows * group.useful(rows)):.3g}")

    best = min(BUDGETS, key=seconds)
    return best if seconds(best) < math.inf else BUDGETS[-1]
