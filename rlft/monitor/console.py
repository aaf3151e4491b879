"""What a run shows while it runs: a live view where stdout is a terminal, one plain line per step where it is not.

The live view is redrawn in place twice a second by a thread of rich; everything else here only sets what it draws. The
cursor is never hidden and no alternate screen is used, so that even `kill -9` leaves the terminal as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlft.monitor import health
from rlft.types import Best

SHADES = "▁▂▃▄▅▆▇█"
PHASES = ("generate", "reward", "train", "sync")
ROWS: list[tuple[str, str, Callable[[float], str]]] = [
    ("reward", "reward", "{:.3f}".format),
    ("length", "completions/mean_length", "{:.1f}".format),
    ("entropy", "entropy", "{:.3f}".format),
    ("mismatch", health.MISMATCH, "{:.1e}".format),
    ("clipped", "completions/clipped_ratio", "{:.0%}".format),
    ("gradient", "grad_norm", "{:.3g}".format),
]
"""Name, metric and format of the rows of the live view, each with its course over the last steps."""


class Console:
    """The run's display. A context manager: `close` is called on the way out, whatever happened."""

    def __init__(self, plain: bool | None = None, terminal: Terminal | None = None) -> None:
        """plain: lines instead of the live view; None decides by whether stdout is a terminal. terminal: for tests."""
        self._out = terminal or Terminal(highlight=False)
        # The file is asked and not rich, for which FORCE_COLOR in a CI makes a terminal of any file.
        live = self._out.file.isatty() and not self._out.is_dumb_terminal
        self.plain = not live if plain is None else plain
        self._live: Live | None = None
        self._history: list[dict[str, float]] = []
        self._rows: list[dict[str, float]] = []
        self._told: set[str] = set()
        self._warnings: list[health.Message] = []
        self._title: list[str] = []
        self._phase: tuple[str, int, int] = ("", 0, 0)
        self._sample = self._algorithm = ""
        self._steps = self._done = 0
        self._began = time.monotonic()
        self._closed = False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start(self, title_lines: Sequence[str], steps: int, done: int = 0, algorithm: str = "") -> None:
        """Print what is about to run and begin the view. steps: of the whole run; done: those a resume begins after;
        algorithm: `algo.name`, since some health rules are not for all."""
        for line in title_lines:
            self._print(line)
        self._steps, self._done, self._began, self._algorithm = steps, done, time.monotonic(), algorithm
        self._open()

    def progress(self, what: str, done: int, total: int) -> None:
        """Within a step (or before the first): `done` of `total` in the phase `what`. Plain lines leave it out."""
        self._phase = (what, done, total)
        self._open()

    def generating(self, done: int, total: int) -> None:
        """`progress` of the phase "generating", in the form engines call it."""
        self.progress("generating", done, total)

    def step(self, values: Mapping[str, float], sample: str | None) -> list[health.Message]:
        """A step is done. values: its metrics and `step`; sample: the text of one completion, to look at. Returns the
        health messages that it printed, those that begin at this step."""
        self._done = int(values["step"])
        self._history = [*self._history, dict(values)][-health.WINDOW :]
        self._rows = [*self._rows, dict(values)][-health.WINDOW :]
        self._sample = sample or ""
        self._phase = ("", 0, 0)
        if self.plain:
            self._print(plain_line(values, self._steps, self._left()))
        self._warnings = health.check(self._rows, self._algorithm)
        # Said when it begins, not at each step that it lasts.
        new = [message for message in self._warnings if message.name not in self._told]
        self._warn(new)
        self._told = {message.name for message in self._warnings}
        return new

    def evaluation(self, step: int, values: Mapping[str, float]) -> list[health.Message]:
        """An evaluation after `step` is done: say, and return, what the health rules see in it. values: its eval/*
        metrics."""
        self._rows = [*self._rows, {"step": float(step), **values}][-health.WINDOW :]
        found = health.check(self._rows, self._algorithm)
        self._warnings = [*self._warnings, *found]
        self._warn(found)
        return found

    def _warn(self, messages: Sequence[health.Message]) -> None:
        for _, text in messages:
            self._print(f"! step {self._done}: {text}", "yellow")

    def note(self, text: str) -> None:
        """One line that stays."""
        self._print(text)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """A small table that stays. rows: the first one is the header."""
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        self._print(title, "bold")
        for n, row in enumerate(rows):
            cells = [
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            self._print("  " + "  ".join(cells).rstrip(), "dim" if n == 0 else "")

    def finish(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        adapter: Path,
        report: Path,
        again: str,
        best: Best | None = None,
    ) -> None:
        """Close the view and say what came out: held-out metrics before and after (either may be empty), the adapter's
        folder, the report, and the command that samples from the result. best: named where it beats the last."""
        self.close()
        both = {**before, **after}
        names = evaluation_names(both)
        if names:
            head = ("", "before", "after", *(("change",) if before and after else ()))
            rows = [
                (label(both, name), with_error(before, name), with_error(after, name), changed(before, after, name))
                for name in names
            ]
            count = max(before.get("eval/rows", 0), after.get("eval/rows", 0))
            self.table(f"held-out rows: {count:.0f}", [head, *(row[: len(head)] for row in rows)])
        if best is not None and after.get(best.metric) != best.value:
            told = f"step {best.step} did best ({best.metric} {best.value:.3f}): choose it with --checkpoint best"
            told += "; being the best on these rows it looks too good on them"
            self._print(f"{'checkpoints:':<16}{told}")
        for name, value in (("adapter", str(adapter)), ("report", str(report)), ("sample from it", again)):
            self._print(f"{name + ':':<16}{value}")

    def close(self) -> None:
        """Stop the live view, leaving its last state on the screen. May be called twice."""
        self._closed = True
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    # ---- drawing ----

    def _open(self) -> None:
        if self.plain or self._closed or self._live is not None:
            return
        self._live = Live(console=self._out, get_renderable=self._view, refresh_per_second=2, vertical_overflow="crop")
        self._live.start()
        self._out.show_cursor(True)

    def _print(self, text: str, style: str = "") -> None:
        if self.plain:
            # An ASCII-only stdout must not stop a run over a "±".
            encoding = getattr(self._out.file, "encoding", None) or "utf-8"
            print(clean(text).encode(encoding, "replace").decode(encoding), file=self._out.file, flush=True)
        else:
            # Without a view below, a long path stays one line that can be copied; with one, every line must be counted.
            self._out.print(Text(clean(text), style), soft_wrap=self._live is None)

    def _left(self) -> float | None:
        """Seconds to the end of the run, from the time of the last steps; None before the first."""
        times = health.finite(self._history[-10:], "step_time")
        return sum(times) / len(times) * (self._steps - self._done) if times else None

    def _view(self) -> RenderableType:
        parts: list[RenderableType] = [self._bar()]
        if self._history:
            parts += [self._numbers(self._history), time_line(self._history[-1])]
        parts += [Text(f"! {text}", "yellow") for _, text in self._warnings]
        if self._sample:
            parts.append(Padding(Text(shorten(self._sample, 6), "dim"), (0, 0, 0, 2)))
        return Padding(Group(*parts), (1, 0, 0, 0))

    def _bar(self) -> RenderableType:
        left = self._left()
        ends = f", {duration(left)} left" if left is not None else ""
        what, done, total = self._phase
        phase = f"{what} {done}/{total}" if what else ""
        if not self._steps:
            return Text(phase, "cyan")
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(f"step {self._done}/{self._steps}", "bold"),
            ProgressBar(max(1, self._steps), self._done, width=24),
            Text(f"{duration(time.monotonic() - self._began)}{ends}"),
            Text(phase, "cyan"),
        )
        return grid

    def _numbers(self, history: list[dict[str, float]]) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        for name, key, form in ROWS:
            value = health.newest(history, key)
            if value is not None:
                grid.add_row(
                    Text(name, "dim"), Text(form(value), "bold"), Text(spark(health.finite(history, key)), "green")
                )
        return grid


