"""Build a training session from a config. This is the only module that knows all the parts of a run.

`build_session` validates first (as `rlft validate` does), then loads the model, resumes if asked, and measures how far
engine and trainer disagree. `rlft.trainer.reopen` opens a finished run for `rlft eval` and `rlft generate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlft import __version__, dist
from rlft.algos.algorithm import Algorithm, build_algorithm
from rlft.config.data import Data, Reward
from rlft.config.files import to_toml
from rlft.config.paths import user_path
from rlft.config.run import Config
from rlft.data.limits import Limits
from rlft.data.prompts import Prompts, exclude_prompts, hold_out, load_prompts
from rlft.data.table import PromptTable
from rlft.data.usable import Rows, check_rows
from rlft.environment import untested, without_bars
from rlft.errors import ConfigError, DataError
from rlft.models import targets
from rlft.models.allocator import segments
from rlft.models.fused.placement import move_others
from rlft.models.load import attach_lora, describe_base, load_base, pad_rows, resolve_device, resolve_dtype
from rlft.models.policy import Policy
from rlft.models.structure import decoder_of
from rlft.models.vision import image_reader
from rlft.monitor.background import Background
from rlft.monitor.console import Console
from rlft.monitor.health import HealthMonitor
from rlft.monitor.token_text import TokenText
from rlft.monitor.tracking import Tracking
from rlft.rewards.builtin.length import length
from rlft.rewards.parts import OVERLONG
from rlft.rewards.pool import InProcess
from rlft.rewards.rows import open_ends, pass_opened
from rlft.rewards.score import RewardFunction, build_rewards
from rlft.rollout.engine import Engine, asleep, undeclared_end
from rlft.rollout.replay import ReplayEngine
from rlft.runs import trust
from rlft.runs.claim import Claim
from rlft.runs.folder import Run
from rlft.trainer import engines, opening, ranks
from rlft.trainer.advice import advice
from rlft.trainer.agreement import agree
from rlft.trainer.callbacks import Callbacks
from rlft.trainer.evaluate import measures_loss
from rlft.trainer.given_objects import Given
from rlft.trainer.given_rows import copy_rows, read_streams
from rlft.trainer.limits import check_loaded
from rlft.trainer.optim import Optimizer
from rlft.trainer.plans import memory_plan, pack_plan_of, pass_summary
from rlft.trainer.progress import Progress
from rlft.trainer.reference import Reference
from rlft.trainer.saving import resume as resumed
from rlft.trainer.selfcheck import check as check_path
from rlft.trainer.session import Recorder, Sampler, Session, Trainer, check_adapter
from rlft.trainer.validate import Checked, check, purpose_of
from rlft.types import PackPlan, Prompt, State


def _check(cfg: Config, resume: bool, callables: bool) -> Checked:
    """Check the config, and raise ConfigError with all of its problems."""
    checked = check(cfg, resume=resume, callables=callables)
    faults = checked.problems
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        raise ConfigError(
            "\n".join([f"{len(faults)} problems:", *(f"  {i + 1}. {text}" for i, text in enumerate(faults))])
        )
    return checked


RESUMED = 'they come from lora.resume_from = "{}", or from the checkpoint; train another'


@contextlib.contextmanager
def build_session(
    cfg: Config,
    rewards: Sequence[Any] | None = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    console: Console | None = None,
    given: Given = Given(),  # noqa: B008 (it is frozen)
) -> Iterator[Session]:
    """Build the session of a run, resumed from its newest checkpoint if asked, and close its resources at the end.

    rewards: callables or rlft.Reward in place of `cfg.rewards`. console: the display, a new one where there is none
    yet. given: objects in place of what the config names. The run folder is claimed first and released last. Raises
    RlftError for every error a user can cause.
    """
    called = Callbacks(callbacks)
    ranks.check_config(cfg)
    with ranks.claimed_by_lead(cfg, resume) as claimed, console or Console() as console:
        if claimed.resumed:
            ranks.on_lead(lambda: given.check_resume(claimed.run))
        cfg, called = ranks.config_here(cfg, claimed.run), called if dist.lead() else Callbacks()
        cfg, notes = read_streams(cfg)
        if claimed.run.path != user_path(cfg.out, "out"):
            cfg = replace(cfg, out=str(claimed.run.path))  # numbered
        checked = _check(cfg, claimed.resumed, callables=rewards is not None)
        opening.each(console.note, [*claimed.notes, *notes, *given.notes])
        with _built(cfg, claimed, checked, rewards, called, console, given) as session:
            yield session


@contextlib.contextmanager
def _built(
    cfg: Config,
    claimed: Claim,
    checked: Checked,
    rewards: Sequence[Any] | None,
    callbacks: Callbacks,
    console: Console,
    given: Given,
) -> Iterator[Session]:
    """Build the session of a checked config in a claimed folder."""
    assert checked.algorithm is not None and checked.rows is not None, "a problem otherwise"
    run, algorithm = claimed.run, checked.algorithm
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_bars(always=not console.plain))
        stack.enter_context(segments(growing=True))
        writer = stack.enter_context(Background("rlft-writer"))
        opening.each(console.warn, [*untested(), *advice(cfg, checked.rows, run.path)])
        console.phase(f"loading {cfg.model}")
        tokenizer = given.tokenizer_of(cfg)
        cfg, limits = copy_rows(cfg, run), given.limits_of(cfg)
        rows, eval_prompts = load_prompts_of(cfg, tokenizer, limits, console.note, checked, run)
        prompts = Prompts(rows, cfg.seed, cfg.data.shuffle)
        functions, eval_functions = _functions(cfg, rewards, open_ends(rows, tokenizer), console.warn)
        _close_later(stack, [*functions, *eval_functions])
        policy = given.policy_of(cfg, stack, lambda: load_policy(cfg, console.note))
        check_loaded(limits, policy.base.config, rows, eval_prompts)
        steps = cfg.steps or prompts.steps(cfg.prompts_per_step, cfg.data.epochs or 1.0)
        opening.each(console.note, opening.title(cfg, policy, rows, eval_prompts, steps, run))
        engine, eval_engine = _engines(cfg, policy, tokenizer, console, rows, eval_prompts, bool(eval_functions))
        opening.each(console.warn, _starting(cfg, engine, undeclared_end(tokenizer, policy.base)))
        _close_later(stack, [engine, eval_engine])
        assert engine.SAMPLES or not algorithm.loss.needs_sampler, "validate refuses this"
        fp16, views = resolve_dtype(cfg, policy.device) == torch.float16, policy.flat.parameters.values()
        console.phase("compiling and checking the model")
        plan, memory, passes = _planned(cfg, algorithm, policy, eval_engine, rows if engine.SAMPLES else ())
        eval_loss = bool(eval_prompts) and not engine.SAMPLES and measures_loss(rows, eval_prompts)
        sampler = Sampler(
            engine, eval_engine, prompts, eval_prompts, eval_loss, functions, eval_functions, console.progress
        )
        optimizer = Optimizer(policy.adapter_params, cfg.optim, steps * cfg.optim.updates, fp16, views, given.optimizer)
        reference = Reference(policy, keep=steps * cfg.prompts_per_step > len(rows) and not policy.mixes_rows)
        identity, state = identity_of(cfg, policy) | given.identity, State(steps=steps, data=rows.digest())
        dist.check_same("the run (data and base)", (state.data, identity), ranks.SAME)
        progress = Progress(state, policy, optimizer, reference, prompts)
        if claimed.resumed:
            ranks.on_lead(lambda: resumed(run, cfg, progress, identity, bool(eval_prompts), console.note))
            ranks.send_progress(progress)
        check_adapter(policy, RESUMED.format(cfg.lora.resume_from))
        claimed.make_room()
        # Before the config is written, which makes the folder a run: a tracker that fails leaves no run behind.
        tracking = stack.enter_context(Tracking(cfg, run, state.step, claimed.resumed, console.note))
        _write_start(run, cfg, memory | given.state_bytes(policy), console)
        opening.each(console.detail, opening.details(cfg, policy, algorithm, passes))
        console.start([], steps, state.step)
        console.phase("comparing engine and trainer")
        limit = dist.from_lead(agree(cfg, policy, engine, rows, plan, console.detail))
        trainer = Trainer(cfg, steps, policy, algorithm, optimizer, reference, plan, limit, state, identity, progress)
        health = HealthMonitor(cfg.algo.name)
        recorder = Recorder(run, writer, console, health, tracking, TokenText(tokenizer), tokenizer, callbacks)
        yield Session(sampler, trainer, recorder)


def _planned(
    cfg: Config, algorithm: Algorithm, policy: Policy, engine: Engine, rows: Sequence[Prompt]
) -> tuple[PackPlan, dict[str, int], str]:
    """Check the policy's path; return how steps are packed, the bytes of memory, and a summary of a pass."""
    with asleep(engine):
        check_path(policy)
        # Planned here, because a pass may use the memory that is free now.
        plan = ranks.same_plan(pack_plan_of(cfg, algorithm, policy, rows))
        return plan, memory_plan(policy, cfg, engine, plan.budget), pass_summary(policy, plan.budget)


