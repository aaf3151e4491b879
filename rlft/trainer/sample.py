"""Sample completions of the next prompts and score them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlft.batch import groups_of, samples_of
from rlft.errors import EngineError
from rlft.rewards.parts import RewardBreakdown
from rlft.rewards.score import check_invalid, score_samples
from rlft.trainer.dynamic_sampling import solved
from rlft.trainer.session import Sampler, Trainer
from rlft.trainer.step import Step
from rlft.types import Group, Rollout


def sample_and_score(sampler: Sampler, trainer: Trainer, step: Step, count: int, round_: int) -> list[Group]:
    """Take `count` prompts from the data, sample a group of completions for each, and score them.

    round_: 0 for the first sample of the step, 1 onwards when dynamic sampling replaces groups.
    """
    groups = sample(sampler, trainer, step, count, round_)
    score(sampler, trainer, step, groups)
    return groups


def sample(sampler: Sampler, trainer: Trainer, step: Step, count: int, round_: int) -> list[Group]:
    """Sample a group of completions for each of the next `count` prompts."""
    seed, number = trainer.cfg.seed, trainer.state.step
    # The third number is far above any prompt's position, so that no two samples of a run share a seed.
    stream = (seed, number) if round_ == 0 else (seed, number, 2**31 + round_)
    with step.clock("generate"):
        rollouts = sampler.engine.generate(sampler.prompts.take(count), trainer.cfg.sampling, stream)
        check_versions(rollouts, number)
    return groups_of(rollouts)


def score(sampler: Sampler, trainer: Trainer, step: Step, groups: Sequence[Group]) -> None:
    """Set the rewards of the groups, and take rows out of the data that the curriculum calls solved."""
    cfg, samples = trainer.cfg, samples_of(groups)
    with step.clock("reward"):
        breakdown = score_samples(samples, sampler.functions, trainer_state(sampler, trainer))
        invalid = float(breakdown.total.isnan().float().mean())
        check_invalid(trainer.state.invalid_history, invalid, breakdown.faults())
    step.breakdown = breakdown if step.breakdown is None else RewardBreakdown.join([step.breakdown, breakdown])
    if cfg.curriculum.solved_share is not None:
        by, share, threshold = cfg.dynamic_sampling.by, cfg.curriculum.solved_share, cfg.curriculum.threshold
        sampler.prompts.solved |= solved(groups, share, threshold, by)


def check_versions(rollouts: list[Rollout], step: int) -> None:
    """Raise EngineError when a rollout was sampled with an adapter other than this step's."""
    stale = sorted({rollout.policy_version for rollout in rollouts} - {step})
    if stale:
        raise EngineError(f"rollouts of policy version {stale} in step {step}: the engine's adapter is stale")


def trainer_state(sampler: Sampler, trainer: Trainer) -> dict[str, Any]:
    """Return the `trainer_state` argument of reward functions, with the names of transformers' TrainerState."""
    return {
        "global_step": trainer.state.step,
        "max_steps": trainer.steps,
        "epoch": sampler.prompts.epoch,
        "num_input_tokens_seen": trainer.state.num_tokens,
    }
