"""The probe at the start of a run: which prompts it has, how long they are, and what it says.

Its cost is bounded: two generations of at most 64 (CPU: 16) tokens each, `parity.probe_prompts` prompts, and up to five
long ones that have at most 32,768 (CPU: 512) tokens together, unless the longest prompt of the data alone has more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from rlft.config.run import Config
from rlft.models.policy import Policy
from rlft.rollout.engine import Engine
from rlft.trainer import parity
from rlft.types import PackPlan, Prompt

LONG = {"cuda": 32768, "cpu": 512}
"""Tokens of the long prompts together."""
DRAWN = {"cuda": 64, "cpu": 16}
"""Tokens of a completion."""


def long_prompts(rows: Sequence[Prompt], longest: int, room: int) -> list[Prompt]:
    """The longest prompt of the data, one made of the data's prompts with `longest` tokens, and up to three of the next
    longest, in `room` tokens together (the first is always there): windows, RoPE scaling and chunked prefill show in
    these."""
    ordered = sorted(rows, key=lambda p: -len(p.ids))
    chosen, left = ordered[:1], room - len(ordered[0].ids)
    size = min(longest, left)
    if size > len(ordered[0].ids):
        ids: list[int] = []
        for row in itertools.cycle(ordered):
            ids += row.ids
            if len(ids) >= size:
                break
        chosen.append(replace(ordered[0], ids=tuple(ids[:size])))
        left -= size
    for row in ordered[1:4]:
        if len(row.ids) <= left:
            chosen.append(row)
            left -= len(row.ids)
    return chosen


def agree(
    cfg: Config, policy: Policy, engine: Engine, rows: Sequence[Prompt], plan: PackPlan, note: Callable[[str], None]
) -> parity.Limit:
    """Run the probe where there is an engine that samples; returns the gate's limits."""
    if not (engine.SAMPLES and cfg.parity.probe):
        return parity.limit(None, cfg.parity)
    kind, most = policy.device.type, cfg.sampling.max_tokens
    sampling = replace(cfg.sampling, group_size=1, max_tokens=min(DRAWN[kind], most))
    # A prompt reaches the positions of the longest completion at the price of a prefill.
    longest = max(len(row.ids) for row in rows) + most - sampling.max_tokens
    long = long_prompts(rows, longest, LONG[kind])
    found = parity.probe(policy, engine, rows[: cfg.parity.probe_prompts], sampling, cfg.seed, plan, long)
    limit = parity.limit(found, cfg.parity)
    note(
        f"engine and trainer agree to {found.off:.1e} nat on the base and {found.on:.1e} with a random adapter "
        f"({found.tokens} tokens, prompts of up to {max(len(p.ids) for p in long)}, shift {found.shift:.2f} nat); a "
        f"step may differ by {limit.step:.3g}, a long sequence by {limit.sequence:.3g}, a short one by more"
    )
    if found.weaker:
        note(found.weaker)
    return limit
