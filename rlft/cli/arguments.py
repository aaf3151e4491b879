"""What the commands of `rlft` take besides a config, as dataclasses: fields are flags, docstrings their help."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlft.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """A run folder."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""


@dataclasses.dataclass(frozen=True)
class EvalArgs(RunArgs):
    """Score a checkpoint of a run on the rows that the run held out. Nothing is written into RUN."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which checkpoint: the newest, the one that did best on the held-out rows, or one by its step."""
    base: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The model without an adapter instead: what the run began with."""
    rows: int | None = None
    """Use only the first N rows; all of them without it."""
    samples: int | None = None
    """Completions per row, for pass@k; without it the run's eval.samples."""
    temperature: float | None = None
    """Sampling temperature, 0 for greedy; without it the run's eval.temperature."""
    top_p: float | None = None
    """Nucleus sampling; without it the run's eval.top_p."""
    top_k: int | None = None
    """Sample among the k most likely tokens; without it the run's eval.top_k."""
    max_tokens: int | None = None
    """Longest completion; without it the run's."""
    threshold: float | None = None
    """A completion with at least this reward counts as solved; without it the run's eval.threshold."""
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the code that RUN/config.toml names (rewards, data.template, algo.name) although the folder comes from
    elsewhere, or was moved or edited."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object with every number instead of the table."""


@dataclasses.dataclass(frozen=True)
class GenerateArgs(RunArgs):
    """Sample one completion from a checkpoint of a run, prompted as its data was."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """What to say to the model."""
    max_tokens: int | None = None
    """Longest completion; without it the run's sampling.max_tokens."""
    temperature: float | None = None
    """Softmax temperature, 0 for greedy; without it the run's sampling.temperature."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which checkpoint: the newest, the one that did best on the held-out rows, or one by its step."""
    image: tuple[Annotated[str, tyro.conf.arg(metavar="FILE")], ...] = ()
    """Images to show before the prompt."""


@dataclasses.dataclass(frozen=True)
class RewardCheckArgs:
    """Score a few completions without a model and print each reward. Exit code 2 when a function fails on any of them.

    Without a tokenizer completion_ids are empty: it is loaded when FILE is a config and a function names them, and a
    run's completions have theirs.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A config (.toml, .yaml), or one reward as `rewards` names it: "number", "my_rewards.py:correct"."""
    data: str | None = None
    """Dataset to take rows from; without it the config's, or that of --run."""
    rows: int = 8
    """Take the first N rows, or completions of --run."""
    run: Path | None = None
    """Score the completions of this run folder instead of those recorded with the data."""
    step: int | None = None
    """Which step of --run; without it the last one."""
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the data.template that the config.toml of --run names although the folder comes from elsewhere, or was moved
    or edited."""
    completion: str | None = None
    """Column to score as the completion, for example answer; without it what the kind of rows has."""
    timeout: float | None = None
    """Seconds a call may take; without it the config's, or 30."""


@dataclasses.dataclass(frozen=True)
class MergeArgs(RunArgs):
    """Merge the adapter of a run into its base, as a standalone model whose log-probs are checked."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the model; it must not exist, or be empty."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which checkpoint: the newest, the one that did best on the held-out rows, or one by its step."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights that are written."""
    push: str | None = None
    """Hub id to upload the model to as well, such as you/model."""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make a repository that --push creates private."""


@dataclasses.dataclass(frozen=True)
class ExportBaseArgs:
    """Write a base as a plain model, its 4-bit weights decoded to what the trainer computes with."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hub id, folder or package of the base, as `model` of a config."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the model; it must not exist, or be empty."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How runs hold the base."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights that are written, that of the runs."""


@dataclasses.dataclass(frozen=True)
class PushArgs(RunArgs):
    """Upload the adapter of a run and its model card to the Hugging Face hub."""

    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="YOU/MODEL")]
    """Hub id, made if missing."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which checkpoint: the newest, the one that did best on the held-out rows, or one by its step."""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make a repository that is created private."""


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Write the page of a run, or of several runs compared."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs."""
    out: Path | None = None
    """Where to write; without it report.html in the run's folder, comparison.html here for several."""
    serve: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Serve the page of one run on 127.0.0.1 instead, updated with each step of the run, until Ctrl-C."""
    port: int | None = None
    """Port of --serve; without it a free one."""


def check_serving(given: ReportArgs) -> None:
    """Raise ConfigError for arguments of `rlft report` that contradict each other."""
    if given.port is not None and not given.serve:
        raise ConfigError(f"--port {given.port}: belongs to --serve, which is not given; add it or leave out --port")
    if given.port is not None and not 1 <= given.port <= 65535:
        raise ConfigError(f"--port {given.port}: want a number from 1 to 65535, or leave it out for a free one")
    if given.serve and len(given.runs) != 1:
        raise ConfigError(f"--serve: shows one run, and {len(given.runs)} are given; give one, or leave out --serve")
    if given.serve and given.out is not None:
        raise ConfigError(f"--out {given.out}: --serve writes no file; leave out one of them")


@dataclasses.dataclass(frozen=True)
class WatchArgs(RunArgs):
    """Follow a run from another terminal, until it ends."""


def paragraph(text: str) -> str:
    """The text as wide as the terminal, indented: tyro wraps everything but descriptions, and keeps such lines."""
    width = min(120, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
