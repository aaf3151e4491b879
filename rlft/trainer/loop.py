"""The training loop: sample, score, estimate advantages, train on packed micro-batches, sync the adapter, repeat.

Every algorithm, from GRPO to SFT, runs through `loop`. Algorithms differ by config and data only; the loop never
branches on an algorithm's name or an engine's type. `rlft.trainer.setup` builds the session it runs on, and
examples/grpo_from_scratch.py is the same loop in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlft import dist, report
from rlft.config.data import Reward
from rlft.config.files import to_toml
from rlft.config.paths import user_path
from rlft.config.run import Checkpoint, Config
from rlft.data.prompts import Prompts
from rlft.errors import ConfigError
from rlft.models.random_state import kept_random_state
from rlft.monitor.console import Console
from rlft.monitor.notebook import display
from rlft.rollout.engine import asleep
from rlft.runs import checkpoint
from rlft.runs.folder import Run, step_of
from rlft.trainer import broken
from rlft.trainer.callbacks import Callback
from rlft.trainer.dynamic_sampling import kept_groups, replace_uninformative
from rlft.trainer.ending import FROM_PYTHON, Ways, interrupted_by_signals, saved_on_the_way_out, stop_on_signals
from rlft.trainer.given_objects import Given
from rlft.trainer.out_of_memory import what_to_lower
from rlft.trainer.ranks import on_lead
from rlft.trainer.record import call_back, measure, record, step_values
from rlft.trainer.result import Result
from rlft.trainer.sample import sample_and_score
from rlft.trainer.saving import save, write_card
from rlft.trainer.session import Recorder, Session, Trainer
from rlft.trainer.setup import build_session
from rlft.trainer.step import Step, advantages, losses, pack_minibatches, score_batches, update
from rlft.types import State

if TYPE_CHECKING:
    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlft.trainer.given_optimizer import OptimizerFactory


def loop(session: Session, stop: threading.Event | None = None) -> None:
    """Train until all steps of the run are done or `stop` is set. Each iteration is one step."""
    sampler, trainer, recorder = session
    cfg, state, policy, engine = trainer.cfg, trainer.state, trainer.policy, sampler.engine
    engine.load_adapter(policy.adapter(), version=state.step)
    step, due = Step(), Due(cfg.checkpoint)
    if state.step:  # a run that failed in an evaluation has the checkpoint of its step
        evaluate_and_save(session, due)
    while state.step < trainer.steps and not stopping(recorder, stop):
        step = Step()
        trainer.progress.begin()
        policy.forget_images()
        draw = functools.partial(sample_and_score, sampler, trainer, step)
        step.groups, step.rounds = replace_uninformative(
            draw, cfg.prompts_per_step, cfg.dynamic_sampling.rounds, cfg.dynamic_sampling.by
        )
        groups = kept_groups(step.groups)
        call_back(session, "on_rollouts", samples=step.samples)

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
        trainer.progress.end()
        call_back(session, "on_step", values, step.samples)
        evaluate_and_save(session, due)
    broken.check_end(trainer, engine, step.ran)


def stopping(recorder: Recorder, stop: threading.Event | None) -> bool:
    """Return True on every rank when a signal to one of them or a callback asked for the end after this step."""
    return dist.agree(bool(stop and stop.is_set()) or recorder.callbacks.stopping)


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


class Due:
    """When the next checkpoint is due."""

    def __init__(self, cfg: Checkpoint) -> None:
        """Start the clock of `checkpoint.minutes`."""
        self._cfg, self._last = cfg, time.monotonic()

    def at(self, step: int) -> bool:
        """Return True when `checkpoint.every` or `checkpoint.minutes` asks for a checkpoint after `step`."""
        minutes = (time.monotonic() - self._last) / 60
        return bool(
            (self._cfg.every and step % self._cfg.every == 0) or (self._cfg.minutes and minutes >= self._cfg.minutes)
        )

    def save(self, session: Session) -> None:
        """Save a checkpoint and start the clock again."""
        call_back(session, "on_save", checkpoint=save(session))
        self._last = time.monotonic()


def evaluate_and_save(session: Session, due: Due) -> None:
    """Evaluate and save a checkpoint where `eval.every` and [checkpoint] say so, except after the last step."""
    _, trainer, recorder = session
    cfg, run, step = trainer.cfg, recorder.run, trainer.state.step
    asked = dist.agree(recorder.callbacks.save_wanted())
    if step >= trainer.steps:
        return
    if cfg.eval.every and step % cfg.eval.every == 0 and not dist.from_lead(run.evaluation(step)):
        measure(session)
        if (best := dist.from_lead(run.best(also=step))) is not None and best.step == step:
            due.save(session)
    if asked or dist.from_lead(due.at(step)):
        due.save(session)


@contextlib.contextmanager
def random_of(seed: int, step: int) -> Iterator[None]:
    """Seed PyTorch (used by LoRA dropout) from (seed, step), so that a resumed step gives the same numbers."""
    with kept_random_state():
        torch.manual_seed(int(np.random.SeedSequence([seed % 2**32, step]).generate_state(1)[0]))
        yield


def train(
    cfg: Config | str | Path,
    rewards: Sequence[str | Reward | Callable[..., Any]] | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback | Callable[[State, dict[str, float]], None]] = (),
    verbose: bool = False,
    *,
    model: str | PreTrainedModel | PeftModel | PeftMixedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    optimizer: OptimizerFactory | None = None,
    **settings: Any,
) -> Result:
    """Train a run from its config, an `rlft.Config` or the path of a TOML or YAML file.

    rewards: reward functions in place of the config's. resume: go on from the newest checkpoint in the config's `out`.
    callbacks: `rlft.Callback` objects, or functions called with (state, metrics) after each step. verbose: print the
    details too that log.txt in the run folder has. model: a name, or a model of transformers or PEFT to train in place
    of the files that the config names; a PEFT model's LoRA adapter is what is trained, and nothing else of the object
    is changed when the run has ended. tokenizer: in place of the model's. optimizer: a class of torch.optim or a
    function of the parameters that returns one, in place of AdamW. settings: take the place of the config's; a section
    is a dict, for example `rlft.train("run.toml", steps=3, sampling={"max_tokens": 64})`, and `data` may be rows (see
    `rlft.Data.rows`). Raises RlftError for everything a user can cause; the run folder keeps everything written before
    it.
    """
    cfg, given = Given.of(cfg, settings, model, tokenizer, optimizer)
    with display(verbose) as console:
        return run(cfg, console, rewards, resume, callbacks, given=given)


def run(
    cfg: Config,
    console: Console,
    rewards: Sequence[Any] | None = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    ways: Ways = FROM_PYTHON,
    given: Given = Given(),  # noqa: B008 (it is frozen)
) -> Result:
    """Train a run as `train` does. ways: how its user goes on with it. given: objects in place of what it names."""
    with dist.started(cfg.ranks.timeout):
        again = cfg.if_exists == "resume" or resume
        done = on_lead(lambda: finished(cfg, console) if again else None)
        return done if done is not None else _run(cfg, console, rewards, resume, callbacks, ways, given)


def _run(
    cfg: Config,
    console: Console,
    rewards: Sequence[Any] | None,
    resume: bool,
    callbacks: Sequence[Any],
    ways: Ways,
    given: Given,
) -> Result:
    """Train a run that is not finished; the ranks have joined."""
    console.phase(f"loading {cfg.model}", line=not console.panel.phase[0])  # unless the command has printed a line
    with (
        interrupted_by_signals(),
        what_to_lower(cfg) as sessions,
        build_session(cfg, rewards, resume, callbacks, console, given) as session,
    ):
        sessions.append(session)
        with saved_on_the_way_out(session, ways):
            return _train(session, ways)


def _train(session: Session, ways: Ways) -> Result:
    _, trainer, recorder = session
    run, state = recorder.run, trainer.state
    call_back(session, "on_start")
    # A run that was resumed after a step has evaluated before the first one.
    before = dist.from_lead(run.first_evaluation() if state.step else {}) or measure(session)
    with stop_on_signals(recorder.console) as stop:
        loop(session, stop)
        path = save(session) if state.step else None
        stopped = dist.agree(stop.is_set() or (recorder.callbacks.stopping and state.step < trainer.steps))
    if path is None:
        raise KeyboardInterrupt  # stopped before the first step
    call_back(session, "on_save", checkpoint=path)
    # Evaluated after the save, so that an interrupt loses nothing. A result already in the run folder is reused.
    after = {} if stopped else dist.from_lead(run.evaluation(state.step)) or measure(session)
    save(session)  # again, now that the best checkpoint is known
    # The others end after the lead, since torchrun ends all ranks when one has ended with an error.
    return Result(on_lead(lambda: _finish(session, ways, path, before, after, stopped)), interrupted=stopped)


def _finish(
    session: Session, ways: Ways, path: Path, before: dict[str, float], after: dict[str, float], stopped: bool
) -> Path:
    """Write what a run leaves behind besides its checkpoints, and show its results; return the run folder."""
    _, trainer, recorder = session
    run, state = recorder.run, trainer.state
    write_card(recorder, trainer.cfg, state.step, path, path)  # again, with the results on the held-out rows
    page = report.write(run.path)
    again, best = f'rlft generate {run.path} "your prompt"', run.best()
    recorder.console.finish(before, after, adapter=path, report=page, again=again, best=best)
    call_back(session, "on_end", after, checkpoint=path)
    if stopped:
        recorder.console.note(
            f"stopped after step {state.step} of {trainer.steps}. Go on with: {ways.resume(run.path)}"
        )
    return run.path


def finished(cfg: Config, console: Console) -> Result | None:
    """Return the result of a run whose steps, evaluation and report are all there; None for any other.

    Loads nothing. A run of `data.epochs` counts as finished where its settings are those it was trained with.
    """
    run = Run(user_path(cfg.out, "out"))
    if not run.has_checkpoint() or not all(path.is_file() for path in (run.report, run.metrics_file, run.config)):
        return None
    path = run.latest_checkpoint()
    step, record = step_of(path), checkpoint.check(path)
    steps = cfg.steps or (record["state"]["steps"] if run.config.read_bytes() == to_toml(cfg).encode() else None)
    newest = max(file.stat().st_mtime_ns for file in (run.metrics_file, path))
    try:
        after = run.evaluation(step or 0)
    except ConfigError:  # a damaged line, which the resume sets aside
        return None
    if step != steps or (cfg.eval.rows and not after) or run.report.stat().st_mtime_ns < newest:
        return None
    console.note(f"{run.path}: nothing to do: step {step} of {steps}; raise steps to train on")
    return Result(run.path)
