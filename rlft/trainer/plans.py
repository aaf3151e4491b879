"""How a micro-batch is packed, and what it and the rest of a run take of the device's memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rlft.algos.algorithm import Algorithm
from rlft.config.run import Config
from rlft.models.fused.memory import weight_bytes
from rlft.models.fused.token_budget import ALONE, Group
from rlft.models.policy import Policy
from rlft.rollout.engine import Engine
from rlft.types import PackPlan, Prompt

TYPICAL = 1024
"""Tokens that completions are taken to have where they may have more."""


def pack_plan_of(cfg: Config, algorithm: Algorithm, policy: Policy, sampled: Sequence[Prompt] = ()) -> PackPlan:
    """How updates are packed; `keep` is left empty. The fused layers are told how long a full micro-batch is, and
    whether there is an entropy bonus. sampled: prompts that groups of completions are drawn for."""
    budget, group = cfg.packing.tokens_per_micro_batch, ALONE
    if policy.fused is not None:
        policy.fused.expect(algorithm.entropy_grad)
    if budget == "auto":
        if sampled and cfg.packing.share_prefix and policy.packed and not algorithm.whole_groups:
            prompt = int(statistics.median(len(p.ids) for p in sampled))
            group = Group(prompt, cfg.sampling.group_size * min(cfg.sampling.max_tokens, TYPICAL))
        budget = policy.token_budget(group)
    if policy.fused is not None:
        policy.fused.full = budget
    return PackPlan(
        keep=(),
        aggregation=algorithm.aggregation,
        budget=budget,
        max_len=cfg.sampling.max_tokens,
        temperature=cfg.sampling.temperature,
        whole_groups=algorithm.whole_groups,
        share_prefix=cfg.packing.share_prefix and policy.packed,
    )


def memory_plan(policy: Policy, cfg: Config, engine: Engine, tokens: int) -> dict[str, int]:
    """Bytes on the device of what the training keeps from step to step, of what the engine takes on top while it is
    awake, and of a full micro-batch at its peak. tokens: of a full micro-batch."""
    adapter = policy.adapter_params.numel() * policy.adapter_params.element_size()
    moments = 2 * policy.adapter_params.numel() if cfg.optim.name == "adamw_8bit" else 2 * adapter
    return {
        "base": weight_bytes(policy.base)["bytes"],
        "adapter": adapter,
        "gradient": adapter,
        "optimiser moments": moments,
        **engine.memory,
        **({f"a micro-batch of {tokens} tokens": policy.fused.plan_for(tokens).peak} if policy.fused else {}),
    }


def pass_summary(policy: Policy, tokens: int) -> str:
    """How a full micro-batch runs, and what it takes."""
    if policy.fused is None:
        return f"micro-batches of {tokens} tokens, not planned"
    plan = policy.fused.plan_for(tokens)
    return f"a micro-batch of {tokens} tokens takes {plan.peak / 2**30:.2f} GiB ({plan})"
