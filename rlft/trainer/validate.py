"""Find every problem of a run that shows without loading its model, for `rlft validate` and `rlft train`.

Each check yields messages instead of raising the first one, so that a user can fix a config in one pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlft.algos.advantages import WITHIN_GROUPS
from rlft.algos.algorithm import Algorithm, build_algorithm
from rlft.config import resolve, secrets
from rlft.config.data import Data, Reward
from rlft.config.files import to_toml
from rlft.config.paths import user_path
from rlft.config.run import Config
from rlft.data.kinds import PAIRS, SAMPLED, Purpose
from rlft.data.prompts import load_prompts
from rlft.data.usable import Rows, check_rows
from rlft.environment import version_problems
from rlft.errors import ConfigError, RlftError
from rlft.models.continued import read_adapter_config
from rlft.models.load import describe_base, load_tokenizer, locate, resolve_device
from rlft.monitor import tracking
from rlft.rewards.build import builtin
from rlft.rewards.call import signature
from rlft.rewards.overlap import OURS
from rlft.rewards.protocol import Signature
from rlft.rewards.rows import builtin_problems
from rlft.rewards.texts import LONGEST, described, type_name
from rlft.runs.claim import decide
from rlft.runs.folder import Run
from rlft.trainer.engines import engine_name
from rlft.trainer.given_rows import as_written
from rlft.trainer.limits import limits_of_files

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""Arguments that every reward function may take besides the dataset's columns."""


@dataclass(frozen=True)
class Checked:
    """What a check of a config has found and built."""

    problems: list[str]
    """One sentence each that names the field, its value and the remedy."""
    algorithm: Algorithm | None
    """None where it could not be built."""
    rows: Rows | None
    """The rows of the training data; None where they could not be read."""
    held: Rows | None
    """The rows of `eval.data`, or else those of the training data."""


def problems(cfg: Config, resume: bool = False, callables: bool = False) -> list[str]:
    """Return all problems of a config, see `validate`."""
    return validate(cfg, resume, callables).problems


def validate(cfg: Config, resume: bool = False, callables: bool = False) -> Checked:
    """Find all problems of a config, see `check`; also those that the rows have with the tokenizer of the model."""
    checked = check(cfg, resume, callables)
    return checked if checked.problems else replace(checked, problems=list(dict.fromkeys(_encoding(cfg, checked))))


def check(cfg: Config, resume: bool = False, callables: bool = False) -> Checked:
    """Find all problems of a config; a start goes on with what was built and read here.

    resume: the run folder must hold a run instead of being free. callables: reward functions were given from Python in
    place of `cfg.rewards`. Reads the dataset and imports reward files and the algorithm; loads no model.
    """
    messages = [*version_problems(_needed(cfg)), *_training(cfg)]
    device = _collect(messages, lambda: resolve_device(cfg))
    messages += _model(cfg, device)
    messages += _out(cfg, resume)
    algorithm = _collect(messages, lambda: build_algorithm(cfg.algo, cfg.optim.updates))
    purpose = purpose_of(cfg, algorithm)
    rows: Rows | None = _collect(messages, lambda: check_rows(cfg.data, cfg.seed, purpose))
    held = rows
    if cfg.eval.rows and cfg.eval.data is not None:
        held = _collect(messages, lambda: check_rows(cfg.eval.data or Data(), cfg.seed, purpose))
    if rows is not None:
        messages += _engine(cfg, algorithm, rows, callables)
        messages += _vllm(cfg, rows, device)
        messages += _base(cfg, rows.kind not in SAMPLED, callables)
        messages += _held_out(cfg, rows, held)
        if cfg.eval.rows and held is not None:
            messages += _measured(cfg, rows.kind, held.kind, callables)
    messages += _rewards("rewards", cfg.rewards, rows)
    messages += _rewards("eval.rewards", cfg.eval.rewards, held)
    messages += tracking.problems(cfg.track)
    # A value that no file can hold would stop the run when it writes its config, after the model was loaded.
    _collect(messages, lambda: to_toml(as_written(cfg)))
    # Two checks may report the same fault.
    return Checked(list(dict.fromkeys(messages)), algorithm, rows, held)


def _training(cfg: Config) -> list[str]:
    """Return what sampling in training may not have. `Config` does not check it, so that every fault shows at once."""
    try:
        cfg.sampling.check_for_training()
    except ConfigError as error:
        return str(error).splitlines()
    return []


