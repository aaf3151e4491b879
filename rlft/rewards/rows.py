"""What built-in rewards need of the dataset and of the prompts, found before a model is loaded or a step is taken.

A built-in whose file has `check_row(row, args)` is asked about the dataset's rows, so that an answer it cannot use is
named by its row at the start. NEEDS in its file names a module and the extra of rlft that installs it. A reward
function with a parameter `opened` gets the tag that the chat template opens at the end of every prompt, "<think>\\n"
for example, since completions go on inside of it.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rlft.config import resolve
from rlft.config.data import Reward
from rlft.environment import install
from rlft.errors import DataError
from rlft.rewards.score import BUILTIN, RewardFunction
from rlft.types import Prompt

CHECKED = 1000
"""Rows of the dataset that are checked at the start; the rest is checked when it is scored."""
OPEN_TAG = re.compile(r"<\w+>\s*\Z")
"""A tag at the end of a prompt that the completion has to close."""


def builtin_problems(reward: Reward, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield a package that a built-in needs and that is missing, and the first row that it cannot use."""
    if ":" in reward.use:
        return
    file = resolve.module(reward.use, BUILTIN, "rewards")
    needed, extra = getattr(file, "NEEDS", ("rlft", ""))
    if importlib.util.find_spec(needed) is None:
        yield f'"{reward.use}": needs {needed}, which is not installed: {install(extra)}'
    if hasattr(file, "check_row"):
        yield from _unusable(file.check_row, reward, rows)


def _unusable(check: Callable[..., None], reward: Reward, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    first, bad, count = "", 0, 0
    for i, row in enumerate(itertools.islice(rows, CHECKED)):
        count += 1
        try:
            check(row, reward.args)
        except DataError as error:
            first, bad = first or f"row {i}: {error}", bad + 1
    if first:
        yield f'"{reward.use}": {first} ({bad} of the first {count} rows)'


def open_ends(prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """Return the last tokens of the first hundred prompts as text."""
    return [tokenizer.decode(prompt.ids[-16:]) for prompt in prompts[:100]]


def pass_opened(functions: Sequence[RewardFunction], prompts: Iterable[str]) -> str:
    """Set the argument `opened` of functions that have it and no value for it.

    prompts: from `open_ends`. Returns a note for the user when the tag was set, or when it
    differs between prompts and cannot be; "" otherwise.
    """
    taking = [function for function in functions if "opened" in function.names and "opened" not in function.args]
    found = {match[0] if (match := OPEN_TAG.search(text)) else "" for text in prompts} if taking else set()
    names = ", ".join(function.name for function in taking)
    if len(found) > 1:
        return (
            f"{names}: some prompts end in {' or '.join(sorted(map(repr, found - {''})))} and some do not, so "
            f"completions are scored as they are; set opened in the rewards' args where that is wrong"
        )
    opened = next(iter(found), "")
    if not opened:
        return ""
    for function in taking:
        function.args = {**function.args, "opened": opened}
    return f"the chat template ends each prompt with {opened!r}, so {names} score {opened!r} + completion"
