"""THE loop: sample, score, estimate advantages, train on packed micro-batches, hand the adapter over, repeat.

GRPO, SFT and every later algorithm run through `loop`: they differ by config and data, and nothing in it asks for an
algorithm's name or an engine's type. `rlft.trainer.setup` wires what it runs on.
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
from rlft.monitor.console import evaluation_line
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


def loop(s: Session) -> None:
    """Train until `s.steps` steps are done or `s.stop` is set. One pass of the body is one step."""
    cfg, state, policy, engine, algorithm = s.cfg, s.state, s.policy, s.engine, s.algorithm
    engine.load_adapter(policy.adapter(), version=state.step)
    ran: list[Batch] = []
    while state.step < s.steps and not s.stop:
        clock, metrics, mismatch = Clock(), Metrics(), parity.Mismatch()
        draw = functools.partial(sample_and_score, s, clock)
        drawn = replace_uninformative(
            draw(cfg.prompts_per_step, 0), draw, cfg.prompts_per_step, cfg.dynamic_sampling.rounds
        )
        parts = RewardBreakdown.join(drawn.parts)

        with clock("train"), asleep(engine), random_of(cfg.seed, state.step):
            done = learn(s, drawn, parts, metrics, mismatch)

        state.step += 1
        state.consumed, state.solved = s.prompts.consumed, sorted(s.prompts.solved)
        state.num_tokens += sum(len(r.prompt.ids) + len(r.completion_ids) for r in drawn.rollouts)
        with clock("sync"):
            engine.load_adapter(policy.adapter(), version=state.step)

        values = metrics.values() | mismatch.values() | parts.metrics() | rollout_values(drawn.rollouts, drawn.rewards)
        values |= update_values(done.updates, values) | packing_stats(done.packed, done.ran) | clock.values()
        values |= rates(drawn.rollouts, done.ran, cfg.optim.passes, clock)
        values |= drawn.metrics(cfg.prompts_per_step) if cfg.dynamic_sampling.rounds else {}
        values |= {
            "epoch": s.prompts.epoch,
            "num_tokens": float(state.num_tokens),
            "parity/limit": s.limit.step,
            "skipped_updates": float(state.skipped_updates),
        }
        values |= {"curriculum/solved": float(len(state.solved))} if cfg.curriculum.solved_share is not None else {}
        values |= s.optimizer.metrics() | peak_memory(policy.device)
        if algorithm.adapt is not None:
            values |= state.adapted
            state.adapted = algorithm.adapt(state.adapted, values.get("entropy", math.nan), algorithm.config)
        record(s, values, drawn, parts, spread_back(drawn, done.advantages.tolist()), mismatch)
        ran = done.ran
        broken.check_step(s, values, drawn.rollouts, ran)
        if cfg.eval.every and state.step % cfg.eval.every == 0 and state.step < s.steps:
            measure(s)
            if (best := s.run.best(also=state.step)) is not None and best.step == state.step:
                s.save()
        if cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0 and state.step < s.steps:
            s.save()
    broken.check_end(s, ran)


def sample_and_score(s: Session, clock: Clock, count: int, round_: int) -> SampledGroups:
    """`count` prompts of the data, sampled and scored. round_: 0, and 1 onwards when groups of the step are
    replaced."""
    # Far above any prompt's position, so that no two draws of a run share a seed.
    seed = (s.cfg.seed, s.state.step) if round_ == 0 else (s.cfg.seed, s.state.step, 2**31 + round_)
    with clock("generate"):
        rollouts = s.engine.generate(s.prompts.take(count), s.cfg.sampling, seed)
        check_versions(rollouts, s.state.step)
    with clock("reward"):
        rewards, parts = score(rollouts, s.functions, trainer_state(s))
        check_invalid(s.state.invalid_history, float(rewards.isnan().float().mean()), parts.faults())
    drawn = SampledGroups(
        rollouts, rewards, parts.deciding(s.cfg.dynamic_sampling.by), [parts], (True,) * len(rollouts)
    )
    if s.cfg.curriculum.solved_share is not None:
        s.prompts.solved |= solved(drawn, s.cfg.curriculum.solved_share, s.cfg.curriculum.threshold)
    return drawn


@contextlib.contextmanager
def random_of(seed: int, step: int) -> Iterator[None]:
    """PyTorch's random state (LoRA dropout) from (seed, step), so that a resumed step draws the same."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed % 2**32, step]).generate_state(1)[0]))
        yield


def check_versions(rollouts: list[Rollout], step: int) -> None:
    """Raise EngineError when a rollout was sampled with another adapter than this step's."""
    stale = sorted({r.policy_version for r in rollouts} - {step})
    if stale:
        raise EngineError(f"rollouts of policy version {stale} in step {step}: the engine's adapter is stale")


def trainer_state(s: Session) -> dict[str, Any]:
    """The snapshot that reward functions get as `trainer_state`; names as in transformers' TrainerState."""
    return {
        "global_step": s.state.step,
        "max_steps": s.steps,
        "epoch": s.prompts.epoch,
        "num_input_tokens_seen": s.state.num_tokens,
    }