def purpose_of(cfg: Config, algorithm: Algorithm | None) -> Purpose:
    """Return what a run does with its rows: sample completions, or train on recorded ones."""
    if algorithm is None:
        return ""
    if cfg.engine.name in ("eager", "vllm"):
        return "sampling"
    if algorithm.loss.whole_groups and algorithm.advantage_name in ("identity", "best_and_worst"):
        return "pairs"
    if algorithm.advantage_name == "identity":
        return "supervised"
    return "sampling" if cfg.engine.name == "auto" else ""


def _encoding(cfg: Config, checked: Checked) -> Iterator[str]:
    """Encode all rows with the tokenizer of a model that is on this machine, and yield what is wrong with them."""
    where = locate(cfg.model)
    if checked.rows is None or not Path(where.path).is_dir():
        return
    messages: list[str] = []
    tokenizer = _collect(messages, lambda: load_tokenizer(cfg.model))
    limits = _collect(messages, lambda: limits_of_files(cfg))
    if tokenizer is not None and limits is not None:
        _collect(messages, lambda: load_prompts(cfg.data, tokenizer, cfg.seed, checked.rows, limits))
        if (held := cfg.eval.data) is not None and checked.held is not None:
            _collect(messages, lambda: load_prompts(held, tokenizer, cfg.seed, checked.held, limits))
    yield from messages


def _collect(messages: list[str], check: Callable[[], Any]) -> Any:
    """Return the result of `check`; on RlftError append its message to `messages` and return None."""
    try:
        return check()
    except RlftError as error:
        messages.append(str(error))
        return None


def _needed(cfg: Config) -> tuple[str, ...]:
    bits = cfg.quantization in ("nf4", "int8") or cfg.optim.name == "adamw_8bit"
    vllm = cfg.engine.name == "vllm"
    return ("torch", "transformers", "peft", *(("bitsandbytes",) if bits else ()), *(("vllm",) if vllm else ()))