def plain_line(values: Mapping[str, float], steps: int, left: float | None) -> str:
    """One line about a step: what was logged, in a fixed order."""
    step = int(values["step"])
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    forms = {
        "reward": "reward {:.3f}",
        "loss": "loss {:.4f}",
        "completions/mean_length": "len {:.1f}",
        "entropy": "entropy {:.3f}",
        health.MISMATCH: "mismatch {:.0e}",
        "step_time": "{:.1f} s",
        "perf/rollout_tokens_per_s": "sample {:.0f} tok/s",
        "perf/training_tokens_per_s": "train {:.0f} tok/s",
    }
    parts += [form.format(values[name]) for name, form in forms.items() if name in values]
    if left is not None and step < steps:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def time_line(values: Mapping[str, float]) -> Text:
    """Seconds of the newest step, their split over its phases, and the rates."""
    parts = [f"{values['step_time']:.1f} s"] if "step_time" in values else []
    total = values.get("step_time") or sum(values.get(f"time/{p}", 0.0) for p in PHASES)
    parts += [f"{p} {values[f'time/{p}'] / total:.0%}" for p in PHASES if total and f"time/{p}" in values]
    for name, rate in (("sample", "perf/rollout_tokens_per_s"), ("train", "perf/training_tokens_per_s")):
        if rate in values:
            parts.append(f"{name} {values[rate]:,.0f} tok/s")
    return Text("  ".join(parts), "dim")


