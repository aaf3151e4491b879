"""A run brought back from its folder: evaluated again, or sampled from, with the adapter of one of its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlft.algos.algorithm import build_algorithm
from rlft.config.data import Sampling
from rlft.config.run import Config
from rlft.data.prompts import encode_prompt
from rlft.errors import ConfigError
from rlft.models.load import load_tokenizer
from rlft.models.policy import Policy
from rlft.monitor.console import Console
from rlft.rewards.score import build_rewards
from rlft.rollout.eager import EagerEngine
from rlft.rollout.engine import Engine
from rlft.runs import checkpoint
from rlft.runs.folder import Run
from rlft.trainer.engines import longest_sequence, start
from rlft.trainer.evaluate import evaluate, measures_loss, recorded_loss
from rlft.trainer.plans import pack_plan_of
from rlft.trainer.setup import identity_of, load_policy, load_prompts_of


@dataclass(frozen=True)
class OpenedRun:
    """A run with one of its adapters loaded."""

    cfg: Config
    policy: Policy
    tokenizer: Any
    step: int
    """Steps the adapter was trained for; 0 for the base."""
    long: bool
    """Whether the run has longrope's long factors."""


@contextlib.contextmanager
def open_run(out: Path, which: str = "latest") -> Iterator[OpenedRun]:
    """The run in the folder `out`. which: "latest", "best", a step ("12"), or "base" for the model without an adapter.

    Raises ConfigError when the folder holds no run, or not that checkpoint, or one of another base.
    """
    run = Run.resume(str(out))
    path = None if which == "base" else run.checkpoint(which)
    saved = path or (run.latest_checkpoint() if run.has_checkpoint() else None)
    long = saved is not None and checkpoint.continued_from(saved).get("rope") == "long factors"
    cfg = Config.load(run.config)
    tokenizer = load_tokenizer(cfg.model)
    step = 0
    if path is None:
        # A new adapter adds exactly nothing.
        policy = load_policy(replace(cfg, lora=replace(cfg.lora, resume_from=None)))
    else:
        policy = load_policy(cfg)
        state, tensors, _ = checkpoint.load_checkpoint(path, identity_of(cfg, policy))
        policy.adapter_params.data.copy_(tensors["adapter"])
        policy.flat.start.copy_(tensors["adapter_start"])
        step = state.step
    yield OpenedRun(cfg, policy, tokenizer, step, long)


@contextlib.contextmanager
def _sampling(run: OpenedRun, engine: Engine) -> Iterator[Engine]:
    """The engine with the run's adapter; closed afterwards."""
    try:
        engine.load_adapter(run.policy.adapter(), version=run.step)
        yield engine
    finally:
        engine.close()


def evaluate_run(
    out: Path, which: str = "latest", rows: int | None = None, rewards: Sequence[Any] | None = None, **changes: Any
) -> dict[str, float]:
    """Evaluate a run on its held-out rows: `eval/*` as during training (rlft.trainer.evaluate), and `step`.

    which: as `open_run`. rows: only the first so many. rewards: in place of the run's. changes: other values for fields
    of [eval] (samples, temperature, max_tokens, ...). "best" also has eval/chosen_among, the evaluations that it is the
    best of, from 2 on: what the choice had of luck is in its results. Nothing is written into the run's folder. Raises
    ConfigError when the run has no held-out rows or nothing to score them with.
    """
    with open_run(out, which) as run:
        cfg = run.cfg
        if not cfg.eval.rows:
            raise ConfigError(f"{out}: the run has no [eval] rows; set eval.rows and eval.rewards in its config.toml")
        if rows is not None and not 1 <= rows <= cfg.eval.rows:
            raise ConfigError(f"--rows {rows}: the run holds out {cfg.eval.rows} rows (eval.rows); give 1 to that many")
        prompts, held = load_prompts_of(cfg, run.tokenizer)
        cfg = replace(cfg, eval=replace(cfg.eval, **changes))
        scored = bool((cfg.eval.rewards or cfg.rewards) if rewards is None else rewards)
        run.policy.fix_rope(longest_sequence(cfg, run.policy, prompts, held, scored), run.long)
        held, values = held[:rows], {}
        if cfg.engine.name in ("auto", "replay") and measures_loss(prompts, held):
            algorithm = build_algorithm(cfg.algo, cfg.optim.updates)
            values = recorded_loss(run.policy, held, algorithm, pack_plan_of(cfg, algorithm, run.policy))
        functions = build_rewards((cfg.eval.rewards or cfg.rewards) if rewards is None else rewards)
        if not functions and not values:
            raise ConfigError(
                f"{out}: its rewards were given from Python; name them as eval.rewards in its config.toml"
            )
        try:
            if functions:
                with Console() as console:
                    started = start(cfg, run.policy, run.tokenizer, console, held)
                    with _sampling(run, started) as engine:
                        values |= evaluate(engine, held, cfg, functions, {"global_step": run.step}).metrics
        finally:
            for function in functions:
                function.close()
        among = Run.resume(str(out)).chosen_among() if which == "best" else 0
        return {"step": float(run.step), **values, **({"eval/chosen_among": float(among)} if among > 1 else {})}


def generate_from_run(
    out: Path, prompt: str, max_tokens: int | None = None, temperature: float | None = None, which: str = "latest"
) -> str:
    """One completion of a prompt by a checkpoint of a run (`open_run`), prompted as its data was."""
    with open_run(out, which) as run:
        cfg = run.cfg
        made = encode_prompt({"prompt": prompt}, 0, cfg.data, run.tokenizer)
        sampling = Sampling(
            group_size=1,
            max_tokens=max_tokens or cfg.sampling.max_tokens,
            temperature=cfg.sampling.temperature if temperature is None else temperature,
            stop_token_ids=cfg.sampling.stop_token_ids,
            stop=cfg.sampling.stop,
        )
        run.policy.fix_rope(len(made.ids) + sampling.max_tokens, run.long)
        # One completion is there before vLLM has started.
        with _sampling(run, EagerEngine(run.policy, run.tokenizer)) as engine:
            return engine.generate([made], sampling, seed=(cfg.seed, 0))[0].text
