"""The text of `rlft --help`, from the commands."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Mapping
from typing import NamedTuple

EXIT_CODES = (
    "exit codes: 0 done, 1 engine or memory (or a bug of ours), 2 a setting, data or a reward is wrong, 3 stopped by a "
    "guard, 130 interrupted"
)
FILE = """\
A run is one small file:

  model = "Qwen/Qwen3-0.6B"
  data = "train.jsonl"                 # rows with a prompt, and columns for the rewards
  rewards = ["my_rewards.py:correct"]  # def correct(completions, answer, **columns) -> list[float]
  steps = 200
  out = "runs/first"
"""


class Command(NamedTuple):
    """One command of `rlft`."""

    run: Callable[[list[str]], int]
    """From the arguments after its name to the exit code."""
    usage: str
    """What those arguments are."""
    about: str
    """What it does: a paragraph of the manual, and the head of `rlft COMMAND --help`."""


def manual(commands: Mapping[str, Command]) -> str:
    """The text of `rlft --help`."""
    width = min(100, shutil.get_terminal_size().columns)

    def filled(text: str, first: int = 0, rest: int = 0) -> str:
        before, after = " " * first, " " * rest
        return textwrap.fill(text, width, initial_indent=before, subsequent_indent=after, break_on_hyphens=False)

    parts = ["rlft: reinforcement-learning-first post-training of language models.", "", "usage: rlft COMMAND ...", ""]
    for name, command in commands.items():
        parts += [filled(f"rlft {name} {command.usage}", 2, 10), filled(command.about, 6, 6)]
    more = "`rlft COMMAND --help` shows what a command takes, `rlft --version` the version."
    return "\n".join([*parts, "", filled(more), "", FILE, filled(EXIT_CODES), ""])
