"""The command line: `rlft train run.toml --optim.lr=1e-5`.

Flags are the fields of the config dataclasses, with the file's values as defaults; `algo.name` is read first, so that
[algo] has the flags and the help of that algorithm. Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
import operator
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from rlft import config_file
from rlft.config import Algo, Config
from rlft.errors import ConfigError, RewardError, RlftError
from rlft.resolve import near

A = TypeVar("A")

MANUAL = """\
rlft: reinforcement-learning-first post-training of language models.

usage: rlft COMMAND ...

  rlft train FILE [--resume] [--section.field value ...]
      Train the run that FILE (.toml or .yaml) describes. Any setting can be changed by a flag, for example
      --optim.lr=1e-5 or --sampling.group_size 16; `rlft train FILE --help` lists them all with FILE's values.
      --resume goes on from the newest checkpoint in the run's folder.
  rlft validate FILE [--section.field value ...]
      Check everything that can be checked without loading the model, and print the resolved config.
  rlft reward-check FILE [--data PATH] [--rows N]
      Score a few completions without a model and print each reward: those recorded with the data, with --run RUN
      [--step N] those an earlier run sampled, with --completion COLUMN any column. FILE is a config, or one reward
      such as my_rewards.py:correct. Exit code 2 when a function fails on any of them.
  rlft eval RUN [--checkpoint latest|best|STEP] [--base] [--rows N] [--samples K] [--temperature T] [--json]
      Score a checkpoint of the run folder RUN (or its base model) on the rows that the run held out: mean reward,
      pass@k with K samples per row, loss of recorded rows, with standard errors and 95% intervals.
  rlft generate RUN "prompt" [--checkpoint latest|best|STEP] [--max_tokens N] [--temperature T]
      Sample one completion from a checkpoint of a run.
  rlft merge RUN OUT [--checkpoint latest|best|STEP] [--dtype bfloat16] [--push YOU/MODEL [--private]]
      Merge the run's adapter into its base, unquantised, as a model in the folder OUT; its log-probs are checked.
  rlft push RUN YOU/MODEL [--checkpoint latest|best|STEP] [--private]
      Upload the run's adapter and its model card to the Hugging Face hub.
  rlft report RUN [RUN ...] [--out FILE]
      Write RUN/report.html, a page that opens without a network; of several runs comparison.html, with their curves
      over each other and the settings that differ.
  rlft env
      Versions, device, what is missing and the pip command that adds it.

A run is one small file:

  model = "Qwen/Qwen3-0.6B"
  data = "train.jsonl"                 # rows with a prompt, and columns for the rewards
  rewards = ["my_rewards.py:correct"]  # def correct(completions, answer, **columns) -> list[float]
  steps = 200
  out = "runs/first"

