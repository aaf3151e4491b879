"""The training loop: sample, score, estimate advantages, train on packed micro-batches, sync the adapter, repeat.

Every algorithm, from GRPO to SFT, runs through `loop`. Algorithms differ by config and data only; the loop never
branches on an algorithm's name or an engine's type. `rlft.trainer.setup` builds the session it runs on.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from rlft import report
from rlft.batch import group_ids, packing_stats
from rlft.config.data import Reward
from rlft.config.run import Config, config_from
from rlft.errors import EngineError
from rlft.rewards.parts import RewardBreakdown
from rlft.rewards.score import check_invalid, score
from rlft.rollout.engine import asleep
from rlft.runs.folder import PIECED_GROUPS
from rlft.trainer import broken, parity
from rlft.trainer.dynamic_sampling import SampledGroups, replace_uninformative, solved, spread_back
from rlft.trainer.evaluate import change, evaluate, recorded_loss
from rlft.trainer.metrics import Metrics
from rlft.trainer.out_of_memory import what_to_lower
from rlft.trainer.setup import Session, build_session
from rlft.trainer.step import learn
from rlft.trainer.step_metrics import Clock, peak_memory, rates, rollout_values, update_values
from rlft.types import Batch, Rollout, State


def loop(session: Session) -> None:
    """Train until `session.steps` steps are done or `session.stop` is set. Each iteration is one step."""
    cfg, state, policy, engine, algorithm = (
        session.cfg,
        session.state,
        session.policy,
        session.engine,
        session.algorithm,
    )
    engine.load_adapter(policy.adapter(), version=state.step)
    batches: list[Batch] = []
    while state.step < session.steps and not session.stop:
        clock, metrics, mismatch = Clock(), Metrics(), parity.Mismatch()
        draw_sample = functools.partial(sample_and_score, session, clock)
        sample = replace_uninformative(
            draw_sample(cfg.prompts_per_step, 0), draw_sample, cfg.prompts_per_step, cfg.dynamic_sampling.rounds
        )
        parts = RewardBreakdown.join(sample.parts)

        with clock("train"), asleep(engine), random_of(cfg.seed, state.step):
            result = learn(session, sample, parts, metrics, mismatch)

        state.step += 1
        state.consumed, state.solved = session.prompts.consumed, sorted(session.prompts.solved)
        state.num_tokens += sum(len(rollout.prompt.ids) + len(rollout.completion_ids) for rollout in sample.rollouts)
        with clock("sync"):
            engine.load_adapter(policy.adapter(), version=state.step)

        values = (
            metrics.reduce().values()
            | mismatch.values()
            | parts.metrics()
            | rollout_values(sample.rollouts, sample.rewards)
        )
        values |= update_values(result.updates, values) | packing_stats(result.packed, result.ran) | clock.values()
        values |= rates(sample.rollouts, result.ran, cfg.optim.passes, clock)
        values |= sample.metrics(cfg.prompts_per_step) if cfg.dynamic_sampling.rounds else {}
        values |= {
            "epoch": session.prompts.epoch,
            "num_tokens": float(state.num_tokens),
            "parity/limit": session.limit.step,
            "skipped_updates": float(state.skipped_updates),
        }
        values |= {"curriculum/solved": float(len(state.solved))} if cfg.curriculum.solved_share is not None else {}
        values |= session.optimizer.metrics() | peak_memory(policy.device)
        if algorithm.adapt is not None:
            values |= state.adapted
            state.adapted = algorithm.adapt(state.adapted, values.get("entropy", math.nan), algorithm.config)
        record(session, values, sample, parts, spread_back(sample, result.advantages.tolist()), mismatch)
        batches = result.ran
        broken.check_step(session, values, sample.rollouts, batches)
        if cfg.eval.every and state.step % cfg.eval.every == 0 and state.step < session.steps:
            measure(session)
            if (best := session.run.best(also=state.step)) is not None and best.step == state.step:
                session.save()
        if cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0 and state.step < session.steps:
            session.save()
    broken.check_end(session, batches)


def sample_and_score(session: Session, clock: Clock, count: int, round_: int) -> SampledGroups:
    """Take `count` prompts from the data, sample completions and score them.

    round_: 0 for the first sample of the step, 1 onwards when dynamic sampling replaces groups.
    """
    # The third number is far above any prompt's position, so that no two samples of a run share a seed.
    seed = (
        (session.cfg.seed, session.state.step)
        if round_ == 0
        else (session.cfg.seed, session.state.step, 2**31 + round_)
    )
    with clock("generate"):
        rollouts = session.engine.generate(session.prompts.take(count), session.cfg.sampling, seed)
        check_versions(rollouts, session.state.step)
    with clock("reward"):
        rewards, parts = score(rollouts, session.functions, trainer_state(session))
        check_invalid(session.state.invalid_history, float(rewards.isnan().float().mean()), parts.faults())
    sample = SampledGroups(
        rollouts, rewards, parts.deciding(session.cfg.dynamic_sampling.by), [parts], (True,) * len(rollouts)
    )
    if session.cfg.curriculum.solved_share is not None:
        session.prompts.solved |= solved(sample, session.cfg.curriculum.solved_share, session.cfg.curriculum.threshold)
    return sample


@contextlib.contextmanager
def random_of(seed: int, step: int) -> Iterator[None]:
    """Seed PyTorch (used by LoRA dropout) from (seed, step), so that a resumed step gives the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed % 2**32, step]).generate_state(1)[0]))
        yield


