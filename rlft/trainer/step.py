"""What a step does while the engine sleeps: advantages, packed micro-batches, old log-probs, and the updates."""

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
from rlft.types import Batch, Rollout, Stats


class StepResult(NamedTuple):
    """What the training of one step did."""

    advantages: Tensor
    """[N] of the rollouts that were kept."""
    packed: list[Batch]
    """All micro-batches of the step."""
    ran: list[Batch]
    """Those that were run in each pass."""
    updates: list[Update]


def learn(
    s: Session, drawn: SampledGroups, parts: RewardBreakdown, metrics: Metrics, mismatch: parity.Mismatch
) -> StepResult:
    """Advantages, micro-batches and updates of one step, while the engine sleeps.

    metrics, mismatch: filled. Each part answers one out-of-memory error. Raises ParityError before the first update
    where engine and trainer disagree.
    """
    cfg, policy, algorithm = s.cfg, s.policy, s.algorithm
    rollouts, rewards = kept_rollouts(drawn)
    retried = functools.partial(with_advice, lower=policy.lower, note=s.console.note)
    shaped, known = retried(lambda: kl_in_reward(policy, algorithm, s.plan, rollouts, rewards))
    metrics.add(known)
    inputs = estimator_inputs(rollouts, parts, {f.name: f.weight for f in s.functions}, drawn.kept)
    advantages = algorithm.advantage(shaped, group_ids(rollouts), **inputs)
    packed = minibatches(s, rollouts, rewards, advantages)
    skip = cfg.packing.skip_zero_advantage and algorithm.zero_adv_zero_grad
    some = [to_run(part, skip) for part in packed]
    # The same batches for old and now: packed otherwise, their difference would be noise of the kernels.
    ran = retried(lambda: [[filled(s, batch) for batch in part] for part in some])
    for batch in chain(*ran) if algorithm.old == "trainer" else ():
        assert batch.old_logprobs is not None
        mismatch.add(batch.old_logprobs, batch)
    updates = train_on(s, rollouts, packed, ran, metrics, mismatch)
    return StepResult(advantages, list(chain(*packed)), list(chain(*ran)), updates)


