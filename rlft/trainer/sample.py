"""Sample completions of the next prompts and score them, each rank its share of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rlft import dist
from rlft.batch import groups_of, samples_of
from rlft.errors import EngineError
from rlft.rewards.overlap import Scoring
from rlft.rewards.parts import RewardBreakdown
from rlft.rewards.score import check_invalid, finish
from rlft.trainer.dynamic_sampling import solved
from rlft.trainer.session import Sampler, Trainer
from rlft.trainer.step import Step
from rlft.trainer.step_metrics import Clock
from rlft.types import Group, Prompt, Rollout

NO_PROMPT = Prompt((), {}, -1)
"""In place of the prompt of a rollout that is sent to other ranks."""


def sample_and_score(sampler: Sampler, trainer: Trainer, step: Step, count: int, round_: int) -> list[Group]:
    """Take `count` prompts from the data, sample a group of completions for each, and score them.

    Finished groups are scored while others are sampled, by the functions that allow it. round_: 0 for the first sample
    of the step, 1 onwards when dynamic sampling replaces groups.
    """
    prompts, functions = sampler.prompts.take(count), sampler.functions
    share = dist.share(len(prompts))

    def sample_share() -> tuple[list[Rollout], RewardBreakdown]:
        with Scoring(functions, prompts, trainer_state(sampler, trainer), sampler.progress) as scoring:
            rollouts = _sample(sampler, trainer, step, prompts, share, round_, scoring)
            with step.clock("reward"):
                return rollouts, finish(scoring, rollouts, functions)

    rollouts, breakdown = gathered(sample_share, prompts, step.clock)
    groups = groups_of(rollouts)
    breakdown.store(samples_of(groups))
    invalid = float(breakdown.total.isnan().float().mean())
    check_invalid(trainer.state.invalid_history, invalid, breakdown.faults())
    step.breakdown = breakdown if step.breakdown is None else RewardBreakdown.join([step.breakdown, breakdown])
    _take_out_solved(sampler, trainer, groups)
    return groups


def gathered(
    sample: Callable[[], tuple[list[Rollout], RewardBreakdown]], prompts: Sequence[Prompt], clock: Clock | None = None
) -> tuple[list[Rollout], RewardBreakdown]:
    """Call `sample` on every rank; return the rollouts and scores of all, in the order of ranks.

    prompts: of all ranks. Their rows are known to every rank, so they are not sent: a rollout travels with its prompt's
    place. clock: its time "wait" is that for the other ranks. Raises on every rank what one raised.
    """
    if dist.is_alone():
        return sample()
    place = {id(prompt): i for i, prompt in enumerate(prompts)}

    def without_prompts() -> tuple[list[tuple[int, Rollout]], RewardBreakdown]:
        rollouts, breakdown = sample()
        return [(place[id(rollout.prompt)], replace(rollout, prompt=NO_PROMPT)) for rollout in rollouts], breakdown

    results = dist.gather_results(without_prompts, clock and clock("wait"))
    rollouts = [replace(rollout, prompt=prompts[i]) for sent, _ in results for i, rollout in sent]
    return rollouts, RewardBreakdown.join([breakdown for _, breakdown in results])


def _sample(
    sampler: Sampler, trainer: Trainer, step: Step, prompts: list[Prompt], share: slice, round_: int, scoring: Scoring
) -> list[Rollout]:
    seed, number = trainer.cfg.seed, trainer.state.step
    # The third number is far above any prompt's position, so that no two samples of a run share a seed.
    stream = (seed, number) if round_ == 0 else (seed, number, 2**31 + round_)
    finished = scoring.add if scoring.overlaps else None
    with step.clock("generate"):
        rollouts = sampler.engine.generate(
            prompts[share], trainer.cfg.sampling, stream, finished=finished, first=share.start
        )
        check_versions(rollouts, number)
    return rollouts


def _take_out_solved(sampler: Sampler, trainer: Trainer, groups: list[Group]) -> None:
    """Take rows out of the data that the curriculum calls solved."""
    cfg = trainer.cfg
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
