"""The live panel of a run: progress, metrics with sparklines, health messages and one completion.

`Panel` holds what is shown; `Panel.view` draws it with rich. The same panel is shown by the process that trains and by
`rlft watch`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlft.monitor import health
from rlft.runs.formats import duration, visible

SHADES = "▁▂▃▄▅▆▇█"
PHASES = ("generate", "reward", "train", "sync")
MOST_FUNCTIONS = 8
"""Largest number of reward functions with a row each."""
LABELS = ("answer", "solution", "ground_truth", "label", "target")
"""Columns of a dataset that are shown as the label of a completion, the first one that a row has."""
Form = Callable[[float], str]
THREE: Form = "{:.3f}".format
LATER: list[tuple[str, str, Form]] = [
    ("loss", "loss", "{:.4f}".format),
    ("length", "completions/mean_length", "{:.1f}".format),
    ("entropy", "entropy", THREE),
    ("mismatch", health.MISMATCH, "{:.1e}".format),
    ("clipped", "completions/clipped_ratio", "{:.0%}".format),
    ("gradient", "grad_norm", "{:.3g}".format),
]
"""Name, metric and format of the rows of the panel below the outcome."""


class Example(NamedTuple):
    """A completion to show, with what it was asked and what it got."""

    completion: str
    prompt: str = ""
    reward: float | None = None
    label: str = ""

    def scores(self) -> str:
        """Return reward and label as text; empty without both."""
        parts = [f"reward {self.reward:.3g}"] if self.reward is not None else []
        return ", ".join([*parts, *([f"label {shorten(self.label, 1, 80)}"] if self.label else [])])


def label_of(row: Mapping[str, Any]) -> str:
    """Return the label of a dataset row as text; "" where it has none of LABELS."""
    name = next((name for name in LABELS if row.get(name) is not None), None)
    return "" if name is None else row[name] if isinstance(row[name], str) else str(row[name])


def prompt_text(prompt: str, is_messages: bool) -> str:
    """Return the text of a prompt as a rollouts file has it: of JSON messages, the content of the last one."""
    if not is_messages:
        return prompt
    try:
        content = json.loads(prompt)[-1]["content"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return prompt
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join("[image]" if part.get("type") == "image" else str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


@dataclass
class Panel:
    """What the live panel shows."""

    steps: int = 0
    """Of the whole run; 0 until they are known."""
    done: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the last finished steps."""
    warnings: Sequence[health.Message] = ()
    """Health messages that apply now."""
    example: Example | None = None
    phase: tuple[str, int, int] = ("", 0, 0)
    """What is being waited for, and how much of it is done; a total of 0 where that is not known."""
    began: float = field(default_factory=time.monotonic)
    """When the run, or this part of it, began."""
    phase_began: float = field(default_factory=time.monotonic)
    elapsed: float | None = None
    """Seconds of the run, where they are not counted from `began`."""

    def enter(self, what: str, done: int = 0, total: int = 0) -> None:
        """Set the phase; its clock starts when its name changes."""
        if what != self.phase[0]:
            self.phase_began = time.monotonic()
        self.phase = (what, done, total)

    def phase_text(self) -> str:
        """Return what is being waited for, with how much of it is done, or else for how long."""
        what, done, total = self.phase
        waited = clock(time.monotonic() - self.phase_began)
        return f"{what} {done}/{total}" if total else f"{what} {waited}" if what else ""

    def add(self, values: Mapping[str, float]) -> None:
        """Add a finished step."""
        self.done = int(values["step"])
        self.history = [*self.history, dict(values)][-health.WINDOW :]
        self.enter("")

    def seconds_left(self) -> float | None:
        """Estimate the seconds to the end of the run from the last steps; None before the first."""
        times = health.finite(self.history[-10:], "step_time")
        return sum(times) / len(times) * (self.steps - self.done) if times and self.steps else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.view(options.max_width)

    def view(self, width: int = 80) -> RenderableType:
        """Return what rich draws. width: of the terminal, in columns."""
        parts: list[RenderableType] = [self._bar()]
        if self.history:
            parts += [self._numbers(max(10, min(80, width - 34))), time_line(self.history[-1])]
        parts += [Text(f"! {message.text}", "yellow") for message in self.warnings]
        if self.example is not None:
            parts.append(Padding(example_text(self.example), (0, 0, 0, 2)))
        return Padding(Group(*parts), (1, 0, 0, 0))

    def _bar(self) -> RenderableType:
        phase = self.phase_text()
        if not self.steps and not self.done:
            return Text(phase, "cyan")
        left = self.seconds_left()
        remaining = f", {clock(left)} left" if left is not None else ""
        elapsed = time.monotonic() - self.began if self.elapsed is None else self.elapsed
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(f"step {self.done}/{self.steps}" if self.steps else f"step {self.done}", "bold"),
            ProgressBar(max(1, self.steps), self.done if self.steps else 0, width=24),
            Text(f"{clock(elapsed)}{remaining}"),
            Text(phase, "cyan"),
        )
        return grid

    def _numbers(self, width: int) -> RenderableType:
        """Return the table of metrics. width: of a sparkline, in characters."""
        grid = Table.grid(padding=(0, 2))
        for name, key, form in rows(self.history[-1]):
            value = health.newest(self.history, key)
            if value is not None:
                line = spark(health.finite(self.history, key), width)
                grid.add_row(Text(shortened(name, 16), "dim"), Text(form(value), "bold"), Text(line, "green"))
        return grid


