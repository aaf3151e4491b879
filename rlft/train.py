"""THE loop: sample, score, estimate advantages, train on packed micro-batches, hand the adapter over, repeat.

GRPO, SFT and every later algorithm run through `loop`: they differ by config and data, and nothing in it asks for an
algorithm's name or an engine's type. `rlft.session` wires what it runs on.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlft import parity, report
from rlft.batch import count, group_ids, pack, packing_stats
from rlft.config import Config, Sampling
from rlft.data import encode_prompt
from rlft.dist import sum_counts, sum_tensor
from rlft.errors import ConfigError, EngineError, TrainError
from rlft.evaluate import evaluate
from rlft.metrics import Metrics
from rlft.rewards.score import Parts, check_invalid, score
from rlft.rewards.score import build as build_rewards
from rlft.rollout.engine import asleep
from rlft.session import Session, build, load_rows, open_run
from rlft.step_metrics import Clock, batch_stats, rates, rollout_values
from rlft.types import Batch, PackPlan, Rollout, State


def loop(s: Session) -> None:
    """Train until `s.steps` steps are done or `s.stop` is set. One pass of the body is one step."""
    cfg, state, policy, engine, algorithm = s.cfg, s.state, s.policy, s.engine, s.algorithm
    engine.load_adapter(policy.adapter(), version=state.step)
    while state.step < s.steps and not s.stop:
        clock, metrics, mismatch = Clock(), Metrics(), parity.Mismatch()
        with clock("generate"):
            prompts = s.prompts.take(cfg.prompts_per_step)
            rollouts = engine.generate(prompts, cfg.sampling, seed=(cfg.seed, state.step))
            check_versions(rollouts, state.step)
        with clock("reward"):
            rewards, parts = score(rollouts, s.functions, trainer_state(s))
            check_invalid(state.invalid_history, float(rewards.isnan().float().mean()), parts.faults())
        advantages = algorithm.advantage(rewards, group_ids(rollouts))
        plan = pack_plan(s, rewards)

        with clock("train"), asleep(engine), random_of(cfg.seed, state.step):
            policy.flat.zero_grad()
            batches = pack(rollouts, advantages, plan, sum_counts(count(rollouts, plan)))
            ran = to_run(batches, cfg.packing.skip_zero_advantage and algorithm.zero_adv_zero_grad)
            for done, batch in enumerate(ran):
                s.console.progress("training", done, len(ran))
                batch = batch.to(policy.device)
                if algorithm.needs_reference:
                    batch = replace(batch, ref_logprobs=policy.score(batch, weights="reference"))
                logprobs, entropy = policy.logprobs(batch)
                loss, stats = algorithm.loss(logprobs, batch, algorithm.config)
                loss.backward()
                metrics.add({**stats, **batch_stats(loss, entropy, batch)})
                mismatch.add(logprobs, batch)
            sum_tensor(policy.flat.gradient)
            sum_tensor(mismatch.sums)
            parity.gate(mismatch, s.limit, policy.score, ran[0] if ran else None)
            update = s.optimizer.step(state.updates, state.skipped_updates)

        state.step += 1
        state.updates += 1
        state.skipped_updates = state.skipped_updates + 1 if update.skipped else 0
        state.consumed = s.prompts.consumed
        state.num_tokens += sum(len(r.prompt.ids) + len(r.completion_ids) for r in rollouts)
        with clock("sync"):
            engine.load_adapter(policy.adapter(), version=state.step)

        values = metrics.values() | mismatch.values() | parts.metrics() | rollout_values(rollouts, rewards)
        values |= packing_stats(batches, ran) | clock.values() | rates(rollouts, ran, clock)
        values |= {
            "grad_norm": update.grad_norm, "learning_rate": update.learning_rate, "epoch": s.prompts.epoch,
            "num_tokens": float(state.num_tokens), "skipped_updates": float(state.skipped_updates),
            "parity/limit": s.limit,
        }  # fmt: skip
        record(s, values, rollouts, rewards, parts, advantages)
        if cfg.eval.every and state.step % cfg.eval.every == 0 and state.step < s.steps:
            measure(s)
        if cfg.checkpoint.every and state.step % cfg.checkpoint.every == 0 and state.step < s.steps:
            s.save()


@contextlib.contextmanager
def random_of(seed: int, step: int) -> Iterator[None]:
    """PyTorch's random state (LoRA dropout) from (seed, step), so that a resumed step draws the same."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed % 2**32, step]).generate_state(1)[0]))
        yield


def to_run(batches: list[Batch], skip: bool) -> list[Batch]:
    """The micro-batches to run: without those of zero advantage when they cannot change the gradient.

    They come last, so leaving them out changes no other. Some are run all the same until 256 trained tokens are, so
    that entropy, mismatch and the parity gate always have something to look at.
    """
    chosen, tokens = [], 0
    for batch in batches:
        if not (skip and batch.zero_advantage) or tokens < 256:
            chosen.append(batch)
            tokens += int(batch.train_mask.sum())
    return chosen


def pack_plan(s: Session, rewards: Tensor) -> PackPlan:
    """The plan of one update: rollouts with an invalid reward are out."""
    return replace(s.plan, keep=tuple((~rewards.isnan()).tolist()))


def check_versions(rollouts: list[Rollout], step: int) -> None:
    """Raise EngineError when a rollout was sampled with another adapter than this step's."""
    stale = sorted({r.policy_version for r in rollouts} - {step})
    if stale:
        raise EngineError(f"rollouts of policy version {stale} in step {step}: the engine's adapter is stale")


