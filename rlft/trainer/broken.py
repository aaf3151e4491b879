"""A policy that is broken ends the run, with the sentence that fits: values that are not finite, or nothing to train.

Every micro-batch counts its log-probs and entropies that are not finite (`step_metrics.batch_stats`); the counts are
read with the step's other metrics, so looking makes no wait for a GPU. What is at fault is found out only once there is
something to say: the adapter, the base's weights, an overflow in the base's dtype, or an adapter that has grown.
Gradients that are not finite while log-probs are: `rlft.trainer.optim`. Rewards: `rlft.rewards.score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from rlft.batch import count, pack
from rlft.config.run import Config
from rlft.errors import TrainError
from rlft.models.policy import Policy
from rlft.rollout.engine import Engine, asleep
from rlft.types import Batch, PackPlan, Rollout, State


class RunView(Protocol):
    """What the checks look at of a run; `rlft.trainer.setup.Session` has it."""

    cfg: Config
    policy: Policy
    engine: Engine
    state: State
    plan: PackPlan
    steps: int


def check_step(s: RunView, values: Mapping[str, float], rollouts: Sequence[Rollout], ran: Sequence[Batch]) -> None:
    """Raise TrainError after a step whose policy is broken.

    values: the metrics of the step. rollouts: all that were drawn. ran: the micro-batches that were trained on.
    """
    state = s.state
    if values.get("nonfinite_logprobs"):
        with asleep(s.engine):
            count_ = f"{values['nonfinite_logprobs']:.0f} of the policy's log-probs"
            raise not_finite(s.policy, ran, f"step {state.step}: {count_}")
    tokens = sum(len(r.completion_ids) for r in rollouts)
    if tokens and values.get("sampling/nonfinite_logprobs") == tokens:
        # The trainer has not looked at them, since such tokens are not trained.
        with asleep(s.engine):
            which = f"step {state.step}: all {tokens} of the engine's log-probs"
            raise not_finite(s.policy, unsampled(rollouts, s.plan), which)
    state.untrained = 0 if ran else state.untrained + 1
    # A run of fewer steps has to train something too.
    if state.untrained >= min(s.cfg.optim.max_skipped, s.steps):
        raise TrainError(
            f"no token could be trained in {state.untrained} steps in a row: {_why_untrained(rollouts)}. Read the "
            f"completions: prompts, chat template or sampling.max_tokens ({s.cfg.sampling.max_tokens}) may not fit"
        )


def check_end(s: RunView, ran: Sequence[Batch]) -> None:
    """Raise TrainError when the policy after the last update is broken, or no update of a whole run was made.

    ran: micro-batches of the last step. One of them is run with its gradient, as the next step would do it: no other
    step looks at what the last update left behind.
    """
    state, lr = s.state, s.cfg.optim.lr
    if state.step == s.steps and state.updates and state.skipped_updates >= state.updates:
        raise TrainError(
            f"all {state.updates} updates of the run had a non-finite gradient and were skipped, so nothing was "
            f'trained: lower optim.lr ({lr}), set dtype = "float32", or (float16) train for more steps'
        )
    if not ran:
        return
    policy, batch = s.policy, ran[0]
    with asleep(s.engine), torch.random.fork_rng():
        logprobs, _ = policy.logprobs(batch)
        if not logprobs.isfinite().all():
            raise not_finite(policy, [batch], "after the last update the policy's log-probs")
        policy.flat.zero_grad()
        (logprobs * batch.weight.to(policy.device)).sum().backward()
        good = policy.flat.gradient.isfinite().all()
        policy.flat.zero_grad()
    if not good:
        raise TrainError(
            f"after the last update the gradient of the policy's log-probs is not finite: the adapter has grown too "
            f"large (largest value {_largest(policy):.3g}). Lower optim.lr ({lr}) and start again"
        )


def unsampled(rollouts: Sequence[Rollout], plan: PackPlan) -> list[Batch]:
    """Micro-batches with every token of the completions, whatever the engine's log-probs were."""
    shown = [replace(r, sampler_logprobs=None, completion_mask=(True,) * len(r.completion_ids)) for r in rollouts]
    plan = replace(plan, keep=(True,) * len(shown), whole_groups=False)
    return pack(shown, torch.zeros(len(shown)), plan, count(shown, plan))


def not_finite(policy: Policy, batches: Sequence[Batch], which: str) -> TrainError:
    """The error for log-probs that are not finite, with what is at fault.

    batches: where they were seen. which: the beginning of the sentence.
    """
    return TrainError(f"{which} are not finite: {_fault(policy, batches)}")


def _fault(policy: Policy, batches: Sequence[Batch]) -> str:
    """What is at fault: adapter, base, dtype or learning rate."""
    wrong = policy.flat.not_finite()
    if wrong:
        return (
            f"{len(wrong)} of the adapter's tensors are not finite, {wrong[0]} for one. An update has set them, or a "
            f"callback; go on from an earlier checkpoint with a lower optim.lr"
        )
    batch = next((batch for batch in batches if not policy.score(batch).isfinite().all()), None)
    if batch is None:
        return (
            "scored again they are finite, and so is the adapter. An engine that computes otherwise, a kernel or the "
            "machine is at fault; go on from the last checkpoint"
        )
    with policy.model.disable_adapter():
        alone = policy.score(batch).isfinite().all()
    if alone:
        return (
            f"the base alone gives finite ones, so the adapter has grown until the pass overflows (largest value "
            f"{_largest(policy):.3g}). Lower optim.lr and start again, or go on from an earlier checkpoint"
        )
    weights = {n: p for n, p in policy.base.named_parameters() if p.is_floating_point()}
    wrong = [name.replace(".base_layer", "") for name, p in weights.items() if not p.isfinite().all()]
    if wrong:
        return (
            f"{len(wrong)} of the base's weights hold values that are not finite, {wrong[0]} for one. The model's "
            f"files are damaged, or were rounded to a dtype that is too narrow"
        )
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    return (
        f"the base alone gives them too and its weights are finite, so activations overflow in {dtype}. "
        f'Set dtype = "bfloat16" or "float32"'
    )


def _largest(policy: Policy) -> float:
    return float(policy.adapter_params.detach().abs().max())


def _why_untrained(rollouts: Sequence[Rollout]) -> str:
    """Why nothing of the rollouts of a step was trained, in numbers."""
    empty = sum(not r.completion_ids for r in rollouts)
    masked = sum(bool(r.completion_ids) and not r.trained.any() for r in rollouts)
    cut = sum(r.finish_reason == "length" and bool(r.trained.any()) for r in rollouts)
    found = [
        f"{number} {what}"
        for number, what in (
            (empty, "are empty"),
            (masked, "have no token that the policy chose with a finite log-prob"),
            (cut, "were cut at sampling.max_tokens (left out with overlong.mask)"),
        )
        if number
    ]
    return f"of the {len(rollouts)} completions of the last one {', '.join(found) or 'none has a valid reward'}"