def check_versions(rollouts: list[Rollout], step: int) -> None:
    """Raise EngineError when a rollout was sampled with an adapter other than this step's."""
    stale = sorted({rollout.policy_version for rollout in rollouts} - {step})
    if stale:
        raise EngineError(f"rollouts of policy version {stale} in step {step}: the engine's adapter is stale")


def trainer_state(session: Session) -> dict[str, Any]:
    """Return the `trainer_state` argument of reward functions, with the names of transformers' TrainerState."""
    return {
        "global_step": session.state.step,
        "max_steps": session.steps,
        "epoch": session.prompts.epoch,
        "num_input_tokens_seen": session.state.num_tokens,
    }


def record(
    session: Session,
    values: dict[str, float],
    sample: SampledGroups,
    parts: RewardBreakdown,
    advantages: list[float],
    mismatch: parity.Mismatch,
) -> None:
    """Report a finished step to the run folder, the console, the trackers and the callbacks."""
    for fault in parts.faults():
        session.console.note(fault)
    step, columns = session.state.step, parts.columns()
    session.run.log(step, values)
    session.writer.submit(lambda: write_completions(session, step, sample, columns, advantages, mismatch))
    new = session.health.step(step, values)
    session.console.step(values | {"step": float(step)}, sample.rollouts[0].text, new, session.health.active)
    scores = {"reward": sample.rewards.tolist(), **{f"rewards/{name}": column for name, column in columns.items()}}
    session.tracking.log(step, values, "completions", sample.rollouts, scores | {"advantage": advantages}, new)
    for callback in session.callbacks:
        callback(session.state, dict(values))  # a copy: what a callback puts into it is no metric of ours


def write_completions(
    session: Session,
    step: int,
    sample: SampledGroups,
    columns: dict[str, list[Any]],
    advantages: list[float],
    mismatch: parity.Mismatch,
) -> None:
    """Write the completions of a step to their file. Runs on the writer thread, so the arguments must not change."""
    kept_rows = [i for i, is_kept in enumerate(sample.kept) if is_kept]
    session.run.write_rollouts(
        step,
        sample.rollouts,
        sample.rewards.tolist(),
        columns,
        advantages,
        {kept_rows[row]: values for row, values in mismatch.logprobs.items()},
        session.pieces.first_groups(sample.rollouts, group_ids(sample.rollouts).tolist(), PIECED_GROUPS),
    )