def trainer_state(s: Session) -> dict[str, Any]:
    """The snapshot that reward functions get as `trainer_state`; names as in transformers' TrainerState."""
    return {
        "global_step": s.state.step, "max_steps": s.steps, "epoch": s.prompts.epoch,
        "num_input_tokens_seen": s.state.num_tokens,
    }  # fmt: skip


def record(s: Session, values: dict[str, float], rollouts: list[Rollout], rewards: Tensor, parts: Parts,
           advantages: Tensor) -> None:  # fmt: skip
    """Everything about a finished step into the run folder and onto the console."""
    for fault in parts.faults():
        s.console.note(fault)
    s.run.log(s.state.step, values)
    s.run.write_rollouts(s.state.step, rollouts, rewards.tolist(), parts.columns(), advantages.tolist())
    s.console.step(values | {"step": float(s.state.step)}, rollouts[0].text)
    for callback in s.callbacks:
        callback(s.state, values)


def measure(s: Session) -> dict[str, float]:
    """Evaluate the adapter in training on the held-out rows, and log it at the current step."""
    if not s.held:
        return {}
    s.eval_engine.load_adapter(s.policy.adapter(), version=s.state.step)
    values, rollouts, rewards = evaluate(s.eval_engine, s.held, s.cfg, s.eval_functions, trainer_state(s))
    s.run.log(s.state.step, values)
    s.run.write_evaluation(s.state.step, rollouts, rewards)
    s.console.note(f"held-out reward {values['eval/reward']:.3f} ± {values['eval/reward_stderr']:.3f} "
                   f"over {len(s.held)} rows after step {s.state.step}")  # fmt: skip
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
    interrupted: bool


@contextlib.contextmanager
def stop_on_interrupt(s: Session) -> Iterator[None]:
    """The first Ctrl-C lets the step in flight finish and be saved; the second one stops at once."""

    def first(_signal: int, _frame: FrameType | None) -> None:
        s.stop = True
        signal.signal(signal.SIGINT, before)
        s.console.note("stopping after this step and saving; Ctrl-C again stops at once and loses it")

    try:
        before = signal.signal(signal.SIGINT, first)
    except ValueError:  # not the main thread: the caller has the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def what_to_lower(s: Session) -> Iterator[None]:
    """Out of memory becomes a TrainError (exit code 1) that says which settings decide how much is needed."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; PyTorch's CPU allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        cfg = s.cfg
        told = TrainError(
            f"out of memory in step {s.state.step + 1} ({str(error).splitlines()[0]}). Lower packing.budget "
            f"({cfg.packing.budget} tokens per micro-batch) for training, engine.batch_size ({cfg.engine.batch_size} "
            f"sequences) for sampling, or sampling.max_tokens ({cfg.sampling.max_tokens})"
        )
        told.exit_code = 1
        raise told from error


def train(
    cfg: Config, rewards: Sequence[Any] | None = None, resume: bool = False,
    callbacks: Sequence[Callable[[State, dict[str, float]], None]] = (),
) -> Result:  # fmt: skip
    """Train a run from its config; also callable as `rlft.train(cfg)`.

    rewards: reward functions (callables or rlft.Reward) in place of `cfg.rewards`. resume: go on from the newest
    checkpoint in `cfg.out`. callbacks: called with (state, metrics) after each step. Raises RlftError for everything a
    user can cause; the run folder keeps what was done until then.
    """
    with build(cfg, rewards, resume, callbacks) as s:
        before = s.first_evaluation or measure(s)
        with stop_on_interrupt(s), what_to_lower(s):
            loop(s)
        after = measure(s) if s.state.step and not s.stop else {}
        path = s.save()
        page = report.write(s.run.path)
        s.console.finish(before, after, adapter=path, report=page, again=f'rlft generate {s.run.path} "your prompt"')
        return Result(s.run.path, s.state.step, path, page, before, after, s.stop)


def evaluate_run(out: Path, rows: int | None = None) -> dict[str, float]:
    """Evaluate the newest checkpoint of a run on its held-out rows (or the first `rows` of them)."""
    with open_run(out) as (cfg, engine, tokenizer, step):
        if not cfg.eval.rows:
            raise ConfigError(f"{out}: the run has no [eval] rows; add eval.rows and eval.rewards to its config.toml")
        _, held = load_rows(cfg, tokenizer)
        functions = build_rewards(cfg.eval.rewards or cfg.rewards)
        try:
            values, _, _ = evaluate(engine, held[:rows], cfg, functions, {"global_step": step})
        finally:
            for function in functions:
                function.close()
        return values


def generate_from_run(out: Path, prompt: str, max_tokens: int | None = None, temperature: float | None = None) -> str:
    """One completion of a prompt by the newest checkpoint of a run, prompted as its data was."""
    with open_run(out) as (cfg, engine, tokenizer, _):
        made = encode_prompt({"prompt": prompt}, 0, cfg.data, tokenizer)
        sampling = Sampling(
            group_size=1, max_tokens=max_tokens or cfg.sampling.max_tokens,
            temperature=cfg.sampling.temperature if temperature is None else temperature,
            stop_token_ids=cfg.sampling.stop_token_ids,
        )  # fmt: skip
        return engine.generate([made], sampling, seed=(cfg.seed, 0))[0].text


class _CallableModule(ModuleType):
    """Importing the submodule binds `rlft.train` to this module; calling that must train, as the README says."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
