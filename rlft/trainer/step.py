"""The training part of a step, run while the engine sleeps: advantages, micro-batches, losses, updates.

A step is one object. `sample_and_score` fills its groups, `pack_minibatches` packs the kept ones, `losses` and
`update` run once per mini-batch and pass. The evaluation uses the same functions without gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from rlft import dist
from rlft.algos.algorithm import Algorithm
from rlft.batch import count, micro_batch_tokens, pack, samples_of
from rlft.dist import Value
from rlft.models.policy import Policy
from rlft.rewards.parts import RewardBreakdown
from rlft.trainer import parity
from rlft.trainer.metrics import Metrics
from rlft.trainer.optim import Update
from rlft.trainer.out_of_memory import with_advice
from rlft.trainer.prepare import PackedStep, assign_advantages, dealt
from rlft.trainer.ranks import check_adapter_is_same
from rlft.trainer.session import Recorder, Trainer
from rlft.trainer.step_metrics import Clock, batch_stats
from rlft.types import Batch, Group, LeftOut, PackPlan, Rollout, Sample, Stats, StepInputs


@dataclass(eq=False)
class MiniBatch:
    """The groups of one optimiser update, packed into micro-batches."""

    groups: list[Group]
    batches: list[Batch]
    """All micro-batches."""
    ran: list[Batch]
    """The micro-batches that are run, by all ranks together."""
    runnable: list[Batch]
    """The micro-batches that this rank runs, with the reference and old log-probs that the loss needs."""


@dataclass(eq=False)
class Step:
    """One step of training, filled as it goes on."""

    groups: list[Group] = field(default_factory=list)
    """All sampled groups, those that dynamic sampling dropped included."""
    breakdown: RewardBreakdown | None = None
    """Rewards by function, over all rounds of sampling."""
    rounds: int = 0
    """Rounds of dynamic sampling after the first sample."""
    minibatches: list[MiniBatch] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    metrics: Metrics = field(default_factory=Metrics)
    mismatch: parity.Mismatch = field(default_factory=parity.Mismatch)
    passes_run: int = 0
    """Micro-batches run so far, over all mini-batches and passes."""
    start: Tensor | None = None
    """[numel] on the host: the adapter before the first update, for old log-probs that are computed again when memory
    runs out between two updates; None where the trainer computes no old log-probs."""

    @property
    def samples(self) -> list[Sample]:
        """The samples of all groups."""
        return samples_of(self.groups)

    @property
    def rollouts(self) -> list[Rollout]:
        """The rollouts of all groups."""
        return [sample.rollout for sample in self.samples]

    @property
    def packed(self) -> list[Batch]:
        """All micro-batches."""
        return [batch for minibatch in self.minibatches for batch in minibatch.batches]

    @property
    def ran(self) -> list[Batch]:
        """The micro-batches that all ranks together run in each pass."""
        return [batch for minibatch in self.minibatches for batch in minibatch.ran]

    @property
    def runnable(self) -> list[Batch]:
        """The micro-batches that this rank runs in each pass."""
        return [batch for minibatch in self.minibatches for batch in minibatch.runnable]


def advantages(
    trainer: Trainer, recorder: Recorder, step: Step, groups: Sequence[Group], weights: dict[str, float]
) -> None:
    """Estimate the advantages of the groups. weights: of each reward function."""
    policy, algorithm, plan = trainer.policy, trainer.algorithm, trainer.plan
    run = functools.partial(assign_advantages, policy, algorithm, plan, groups, weights)
    step.metrics.add(_with_advice_alone(run, policy.lower, recorder.console.note))


def _with_advice_alone(run: Callable[[], Value], lower: Callable[[], str], note: Callable[[str], None]) -> Value:
    """Return `with_advice` of a function in which ranks meet: one of several cannot run it again."""
    return with_advice(run, lower, note) if dist.is_alone() else run()


def leave_out(groups: Sequence[Group], mask_truncated: bool) -> None:
    """Leave out samples without a valid reward and, with `overlong.mask`, truncated ones."""
    for sample in samples_of(groups):
        if sample.reward != sample.reward:
            sample.left_out = LeftOut.INVALID
        elif mask_truncated and sample.rollout.truncated:
            sample.left_out = LeftOut.TRUNCATED


def pack_minibatches(trainer: Trainer, groups: Sequence[Group]) -> list[MiniBatch]:
    """Split the groups evenly into `optim.minibatches` updates, and pack each one's micro-batches."""
    leave_out(groups, trainer.cfg.overlong.mask)
    parts = min(trainer.cfg.optim.minibatches, len(groups))
    skip = trainer.cfg.packing.skip_zero_advantage and trainer.algorithm.loss.zero_adv_zero_grad
    minibatches = []
    for part in range(parts):
        own = [group for i, group in enumerate(groups) if (i * parts) // len(groups) == part]
        batches = pack(own, dealt_plan(trainer.plan, own), count(own))
        ran = to_run(batches, skip)
        minibatches.append(MiniBatch(own, batches, ran, dealt(ran)))
    return minibatches


NEARLY = 1.02
"""A budget whose fullest rank has at most this times the tokens of the best one is as good."""


def dealt_plan(plan: PackPlan, groups: Sequence[Group]) -> PackPlan:
    """Return the plan with the largest budget that lets all ranks have nearly the same number of tokens."""
    if dist.is_alone():
        return plan
    samples = samples_of(groups)
    tokens = sum(len(sample.rollout.prompt.ids) + len(sample.rollout.completion_ids) for sample in samples)
    micro_batches_of = micro_batch_tokens(groups, plan, count(groups))
    return replace(plan, budget=even_budget(tokens, dist.world(), plan.budget, micro_batches_of))


def even_budget(tokens: int, world: int, most: int, micro_batches_of: Callable[[int], Sequence[float]]) -> int:
    """Return the largest budget of up to `most` tokens with which `world` ranks have nearly the same work.

    micro_batches_of: from a budget to the tokens of its micro-batches. Tried are budgets of the fewest micro-batches
    per rank that the tokens need, and of up to three more, each also with a little room, since samples do not fill
    micro-batches to the last token.
    """
    fewest = -(-tokens // (world * most))
    budgets = {math.ceil(tokens * room / (world * (fewest + more))) for more in range(4) for room in (1.0, 1.05)}
    budgets = {max(1, min(most, budget)) for budget in budgets}
    fullest = {budget: max(dist.loads(micro_batches_of(budget), world)) for budget in sorted(budgets, reverse=True)}
    enough = NEARLY * min(fullest.values())
    return next(budget for budget, load in fullest.items() if load <= enough)


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


def score_batches(trainer: Trainer, recorder: Recorder, step: Step) -> None:
    """Add the reference and old log-probs of every micro-batch. Called before the first update of the step."""
    # Old and new log-probs come from the same batches: another packing would add kernel noise to their ratio.
    parts = [minibatch.runnable for minibatch in step.minibatches]
    scored = with_advice(
        lambda: [[with_other_logprobs(trainer, batch) for batch in part] for part in parts],
        trainer.policy.lower,
        recorder.console.note,
    )
    for minibatch, batches in zip(step.minibatches, scored, strict=True):
        minibatch.runnable = batches
    trainer.reference.share()
    if trainer.algorithm.old != "trainer":
        return
    for batch in step.runnable:
        assert batch.old_logprobs is not None
        step.mismatch.add(batch.old_logprobs, batch)
    # Saved on the host, since it is read only when memory runs out between two updates.
    step.start = trainer.policy.adapter_params.detach().to("cpu", copy=True)


def with_other_logprobs(trainer: Trainer, batch: Batch) -> Batch:
    """Return the micro-batch with the reference and old log-probs that the loss needs."""
    if trainer.algorithm.loss.needs_reference:
        batch = trainer.reference.fill(batch)
    if trainer.algorithm.old == "sampler":
        return replace(batch, old_logprobs=batch.sampler_logprobs)
    if trainer.algorithm.old == "trainer":
        # Planned once, so that old and new run the same computation: with an unchanged policy all ratios are 1.
        batch = trainer.policy.planned(batch)
        return replace(batch, old_logprobs=trainer.policy.score(batch))
    return batch


def step_inputs(
    policy: Policy, algorithm: Algorithm, plan: PackPlan, minibatch: MiniBatch, adapted: dict[str, float]
) -> StepInputs:
    """Return `Batch.inputs` of an update: numbers the loss needs from the whole update, under its initial policy."""
    packed = {id(sample) for batch in minibatch.batches for sample in batch.samples}
    rollouts = [sample.rollout for sample in samples_of(minibatch.groups) if id(sample) in packed]
    return algorithm.loss.prepare(PackedStep(policy, plan, rollouts, minibatch.batches, adapted))


def losses(trainer: Trainer, recorder: Recorder, step: Step, minibatch: MiniBatch) -> None:
    """Accumulate the gradient of an update in the adapter's buffer, and its statistics in the step.

    When memory runs out, the whole update is run again with a smaller plan.
    """

    def lower() -> str:
        message = trainer.policy.lower()
        if step.start is not None:
            _score_again(trainer, step, step.start)
        return message

    policy, algorithm, adapted = trainer.policy, trainer.algorithm, trainer.state.adapted
    inputs_of = functools.partial(step_inputs, policy, algorithm, trainer.plan, minibatch, adapted)
    inputs = _with_advice_alone(inputs_of, lower, recorder.console.note)
    run = functools.partial(_forward_backward, trainer, recorder, step, minibatch, inputs)
    passes = with_advice(run, lower, recorder.console.note)
    step.passes_run += len(passes)
    for logprobs, batch, stats in passes:
        step.metrics.add(stats)
        if not step.updates and trainer.algorithm.old != "trainer":
            step.mismatch.add(logprobs, batch)


def _forward_backward(
    trainer: Trainer, recorder: Recorder, step: Step, minibatch: MiniBatch, inputs: StepInputs
) -> list[tuple[Tensor, Batch, Stats]]:
    """Run this rank's micro-batches forward and backward; return (log-probs [T], batch, stats) of each.

    inputs: from `step_inputs`.
    """
    policy, algorithm = trainer.policy, trainer.algorithm
    policy.flat.zero_grad()
    total = len(step.runnable) * trainer.cfg.optim.passes
    passes: list[tuple[Tensor, Batch, Stats]] = []
    for batch in minibatch.runnable:
        recorder.console.progress("training", step.passes_run + len(passes), total)
        logprobs, entropy = policy.logprobs(batch, algorithm.loss.entropy_grad)
        loss, stats, here = batch_loss(policy, algorithm, batch, logprobs, entropy, inputs)
        if loss.requires_grad:  # not where the adapter is on the tower alone and no row has an image
            trainer.optimizer.scaled(loss).backward()
        passes.append((logprobs.detach(), batch, {**stats, **batch_stats(loss, logprobs, entropy, here)}))
    return passes


def batch_loss(
    policy: Policy, algorithm: Algorithm, batch: Batch, logprobs: Tensor, entropy: Tensor | None, inputs: StepInputs
) -> tuple[Tensor, Stats, Batch]:
    """Return the loss of a micro-batch, its metrics, and the batch on the policy's device.

    logprobs, entropy: [T], of the current policy. inputs: from `step_inputs`.
    """
    here = replace(batch.to(policy.device), entropy=entropy, inputs=inputs)
    return *algorithm.loss(logprobs, here), here


def _score_again(trainer: Trainer, step: Step, start: Tensor) -> None:
    """Plan all micro-batches again, and compute their old log-probs under the adapter `start` [numel]."""
    flat = trainer.policy.adapter_params.data
    current = flat.clone()
    flat.copy_(start)
    try:
        for minibatch in step.minibatches:
            minibatch.runnable = [
                with_other_logprobs(trainer, replace(batch, plan=None)) for batch in minibatch.runnable
            ]
    finally:
        flat.copy_(current)


def update(trainer: Trainer, step: Step) -> None:
    """Sum the gradient over ranks, compare engine and trainer before the first update, and apply the update.

    Raises ParityError when engine and trainer disagree.
    """
    policy, state = trainer.policy, trainer.state
    dist.sum_tensor(policy.flat.gradient)
    if not step.updates:
        step.mismatch.sum_over_ranks()
        parity.gate(step.mismatch, trainer.limit, policy.score)
        trainer.progress.before_updates()
    step.updates.append(trainer.optimizer.step(state.updates, state.skipped_updates))
    check_adapter_is_same(policy.adapter_params)
    state.updates += 1
    state.skipped_updates = state.skipped_updates + 1 if step.updates[-1].skipped else 0


def share_logprobs(step: Step) -> None:
    """Give every rank the trainer's log-probs of all samples, which the lead writes to the run folder."""
    if dist.is_alone():
        return
    step.mismatch.store_logprobs()
    samples = step.samples
    own = {i: sample.logprobs for i, sample in enumerate(samples) if sample.logprobs is not None}
    for found in dist.gather(own):
        for i, logprobs in found.items():
            samples[i].logprobs = logprobs
