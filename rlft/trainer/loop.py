"""The training loop: sample, score, estimate advantages, train on packed micro-batches, sync the adapter, repeat.

Every algorithm, from GRPO to SFT, runs through `loop`. Algorithms differ by config and data only; the loop never
branches on an algorithm's name or an engine's type. `rlft.trainer.setup` builds the session it runs on, and
examples/grpo_from_scratch.py is the same loop in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from rlft import report
from rlft.config.data import Reward
from rlft.config.run import Config, config_from
from rlft.data.prompts import Prompts
from rlft.rollout.engine import asleep
from rlft.trainer import broken
from rlft.trainer.dynamic_sampling import kept_groups, replace_uninformative
from rlft.trainer.out_of_memory import what_to_lower
from rlft.trainer.record import measure, record, step_values
from rlft.trainer.sample import sample_and_score
from rlft.trainer.saving import save, write_card
from rlft.trainer.session import Recorder, Session, Trainer
from rlft.trainer.setup import build_session
from rlft.trainer.step import Step, advantages, losses, pack_minibatches, score_batches, update
from rlft.types import State


def loop(session: Session, stop: threading.Event | None = None) -> None:
    """Train until all steps of the run are done or `stop` is set. Each iteration is one step."""
    sampler, trainer, recorder = session
    cfg, state, policy, engine = trainer.cfg, trainer.state, trainer.policy, sampler.engine
    engine.load_adapter(policy.adapter(), version=state.step)
    step = Step()
    while state.step < trainer.steps and not (stop and stop.is_set()):
        step = Step()
        draw = functools.partial(sample_and_score, sampler, trainer, step)
        step.groups, step.rounds = replace_uninformative(
            draw, cfg.prompts_per_step, cfg.dynamic_sampling.rounds, cfg.dynamic_sampling.by
        )
        groups = kept_groups(step.groups)

        with step.clock("train"), asleep(engine), random_of(cfg.seed, state.step):
            advantages(trainer, recorder, step, groups, sampler.reward_weights)
            step.minibatches = pack_minibatches(trainer, groups)
            score_batches(trainer, recorder, step)
            for minibatch in step.minibatches * cfg.optim.passes:
                losses(trainer, recorder, step, minibatch)
                update(trainer, step)

        advance(state, sampler.prompts, step)
        with step.clock("sync"):
            engine.load_adapter(policy.adapter(), version=state.step)
        values = step_values(sampler, trainer, step)
        adapt(trainer, values)
        record(session, step, values)
        broken.check_step(trainer, engine, values, step.rollouts, step.ran)
        evaluate_and_save(session)
    broken.check_end(trainer, engine, step.ran)


def advance(state: State, prompts: Prompts, step: Step) -> None:
    """Count a step whose updates are done."""
    state.step += 1
    state.consumed, state.solved = prompts.consumed, sorted(prompts.solved)
    state.num_tokens += sum(len(rollout.prompt.ids) + len(rollout.completion_ids) for rollout in step.rollouts)


def adapt(trainer: Trainer, values: dict[str, float]) -> None:
    """Log the numbers that the loss adapts from step to step, and set those of the next step."""
    state = trainer.state
    values |= state.adapted
    state.adapted = trainer.algorithm.loss.adapt(state.adapted, values.get("entropy", math.nan))


def evaluate_and_save(session: Session) -> None:
    """Evaluate and save a checkpoint where `eval.every` and `checkpoint.every` say so, except after the last step."""
    _, trainer, recorder = session
    cfg, step = trainer.cfg, trainer.state.step
    if step >= trainer.steps:
        return
    if cfg.eval.every and step % cfg.eval.every == 0:
        measure(session)
        if (best := recorder.run.best(also=step)) is not None and best.step == step:
            save(session)
    if cfg.checkpoint.every and step % cfg.checkpoint.every == 0:
        save(session)


@contextlib.contextmanager
def random_of(seed: int, step: int) -> Iterator[None]:
    """Seed PyTorch (used by LoRA dropout) from (seed, step), so that a resumed step gives the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed % 2**32, step]).generate_state(1)[0]))
        yield


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
def stop_on_interrupt(recorder: Recorder) -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets, to stop after the current step; a second stops at once."""
    stop = threading.Event()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, _frame: FrameType | None) -> None:
        stop.set()
        restore()
        what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # Printing is not reentrant: when the signal interrupts a print, the note is dropped; the run stops anyway.
        with contextlib.suppress(RuntimeError):
            recorder.console.note(f"stopping after this step and saving; {what} again stops at once and loses it")

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, first)
    except ValueError:  # only the main thread can set signal handlers
        yield stop
        return
    try:
        yield stop
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
    dict, for example `rlft.train("run.toml", steps=3, sampling={"max_tokens": 64})`, and `data` may be rows (see
    `rlft.Data.rows`). Raises RlftError for everything a user can cause; the run folder keeps everything written before
    it.
    """
    cfg = config_from(cfg, settings)
    with what_to_lower(cfg) as sessions, build_session(cfg, rewards, resume, callbacks) as session:
        sessions.append(session)
        _, trainer, recorder = session
        run, state = recorder.run, trainer.state
        # A run that was resumed after a step has evaluated before the first one.
        before = (run.first_evaluation() if state.step else {}) or measure(session)
        with stop_on_interrupt(recorder) as stop:
            loop(session, stop)
            path = save(session)
        # Evaluated after the save, so that an interrupt loses nothing. A result already in the run folder is reused.
        after = {} if stop.is_set() else run.evaluation(state.step) or measure(session)
        save(session)  # again, now that the best checkpoint is known
        write_card(recorder, cfg, state.step, path, path)  # again, with the results on the held-out rows
        page = report.write(run.path)
        again, best = f'rlft generate {run.path} "your prompt"', run.best()
        recorder.console.finish(before, after, adapter=path, report=page, again=again, best=best)
        if stop.is_set():
            recorder.console.note(
                f"stopped after step {state.step} of {trainer.steps}; the same command with --resume goes on"
            )
        better = None if best is None else run.checkpoint(str(best.step))
        return Result(run.path, state.step, path, page, before, after, better, stop.is_set())