def outcome(values: Mapping[str, float]) -> list[tuple[str, str, Form]]:
    """Return name, metric and format of what a step is judged by.

    The reward where completions are sampled or scored; accuracy and margin of pairs; the perplexity of SFT. A recorded
    reward (1, or 1 and -1) says nothing.
    """
    if "rewards/accuracies" in values:
        return [("accuracy", "rewards/accuracies", "{:.0%}".format), ("margin", "rewards/margins", THREE)]
    if "perplexity" in values:
        return [("perplexity", "perplexity", "{:.4g}".format)]
    if "rewards/chosen" in values or "rewards/rejected" in values:  # KTO, whose completions are no pairs
        return [("desirable", "rewards/chosen", THREE), ("undesirable", "rewards/rejected", THREE)]
    return [("reward", "reward", THREE)]


def functions(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return name and metric of each reward function, where there is more than one."""
    keys = [key for key in values if key.startswith("rewards/") and key.endswith("/mean")]
    return [(key.removeprefix("rewards/").removesuffix("/mean"), key) for key in keys] if len(keys) > 1 else []


def rows(values: Mapping[str, float]) -> list[tuple[str, str, Form]]:
    """Return name, metric and format of every row of the panel. values: of the newest step."""
    parts = [(f" {name}", key, THREE) for name, key in functions(values)][:MOST_FUNCTIONS]
    # The loss of a policy gradient does not fall as the policy learns.
    return [*outcome(values), *parts, *(LATER[1:] if health.MISMATCH in values else LATER)]


def plain_line(values: Mapping[str, float], steps: int, left: float | None) -> str:
    """Return one line about a step: its metrics in a fixed order. steps: 0 where the number is not known."""
    step = int(values["step"])
    parts = [f"step {step:>{len(str(steps))}}/{steps}" if steps else f"step {step}"]
    parts += [f"{name} {form(values[key])}" for name, key, form in outcome(values) if key in values]
    formats = {
        "loss": "loss {:.4f}",
        "completions/mean_length": "len {:.1f}",
        "entropy": "entropy {:.3f}",
        health.MISMATCH: "mismatch {:.0e}",
        "step_time": "{:.1f} s",
        "perf/rollout_tokens_per_s": "sample {:.0f} tok/s",
        "perf/training_tokens_per_s": "train {:.0f} tok/s",
    }
    parts += [template.format(values[name]) for name, template in formats.items() if name in values]
    if left is not None and step < steps:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def example_text(example: Example) -> Text:
    """Return a completion with its prompt, reward and label, wrapped at words by rich."""
    text = Text(overflow="fold")
    if example.prompt:
        text.append(f"prompt: {shorten(example.prompt, 2, 300)}\n", "dim")
    text.append(shorten(example.completion, 6))
    if scores := example.scores():
        text.append(f"\n({scores})", "cyan")
    return text


def time_line(values: Mapping[str, float]) -> Text:
    """Return the seconds of the newest step, their split over the phases, and the token rates."""
    parts = [f"{values['step_time']:.1f} s"] if "step_time" in values else []
    total = values.get("step_time") or sum(values.get(f"time/{phase}", 0.0) for phase in PHASES)
    parts += [
        f"{phase} {values[f'time/{phase}'] / total:.0%}" for phase in PHASES if total and f"time/{phase}" in values
    ]
    for name, rate in (("sample", "perf/rollout_tokens_per_s"), ("train", "perf/training_tokens_per_s")):
        if rate in values:
            parts.append(f"{name} {values[rate]:,.0f} tok/s")
    return Text("  ".join(parts), "dim")


def spark(values: Sequence[float], width: int = 40) -> str:
    """Return a sparkline of the last `width` values, scaled to the range of all; "" for fewer than two."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(SHADES) - 1) / (high - low) if high > low else 0.0
    return "".join(SHADES[round((value - low) * scale)] for value in values[-width:])


def clock(seconds: float) -> str:
    """Format seconds as a clock: 75 -> "1:15", 3675 -> "1:01:15".

    Only for the live view, which is redrawn twice a second: "10.0 min" would stand still for six seconds.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shorten(text: str, lines: int, characters: int = 600) -> str:
    """Return the first lines of a text, at most `characters` of it, cut at a word."""
    whole = visible(text).rstrip("\n")
    cut = whole[:characters]
    if len(whole) > characters and " " in cut[-20:]:
        cut = cut[: cut.rindex(" ")]
    result = "\n".join(cut.splitlines()[:lines])
    return result if len(result) >= len(whole) else result + " ..."


def shortened(name: str, characters: int) -> str:
    """Return a name, with its end left out where it is too long for a column."""
    return name if len(name) <= characters else name[: characters - 1] + "…"
