"""Samples, groups and micro-batches from plain lists of rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlft.batch import count, groups_of, pack, samples_of
from rlft.rewards.parts import RewardBreakdown, reward_columns
from rlft.types import Batch, Counts, FinishReason, Group, LeftOut, Outcome, PackPlan, Prompt, Rollout, Sample


def groups(
    rollouts: Sequence[Rollout], advantages: Tensor | Sequence[float] | None = None, keep: Sequence[bool] | None = None
) -> list[Group]:
    """The rollouts as groups, with advantage 1 by default; those that are not kept have no valid reward."""
    values = [1.0] * len(rollouts) if advantages is None else advantages
    made = groups_of(rollouts, values.tolist() if isinstance(values, Tensor) else values)
    for sample, kept in zip(samples_of(made), keep or [True] * len(rollouts), strict=True):
        sample.left_out = None if kept else LeftOut.INVALID
    return made


def packed(
    rollouts: Sequence[Rollout],
    plan: PackPlan,
    advantages: Tensor | Sequence[float] | None = None,
    keep: Sequence[bool] | None = None,
    counts: Counts | None = None,
) -> list[Batch]:
    """The rollouts in micro-batches. counts: of the whole update, where that is more than these."""
    made = groups(rollouts, advantages, keep)
    return pack(made, plan, counts or count(made))


def rows(batch: Batch, rollouts: Sequence[Rollout]) -> tuple[int, ...]:
    """Index among the rollouts of each sample of a micro-batch. Rollouts are told apart by row and sample."""
    index = {(rollout.prompt.index, rollout.sample_index): i for i, rollout in enumerate(rollouts)}
    assert len(index) == len(rollouts), "two rollouts of the same row and sample"
    return tuple(index[sample.rollout.prompt.index, sample.rollout.sample_index] for sample in batch.samples)


def columns(parts: RewardBreakdown) -> dict[str, list[Any]]:
    """The columns that a run writes of what reward functions returned and logged."""
    made = [
        Sample(Rollout(Prompt((), {}, i), (), (), None, "", FinishReason.STOP, 0, 0, 0))
        for i in range(len(parts.total))
    ]
    parts.store(made)
    return reward_columns(made)


def samples(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    parts: Mapping[str, Sequence[Any]] | None = None,
    advantages: Sequence[float] | None = None,
    logprobs: Mapping[int, Tensor] | None = None,
) -> list[Sample]:
    """The rollouts as samples that were scored and run. parts: "function" or "function/what it logged" -> column."""
    made = []
    for i, rollout in enumerate(rollouts):
        sample = Sample(rollout, rewards[i], rewards[i], advantage=advantages[i] if advantages else 0.0)
        for name, column in (parts or {}).items():
            function, _, logged = name.partition("/")
            if logged:
                sample.outcomes[function].extras[logged] = column[i]
            else:
                sample.outcomes[function] = Outcome(column[i], False, {})
        sample.logprobs = (logprobs or {}).get(i)
        made.append(sample)
    return made
