"""`rlft reward-check`: reward functions on a few completions, without a model.

The completions are those recorded with the data, or those that an earlier run sampled. What a function gets, how long
it may take and what counts as a fault are as in training: the same code runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlft.config.data import Data, Reward
from rlft.config.run import Config
from rlft.data.kinds import kind_of
from rlft.data.usable import Rows, check_rows
from rlft.errors import ConfigError, DataError
from rlft.rewards.parts import RewardBreakdown
from rlft.rewards.score import RewardFunction, build_rewards, score
from rlft.runs.folder import Run
from rlft.runs.tables import shown_prompt
from rlft.types import FinishReason, Prompt, Rollout


def check(
    file: str,
    show: Callable[[Any], None],
    data: str | None = None,
    rows: int = 8,
    run: Path | None = None,
    step: int | None = None,
    completion: str | None = None,
    timeout: float | None = None,
) -> bool:
    """Score a few completions and show a table of them; True when every function went well on every one.

    file: a config (.toml, .yaml), whose rewards and data are used, or one reward as `rewards` in a config names it.
    show: prints a rich table or a line. data: a dataset in place of the config's. run, step: score what that run
    sampled in that step (None: its last). completion: the column to score as the completion. timeout: seconds a call
    may take. Raises RlftError for what is missing, and for a function that fails on everything.
    """
    if step is not None and run is None:
        raise ConfigError(f"--step {step}: a step of which run? Give --run RUN")
    if completion is not None and run is not None:
        raise ConfigError(f'--completion "{completion}" and --run {run}: give one of them')
    cfg = Config.load(file) if Path(file).suffix in (".toml", ".yaml", ".yml") else None
    rewards = cfg.rewards if cfg else (Reward(file, timeout=timeout or 30.0),)
    if not rewards:
        raise ConfigError(f"{file}: has no rewards; add rewards = [...], or give file.py:function")
    source = _data(cfg, data, run)
    every = check_rows(source, cfg.seed if cfg else 42)
    functions = build_rewards(rewards)
    try:
        for function in functions:
            function.timeout = timeout or function.timeout
        if run is not None:
            made, state = _sampled(Run.resume(run), step, every, source, rows)
        else:
            found = [pair for i, row in enumerate(every[:rows]) for pair in _recorded(row, i, completion)]
            tokenizer, state = _tokenizer(cfg, functions), 0
            made = [_rollout(prompt, text, i, tokenizer) for i, (prompt, text) in enumerate(found)]
        _, parts = score(made, functions, {"global_step": state, "max_steps": (cfg and cfg.steps) or 0, "epoch": 0.0})
    finally:
        for function in functions:
            function.close()
    show(_table(made, functions, parts))
    show(_summary(functions, parts))
    for note in [*(function.note for function in functions if function.note), *parts.faults()]:
        show(note)
    return not any(any(outcome.invalid) for outcome in parts.outcomes.values())


def _data(cfg: Config | None, data: str | None, run: Path | None) -> Data:
    if data is not None:
        # Columns and template of the config go on holding.
        return Data(data) if cfg is None else replace(cfg.data, path=data, sources=())
    if cfg is not None:
        return cfg.data
    if run is not None:
        return Config.load(Run.resume(run).config).data
    raise ConfigError(
        "give the rows to score: --data PATH (a file, a folder, a hub id, reasoning_gym:TASK) or --run RUN"
    )


# ---- what is scored ----------------------------------------------------------------------------------------------


def _recorded(row: dict[str, Any], index: int, column: str | None) -> list[tuple[Prompt, str]]:
    """The completions that came with a row and their prompt: two for a pair. Raises DataError when there is none."""
    kind = kind_of(row)
    prompt = Prompt((), row, index, None if isinstance(row.get("prompt"), str) else tuple(row.get("prompt") or ()))
    if column is not None:
        if row.get(column) is None:
            raise DataError(f'--completion "{column}": row {index} has no such column; it has {", ".join(row)}')
        found = [row[column]]
    elif kind == "messages":
        turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"row {index}: messages has no assistant message to score")
        prompt = Prompt((), row, index, tuple(row["messages"][: turns[-1]]))
        found = [row["messages"][turns[-1] :][:1]]
    else:
        one = ("completion",)
        columns = {"completion": one, "label": one, "preference": ("chosen", "rejected"), "text": ("text",)}
        found = [row[name] for name in columns.get(kind, ())]
    if not found:
        raise DataError(
            f"the rows have no completion to score, only {', '.join(row)}. Give --run RUN for what an earlier run "
            f"sampled, or --completion COLUMN to score a column as if it were one, for example --completion answer"
        )
    return [(prompt, value if isinstance(value, str) else _last(value)) for value in found]


def _last(value: Any) -> str:
    """The text of a completion that is messages; of any other value what str makes of it."""
    messages = isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]
    return str(value[-1]["content"] if messages else value)


def _rollout(prompt: Prompt, text: str, sample: int, tokenizer: Any) -> Rollout:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else ()
    return Rollout(prompt, ids, (True,) * len(ids), None, text, FinishReason.STOP, sample, -1, 0)


def _tokenizer(cfg: Config | None, functions: Sequence[RewardFunction]) -> Any:
    """The config's tokenizer when a function names completion_ids, else None: then they are empty."""
    asks = [function.name for function in functions if "completion_ids" in function.names]
    if not asks:
        return None
    if cfg is None:
        raise ConfigError(
            f'reward "{asks[0]}" wants completion_ids, which need a tokenizer: give a config whose `model` has it, or '
            f"--run RUN, whose completions have theirs"
        )
    from rlft.models.load import load_tokenizer

    return load_tokenizer(cfg.model)