def _write_start(run: Run, cfg: Config, memory: dict[str, int], console: Console) -> None:
    """Write the files that make the folder a run. memory: bytes by owner."""
    run.write_config(to_toml(cfg))
    trust.sign(run)
    run.write_plan(memory)
    console.keep_log(run.log_file)


def _close_later(stack: contextlib.ExitStack, resources: Sequence[Any]) -> None:
    """Close each object when the run ends. The same object may be listed several times."""
    for resource in {id(resource): resource for resource in resources}.values():
        stack.callback(resource.close)


def load_prompts_of(
    cfg: Config,
    tokenizer: Any,
    limits: Limits,
    note: Callable[[str], None] = lambda _: None,
    checked: Checked | None = None,
    run: Run | None = None,
) -> tuple[PromptTable, PromptTable]:
    """Load the training prompts and the held-out prompts.

    limits: of the model's files. note: called with messages about rows that are left out. checked: has the rows, where
    they were read before. run: gets a file of the rows that are left out.
    """

    def load(name: str, data: Data, rows: Rows | None) -> PromptTable:
        if rows is None:
            rows = check_rows(data, cfg.seed, purpose_of(cfg, build_algorithm(cfg.algo, cfg.optim.updates)))
        loaded = load_prompts(data, tokenizer, cfg.seed, rows, limits)
        for line in loaded.notes:
            note(line.replace("data:", f"{name}:", 1))
        if loaded.drops:
            file = f"{'' if name == 'data' else 'eval-'}dropped.jsonl"
            note(f"{loaded.drops.note(name)}{f'; see {run.path / file}' if run else ''}")
            if run is not None:
                with run.writing(file):
                    loaded.drops.write(run.path / file)
        return loaded.prompts

    data = load("data", cfg.data, checked and checked.rows)
    if not cfg.eval.rows:
        return data, data[:0]
    if cfg.eval.data is None:
        return hold_out(data, cfg.eval.rows, cfg.seed)
    evals = load("eval.data", cfg.eval.data, checked and checked.held)
    if len(evals) < cfg.eval.rows:
        raise DataError(f"eval.rows = {cfg.eval.rows}: eval.data has {len(evals)} usable rows; lower eval.rows")
    evals = evals[: cfg.eval.rows]
    rest = exclude_prompts(data, evals)
    if not rest:
        raise DataError(
            "eval.data: every training row has a prompt that is evaluated on; give other rows to one of them"
        )
    if len(rest) < len(data):
        note(f"{len(data) - len(rest)} training rows with a prompt of eval.data left out")
    return rest, evals