def minibatches(s: Session, rollouts: list[Rollout], rewards: Tensor, advantages: Tensor) -> list[list[Batch]]:
    """The packed micro-batches of each update: the step's groups in `optim.minibatches` parts, as even as possible."""
    groups = group_ids(rollouts)
    total = int(groups[-1]) + 1
    parts = min(s.cfg.optim.minibatches, total)
    packed = []
    for part in range(parts):
        rows = ((groups * parts) // total == part).nonzero().flatten().tolist()
        some = [rollouts[row] for row in rows]
        cut = [r.finish_reason == "length" and s.cfg.overlong.mask for r in some]
        keep = tuple(not invalid and not c for invalid, c in zip(rewards[rows].isnan().tolist(), cut, strict=True))
        plan = replace(s.plan, keep=keep)
        made = pack(some, advantages[rows], plan, sum_counts(count(some, plan)))
        # Which rollouts of the step they are, and not of the part.
        packed.append([replace(batch, rows=tuple(rows[row] for row in batch.rows)) for batch in made])
    return packed


def prepared(s: Session, rollouts: list[Rollout], batches: list[Batch]) -> dict[str, float]:
    """`Batch.prepared` of an update: what the loss needs to know about everything that the update trains on, of the
    policy that it starts from. batches: its micro-batches, those that are not run too."""
    if s.algorithm.prepare is None:
        return {}
    rows = sorted(row for batch in batches for row in batch.rows)
    look = PackedStep(s.policy, s.plan, [rollouts[row] for row in rows], batches)
    return s.state.adapted | s.algorithm.prepare(look, s.algorithm.config)


def filled(s: Session, batch: Batch) -> Batch:
    """The batch with the other policies' log-probs that the loss wants, before the first update of the step."""
    if s.algorithm.needs_reference:
        batch = s.reference.fill(batch)
    if s.algorithm.old == "sampler":
        return replace(batch, old_logprobs=batch.sampler_logprobs)
    if s.algorithm.old == "trainer":
        # Planned once, so that now is the same computation as old: ratios of a policy that does not move are 1.
        batch = s.policy.planned(batch)
        return replace(batch, old_logprobs=s.policy.score(batch))
    return batch


def train_on(
    s: Session,
    rollouts: list[Rollout],
    packed: list[list[Batch]],
    ran: list[list[Batch]],
    metrics: Metrics,
    mismatch: parity.Mismatch,
) -> list[Update]:
    """The updates of a step, one for each of the lists of micro-batches and pass over them.

    rollouts: those of the step. packed: all micro-batches of each update; ran: those that are run.
    """
    policy, state, algorithm = s.policy, s.state, s.algorithm
    queue, whole = ran * s.cfg.optim.passes, packed * s.cfg.optim.passes
    # On the host: it is read only where memory is exhausted between two updates.
    start = policy.adapter_params.detach().to("cpu", copy=True) if algorithm.old == "trainer" else None
    done, total = 0, sum(map(len, queue))
    updates: list[Update] = []

    def lower() -> str:
        said = policy.lower()
        if start is not None:
            queue[len(updates) :] = planned_again(s, queue[len(updates) :], start)
        return said

    def attempt() -> list[tuple[Tensor, Batch, Stats]]:
        numbers = prepared(s, rollouts, whole[len(updates)])
        return forward_backward(s, queue[len(updates)], numbers, done, total)

    while len(updates) < len(queue):
        passes = with_advice(attempt, lower, s.console.note)
        done += len(passes)
        for logprobs, batch, stats in passes:
            metrics.add(stats)
            if not updates and algorithm.old != "trainer":
                mismatch.add(logprobs, batch)
        sum_tensor(policy.flat.gradient)
        if not updates:
            sum_tensor(mismatch.sums)
            parity.gate(mismatch, s.limit, policy.score, rollouts)
        updates.append(s.optimizer.step(state.updates, state.skipped_updates))
        state.updates += 1
        state.skipped_updates = state.skipped_updates + 1 if updates[-1].skipped else 0
    return updates


def forward_backward(
    s: Session, part: list[Batch], numbers: dict[str, float], done: int, total: int
) -> list[tuple[Tensor, Batch, Stats]]:
    """The gradient of an update into the adapter's buffer. Returns each micro-batch with its log-probs [T] and numbers.

    numbers: `prepared`. done, total: micro-batches of the step before these, and all, for the progress bar.
    """
    policy, algorithm = s.policy, s.algorithm
    policy.flat.zero_grad()
    passes: list[tuple[Tensor, Batch, Stats]] = []
    for batch in part:
        s.console.progress("training", done + len(passes), total)
        logprobs, entropy = policy.logprobs(batch, algorithm.entropy_grad)
        here = replace(batch.to(policy.device), entropy=entropy, prepared=numbers)
        loss, stats = algorithm.loss(logprobs, here, algorithm.config)
        s.optimizer.scaled(loss).backward()
        passes.append((logprobs.detach(), batch, {**stats, **batch_stats(loss, logprobs, entropy, here)}))
    return passes


def planned_again(s: Session, parts: list[list[Batch]], start: Tensor) -> list[list[Batch]]:
    """Micro-batches with new plans, and with old log-probs of the adapter `start` [numel] computed by these."""
    flat = s.policy.adapter_params.data
    now = flat.clone()
    flat.copy_(start)
    try:
        return [[filled(s, replace(batch, plan=None)) for batch in part] for part in parts]
    finally:
        flat.copy_(now)


def to_run(batches: list[Batch], skip: bool) -> list[Batch]:
    """The micro-batches to run: without those of zero advantage when they cannot change the gradient.

    They come last, so leaving them out changes no other. Some are run all the same until 256 trained tokens are, so
    that entropy, mismatch and the parity gate always have something to look at.
    """
    chosen, tokens = [], 0
    for batch in batches:
        if not (skip and batch.zero_advantage) or tokens < 256:
            chosen.append(batch)
            tokens += int(batch.train_mask.sum())
    return chosen
