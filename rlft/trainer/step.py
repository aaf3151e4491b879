"""The training part of a step, run while the engine sleeps: advantages, micro-batches, old log-probs, updates."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from torch import Tensor

from rlft.batch import count, group_ids, pack
from rlft.dist import sum_counts, sum_tensor
from rlft.rewards.parts import RewardBreakdown
from rlft.trainer import parity
from rlft.trainer.dynamic_sampling import SampledGroups, kept_rollouts
from rlft.trainer.metrics import Metrics
from rlft.trainer.optim import Update
from rlft.trainer.out_of_memory import with_advice
from rlft.trainer.prepare import PackedStep, estimator_inputs, kl_in_reward
from rlft.trainer.setup import Session
from rlft.trainer.step_metrics import batch_stats
from rlft.types import Batch, Rollout, Stats, StepInputs


class StepResult(NamedTuple):
    """Result of training on one step."""

    advantages: Tensor
    """[N], of the rollouts kept by dynamic sampling."""
    packed: list[Batch]
    """All micro-batches of the step."""
    ran: list[Batch]
    """The micro-batches that were run in each pass."""
    updates: list[Update]


def learn(
    session: Session, sample: SampledGroups, parts: RewardBreakdown, metrics: Metrics, mismatch: parity.Mismatch
) -> StepResult:
    """Train on one step: estimate advantages, pack micro-batches and run the updates.

    metrics, mismatch: filled in place. Each part retries once when out of memory. Raises ParityError before the first
    update when engine and trainer disagree.
    """
    cfg, policy, algorithm = session.cfg, session.policy, session.algorithm
    rollouts, rewards = kept_rollouts(sample)
    retry = functools.partial(with_advice, lower=policy.lower, note=session.console.note)
    shaped_rewards, kl_stats = retry(lambda: kl_in_reward(policy, algorithm, session.plan, rollouts, rewards))
    metrics.add(kl_stats)
    inputs = estimator_inputs(
        rollouts, parts, {function.name: function.weight for function in session.functions}, sample.kept
    )
    advantages = algorithm.advantage(shaped_rewards, group_ids(rollouts), **inputs)
    packed = minibatches(session, rollouts, rewards, advantages)
    skip = cfg.packing.skip_zero_advantage and algorithm.loss.zero_adv_zero_grad
    runnable = [to_run(part, skip) for part in packed]
    # Old and new log-probs come from the same batches: another packing would add kernel noise to their ratio.
    batches = retry(lambda: [[add_other_logprobs(session, batch) for batch in part] for part in runnable])
    for batch in chain(*batches) if algorithm.old == "trainer" else ():
        assert batch.old_logprobs is not None
        mismatch.add(batch.old_logprobs, batch)
    updates = train_on(session, rollouts, packed, batches, metrics, mismatch)
    return StepResult(advantages, list(chain(*packed)), list(chain(*batches)), updates)


def minibatches(session: Session, rollouts: list[Rollout], rewards: Tensor, advantages: Tensor) -> list[list[Batch]]:
    """Split the step's groups evenly into `optim.minibatches` updates, and pack each one's micro-batches."""
    groups = group_ids(rollouts)
    total = int(groups[-1]) + 1
    parts = min(session.cfg.optim.minibatches, total)
    packed = []
    for part in range(parts):
        rows = ((groups * parts) // total == part).nonzero().flatten().tolist()
        part_rollouts = [rollouts[row] for row in rows]
        truncated = [rollout.finish_reason == "length" and session.cfg.overlong.mask for rollout in part_rollouts]
        keep = tuple(
            not invalid and not is_cut
            for invalid, is_cut in zip(rewards[rows].isnan().tolist(), truncated, strict=True)
        )
        plan = replace(session.plan, keep=keep)
        batches = pack(part_rollouts, advantages[rows], plan, sum_counts(count(part_rollouts, plan)))
        # `rows` counts the rollouts of the step, not those of the part.
        packed.append([replace(batch, rows=tuple(rows[row] for row in batch.rows)) for batch in batches])
    return packed


def prepare_update(session: Session, rollouts: list[Rollout], batches: list[Batch]) -> StepInputs:
    """Return `Batch.inputs` of an update: numbers the loss needs from the whole update, under its initial policy.

    batches: all micro-batches of the update, including those that are not run.
    """
    rows = sorted(row for batch in batches for row in batch.rows)
    view = PackedStep(session.policy, session.plan, [rollouts[row] for row in rows], batches, session.state.adapted)
    return session.algorithm.loss.prepare(view)


def add_other_logprobs(session: Session, batch: Batch) -> Batch:
    """Add the reference and old log-probs that the loss needs. Called before the first update of the step."""
    if session.algorithm.loss.needs_reference:
        batch = session.reference.fill(batch)
    if session.algorithm.old == "sampler":
        return replace(batch, old_logprobs=batch.sampler_logprobs)
    if session.algorithm.old == "trainer":
        # Planned once, so that old and new run the same computation: with an unchanged policy all ratios are 1.
        batch = session.policy.planned(batch)
        return replace(batch, old_logprobs=session.policy.score(batch))
    return batch


def train_on(
    session: Session,
    rollouts: list[Rollout],
    packed: list[list[Batch]],
    ran: list[list[Batch]],
    metrics: Metrics,
    mismatch: parity.Mismatch,
) -> list[Update]:
    """Run the updates of a step: one per list of micro-batches and pass.

    rollouts: all of the step. packed: all micro-batches of each update. ran: the micro-batches to run.
    """
    policy, state, algorithm = session.policy, session.state, session.algorithm
    queue, whole = ran * session.cfg.optim.passes, packed * session.cfg.optim.passes
    # Saved on the host, since it is read only when memory runs out between two updates.
    start = policy.adapter_params.detach().to("cpu", copy=True) if algorithm.old == "trainer" else None
    done, total = 0, sum(map(len, queue))
    updates: list[Update] = []

    def lower() -> str:
        message = policy.lower()
        if start is not None:
            queue[len(updates) :] = replan(session, queue[len(updates) :], start)
        return message

    def attempt() -> list[tuple[Tensor, Batch, Stats]]:
        inputs = prepare_update(session, rollouts, whole[len(updates)])
        return forward_backward(session, queue[len(updates)], inputs, done, total)

    while len(updates) < len(queue):
        passes = with_advice(attempt, lower, session.console.note)
        done += len(passes)
        for logprobs, batch, stats in passes:
            metrics.add(stats)
            if not updates and algorithm.old != "trainer":
                mismatch.add(logprobs, batch)
        sum_tensor(policy.flat.gradient)
        if not updates:
            sum_tensor(mismatch.sums)
            parity.gate(mismatch, session.limit, policy.score, rollouts)
        updates.append(session.optimizer.step(state.updates, state.skipped_updates))
        state.updates += 1
        state.skipped_updates = state.skipped_updates + 1 if updates[-1].skipped else 0
    return updates


def forward_backward(
    session: Session, part: list[Batch], inputs: StepInputs, done: int, total: int
) -> list[tuple[Tensor, Batch, Stats]]:
    """Accumulate the gradient of an update in the adapter's buffer.

    Returns (log-probs [T], batch, stats) of each micro-batch. inputs: from `prepare_update`. done, total: micro-batches
    of the step run so far, and in all, for the progress bar.
    """
    policy, algorithm = session.policy, session.algorithm
    policy.flat.zero_grad()
    passes: list[tuple[Tensor, Batch, Stats]] = []
    for batch in part:
        session.console.progress("training", done + len(passes), total)
        logprobs, entropy = policy.logprobs(batch, algorithm.loss.entropy_grad)
        filled_batch = replace(batch.to(policy.device), entropy=entropy, inputs=inputs)
        loss, stats = algorithm.loss(logprobs, filled_batch)
        session.optimizer.scaled(loss).backward()
        passes.append((logprobs.detach(), batch, {**stats, **batch_stats(loss, logprobs, entropy, filled_batch)}))
    return passes


def replan(session: Session, parts: list[list[Batch]], start: Tensor) -> list[list[Batch]]:
    """Plan the micro-batches again, and recompute their old log-probs under the adapter `start` [numel]."""
    flat = session.policy.adapter_params.data
    current = flat.clone()
    flat.copy_(start)
    try:
        return [[add_other_logprobs(session, replace(batch, plan=None)) for batch in part] for part in parts]
    finally:
        flat.copy_(current)


def to_run(batches: list[Batch], skip: bool) -> list[Batch]:
    """Select the micro-batches to run, without those of zero advantage when they cannot change the gradient.

    Those come last, so leaving them out changes no other micro-batch. They are still run until 256 trained tokens are
    reached, so that entropy, mismatch and the parity gate always have data.
    """
    selected, tokens = [], 0
    for batch in batches:
        if not (skip and batch.zero_advantage) or tokens < 256:
            selected.append(batch)
            tokens += int(batch.train_mask.sum())
    return selected