def _functions(
    cfg: Config, rewards: Sequence[Any] | None, ends: Sequence[str], note: Callable[[str], None]
) -> tuple[list[RewardFunction], list[RewardFunction]]:
    """Build the reward functions of training and of evaluation.

    ends: of some prompts as text, for functions that want the tag the prompts open. note: called with what is to be
    known about the functions. Only training has the overlong penalty, if switched on: it depends on
    `sampling.max_tokens`.
    """
    functions = build_rewards(cfg.rewards if rewards is None else rewards)
    names = [function.name for function in functions]
    if cfg.dynamic_sampling.by is not None and cfg.dynamic_sampling.by not in names:
        raise ConfigError(
            f'dynamic_sampling.by = "{cfg.dynamic_sampling.by}": no reward function of that name; '
            f"there are {', '.join(names)}"
        )
    if cfg.overlong.penalty_share:
        if OVERLONG in names:
            raise ConfigError(
                f'overlong.penalty_share = {cfg.overlong.penalty_share} adds a reward named "{OVERLONG}", and there is '
                f"one; leave out one of them"
            )
        longest = cfg.sampling.max_tokens
        args = {"max_tokens": longest, "buffer": max(1, round(cfg.overlong.penalty_share * longest))}
        functions.append(RewardFunction(OVERLONG, InProcess(length), Reward(OVERLONG, args=args)))
        functions[-1].open()
    without_penalty = [function for function in functions if function.name != OVERLONG]
    eval_functions = build_rewards(cfg.eval.rewards) if cfg.eval.rewards else without_penalty
    every = [*functions, *eval_functions]
    for text in dict.fromkeys([*(function.note for function in every), pass_opened(every, ends)]):
        if text:
            note(text)
    return functions, eval_functions