exit codes: 0 done, 1 engine or memory, 2 a setting, data or a reward is wrong, 3 stopped by a guard, 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. An error made on purpose is one message on stderr, without traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(MANUAL, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from rlft import __version__

        print(__version__)
        return 0
    # "my_module:reward" is found beside the config, as it would be by a script; last, so that it shadows nothing.
    sys.path.append(os.getcwd())
    # Its import warns about an optional kernel on every CPU, before anything of ours is printed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if argv[0] not in COMMANDS:
            hint = near(argv[0], list(COMMANDS))
            raise ConfigError(f'no command "{argv[0]}".{hint} Commands: {", ".join(COMMANDS)}')
        return COMMANDS[argv[0]](argv[1:])
    except RlftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(command: str, args: list[str]) -> tuple[Config, bool]:
    """The config of `rlft COMMAND FILE --flags ...`, and whether --resume was given.

    Raises ConfigError for what is wrong in file or flags; tyro exits by itself on --help (0) and a malformed flag (2).
    """
    file, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    if file is None and not {"-h", "--help"} & set(flags):
        raise ConfigError(f"the config file comes first: rlft {command} FILE [--section.field value ...]")
    table = config_file.read(file) if file else {}
    if "resume" in table:
        raise config_file.unknown("resume", "", [])
    _refuse_unknown(flags)
    name = _given(flags, "--algo.name")
    if name in config_file.presets():
        # The flag lays the preset under the file, whose own algorithm it takes the place of.
        table = {**table, "algo": {**config_file.section(Algo, table.get("algo", {}), "algo").options, "name": name}}
        flags = _without(flags, "--algo.name")
        name = None
    table = config_file.with_preset(table)
    algo = config_file.section(Algo, table.get("algo", {}), "algo")
    name = name or algo.name
    shown = config_file.from_table(_flags_type(name), {**table, "algo": {**algo.options, "name": name}})
    parsed = tyro.cli(
        type(shown), default=shown, args=flags, prog=f"rlft {command} {file or 'FILE'}", use_underscores=True,
        description=_about(command), config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip
    final = config_file.to_table(parsed)
    resume = final.pop("resume")
    return config_file.from_table(Config, final), resume


def _about(command: str) -> str:
    what = {
        "train": "Train the run that FILE describes. Exit code 0: done, 2: something to mend, 3: stopped by a guard.",
        "validate": "Check a run without loading its model: prints every problem, or the resolved config.",
    }
    return f"{what[command]} Every setting of FILE is a flag too; the values shown are FILE's, or the defaults."


def _given(flags: list[str], name: str) -> str | None:
    """The last value given for a flag, as "--flag=value" or "--flag value"."""
    values = [f.partition("=")[2] for f in flags if f.startswith(f"{name}=")]
    values += [value for f, value in itertools.pairwise(flags) if f == name]
    return values[-1] if values else None


def _without(flags: list[str], name: str) -> list[str]:
    """The flags without `name`, given as "--flag=value" or "--flag value"."""
    kept, skip = [], False
    for flag in flags:
        if not skip and flag != name and not flag.startswith(f"{name}="):
            kept.append(flag)
        skip = not skip and flag == name
    return kept


def _refuse_unknown(flags: list[str]) -> None:
    """Raise ConfigError for a flag with TRL's name, or ours without its section."""
    elsewhere = {path.rpartition(".")[2] for path in config_file.paths()}
    elsewhere |= {*config_file.TRL_NAMES, *config_file.TRL_NOTES}
    elsewhere -= {f.name for f in dataclasses.fields(Config)} | {"resume"}
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name in elsewhere:
            raise config_file.unknown(name, "", [])


def _flags_type(algorithm: str) -> type:
    """A Config for the command line: unchecked, with `resume`, and with the algorithm's own settings under `algo`."""
    from rlft.algorithm import module_of

    options = _unchecked(module_of(algorithm).Config)
    names = Annotated[str, tyro.conf.arg(help="The algorithm; its own settings are the other flags of this section.")]
    algo = _extended(options, [("name", names, algorithm)])
    resume = Annotated[
        bool, tyro.conf.arg(help="Go on from the newest checkpoint in `out`."), tyro.conf.FlagCreatePairsOff
    ]
    return _extended(_unchecked(Config), [("algo", algo, None), ("resume", resume, False)])


def _extended(cls: type, fields: list[tuple[str, Any, Any]]) -> type:
    """A subclass of the dataclass `cls` with these (name, type, default) fields; its help stays."""
    added = [(name, hint, dataclasses.field(default=default)) for name, hint, default in fields]
    same = {"__doc__": cls.__doc__}
    return dataclasses.make_dataclass(cls.__name__, added, bases=(cls,), frozen=True, namespace=same)


def _unchecked(hint: Any) -> Any:
    """The type `hint` with every dataclass in it replaced by a subclass that accepts any value.

    A file may lack what a flag gives, so checks come after both are merged; a missing field becomes a required flag.
    """
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        # Each type is made once: tyro wants a default to be an instance of the very class its field names.
        types_of = {f.name: _unchecked(hints[f.name]) for f in dataclasses.fields(hint)}
        fields = [(f.name, types_of[f.name], _default(f, types_of[f.name])) for f in dataclasses.fields(hint)]
        made = {"__post_init__": lambda self: None, "__doc__": hint.__doc__}
        return dataclasses.make_dataclass(hint.__name__, fields, bases=(hint,), frozen=True, namespace=made)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, (_unchecked(a) for a in args))
    if origin is None or origin is Literal:
        return hint
    return origin[tuple(_unchecked(a) for a in args)]


def _default(field: dataclasses.Field[Any], hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return dataclasses.field(default_factory=hint)
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=tyro.MISSING if field.default is dataclasses.MISSING else field.default)


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
    """Use only the first so many rows."""
    samples: int | None = None
    """Completions per row, for pass@k; None: the run's eval.samples."""
    temperature: float | None = None
    """Sampling temperature, 0 for greedy; None: the run's eval.temperature."""
    top_p: float | None = None
    """Nucleus sampling; None: the run's eval.top_p."""
    top_k: int | None = None
    """Sample among the k most likely tokens; None: the run's eval.top_k."""
    max_tokens: int | None = None
    """Longest completion; None: the run's."""
    threshold: float | None = None
    """A completion with at least this reward counts as solved; None: the run's eval.threshold."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object with every number instead of the table."""


@dataclasses.dataclass(frozen=True)
class GenerateArgs(RunArgs):
    """Sample one completion from a checkpoint of a run, prompted as its data was."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """What to say to the model."""
    max_tokens: int | None = None
    """Longest completion; None: the run's sampling.max_tokens."""
    temperature: float | None = None
    """Softmax temperature, 0 for greedy; None: the run's sampling.temperature."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which checkpoint: the newest, the one that did best on the held-out rows, or one by its step."""


@dataclasses.dataclass(frozen=True)
class RewardCheckArgs:
    """Score a few completions without a model and print each reward. Exit code 2 when a function fails on any of them.

    Without a tokenizer completion_ids are empty: it is loaded when FILE is a config and a function names them, and a
    run's completions have theirs.
    """

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A config (.toml, .yaml), or one reward as `rewards` names it: "number", "my_rewards.py:correct"."""
    data: str | None = None
    """Dataset to take rows from; None: the config's, or that of --run."""
    rows: int = 8
    """Take the first so many rows, or completions of --run."""
    run: Path | None = None
    """Score the completions of this run folder instead of those recorded with the data."""
    step: int | None = None
    """Which step of --run; None: the last one."""
    completion: str | None = None
    """Column to score as the completion, for example answer. None: what the kind of rows has."""
    timeout: float | None = None
    """Seconds a call may take; None: the config's, or 30."""


@dataclasses.dataclass(frozen=True)
class MergeArgs(RunArgs):
    """Merge the adapter of a run into its base, as a model of its own whose log-probs are checked."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the model; it must not exist, or be empty."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which checkpoint: the newest, the one that did best on the held-out rows, or one by its step."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights that are written."""
    push: str | None = None
    """Hub id to upload the model to as well, such as you/model."""
    private: bool = False
    """Make a repository that --push creates private."""


@dataclasses.dataclass(frozen=True)
class PushArgs(RunArgs):
    """Upload the adapter of a run and its model card to the Hugging Face hub."""

    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="YOU/MODEL")]
    """Hub id, made if missing."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which checkpoint: the newest, the one that did best on the held-out rows, or one by its step."""
    private: bool = False
    """Make a repository that is created private."""


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Write the page of a run, or of several runs compared."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs."""
    out: Path | None = None
    """Where to write; None: report.html in the run's folder, comparison.html here for several."""


