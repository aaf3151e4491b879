"""Report steps and evaluations to the run folder, the console, the trackers and the callbacks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlft import dist
from rlft.batch import group_numbers
from rlft.monitor.panel import Example, label_of, prompt_text
from rlft.rewards.parts import score_columns
from rlft.runs.folder import PIECED_GROUPS
from rlft.runs.tables import Unreadable, has_messages, shown_prompt
from rlft.trainer import dynamic_sampling
from rlft.trainer.callbacks import Event, View
from rlft.trainer.evaluate import change, evaluate, recorded_loss
from rlft.trainer.sample import trainer_state
from rlft.trainer.session import Recorder, Sampler, Session, Trainer
from rlft.trainer.step import Step, share_logprobs
from rlft.trainer.step_metrics import packing_stats, peak_memory, perplexity, rates, rollout_values, update_values
from rlft.types import Sample


def step_values(sampler: Sampler, trainer: Trainer, step: Step) -> dict[str, float]:
    """Return the metrics of a step whose updates are done."""
    cfg, state = trainer.cfg, trainer.state
    assert step.breakdown is not None
    values = (
        step.metrics.reduce().values() | step.mismatch.values() | step.breakdown.metrics() | rollout_values(step.groups)
    )
    values |= update_values(step.updates, values) | packing_stats(step.packed, step.ran) | step.clock.values()
    values |= rates(step.rollouts, step.ran, cfg.optim.passes, step.clock)
    if "nll" in values:
        values["perplexity"] = perplexity(values.pop("nll"))
    if cfg.dynamic_sampling.rounds:
        values |= dynamic_sampling.metrics(step.groups, step.rounds, cfg.prompts_per_step)
    values |= {
        "epoch": sampler.prompts.epoch,
        "num_tokens": float(state.num_tokens),
        "parity/limit": trainer.limit.step,
        **trainer.limit.probed,
        "skipped_updates": float(state.skipped_updates),
    }
    values |= {"curriculum/solved": float(len(state.solved))} if cfg.curriculum.solved_share is not None else {}
    return values | trainer.optimizer.metrics() | peak_memory(trainer.policy.device)


def record(session: Session, step: Step, values: dict[str, float]) -> None:
    """Report a finished step. values: its metrics."""
    _, trainer, recorder = session
    number, samples = trainer.state.step, step.samples
    assert step.breakdown is not None
    for fault in step.breakdown.faults():
        recorder.console.warn(fault)
    recorder.run.log(number, values)
    share_logprobs(step)
    if dist.lead():
        recorder.writer.submit(lambda: write_completions(recorder, number, step))
    new = recorder.health.step(number, values)
    recorder.console.step(values | {"step": float(number)}, example_of(samples[0]), new, recorder.health.active)
    recorder.tracking.log(number, values, "completions", step.rollouts, score_columns(samples), new)


def example_of(sample: Sample) -> Example:
    """Return a completion as the console shows it."""
    prompt, reward = sample.rollout.prompt, sample.reward
    asked = prompt_text(shown_prompt(prompt), has_messages(prompt))
    # The recorded reward of SFT is 1 for every completion.
    shown = None if math.isnan(reward) or len(prompt.recorded) == 1 else reward
    return Example(sample.rollout.text, asked, shown, label_of(prompt.row))


def call_back(
    session: Session,
    event: Event,
    metrics: Mapping[str, float] | None = None,
    samples: Sequence[Sample] = (),
    checkpoint: Path | None = None,
) -> None:
    """Call the user's callbacks. Raises TrainError naming the one that raised. The arguments: those of `View`."""
    _, trainer, recorder = session
    view = View(recorder.run.path, trainer.state.step, trainer.steps, dict(metrics or {}), samples, checkpoint)
    recorder.callbacks.call(event, view, trainer.state)


def write_completions(recorder: Recorder, number: int, step: Step) -> None:
    """Write the completions of step `number` to their file. Runs on the writer thread, after the step has ended."""
    step.mismatch.store_logprobs()
    pieces = recorder.pieces.first_groups(step.rollouts, group_numbers(step.groups).tolist(), PIECED_GROUPS)
    recorder.run.write_rollouts(number, step.samples, pieces)


def measure(session: Session) -> dict[str, float]:
    """Evaluate the current adapter on the held-out rows, log the results at the current step and return them."""
    sampler, trainer, recorder = session
    if not sampler.eval_prompts:
        return {}
    cfg, step, evaluation = trainer.cfg, trainer.state.step, None
    values = (
        recorded_loss(trainer.policy, sampler.eval_prompts, trainer.algorithm, trainer.plan)
        if sampler.eval_loss
        else {}
    )
    if sampler.eval_functions:
        sampler.eval_engine.load_adapter(trainer.policy.adapter(), version=step)
        state = trainer_state(sampler, trainer)
        evaluation = evaluate(sampler.eval_engine, sampler.eval_prompts, cfg, sampler.eval_functions, state)
        values |= evaluation.metrics | change(_first_rewards(recorder), evaluation.by_row(), cfg.eval)
    if evaluation is not None:
        # Written now, since the next evaluation reads the first one. Written before the log, so that a run killed in
        # between counts as not evaluated, and the resumed run evaluates again.
        if dist.lead():
            recorder.run.write_evaluation(step, evaluation.samples)
        for fault in evaluation.faults:
            recorder.console.warn(fault)
        if evaluation.graded() and not step:
            recorder.console.detail(
                f"held-out rewards are not all 0 or 1: solved means at least {cfg.eval.threshold:g}"
            )
    recorder.run.log(step, values)
    samples = evaluation.samples if evaluation is not None else []
    scores = {"reward": [sample.reward for sample in samples]} if evaluation is not None else {}
    new = recorder.health.evaluation(step, values)
    recorder.console.evaluation(step, values, new, recorder.health.active)
    rollouts = [sample.rollout for sample in samples]
    recorder.tracking.log(step, values, "eval/completions", rollouts, scores, new)
    call_back(session, "on_evaluate", values, samples)
    return values


def _first_rewards(recorder: Recorder) -> dict[int, list[float]]:
    """Return the rewards of the first evaluation; {}, with a note, where its file is damaged."""
    try:
        return recorder.run.first_rewards()
    except Unreadable as error:
        recorder.console.warn(f"{error}; the change since the first evaluation is not measured")
        return {}