def spark(values: Sequence[float]) -> str:
    """A line of block characters, lowest to highest of the values; "" for fewer than two."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(SHADES) - 1) / (high - low) if high > low else 0.0
    return "".join(SHADES[round((v - low) * scale)] for v in values[-40:])


def duration(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clean(text: str) -> str:
    """Text without the control characters that could move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def shorten(text: str, lines: int) -> str:
    """The first lines of a completion, at most 600 characters."""
    kept = clean(text)[:600].splitlines()[:lines]
    whole = "\n".join(kept)
    return whole if len(whole) >= len(text.rstrip("\n")) else whole + " ..."


def evaluation_names(values: Mapping[str, float]) -> list[str]:
    """The eval/* metrics worth a row: reward, pass@K, loss, rewards' parts if there are several, lengths, and invalid
    rewards if any. pass@1 is left out where it is the reward."""
    passes = [n for n in values if n.startswith("eval/pass@") and n.removeprefix("eval/pass@").isdigit()]
    passes = [n for n in passes if n != "eval/pass@1" or not math.isclose(values[n], values.get("eval/reward", -1))]
    loss = ["eval/loss", "eval/perplexity", "eval/rewards/accuracies", "eval/rewards/margins"]
    parts = [n for n in values if n.startswith("eval/rewards/") and n.endswith("/mean")]
    lengths = [n for n in values if n.startswith("eval/completions/")]
    invalid = ["eval/invalid"] if values.get("eval/invalid") else []
    wanted = ["eval/reward", *passes, *loss, *(parts if len(parts) > 1 else []), *lengths, *invalid]
    return [n for n in wanted if n in values]


def selection_note(among: int) -> str:
    """What to know of the results of the best of `among` evaluations on the rows that it was chosen on."""
    return (
        f"chosen as the best of {among} evaluations on these rows: results here are too good, and the interval "
        f"does not know it; report other rows (eval.data), or the last checkpoint"
    )


def evaluation_rows(values: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """The table of one evaluation, its header first: name, value, standard error, 95% interval."""
    rows = [("", "value", "stderr", "95% interval")]
    for name in evaluation_names(values):
        error, low, high = (values.get(f"{name}_{end}") for end in ("stderr", "low", "high"))
        interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
        rows.append((label(values, name), f"{values[name]:.3f}", "" if error is None else f"{error:.3f}", interval))
    return rows


def evaluation_line(values: Mapping[str, float], step: int) -> str:
    """One line about an evaluation after `step`: the results, each with its change since the first."""
    names = [n for n in evaluation_names(values) if not n.startswith(("eval/completions/", "eval/rewards/"))]
    told = [
        f"{label(values, n)} {with_error(values, n)}"
        + (f" ({signed(values, f'{n}_change')} since the first)" if f"{n}_change" in values else "")
        for n in names
    ]
    return f"held-out rows ({values['eval/rows']:.0f}) after step {step}: {', '.join(told)}"


def label(values: Mapping[str, float], name: str) -> str:
    """A metric's name in a table; the mean over several samples of a row is called what it is."""
    samples = values.get("eval/samples", 1)
    several = f" (avg@{samples:.0f})" if name == "eval/reward" and samples > 1 else ""
    return name.removeprefix("eval/") + several


def changed(before: Mapping[str, float], after: Mapping[str, float], name: str) -> str:
    """The change of a metric as text: paired by row with its error where that was measured, else the difference."""
    if f"{name}_change" in after:
        return signed(after, f"{name}_change")
    return f"{after[name] - before[name]:+.3f}" if name in before and name in after else "-"


def signed(values: Mapping[str, float], name: str) -> str:
    """`with_error` with a sign."""
    return ("+" if values[name] >= 0 else "") + with_error(values, name)


def with_error(values: Mapping[str, float], name: str) -> str:
    """A metric as text, with its standard error where there is one; "-" where it was not measured."""
    if name not in values:
        return "-"
    error = values.get(f"{name}_stderr")
    return f"{values[name]:.3f}" + (f" ± {error:.3f}" if error is not None else "")