def _parsed(cls: type[A], command: str, args: list[str]) -> A:
    return tyro.cli(cls, args=args, prog=f"rlft {command}", use_underscores=True)


def _train(args: list[str]) -> int:
    cfg, resume = parse("train", args)
    from rlft.train import train

    return 130 if train(cfg, resume=resume).interrupted else 0


def _validate(args: list[str]) -> int:
    try:
        cfg, resume = parse("validate", args)
        from rlft.validate import problems

        found = problems(cfg, resume=resume)
    except ConfigError as error:
        found = str(error).splitlines()
    else:
        if not found:
            print(config_file.to_toml(cfg) + "\n# no problem found")
            return 0
    print(f"{len(found)} problem{'s' if len(found) > 1 else ''}:", *(f"  {text}" for text in found), sep="\n")
    return ConfigError.exit_code


def _reward_check(args: list[str]) -> int:
    given = _parsed(RewardCheckArgs, "reward-check", args)
    from rich.console import Console

    from rlft.reward_check import check

    # Messages of functions are printed as they are: no markup, no colours, no words cut in two.
    show = Console(markup=False, highlight=False, emoji=False, soft_wrap=True).print
    good = check(show=show, **vars(given))
    return 0 if good else RewardError.exit_code


def _eval(args: list[str]) -> int:
    given = _parsed(EvalArgs, "eval", args)
    if given.base and given.checkpoint != "latest":
        raise ConfigError(f"--base and --checkpoint {given.checkpoint}: give one of them")
    from rlft.finished import evaluate_run

    which = "base" if given.base else given.checkpoint
    fields = ("samples", "temperature", "top_p", "top_k", "max_tokens", "threshold")
    changes = {name: value for name in fields if (value := getattr(given, name)) is not None}
    values = evaluate_run(given.run, which, given.rows, **changes)
    if given.json:
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in values.items()}))
        return 0
    from rlft.console import Console, evaluation_rows

    what = "the base model" if given.base else f"step {values['step']:.0f}"
    several = values.get("eval/samples", 1) > 1
    samples = f", {values['eval/samples']:.0f} completions each" if several else ""
    title = f"{what} of {given.run} on {values['eval/rows']:.0f} held-out rows{samples}"
    Console().table(title, evaluation_rows(values))
    return 0


