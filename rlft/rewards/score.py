"""Score rollouts: from the results of the reward functions to the reward of each completion.

A reward is the weighted sum of the functions' results. None or nan means "not applicable". A row on which a function
raised, hung or died is *invalid*: its reward is nan, and it is excluded from the step and counted, never scored 0. A
failed batch is bisected down to the rows at fault, within a deadline for the step. Functions in separate processes and
async functions run concurrently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlft.errors import RewardError
from rlft.rewards.build import BUILTIN as BUILTIN
from rlft.rewards.build import build_rewards as build_rewards
from rlft.rewards.function import RewardFunction
from rlft.rewards.overlap import OURS as OURS
from rlft.rewards.overlap import Scoring
from rlft.rewards.parts import OVERLONG, FunctionScores, RewardBreakdown
from rlft.types import Rollout, Sample


def score_samples(
    samples: Sequence[Sample], functions: Sequence[RewardFunction], trainer_state: dict[str, Any]
) -> RewardBreakdown:
    """Set reward, answer and outcomes of the samples, and return the breakdown by function. Raises as `score`."""
    _, parts = score([sample.rollout for sample in samples], functions, trainer_state)
    parts.store(samples)
    return parts


def score(
    rollouts: Sequence[Rollout], functions: Sequence[RewardFunction], trainer_state: dict[str, Any]
) -> tuple[Tensor, RewardBreakdown]:
    """Compute the reward of each rollout, [N] float32, nan where invalid, and its breakdown.

    Without functions these are the recorded rewards. A row is invalid when a function failed on it, or when no function
    except the overlong penalty applies to it. Raises RewardError for a function that is itself at fault.
    """
    with Scoring(functions, [rollout.prompt for rollout in rollouts], trainer_state) as scoring:
        parts = finish(scoring, rollouts, functions)
    return parts.total, parts


def finish(scoring: Scoring, rollouts: Sequence[Rollout], functions: Sequence[RewardFunction]) -> RewardBreakdown:
    """Wait for the scores of all rollouts, in order, and sum them. Raises as `score`."""
    if functions:
        return breakdown_of(scoring.finish(rollouts), {each.name: each.weight for each in functions}, len(rollouts))
    recorded_rewards = [rollout.recorded_reward for rollout in rollouts]
    assert None not in recorded_rewards, "no reward function and no recorded reward"
    total = torch.tensor(recorded_rewards, dtype=torch.float32)
    return RewardBreakdown(total, total, {})


def breakdown_of(outcomes: dict[str, FunctionScores], weights: dict[str, float], count: int) -> RewardBreakdown:
    """Sum the results of the functions, by name, for each of `count` completions."""
    total, answers = [], []
    for row in range(count):
        weighted = {name: weights[name] * outcome.values[row] for name, outcome in outcomes.items()}
        applicable = {name: value for name, value in weighted.items() if not math.isnan(value)}
        penalty = applicable.pop(OVERLONG, 0.0)
        # A penalty alone is not a reward, since there is nothing to subtract it from.
        invalid = not applicable or any(outcome.invalid[row] for outcome in outcomes.values())
        answers.append(math.nan if invalid else sum(applicable.values()))
        total.append(math.nan if invalid else sum(applicable.values()) + penalty)
    return RewardBreakdown(
        torch.tensor(total, dtype=torch.float32), torch.tensor(answers, dtype=torch.float32), outcomes
    )


def check_invalid(history: list[float], share: float, faults: Sequence[str] = ()) -> None:
    """Append the share of invalid rewards of a step to `history` (the last five steps), and stop if it is too high.

    Raises RewardError (exit code 3) when all rewards of the step, or more than half of the last five steps', are
    invalid.
    """
    history.append(share)
    del history[:-5]
    average = sum(history) / len(history)
    if share < 1 and not (len(history) == 5 and average > 0.5):
        return
    what = "every reward of this step is" if share == 1 else f"{average:.0%} of the rewards of the last five steps are"
    why = f": {'; '.join(faults)}" if faults else ""
    error = RewardError(f"{what} invalid, so there is nothing to learn from{why}")
    error.exit_code = 3
    raise error
