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

from rlft.algos.algorithm import build_algorithm
from rlft.config.data import Data, Reward
from rlft.config.run import Config
from rlft.data.encode import Encoder
from rlft.data.folders import folders_of
from rlft.data.images import images_in, shows_images, source_of, with_places
from rlft.data.kinds import IDS, SAMPLED
from rlft.data.limits import NO_LIMITS, Limits
from rlft.data.usable import Rows, check_rows
from rlft.errors import ConfigError, DataError
from rlft.models.locate import load_tokenizer, locate
from rlft.rewards.parts import RewardBreakdown
from rlft.rewards.rows import open_ends, pass_opened
from rlft.rewards.score import RewardFunction, build_rewards, score
from rlft.runs.folder import Run
from rlft.runs.formats import visible
from rlft.runs.tables import shown_prompt
from rlft.runs.trust import check as check_trust
from rlft.trainer.limits import limits_of_files
from rlft.trainer.validate import purpose_of
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
    trust: bool = False,
) -> bool:
    """Score a few completions and show a table of them; True when every function went well on every one.

    file: a config (.toml, .yaml), whose rewards and data are used, or one reward as `rewards` in a config names it.
    show: prints a rich table or a line. data: a dataset in place of the config's. run, step: score what that run
    sampled in that step (None: its last). completion: the column to score as the completion. timeout: seconds a call
    may take. trust: run the template that the config of `run` names although the folder is not the user's own. Raises
    RlftError for what is missing, and for a function that fails on everything.
    """
    if step is not None and run is None:
        raise ConfigError(f"--step {step}: a step of which run? Give --run RUN")
    if completion is not None and run is not None:
        raise ConfigError(f'--completion "{completion}" and --run {run}: give one of them')
    cfg = Config.load(file) if Path(file).suffix in (".toml", ".yaml", ".yml") else None
    rewards = cfg.rewards if cfg else (Reward(file, timeout=timeout or 30.0),)
    if not rewards:
        raise ConfigError(f"{file}: has no rewards; add rewards = [...], or give file.py:function")
    source = _data(cfg, data, run, trust)
    purpose = purpose_of(cfg, build_algorithm(cfg.algo, cfg.optim.updates)) if cfg else ""
    every = check_rows(source, cfg.seed if cfg else 42, purpose)
    functions = build_rewards(rewards)
    try:
        for function in functions:
            function.timeout = timeout or function.timeout
        if run is not None:
            _pass_opened(functions, Run.resume(run), every, source)
            made, state = _sampled(Run.resume(run), step, every, source, rows)
        else:
            if completion is None and every.kind in SAMPLED:
                raise DataError(
                    f"the rows have no completion to score, only {', '.join(every[0])}. Give --run RUN for what an "
                    f"earlier run sampled, or --completion COLUMN to score a column as if it were one, for example "
                    f"--completion answer"
                )
            tokenizer, state = _tokenizer(cfg, functions), 0
            encoder = _encoder(cfg, source, tokenizer, every.kind)
            asked = [_asked(encoder, source, row, i) for i, row in enumerate(every[:rows])]
            found = [pair for prompt in asked for pair in _recorded(prompt, every.kind, completion)]
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


def _encoder(cfg: Config | None, data: Data, tokenizer: Any, kind: str) -> Encoder | None:
    """Return what encodes the rows, images too where the config's model takes them; None without a tokenizer."""
    if tokenizer is None:
        return None
    limits = NO_LIMITS if cfg is None else Limits(images=limits_of_files(cfg).images)
    return Encoder(data, tokenizer, kind, limits)


def _asked(encoder: Encoder | None, data: Data, row: dict[str, Any], i: int) -> Prompt:
    """Return a row as a prompt, without tokens where there is no encoder."""
    return Prompt((), _with_sources(row, data), i) if encoder is None else encoder.encode(row, i)


def _data(cfg: Config | None, data: str | None, run: Path | None, trust: bool) -> Data:
    if data is not None:
        # Columns and template of the config go on holding.
        return Data(data) if cfg is None else replace(cfg.data, path=data, sources=())
    if cfg is not None:
        return cfg.data
    if run is not None:
        folder = Run.resume(run)
        theirs = Config.load(folder.config)
        check_trust(folder, theirs, trust, rewards=False)
        return theirs.data
    raise ConfigError(
        "give the rows to score: --data PATH (a file, a folder, a hub id, reasoning_gym:TASK) or --run RUN"
    )


# ---- what is scored ----------------------------------------------------------------------------------------------


