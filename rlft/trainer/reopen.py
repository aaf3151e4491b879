"""Open a run from its folder with the adapter of a checkpoint, to evaluate it or to sample from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlft.algos.algorithm import build_algorithm
from rlft.config import secrets
from rlft.config.data import Sampling
from rlft.config.run import BaseWeights, Config
from rlft.data.encode import encode_prompt
from rlft.data.limits import Limits
from rlft.errors import ConfigError
from rlft.models.load import load_tokenizer
from rlft.models.policy import Policy
from rlft.models.rope import context_of
from rlft.monitor.console import Console
from rlft.rewards.rows import open_ends, pass_opened
from rlft.rewards.score import build_rewards
from rlft.rollout.eager import EagerEngine
from rlft.rollout.engine import Engine
from rlft.runs import checkpoint, trust
from rlft.runs.folder import Run
from rlft.trainer.engines import longest_sequence, start
from rlft.trainer.evaluate import evaluate, measures_loss, recorded_loss
from rlft.trainer.limits import limits_of_files
from rlft.trainer.plans import pack_plan_of
from rlft.trainer.setup import identity_of, load_policy, load_prompts_of


@dataclass(frozen=True)
class OpenedRun:
    """A run with one of its adapters loaded."""

    cfg: Config
    policy: Policy
    tokenizer: Any
    step: int
    """Steps that the adapter was trained for; 0 for the base."""
    long: bool
    """Whether the run uses longrope's long factors."""


@contextlib.contextmanager
def open_run(out: Path, which: str = "latest") -> Iterator[OpenedRun]:
    """Open the run in the folder `out`.

    which: "latest", "best", a step ("12"), or "base" for the model without an adapter. Raises ConfigError when the
    folder has no run or no such checkpoint, or when the checkpoint belongs to another base.
    """
    run = Run.resume(str(out))
    path = None if which == "base" else run.checkpoint(which)
    rope_source = path or (run.latest_checkpoint() if run.has_checkpoint() else None)
    long = rope_source is not None and checkpoint.continued_from(rope_source).get("rope") == "long factors"
    # An engine samples from weights on the device, wherever the run has had them.
    cfg = replace(Config.load(run.config), base=BaseWeights())
    checkpoint.check_named(rope_source, cfg.model)
    tokenizer = load_tokenizer(cfg.model, checkpoint.given_tokenizer(rope_source))
    step = 0
    if path is None:
        # A new adapter leaves the base unchanged.
        policy = load_policy(replace(cfg, lora=replace(cfg.lora, resume_from=None)))
    else:
        policy = load_policy(cfg)
        state, tensors, _ = checkpoint.load_checkpoint(path, identity_of(cfg, policy))
        policy.flat.restore(tensors["adapter"], tensors["adapter_start"])
        step = state.step
    yield OpenedRun(cfg, policy, tokenizer, step, long)


@contextlib.contextmanager
def _sampling(run: OpenedRun, engine: Engine) -> Iterator[Engine]:
    """Load the run's adapter into the engine, and close the engine afterwards."""
    try:
        engine.load_adapter(run.policy.adapter(), version=run.step)
        yield engine
    finally:
        engine.close()


def _check_code(out: Path, allowed: bool, rewards: bool) -> None:
    """Raise ConfigError, before a model is loaded, for code that may not run and for secrets that are missing.

    allowed: the user trusts the folder. rewards: those of the run are used.
    """
    folder = Run.resume(str(out))
    cfg = Config.load(folder.config)
    trust.check(folder, cfg, allowed, rewards)
    for reward in (cfg.eval.rewards or cfg.rewards) if rewards else ():
        for problem in secrets.problems(reward.args, f'{folder.config}: args of "{reward.use}"'):
            raise ConfigError(problem)