def _generate(args: list[str]) -> int:
    given = _parsed(GenerateArgs, "generate", args)
    from rlft.finished import generate_from_run

    print(generate_from_run(given.run, given.prompt, given.max_tokens, given.temperature, given.checkpoint))
    return 0


def _merge(args: list[str]) -> int:
    given = _parsed(MergeArgs, "merge", args)
    from rlft.export import merge

    merged = merge(given.run, given.out, given.checkpoint, given.dtype, given.push, given.private)
    print(f"merged {merged.checkpoint} into {merged.out}\n{merged.words()}")
    return 0


def _push(args: list[str]) -> int:
    given = _parsed(PushArgs, "push", args)
    from rlft.export import push_adapter

    print(push_adapter(given.run, given.repo, given.checkpoint, given.private))
    return 0


def _report(args: list[str]) -> int:
    """Write the page of a run, or of several compared."""
    given = _parsed(ReportArgs, "report", args)
    if not given.runs:
        raise ConfigError("rlft report RUN [RUN ...]: give the folder of a run")
    for run in given.runs:
        if not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"{run}: not the folder of a run (it has no metrics.jsonl)")
    from rlft import report

    if len(given.runs) == 1:
        print(report.write(given.runs[0], given.out))
    else:
        print(report.compare(given.runs, given.out or Path("comparison.html")))
    return 0


def _env(args: list[str]) -> int:
    if args:
        raise ConfigError(f"rlft env takes no arguments, not {' '.join(args)}")
    from rlft.environment import describe

    print(describe())
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train, "validate": _validate, "reward-check": _reward_check, "eval": _eval, "generate": _generate,
    "merge": _merge, "push": _push, "report": _report, "env": _env,
}  # fmt: skip