def _sampled(run: Run, step: int | None, rows: Rows, data: Data, wanted: int) -> tuple[list[Rollout], int]:
    """The first completions of a step of a run, each with the row of the dataset it was sampled for; and the step."""
    steps = run.rollout_steps()
    if not steps:
        raise ConfigError(f"--run {run.path}: it holds no rollouts yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"--step {step}: {run.path} holds rollouts of the steps {steps[0]} to {steps[-1]}")
    prompts: dict[str, Prompt] = {}
    for i, row in enumerate(rows):
        messages = _messages(row, data)
        prompt = Prompt((), row, i, messages)
        prompts.setdefault(shown_prompt(prompt), prompt)
    made = []
    for saved in run.read_rollouts(step)[:wanted]:
        if saved["prompt"] not in prompts:
            raise DataError(
                f"--run {run.path}: the data has no row with the prompt {saved['prompt']!r:.80}; give the dataset that "
                f"the run was made from, with its data.columns and data.template (its own config.toml has them)"
            )
        ids = tuple(saved["completion_ids"])
        made.append(
            Rollout(
                prompts[saved["prompt"]],
                ids,
                (True,) * len(ids),
                None,
                saved["completion"],
                FinishReason(saved["finish_reason"]),
                saved["sample"],
                saved["policy_version"],
                0,
            )
        )
    return made, step - 1


def _messages(row: dict[str, Any], data: Data) -> tuple[dict[str, Any], ...] | None:
    """The messages that a run shows as the prompt of a row; None where it shows the string."""
    given = row.get("prompt")
    if not isinstance(given, list):
        return None
    if data.system and given[0]["role"] != "system":
        return ({"role": "system", "content": data.system}, *given)
    return tuple(given)


# ---- what is shown -----------------------------------------------------------------------------------------------


def _table(made: Sequence[Rollout], functions: Sequence[RewardFunction], parts: RewardBreakdown) -> Any:
    """One line per completion."""
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", "completion", box=None, pad_edge=False, header_style="bold")
    for function in functions:
        table.add_column(function.name, justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    for row, rollout in enumerate(made):
        outcomes = [parts.outcomes[function.name] for function in functions]
        cells = [_value(outcome.values[row], outcome.invalid[row]) for outcome in outcomes]
        total = parts.total[row].item()
        invalid = any(outcome.invalid[row] for outcome in outcomes)
        shown = [Text(_short(_prompt(rollout.prompt))), Text(_short(rollout.text))]
        table.add_row(*shown, *cells, _value(total, invalid))
    return table


def _summary(functions: Sequence[RewardFunction], parts: RewardBreakdown) -> Any:
    """One line per function."""
    from rich.table import Table

    table = Table("function", box=None, pad_edge=False, header_style="bold")
    for name in ("weight", "mean", "none", "invalid", "calls", "seconds per call"):
        table.add_column(name, justify="right")
    for function in functions:
        outcome = parts.outcomes[function.name]
        values = [value for value in outcome.values if not math.isnan(value)]
        none = sum(math.isnan(value) and not bad for value, bad in zip(outcome.values, outcome.invalid, strict=True))
        table.add_row(
            function.name,
            f"{function.weight:g}",
            _value(sum(values) / len(values) if values else math.nan, False),
            str(none),
            str(sum(outcome.invalid)),
            str(outcome.calls),
            f"{outcome.seconds / max(1, outcome.calls):.2g}",
        )
    return table


def _value(value: float, invalid: bool) -> str:
    return "invalid" if invalid else "none" if math.isnan(value) else f"{value:.4g}"


def _prompt(prompt: Prompt) -> str:
    text = prompt.row.get("prompt")
    if isinstance(text, str):
        return text
    return str(prompt.messages[-1]["content"]) if prompt.messages else json.dumps(text, default=str)


def _short(text: str, width: int = 32) -> str:
    """On one line, the middle left out where it is long: what is judged is mostly at the end."""
    line, half = " ".join(text.split()), width // 2 - 1
    return line if len(line) <= width else f"{line[:half].rstrip()}…{line[-half:].lstrip()}"