def evaluate_run(
    out: Path,
    which: str = "latest",
    rows: int | None = None,
    rewards: Sequence[Any] | None = None,
    trusted: bool = False,
    **changes: Any,
) -> dict[str, float]:
    """Evaluate a run on its held-out rows: `eval/*` as during training (rlft.trainer.evaluate), and `step`.

    which: see `open_run`. rows: evaluate only this many of the first rows. rewards: in place of the run's. trusted: run
    the code that config.toml names even where the folder is not the user's own (`rlft.runs.trust`). changes: new values
    for fields of [eval] (samples, temperature, max_tokens, ...). "best" also returns eval/chosen_among, the
    number of evaluations it was chosen from, if more than one: the choice biases the result upwards. Nothing is written
    to the run's folder. Raises ConfigError when the run has no held-out rows or nothing to score them with.
    """
    _check_code(out, trusted, rewards is None)
    with open_run(out, which) as run:
        cfg = run.cfg
        if not cfg.eval.rows:
            raise ConfigError(f"{out}: the run has no [eval] rows; set eval.rows and eval.rewards in its config.toml")
        if rows is not None and not 1 <= rows <= cfg.eval.rows:
            raise ConfigError(f"--rows {rows}: the run holds out {cfg.eval.rows} rows (eval.rows); give 1 to that many")
        prompts, held = load_prompts_of(cfg, run.tokenizer, limits_of_files(cfg))
        cfg = replace(cfg, eval=replace(cfg.eval, **changes))
        has_rewards = bool((cfg.eval.rewards or cfg.rewards) if rewards is None else rewards)
        run.policy.fix_rope(longest_sequence(cfg, run.policy, prompts, held, has_rewards), run.long)
        held, values = held[:rows], {}
        if cfg.engine.name in ("auto", "replay") and measures_loss(prompts, held):
            algorithm = build_algorithm(cfg.algo, cfg.optim.updates)
            values = recorded_loss(run.policy, held, algorithm, pack_plan_of(cfg, algorithm, run.policy))
        functions = build_rewards((cfg.eval.rewards or cfg.rewards) if rewards is None else rewards)
        pass_opened(functions, open_ends(held, run.tokenizer))
        if not functions and not values:
            raise ConfigError(
                f"{out}: its rewards were given from Python; name them as eval.rewards in its config.toml"
            )
        try:
            if functions:
                with Console() as console:
                    sampler = start(cfg, run.policy, run.tokenizer, console, held, trains=False)
                    with _sampling(run, sampler) as engine:
                        values |= evaluate(engine, held, cfg, functions, {"global_step": run.step}).metrics
        finally:
            for function in functions:
                function.close()
        candidates = Run.resume(str(out)).chosen_among() if which == "best" else 0
        return {
            "step": float(run.step),
            **values,
            **({"eval/chosen_among": float(candidates)} if candidates > 1 else {}),
        }


def generate_from_run(
    out: Path,
    prompts: Sequence[str],
    max_tokens: int | None = None,
    temperature: float | None = None,
    which: str = "latest",
    images: Sequence[Any] = (),
) -> list[str]:
    """Sample one completion of each prompt from a run, with the prompt format of its data.

    which: see `open_run`. images: shown before every prompt, as a row of the data may have them.
    """
    with open_run(out, which) as run:
        cfg = run.cfg
        limits = Limits(images=None if run.policy.vision is None else run.policy.vision.reader)
        shown = {"images": list(images)} if images else {}
        rows = [
            encode_prompt({"prompt": text, **shown}, i, cfg.data, run.tokenizer, limits)
            for i, text in enumerate(prompts)
        ]
        sampling = Sampling(
            group_size=1,
            max_tokens=max_tokens or cfg.sampling.max_tokens,
            temperature=cfg.sampling.temperature if temperature is None else temperature,
            stop_token_ids=cfg.sampling.stop_token_ids,
            stop=cfg.sampling.stop,
        )
        longest = max((len(row.ids) for row in rows), default=0)
        context, total = context_of(run.policy.base.config), longest + sampling.max_tokens
        if context is not None and total > context:
            raise ConfigError(
                f"--max-tokens {sampling.max_tokens}: with the prompt, {longest} tokens, that is more than the "
                f"model's context of {context}; lower it"
            )
        run.policy.fix_rope(total, run.long)
        # A few completions take less time than starting vLLM.
        with _sampling(run, EagerEngine(run.policy, run.tokenizer)) as engine:
            return [rollout.text for rollout in engine.generate(rows, sampling, seed=(cfg.seed, 0))]
