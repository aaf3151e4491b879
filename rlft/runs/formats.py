"""Format durations, numbers and evaluation results in one way for the console and the report.

An evaluation is a dict of eval/* metrics, nan or None where not finite; `rlft.trainer.evaluate` lists the names.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import IO, Any

ERRORS = ("_low", "_high", "_stderr", "_change")
"""Suffixes of numbers that belong to another eval/* metric."""
MAIN = (
    "eval/reward",
    "eval/loss",
    "eval/perplexity",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "eval/invalid",
)
"""Results that a short table always shows."""
COUNTS = ("eval/rows", "eval/samples")
"""What an evaluation was measured on."""
ORDER = ("eval/reward", "eval/loss", "eval/avg@", "eval/pass@", "eval/rewards/")
"""Prefixes of the results that come first in a table."""

KEPT = "\n\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Control characters that `visible` keeps: the joiners make one emoji of several, and words of Persian."""
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of control characters: C0 and C1, formats such as reversed text, surrogates, line ends."""


def duration(seconds: float) -> str:
    """Format seconds: 18 -> "18 s", 600 -> "10.0 min", 7200 -> "2.0 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def visible(text: str) -> str:
    """Replace characters that could move the cursor, colour the terminal or reverse the text, and halves of
    surrogates."""
    return "".join(
        character
        if character.isprintable() or character in KEPT or unicodedata.category(character) not in INVISIBLE
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def printed(text: str, file: IO[str]) -> str:
    """Return a text as it may be printed to a file, which is mostly a terminal: `visible`, in the file's encoding."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    # A "±" must not stop a run whose stdout is ASCII-only.
    return visible(text).encode(encoding, "replace").decode(encoding)


def number(value: Any, form: str = ".4g") -> str:
    """Format a number; "-" for None and non-finite values."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 1000 and form.endswith("g"):  # not "1.235e+06" for 1234567
        form = "+,.0f" if form.startswith("+") else ",.0f"
    return format(value, form)


def with_error(values: Mapping[str, Any], name: str, sign: str = "", interval: bool = False) -> str:
    """Format a metric with its standard error, "0.720 ± 0.031"; "-" if it was not measured.

    sign: "+" for a change. interval: show the 95% interval in place of the error, if there is one, on a second line.
    """
    low, high, error = (values.get(f"{name}{ending}") for ending in ("_low", "_high", "_stderr"))
    if interval and low is not None and high is not None:
        return f"{number(values.get(name), f'{sign}.3f')}\n{low:{sign}.3f} to {high:{sign}.3f}"
    if error is not None:
        return f"{number(values.get(name), f'{sign}.3f')} ± {error:.3f}"
    return number(values.get(name), f"{sign}.4g")


def change(before: Mapping[str, Any], after: Mapping[str, Any], name: str, interval: bool = False) -> str:
    """Format the change of a metric: the one measured by the run, paired by row, else the difference."""
    if f"{name}_change" in after:
        return with_error(after, f"{name}_change", "+", interval)
    first, last = before.get(name), after.get(name)
    return "-" if first is None or last is None or not math.isfinite(last - first) else f"{last - first:+.3g}"


def evaluation_names(evaluations: Sequence[Mapping[str, Any]], short: bool = False) -> list[str]:
    """Return the eval/* metrics that get a line in a table, most important first; of COUNTS those that change.

    short: only reward, pass@K, loss, the parts of the reward if there are several, lengths, and invalid rewards if any;
    pass@1 is omitted where it equals the reward.
    """
    names = {name for row in evaluations for name in row if name.startswith("eval/")}
    names = {name for name in names if not name.endswith((*ERRORS, "/std", "/seconds", "/invalid"))}
    names = {name for name in names if name not in COUNTS or len({row.get(name) for row in evaluations}) > 1}
    if any(row.get("eval/invalid") for row in evaluations):
        names.add("eval/invalid")
    if short:
        parts = {name for name in names if name.startswith("eval/rewards/") and name.endswith("/mean")}
        names = {
            name
            for name in names
            if name in MAIN
            or name.startswith("eval/completions/")
            or (name in parts and len(parts) > 1)
            or (_is_pass(name) and not _repeats_reward(evaluations, name))
        }

    def place(name: str) -> tuple[int, int, str]:
        return next((i for i, prefix in enumerate(ORDER) if name.startswith(prefix)), len(ORDER)), len(name), name

    return sorted(names, key=place)


def _is_pass(name: str) -> bool:
    return name.startswith("eval/pass@") and name.removeprefix("eval/pass@").isdigit()


def _repeats_reward(evaluations: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Return True for pass@1 where it equals the reward, as with rewards of 0 and 1."""
    return name == "eval/pass@1" and all(
        math.isclose(row.get(name, math.nan), row.get("eval/reward", -1)) for row in evaluations
    )
