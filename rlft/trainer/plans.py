"""Plan how micro-batches are packed, and how much device memory they and the rest of a run need."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rlft.algos.algorithm import Algorithm
from rlft.config.run import Config
from rlft.data.table import table_of
from rlft.models.fused.memory import weight_bytes
from rlft.models.fused.token_budget import ALONE, Group
from rlft.models.policy import Policy
from rlft.rollout.engine import Engine
from rlft.types import PackPlan, Prompt

TYPICAL = 1024
"""Expected tokens per completion where `sampling.max_tokens` allows more."""


def pack_plan_of(cfg: Config, algorithm: Algorithm, policy: Policy, sampled: Sequence[Prompt] = ()) -> PackPlan:
    """Plan how updates are packed.

    Also sets the size of a full micro-batch, and whether there is an entropy bonus, in the fused layers. sampled:
    prompts for which groups of completions are sampled.
    """
    budget, group = cfg.packing.tokens_per_micro_batch, ALONE
    if policy.fused is not None:
        policy.fused.expect(algorithm.loss.entropy_grad)
    if budget == "auto":
        if len(sampled) and cfg.packing.share_prefix and policy.packed and not algorithm.loss.whole_groups:
            prompt = int(statistics.median(table_of(sampled).lengths().tolist()))
            group = Group(prompt, cfg.sampling.group_size * min(cfg.sampling.max_tokens, TYPICAL))
        budget = policy.token_budget(group)
    policy.set_micro_batch(budget)
    return PackPlan(
        aggregation=algorithm.aggregation,
        budget=budget,
        max_len=cfg.sampling.max_tokens,
        temperature=cfg.sampling.temperature,
        whole_groups=algorithm.loss.whole_groups,
        share_prefix=cfg.packing.share_prefix and policy.packed,
    )


def memory_plan(policy: Policy, cfg: Config, engine: Engine, tokens: int) -> dict[str, int]:
    """Return bytes of device memory by purpose.

    These are what training keeps from step to step, what the engine adds while awake, and the peak of a full
    micro-batch of `tokens` tokens.
    """
    adapter = policy.adapter_params.numel() * policy.adapter_params.element_size()
    moments = 2 * policy.adapter_params.numel() if cfg.optim.name == "adamw_8bit" else 2 * adapter
    placement = policy.fused.placement if policy.fused else None
    moved = {} if placement is None else {"layers on their way": placement.ring.bytes}
    return {
        "base": weight_bytes(policy.base)["bytes"] - (0 if placement is None else placement.elsewhere),
        **moved,
        "adapter": adapter,
        "gradient": adapter,
        "optimiser moments": moments,
        **engine.memory,
        **({"images in the vision tower": policy.vision.peak} if policy.vision else {}),
        **({f"a micro-batch of {tokens} tokens": policy.fused.plan_for(tokens).peak} if policy.fused else {}),
    }


def pass_summary(policy: Policy, tokens: int) -> str:
    """Describe how a full micro-batch runs and how much memory it takes."""
    if policy.fused is None:
        return f"micro-batches of {tokens} tokens, not planned"
    plan = policy.fused.plan_for(tokens)
    return f"a micro-batch of {tokens} tokens takes {plan.peak / 2**30:.2f} GiB ({plan})"