def measure(session: Session) -> dict[str, float]:
    """Evaluate the current adapter on the held-out rows, log the results at the current step and return them."""
    if not session.eval_prompts:
        return {}
    step, evaluation = session.state.step, None
    values = (
        recorded_loss(session.policy, session.eval_prompts, session.algorithm, session.plan)
        if session.eval_loss
        else {}
    )
    if session.eval_functions:
        session.eval_engine.load_adapter(session.policy.adapter(), version=step)
        evaluation = evaluate(
            session.eval_engine, session.eval_prompts, session.cfg, session.eval_functions, trainer_state(session)
        )
        values |= evaluation.metrics | change(session.run.first_rewards(), evaluation.by_row(), session.cfg.eval)
    if evaluation is not None:
        # Written now, since the next evaluation reads the first one. Written before the log, so that a run killed in
        # between counts as not evaluated, and the resumed run evaluates again.
        session.run.write_evaluation(step, evaluation.rollouts, evaluation.rewards)
        for fault in evaluation.faults:
            session.console.note(fault)
        if evaluation.graded() and not step:
            session.console.note(
                f"held-out rewards are not all 0 or 1: solved means at least {session.cfg.eval.threshold:g}"
            )
    session.run.log(step, values)
    completions = (evaluation.rollouts, {"reward": evaluation.rewards}) if evaluation is not None else ((), {})
    new = session.health.evaluation(step, values)
    session.console.evaluation(step, values, new, session.health.active)
    session.tracking.log(step, values, "eval/completions", *completions, new)
    return values


@dataclass(frozen=True)
class Result:
    """The result of a finished run."""

    out: Path
    steps: int
    adapter: Path
    """Folder of the PEFT adapter."""
    report: Path
    before: dict[str, float]
    """Evaluation before the first step; empty without [eval]."""
    after: dict[str, float]
    """Evaluation after the last step, with the change since the first one (eval/reward_change, ...); empty when
    interrupted."""
    best: Path | None
    """Folder of the checkpoint with the best result on the held-out rows; None when none was evaluated."""
    interrupted: bool


@contextlib.contextmanager
def stop_on_interrupt(session: Session) -> Iterator[None]:
    """Stop after the current step at the first Ctrl-C or SIGTERM and save; a second signal stops at once."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, _frame: FrameType | None) -> None:
        session.stop = True
        restore()
        what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # Printing is not reentrant: when the signal interrupts a print, the note is dropped; the run stops anyway.
        with contextlib.suppress(RuntimeError):
            session.console.note(f"stopping after this step and saving; {what} again stops at once and loses it")

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, first)
    except ValueError:  # only the main thread can set signal handlers
        yield
        return
    try:
        yield
    finally:
        restore()


def train(
    cfg: Config | str | Path,
    rewards: Sequence[str | Reward | Callable[..., Any]] | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[State, dict[str, float]], None]] = (),
    **settings: Any,
) -> Result:
    """Train a run from its config, an `rlft.Config` or the path of a TOML or YAML file.

    rewards: reward functions in place of the config's. resume: go on from the newest checkpoint in the config's `out`.
    callbacks: called with (state, metrics) after each step. settings: take the place of the config's; a section is a
    dict, for example `rlft.train("run.toml", steps=3, sampling={"max_tokens": 64})`. Raises RlftError for everything a
    user can cause; the run folder keeps everything written before it.
    """
    cfg = config_from(cfg, settings)
    with what_to_lower(cfg) as sessions, build_session(cfg, rewards, resume, callbacks) as session:
        sessions.append(session)
        before = session.first_evaluation or measure(session)
        with stop_on_interrupt(session):
            loop(session)
            path = session.save()
        # Evaluated after the save, so that an interrupt loses nothing. A result already in the run folder is reused.
        after = {} if session.stop else session.run.evaluation(session.state.step) or measure(session)
        session.save()  # again, now that the best checkpoint is known
        session.write_card(path, path)  # again, with the results on the held-out rows
        page = report.write(session.run.path)
        again, best = f'rlft generate {session.run.path} "your prompt"', session.run.best()
        session.console.finish(before, after, adapter=path, report=page, again=again, best=best)
        if session.stop:
            session.console.note(
                f"stopped after step {session.state.step} of {session.steps}; the same command with --resume goes on"
            )
        better = None if best is None else session.run.checkpoint(str(best.step))
        return Result(session.run.path, session.state.step, path, page, before, after, better, session.stop)
