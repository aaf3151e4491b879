"""Stop the run when the policy is broken: its log-probs are not finite, or there is nothing to train on.

Every micro-batch counts its log-probs and entropies that are not finite (`step_metrics.batch_stats`). The counts are
read with the step's other metrics, so the check adds no GPU synchronisation. The cause (adapter, base weights, overflow
in the base's dtype, an adapter that has grown too large) is searched for only when the check fails. For gradients that
are not finite see `rlft.trainer.optim`, for rewards `rlft.rewards.score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlft.batch import pack_all
from rlft.errors import TrainError
from rlft.models.policy import Policy
from rlft.models.random_state import kept_random_state
from rlft.rollout.engine import Engine, asleep
from rlft.trainer.session import Trainer
from rlft.types import Batch, PackPlan, Rollout


def check_step(
    trainer: Trainer, engine: Engine, values: Mapping[str, float], rollouts: Sequence[Rollout], ran: Sequence[Batch]
) -> None:
    """Raise TrainError after a step whose policy is broken.

    values: the metrics of the step. rollouts: all sampled ones. ran: the micro-batches that were trained on.
    """
    state = trainer.state
    if values.get("nonfinite_logprobs"):
        with asleep(engine):
            subject = f"{values['nonfinite_logprobs']:.0f} of the policy's log-probs"
            raise not_finite(trainer.policy, ran, f"step {state.step}: {subject}")
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    if tokens and values.get("sampling/nonfinite_logprobs") == tokens:
        # The trainer has not scored them, since such tokens are not trained.
        with asleep(engine):
            which = f"step {state.step}: all {tokens} of the engine's log-probs"
            raise not_finite(trainer.policy, unsampled(rollouts, trainer.plan), which)
    max_tokens = trainer.cfg.sampling.max_tokens
    state.untrained = 0 if ran else state.untrained + 1
    # A run of fewer steps must train on something too.
    if state.untrained >= min(trainer.cfg.optim.max_skipped, trainer.steps):
        raise TrainError(
            f"no token could be trained in {state.untrained} steps in a row: {_why_untrained(rollouts)}. Read the "
            f"completions: prompts, chat template or sampling.max_tokens ({max_tokens}) may not fit"
        )


def check_end(trainer: Trainer, engine: Engine, ran: Sequence[Batch]) -> None:
    """Raise TrainError when the policy after the last update is broken, or no update of a whole run was made.

    ran: micro-batches of the last step. One of them is run forward and backward as in a further step, since no later
    step would check the result of the last update.
    """
    state, lr = trainer.state, trainer.cfg.optim.lr
    if state.step == trainer.steps and state.updates and state.skipped_updates >= state.updates:
        raise TrainError(
            f"all {state.updates} updates of the run had a non-finite gradient and were skipped, so nothing was "
            f'trained: lower optim.lr ({lr}), set dtype = "float32", or (float16) train for more steps'
        )
    if not ran:
        return
    policy, batch = trainer.policy, ran[0]
    with asleep(engine), kept_random_state():
        logprobs, _ = policy.logprobs(batch)
        if not logprobs.isfinite().all():
            raise not_finite(policy, [batch], "after the last update the policy's log-probs")
        policy.flat.zero_grad()
        if logprobs.requires_grad:  # see `step`
            (logprobs * batch.weight.to(policy.device)).sum().backward()
        good = policy.flat.gradient.isfinite().all()
        policy.flat.zero_grad()
    if not good:
        raise TrainError(
            f"after the last update the gradient of the policy's log-probs is not finite: the adapter has grown too "
            f"large (largest value {_largest(policy):.3g}). Lower optim.lr ({lr}) and start again"
        )


def unsampled(rollouts: Sequence[Rollout], plan: PackPlan) -> list[Batch]:
    """Pack micro-batches that train every completion token, even where the engine's log-probs are not finite."""
    unmasked = [
        replace(rollout, sampler_logprobs=None, completion_mask=(True,) * len(rollout.completion_ids))
        for rollout in rollouts
    ]
    return pack_all(unmasked, plan)


def not_finite(policy: Policy, batches: Sequence[Batch], which: str) -> TrainError:
    """Return the error for log-probs that are not finite, naming the cause.

    batches: micro-batches that have such log-probs. which: the beginning of the message.
    """
    return TrainError(f"{which} are not finite: {_fault(policy, batches)}")


def _fault(policy: Policy, batches: Sequence[Batch]) -> str:
    """Describe the cause: adapter, base, dtype or learning rate."""
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
        base_is_finite = policy.score(batch).isfinite().all()
    if base_is_finite:
        return (
            f"the base alone gives finite ones, so the adapter has grown until the pass overflows (largest value "
            f"{_largest(policy):.3g}). Lower optim.lr and start again, or go on from an earlier checkpoint"
        )
    weights = {name: parameter for name, parameter in policy.base.named_parameters() if parameter.is_floating_point()}
    wrong = [name.replace(".base_layer", "") for name, parameter in weights.items() if not parameter.isfinite().all()]
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
    """Describe in numbers why no rollout of a step was trained."""
    empty = sum(not rollout.completion_ids for rollout in rollouts)
    untrainable = sum(bool(rollout.completion_ids) and not rollout.trained.any() for rollout in rollouts)
    truncated = sum(rollout.truncated and bool(rollout.trained.any()) for rollout in rollouts)
    reasons = [
        f"{number} {what}"
        for number, what in (
            (empty, "are empty"),
            (untrainable, "have no token that the policy chose with a finite log-prob"),
            (truncated, "were cut at sampling.max_tokens (left out with overlong.mask)"),
        )
        if number
    ]
    return f"of the {len(rollouts)} completions of the last one {', '.join(reasons) or 'none has a valid reward'}"