def load_policy(cfg: Config, note: Callable[[str], None] = lambda _: None) -> Policy:
    """Load the base and attach the initial adapter. note: called with messages about files that are ignored."""
    device, place = resolve_device(cfg), cfg.base.place
    on_host = place != "device" and _reads_as_it_is(cfg, device)
    base = load_base(cfg, device, note, torch.device("cpu") if on_host else device)
    model = attach_lora(base, cfg.lora, cfg.seed)
    if on_host:
        move_others(model, decoder_of(base), device)
        pad_rows(base.get_input_embeddings().weight, base.get_output_embeddings().weight)  # type: ignore[operator]
    return Policy(model, place=place, images=image_reader(cfg.model, base.config, cfg.data))


def _reads_as_it_is(cfg: Config, device: torch.device) -> bool:
    """Return False for a base that is quantized while it is read, on the device that computes."""
    plan = describe_base(cfg, device)
    return plan.quantized or plan.quantization == "none"


def _engines(
    cfg: Config, policy: Policy, tokenizer: Any, console: Console, rows: PromptTable, evals: PromptTable, scores: bool
) -> tuple[Engine, Engine]:
    """Start the engines of training and evaluation: the same one, unless training replays recorded completions.

    evals: held-out prompts. scores: evaluations have reward functions, so they sample. Fixes the rotary tables first.
    """
    policy.fix_rope(engines.longest_sequence(cfg, policy, rows, evals, scores))
    if engines.engine_name(cfg, bool(rows[0].recorded), policy.device) != "replay":
        shown = bool(rows.with_images() or evals.with_images())
        engine = engines.start(cfg, policy, tokenizer, console, [rows.longest_prompt(), *evals], shown)
        return engine, engine
    assert rows[0].recorded, "validate refuses this"
    engine = ReplayEngine()
    if not (scores and evals):
        return engine, engine
    return engine, engines.start(cfg, policy, tokenizer, console, evals, bool(evals.with_images()), trains=False)


def identity_of(cfg: Config, policy: Policy) -> dict[str, str]:
    """Return the properties that a checkpoint must share with this run to be resumed."""
    lora, ranks = cfg.lora, sorted(targets.expert_ranks(policy.model))
    return {
        "model": cfg.model,
        "base": policy.fingerprint,
        "rlft": __version__,
        "lora": f"rank {lora.rank}, alpha {lora.alpha:g}, rslora {lora.rslora}, {len(policy.adapter())} tensors"
        + "".join(f", experts {rank}" for rank in ranks if rank != lora.rank),
        **({"rope": policy.rope.factors} if policy.rope is not None else {}),
    }


def _starting(cfg: Config, engine: Engine, end: str) -> list[str]:
    """Return notes about settings and files that have less effect than a reader may expect. end: `undeclared_end`."""
    message = f"sampling.temperature = {cfg.sampling.temperature:g}: recorded completions are trained at temperature 1"
    return [*([message] if not engine.SAMPLES and cfg.sampling.temperature != 1 else []), *([end] if end else [])]