def _recorded(prompt: Prompt, kind: str, column: str | None) -> list[tuple[Prompt, str]]:
    """The completions that came with a row and their prompt: two for a pair. Raises DataError for a missing column."""
    row, index = prompt.row, prompt.index
    if prompt.messages is None and isinstance(row.get("prompt"), list):
        prompt = replace(prompt, messages=tuple(row["prompt"]))
    if column is not None:
        if row.get(column) is None:
            raise DataError(f'--completion "{column}": row {index} has no such column; it has {", ".join(row)}')
        found = [row[column]]
    elif kind in IDS:
        found = [recorded.text for recorded in prompt.recorded]
    elif kind == "messages":
        turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"row {index}: messages has no assistant message to score")
        row = {name: value for name, value in row.items() if name != "prompt"}
        prompt = Prompt((), row, index, tuple(row["messages"][: turns[-1]]))
        found = [row["messages"][turns[-1] :][:1]]
    else:
        one = ("completion",)
        columns = {"completion": one, "label": one, "preference": ("chosen", "rejected"), "text": ("text",)}
        found = [row[name] for name in columns[kind]]
    return [(prompt, value if isinstance(value, str) else _last(value)) for value in found]


def _last(value: Any) -> str:
    """The text of a completion that is messages; of any other value what str makes of it."""
    messages = isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]
    return str(value[-1]["content"] if messages else value)


def _rollout(prompt: Prompt, text: str, sample: int, tokenizer: Any) -> Rollout:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else ()
    return Rollout(prompt, ids, (True,) * len(ids), None, text, FinishReason.STOP, sample, -1, 0)


def _tokenizer(cfg: Config | None, functions: Sequence[RewardFunction]) -> Any:
    """The tokenizer of the config's model, where a function names completion_ids or the model is on this machine.

    None otherwise: completion_ids are then empty, and what the chat template refuses does not show.
    """
    asks = [function.name for function in functions if "completion_ids" in function.names]
    where = locate(cfg.model) if cfg is not None else None
    here = where is not None and where.gguf is None and Path(where.path).is_dir()  # a .gguf file takes long to read
    if not asks and not here:
        return None
    if cfg is None:
        raise ConfigError(
            f'reward "{asks[0]}" wants completion_ids, which need a tokenizer: give a config whose `model` has it, or '
            f"--run RUN, whose completions have theirs"
        )
    return load_tokenizer(cfg.model)


def _pass_opened(functions: Sequence[RewardFunction], run: Run, rows: Rows, data: Data) -> None:
    """Give functions with the parameter `opened` the tag that the prompts of the run end with, as training did."""
    if any("opened" in function.names for function in functions):
        cfg = Config.load(run.config)
        tokenizer = load_tokenizer(cfg.model)
        encoder = _encoder(cfg, data, tokenizer, rows.kind)
        assert encoder is not None, "there is a tokenizer"
        pass_opened(functions, open_ends([encoder.encode(row, i) for i, row in enumerate(rows[:8])], tokenizer))


def _sampled(run: Run, step: int | None, rows: Rows, data: Data, wanted: int) -> tuple[list[Rollout], int]:
    """The first completions of a step of a run, each with the row of the dataset it was sampled for; and the step."""
    steps = run.rollout_steps()
    if not steps:
        raise ConfigError(f"--run {run.path}: it holds no rollouts yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"--step {step}: {run.path} holds rollouts of the steps {steps[0]} to {steps[-1]}")
    prompts: dict[tuple[str, int | None], Prompt] = {}
    for i, row in enumerate(rows):
        messages = _messages(row, data)
        prompt = Prompt((), row, i, messages)
        # Rows with images may differ in nothing else, so that only their number says which one it was.
        number = int(rows.numbers[i]) if shows_images(row) else None
        prompts.setdefault((shown_prompt(prompt), number), replace(prompt, row=_with_sources(row, data)))
    made = []
    for saved in run.read_rollouts(step)[:wanted]:
        text = saved["prompt"]
        prompt = prompts.get((text, None)) or prompts.get((text, saved["row"]))
        if prompt is None:
            raise DataError(
                f"--run {run.path}: the data has no row with the prompt {text!r:.80}; give the dataset that "
                f"the run was made from, with its data.columns and data.template (its own config.toml has them)"
            )
        ids = tuple(saved["completion_ids"])
        made.append(
            Rollout(
                prompt,
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


def _with_sources(row: dict[str, Any], data: Data) -> dict[str, Any]:
    """A row with its images as reward functions get them in training: paths or bytes."""
    found = images_in(row)
    return row | {"images": [source_of(image, folders_of(data)) for image in found]} if found else row


def _messages(row: dict[str, Any], data: Data) -> tuple[dict[str, Any], ...] | None:
    """The messages that a run shows as the prompt of a row; None where it shows the string."""
    given = row.get("prompt")
    if not isinstance(given, list):
        return None
    given = with_places(given, len(images_in(row)))
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
    line, half = visible(" ".join(text.split())), width // 2 - 1
    return line if len(line) <= width else f"{line[:half].rstrip()}…{line[-half:].lstrip()}"