def _model(cfg: Config, device: torch.device | None) -> Iterator[str]:
    name = cfg.model
    try:
        where = locate(name)
    except ConfigError as error:
        yield str(error)
        return
    # A hub id has at most one slash and is no path; whether the hub has it shows at loading.
    if where.path == name and (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
        yield f'model = "{name}": no such folder'
    elif device is not None and (where.gguf or Path(where.path).is_dir()):
        # A model of the hub is checked when it is loaded.
        try:
            describe_base(cfg, device)
        except ConfigError as error:
            yield str(error)
    folder = cfg.lora.resume_from
    if folder is not None:
        try:
            read_adapter_config(folder)
        except ConfigError as error:
            yield str(error)


def _out(cfg: Config, resume: bool) -> Iterator[str]:
    try:
        out = user_path(cfg.out, "out")
    except ConfigError as error:
        yield str(error)
        return
    if out.exists() and not out.is_dir():
        yield f'out = "{out}": is a file; give a folder'
        return
    try:
        decide(Run(out), resume, cfg.if_exists)
    except ConfigError as error:
        yield str(error)
    # The run creates the folder, so the nearest existing parent must be writable.
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield f'out = "{out}": {nearest} cannot be written to; give another folder'


def _vllm(cfg: Config, rows: Rows, device: torch.device | None) -> Iterator[str]:
    """Yield what vLLM does not support, where it is the engine that samples."""
    if device is None or engine_name(cfg, rows.kind not in SAMPLED, device) != "vllm":
        return
    if cfg.quantization == "int8":
        yield 'quantization = "int8": vLLM takes NF4 and plain weights; set "nf4" or "none", or engine.name = "eager"'
    if cfg.dtype == "float64":
        yield 'dtype = "float64": vLLM has 16 and 32 bits; set another dtype, or engine.name = "eager"'
    if device.type == "cpu" and cfg.engine.mode not in ("auto", "shared"):
        yield f'engine.mode = "{cfg.engine.mode}": on a CPU vLLM has no memory that sleeps; set "shared" or "auto"'


def _base(cfg: Config, recorded: bool, callables: bool) -> Iterator[str]:
    """Reject sampling over a base that does not lie on the device."""
    rewards = bool(cfg.rewards or cfg.eval.rewards or callables)
    samples = cfg.engine.name not in ("auto", "replay") or not recorded or (cfg.eval.rows and rewards)
    if cfg.base.place != "device" and samples:
        yield (
            f'base.place = "{cfg.base.place}": an engine samples from weights on the device, so only recorded '
            f'completions without rewards can be trained on (SFT, DPO); set base.place = "device" to sample'
        )


def _engine(cfg: Config, algorithm: Algorithm | None, rows: Rows, callables: bool) -> Iterator[str]:
    """Check engine, algorithm, group size and rewards against the kind of data."""
    recorded, pairs = rows.kind not in SAMPLED, rows.kind in PAIRS
    engine = cfg.engine.name if cfg.engine.name != "auto" else ("replay" if recorded else "eager")
    baseline = algorithm is not None and algorithm.advantage_name
    if algorithm is not None:
        yield from _pairs(cfg, algorithm, rows)
        yield from _dropout(cfg, algorithm, engine)
    if engine == "replay":
        if not recorded:
            yield (
                'engine.name = "replay": the data has no column of completions (completion, text, messages, chosen); '
                'set "eager"'
            )
        elif baseline in WITHIN_GROUPS and not pairs:
            yield (
                f'algo.advantage = "{baseline}": the data has one completion per row, and a group of one has advantage '
                f'0, so nothing is learned; set algo.name = "sft", or engine.name = "eager" to sample completions'
            )
        if algorithm is not None and algorithm.loss.needs_sampler:
            yield f'algo.name = "{cfg.algo.name}": needs sampler log-probs, which recorded completions lack'
        if cfg.engine.routing_replay is True:
            yield "engine.routing_replay = true: recorded completions come without an engine's experts; leave it out"
        if cfg.dynamic_sampling.rounds:
            rounds = cfg.dynamic_sampling.rounds
            yield f"dynamic_sampling.rounds = {rounds}: recorded completions are not drawn again; set it to 0"
        if cfg.curriculum.solved_share is not None:
            yield "curriculum: recorded completions are not solved or unsolved; leave the section out"
        if cfg.overlong.penalty_share or cfg.overlong.mask:
            yield "overlong: recorded completions were not cut at sampling.max_tokens; leave the section out"
        return
    if not (cfg.rewards or callables):
        yield 'rewards is empty: completions are sampled, so name a reward function, for example rewards = ["number"]'
    if cfg.dynamic_sampling.rounds and cfg.sampling.group_size == 1:
        yield (
            f"dynamic_sampling.rounds = {cfg.dynamic_sampling.rounds} with sampling.group_size = 1: the rewards of a "
            f"group of one never differ; set sampling.group_size to 2 or more"
        )
    by = cfg.dynamic_sampling.by
    if by is not None and not callables and by not in [str(reward.use).rpartition(":")[2] for reward in cfg.rewards]:
        yield (
            f'dynamic_sampling.by = "{by}": no reward of that name; '
            f"there are {', '.join(reward.use for reward in cfg.rewards)}"
        )
    if cfg.sampling.group_size == 1 and baseline in WITHIN_GROUPS:
        yield (
            f'sampling.group_size = 1 with algo.advantage = "{baseline}": a group of one has advantage 0, so nothing '
            f"is learned; set sampling.group_size to 2 or more"
        )


def _dropout(cfg: Config, algorithm: Algorithm, engine: str) -> Iterator[str]:
    """Reject LoRA dropout where log-probs with dropout would be compared with log-probs without."""
    if not cfg.lora.dropout:
        return
    if engine != "replay":
        yield (
            f"lora.dropout = {cfg.lora.dropout}: completions are sampled without dropout, so with it the ratios to the "
            f"sampler and the parity gate would be about the dropout's noise; set it to 0 (an adapter that was trained "
            f"with dropout can be continued without)"
        )
    elif algorithm.old == "trainer":
        yield (
            f"lora.dropout = {cfg.lora.dropout} with {algorithm.updates} updates per rollout batch: the ratios of new "
            f"to old log-probs would hold the dropout's noise; set it to 0, or optim.minibatches and optim.passes to 1"
        )


def _pairs(cfg: Config, algorithm: Algorithm, rows: Rows) -> Iterator[str]:
    """Check what losses over pairs and labelled rows require."""
    if algorithm.loss.whole_groups and algorithm.advantage_name == "identity" and rows.kind not in PAIRS:
        yield (
            f'algo.name = "{cfg.algo.name}": learns from pairs, and the data has {", ".join(rows[0])}; give rows with '
            f"chosen and rejected (map yours with data.columns), or make pairs of sampled completions with "
            f'algo.advantage = "best_and_worst" and rewards'
        )
    if algorithm.loss.whole_groups and cfg.overlong.mask:
        yield f'overlong.mask = true: algo.name = "{cfg.algo.name}" would be left with half a pair; set it to false'
    supervised = algorithm.advantage_name == "identity" and not algorithm.loss.needs_reference
    if rows.kind in PAIRS and supervised and not algorithm.loss.whole_groups:
        yield (
            f'algo.name = "{cfg.algo.name}": the rejected side of pairs would be unlearned without bound; use '
            f'algo.name = "dpo", or train on the chosen side with data.columns (completion = "chosen", beside a prompt)'
        )
    if rows.kind == "label" and supervised:
        yield (
            f'algo.name = "{cfg.algo.name}": rows whose label is false would be unlearned without bound; use '
            f'algo.name = "kto", or leave the column label out'
        )
    if algorithm.advantage_name == "max_rl" and cfg.overlong.penalty_share:
        yield (
            f'overlong.penalty_share = {cfg.overlong.penalty_share} with algo.advantage = "max_rl": the penalty makes '
            f"rewards negative, and max_rl divides by their mean; leave one of them out"
        )


def _held_out(cfg: Config, rows: Rows, held: Rows | None) -> Iterator[str]:
    count = cfg.eval.rows
    if cfg.eval.data is not None:
        if held is not None and len(held) < count:
            yield f"eval.rows = {count}: eval.data has {len(held)} rows; lower eval.rows"
    elif count >= len(rows):
        yield f"eval.rows = {count}: the data has {len(rows)} rows and some must be left to train on; lower eval.rows"


def _measured(cfg: Config, kind: str, held: str, callables: bool) -> Iterator[str]:
    """Check that held-out rows can be measured. kind, held: kinds of the training rows and the held-out rows."""
    loss = not {kind, held} & set(SAMPLED) and (kind in PAIRS) == (held in PAIRS) and cfg.engine.name != "eager"
    rewards = bool(cfg.eval.rewards or cfg.rewards or callables)
    if not (rewards or loss):
        yield (
            f"eval.rows = {cfg.eval.rows} but there is no reward to score with: set eval.rewards (rows like the "
            f"training rows, with recorded completions, are measured by their loss)"
        )
    if rewards and held == "text":
        yield (
            f"eval.rows = {cfg.eval.rows}: rows of plain text have no prompt to sample from; leave out rewards and "
            f"eval.rewards, and their loss is measured"
        )


def _rewards(field: str, rewards: tuple[Reward, ...], rows: Rows | None) -> Iterator[str]:
    for number, reward in enumerate(rewards):
        yield from secrets.problems(reward.args, f"{field}[{number}].args")
        if not isinstance(reward.use, str):
            yield f"{field}: a config holds names of functions; give functions to rlft.train(cfg, rewards=[...])"
            continue
        try:
            function = _function(field, reward.use)
        except ConfigError as error:
            yield str(error)
            continue
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's file may raise anything when it is imported
            said = f"{type_name(error)}: {described(error, str, LONGEST)}"
            yield f'{field} = "{reward.use}": importing it raised {said}'
            continue
        try:
            arguments = signature(function)
        except (TypeError, ValueError) as error:
            yield f'{field} = "{reward.use}": {error}'
            continue
        if rows is not None:
            yield from _columns(field, reward, arguments, rows.columns)
            yield from (f"{field} = {problem}" for problem in builtin_problems(reward, rows))


def _function(field: str, use: str) -> Any:
    if ":" in use:
        return resolve.attribute(use, field)
    return vars(builtin(use, field))[use]


def _columns(field: str, reward: Reward, arguments: Signature, columns: Sequence[str]) -> Iterator[str]:
    """Yield arguments that nothing provides, arguments the function does not take, and ambiguous names.

    A column that only some rows have is None for the others.
    """
    have = [name for name in columns if name not in OURS]
    images = ["images"] if "image" in have and "images" not in have else []
    given = [*GIVEN, *reward.args, *have, *images]
    missing = [name for name in arguments.required if name not in given]
    if missing:
        yield (
            f'{field} = "{reward.use}": asks for {", ".join(missing)}; the data has '
            f"{', '.join(have) or 'no column besides the prompt'}.{resolve.did_you_mean(missing[0], given, 0.8)} Map a "
            f"column with data.columns, or set rewards.args; every function may take {', '.join(GIVEN)}"
        )
    for name in reward.args:
        if not arguments.takes(name):
            yield f'{field} = "{reward.use}": rewards.args has {name}, which is no argument of the function'
    for name in have:
        if name in GIVEN:
            yield f"data: the column {name} has the name of what every reward function gets; rename it by data.template"