def record(
    s: Session,
    values: dict[str, float],
    drawn: SampledGroups,
    parts: RewardBreakdown,
    advantages: list[float],
    mismatch: parity.Mismatch,
) -> None:
    """Everything about a finished step into the run folder, onto the console and to the trackers."""
    for fault in parts.faults():
        s.console.note(fault)
    step, columns = s.state.step, parts.columns()
    s.run.log(step, values)
    s.writer.submit(lambda: write_completions(s, step, drawn, columns, advantages, mismatch))
    messages = s.console.step(values | {"step": float(step)}, drawn.rollouts[0].text)
    scores = {"reward": drawn.rewards.tolist(), **{f"rewards/{name}": v for name, v in columns.items()}}
    s.tracking.log(step, values, "completions", drawn.rollouts, scores | {"advantage": advantages}, messages)
    for callback in s.callbacks:
        callback(s.state, values)


def write_completions(
    s: Session,
    step: int,
    drawn: SampledGroups,
    columns: dict[str, list[Any]],
    advantages: list[float],
    mismatch: parity.Mismatch,
) -> None:
    """The completions of a step into their file, on the writing thread: nothing given may change any more."""
    kept = [i for i, keep in enumerate(drawn.kept) if keep]
    s.run.write_rollouts(
        step,
        drawn.rollouts,
        drawn.rewards.tolist(),
        columns,
        advantages,
        {kept[row]: values for row, values in mismatch.logprobs.items()},
        s.pieces.first_groups(drawn.rollouts, group_ids(drawn.rollouts).tolist(), PIECED_GROUPS),
    )


def measure(s: Session) -> dict[str, float]:
    """Evaluate the adapter in training on the held-out rows, and log it at the current step."""
    if not s.eval_prompts:
        return {}
    step, found = s.state.step, None
    values = recorded_loss(s.policy, s.eval_prompts, s.algorithm, s.plan) if s.eval_loss else {}
    if s.eval_functions:
        s.eval_engine.load_adapter(s.policy.adapter(), version=step)
        found = evaluate(s.eval_engine, s.eval_prompts, s.cfg, s.eval_functions, trainer_state(s))
        values |= found.metrics | change(s.run.first_rewards(), found.by_row(), s.cfg.eval)
    if found is not None:
        # At once, since the next evaluation reads the first; before the log, so that a run that is killed in between
        # has not been evaluated, and a resumed one does it again.
        s.run.write_evaluation(step, found.rollouts, found.rewards)
        for fault in found.faults:
            s.console.note(fault)
        if found.graded() and not step:
            s.console.note(f"held-out rewards are not all 0 or 1: solved means at least {s.cfg.eval.threshold:g}")
    s.run.log(step, values)
    shown = (found.rollouts, {"reward": found.rewards}) if found is not None else ((), {})
    s.console.note(evaluation_line(values, step))
    s.tracking.log(step, values, "eval/completions", *shown, s.console.evaluation(step, values))
    return values


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    out: Path
    steps: int
    adapter: Path
    """Folder of the PEFT adapter."""
    report: Path
    before: dict[str, float]
    """Evaluation before the first step; empty without [eval]."""
    after: dict[str, float]
    """Evaluation after the last step, with the change since the first as eval/reward_change and so on; empty when
    interrupted."""
    best: Path | None
    """Folder of the checkpoint that did best on the held-out rows; None when none was evaluated."""
    interrupted: bool


@contextlib.contextmanager
def stop_on_interrupt(s: Session) -> Iterator[None]:
    """The first Ctrl-C, or a scheduler's SIGTERM, lets the step finish and be saved; the second one stops at once."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, _frame: FrameType | None) -> None:
        s.stop = True
        restore()
        what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # A line that was being printed when the signal came cannot be interrupted by another one; the run stops anyway.
        with contextlib.suppress(RuntimeError):
            s.console.note(f"stopping after this step and saving; {what} again stops at once and loses it")

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, first)
    except ValueError:  # not the main thread: the caller has the signals
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
    user can cause; the run folder keeps what was done until then.
    """
    cfg = config_from(cfg, settings)
    with what_to_lower(cfg) as sessions, build_session(cfg, rewards, resume, callbacks) as s:
        sessions.append(s)
        before = s.first_evaluation or measure(s)
        with stop_on_interrupt(s):
            loop(s)
            path = s.save()
        # After the save, so that nothing is lost by stopping it; a run that was stopped after it is not measured twice.
        after = {} if s.stop else s.run.evaluation(s.state.step) or measure(s)
        s.save()  # by now it is known which checkpoint is the best
        s.write_card(path, path)  # and how it did on the held-out rows
        page = report.write(s.run.path)
        again, best = f'rlft generate {s.run.path} "your prompt"', s.run.best()
        s.console.finish(before, after, adapter=path, report=page, again=again, best=best)
        if s.stop:
            s.console.note(f"stopped after step {s.state.step} of {s.steps}; the same command with --resume goes on")
        better = None if best is None else s.run.checkpoint(str(best.step))
        return Result(s.run.path, s.state.step, path, page, before, after, better, s.stop)
