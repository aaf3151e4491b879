"""Run the parity probe at the start of a run: choose its prompts and lengths, and report its result.

The cost is bounded: two generations of at most 64 (CPU: 16) tokens each, over `parity.probe_prompts` prompts and up to
five long ones. The long ones have at most 32,768 (CPU: 512) tokens together, or one prompt if that alone is longer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rlft.config.run import Config
from rlft.data.table import table_of
from rlft.models.policy import Policy
from rlft.rollout.engine import Engine
from rlft.trainer import parity
from rlft.types import PackPlan, Prompt

LONG = {"cuda": 32768, "cpu": 512}
"""Limit on the total tokens of the long prompts."""
DRAWN = {"cuda": 64, "cpu": 16}
"""Tokens of a probe completion."""


def long_prompts(rows: Sequence[Prompt], longest: int, room: int) -> list[Prompt]:
    """Choose long prompts, in which errors of sliding windows, RoPE scaling and chunked prefill show.

    These are the longest prompt of the data, one concatenated from the data's prompts to `longest` tokens, and up to
    three of the next longest. Together they have at most `room` tokens; the first is always included.
    """
    table = table_of(rows)
    by_length = np.argsort(-table.lengths(), kind="stable")
    first = table[int(by_length[0])]
    selected, remaining = [first], room - len(first.ids)
    size = min(longest, remaining)
    if size > len(first.ids):
        ids: list[int] = []
        for place in itertools.cycle(by_length):
            ids += table[int(place)].ids
            if len(ids) >= size:
                break
        selected.append(replace(first, ids=tuple(ids[:size])))
        remaining -= size
    for place in by_length[1:4]:
        row = table[int(place)]
        if len(row.ids) <= remaining:
            selected.append(row)
            remaining -= len(row.ids)
    return selected


def agree(
    cfg: Config, policy: Policy, engine: Engine, rows: Sequence[Prompt], plan: PackPlan, detail: Callable[[str], None]
) -> parity.Limit:
    """Run the probe, if enabled and the engine samples, and return the limits of the parity gate.

    detail: called with what was measured.
    """
    if not (engine.SAMPLES and cfg.parity.probe):
        return parity.limit(None, cfg.parity)
    kind, max_tokens = policy.device.type, cfg.sampling.max_tokens
    sampling = replace(cfg.sampling, group_size=1, max_tokens=min(DRAWN[kind], max_tokens))
    # A prompt this long reaches the positions of the longest completion for the cost of a prefill.
    longest = int(table_of(rows).lengths().max()) + max_tokens - sampling.max_tokens
    long = long_prompts(rows, longest, LONG[kind])
    result = parity.probe(policy, engine, rows[: cfg.parity.probe_prompts], sampling, cfg.seed, plan, long)
    limit = parity.limit(result, cfg.parity)
    detail(
        f"engine and trainer agree to {result.off:.1e} nat on the base and {result.on:.1e} with a random adapter "
        f"({result.tokens} tokens, prompts of up to {max(len(prompt.ids) for prompt in long)}, "
        f"shift {result.shift:.2f} nat); a step may differ by {limit.step:.3g}, a long sequence by "
        f"{limit.sequence:.3g}, a short one by more"
    )
    if result.weaker:
        detail(result.weaker)
    if result.live is None:
        return limit
    detail(f"with experts that the trainer's routers choose they would agree to {result.live:.1e} nat")
    return replace(limit, probed={"parity/probe": result.noise, "parity/probe_live": result.live})
