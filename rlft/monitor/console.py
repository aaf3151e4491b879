"""Show the progress of a run: a live view where stdout is a terminal, else one plain line per step.

A thread of rich redraws the live view in place twice a second; the methods here only update the data it draws. The
cursor is never hidden and no alternate screen is used, so that even `kill -9` leaves the terminal usable.
"""

from __future__ import annotations

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
from rlft.runs.formats import change, duration, evaluation_names, printed, visible, with_error
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
"""Name, metric and format of the rows of the live view, each with a sparkline of the last steps."""


class Console:
    """The display of a run, a context manager that closes it."""

    def __init__(self, plain: bool | None = None, terminal: Terminal | None = None) -> None:
        """Set up the display.

        plain: lines instead of the live view; None: unless stdout is a terminal. terminal: for tests.
        """
        self._out = terminal or Terminal(highlight=False)
        # Asks the file and not rich, which treats any file as a terminal under FORCE_COLOR, as in a CI.
        live = self._out.file.isatty() and not self._out.is_dumb_terminal
        self.plain = not live if plain is None else plain
        self._live: Live | None = None
        self._history: list[dict[str, float]] = []
        self._warnings: Sequence[health.Message] = ()
        self._title: list[str] = []
        self._phase: tuple[str, int, int] = ("", 0, 0)
        self._sample = ""
        self._steps = self._done = 0
        self._began = time.monotonic()
        self._closed = False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start(self, title_lines: Sequence[str], steps: int, done: int = 0) -> None:
        """Print the title and open the view. steps: of the whole run. done: completed steps of a resumed run."""
        for line in title_lines:
            self._print(line)
        self._steps, self._done, self._began = steps, done, time.monotonic()
        self._open()

    def progress(self, what: str, done: int, total: int) -> None:
        """Update the progress within a step: `done` of `total` in the phase `what`. Not shown in plain lines."""
        self._phase = (what, done, total)
        self._open()

    def generating(self, done: int, total: int) -> None:
        """Update the progress of the phase "generating"; the callback of engines."""
        self.progress("generating", done, total)

    def step(
        self,
        values: Mapping[str, float],
        sample: str | None,
        new: Sequence[health.Message] = (),
        active: Sequence[health.Message] = (),
    ) -> None:
        """Show a finished step.

        values: the step's metrics and `step`. sample: the text of one completion to show. new: health messages to
        print. active: health messages that apply now, for the live view.
        """
        self._done = int(values["step"])
        self._history = [*self._history, dict(values)][-health.WINDOW :]
        self._sample, self._warnings = sample or "", tuple(active)
        self._phase = ("", 0, 0)
        if self.plain:
            self._print(plain_line(values, self._steps, self._seconds_left()))
        self._warn(self._done, new)

    def evaluation(
        self,
        step: int,
        values: Mapping[str, float],
        new: Sequence[health.Message] = (),
        active: Sequence[health.Message] = (),
    ) -> None:
        """Show an evaluation after `step` in one line. values: its eval/* metrics. new, active: as in `step`."""
        self._warnings = tuple(active)
        self._print(evaluation_line(values, step))
        self._warn(step, new)

    def _warn(self, step: int, messages: Sequence[health.Message]) -> None:
        for message in messages:
            self._print(f"! step {step}: {message.text}", "yellow")

    def note(self, text: str) -> None:
        """Print a permanent line."""
        self._print(text)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Print a small permanent table. rows: the first one is the header."""
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        self._print(title, "bold")
        for number, row in enumerate(rows):
            cells = [
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self._print("  " + "  ".join(cells).rstrip(), "dim" if number == 0 else "")

    def finish(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        adapter: Path,
        report: Path,
        again: str,
        best: Best | None = None,
    ) -> None:
        """Close the view and print the results of the run.

        These are held-out metrics before and after (either may be empty), the adapter's folder, the report, and the
        command that samples from the result. best: mentioned if it is better than the last evaluation.
        """
        self.close()
        metrics = {**before, **after}
        names = evaluation_names([metrics], short=True)
        if names:
            head = ("", "before", "after", *(("change",) if before and after else ()))
            rows = [
                (label(metrics, name), with_error(before, name), with_error(after, name), change(before, after, name))
                for name in names
            ]
            count = max(before.get("eval/rows", 0), after.get("eval/rows", 0))
            self.table(f"held-out rows: {count:.0f}", [head, *(row[: len(head)] for row in rows)])
        if best is not None and after.get(best.metric) != best.value:
            text = f"step {best.step} did best ({best.metric} {best.value:.3f}): choose it with --checkpoint best"
            text += "; being the best on these rows it looks too good on them"
            self._print(f"{'checkpoints:':<16}{text}")
        for name, value in (("adapter", str(adapter)), ("report", str(report)), ("sample from it", again)):
            self._print(f"{name + ':':<16}{value}")

    def close(self) -> None:
        """Stop the live view and leave its last state on the screen. May be called twice."""
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
            print(printed(text, self._out.file), file=self._out.file, flush=True)
        else:
            # Without a live view, a long path stays on one line for copying; with one, rich must count every line.
            self._out.print(Text(visible(text), style), soft_wrap=self._live is None)

    def _seconds_left(self) -> float | None:
        """Estimate the seconds to the end of the run from the last steps; None before the first."""
        times = health.finite(self._history[-10:], "step_time")
        return sum(times) / len(times) * (self._steps - self._done) if times else None

    def _view(self) -> RenderableType:
        parts: list[RenderableType] = [self._bar()]
        if self._history:
            parts += [self._numbers(self._history), time_line(self._history[-1])]
        parts += [Text(f"! {message.text}", "yellow") for message in self._warnings]
        if self._sample:
            parts.append(Padding(Text(shorten(self._sample, 6), "dim"), (0, 0, 0, 2)))
        return Padding(Group(*parts), (1, 0, 0, 0))

    def _bar(self) -> RenderableType:
        remaining = self._seconds_left()
        remaining_text = f", {clock(remaining)} left" if remaining is not None else ""
        what, done, total = self._phase
        phase = f"{what} {done}/{total}" if what else ""
        if not self._steps:
            return Text(phase, "cyan")
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(f"step {self._done}/{self._steps}", "bold"),
            ProgressBar(max(1, self._steps), self._done, width=24),
            Text(f"{clock(time.monotonic() - self._began)}{remaining_text}"),
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
    """Return one line about a step: its metrics in a fixed order."""
    step = int(values["step"])
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    formats = {
        "reward": "reward {:.3f}",
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


def spark(values: Sequence[float]) -> str:
    """Return a sparkline of block characters, scaled to the range of the values; "" for fewer than two."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(SHADES) - 1) / (high - low) if high > low else 0.0
    return "".join(SHADES[round((value - low) * scale)] for value in values[-40:])


def clock(seconds: float) -> str:
    """Format seconds as a clock: 75 -> "1:15", 3675 -> "1:01:15".

    Only for the live view, which is redrawn twice a second: "10.0 min" would stand still for six seconds.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shorten(text: str, lines: int) -> str:
    """Return the first lines of a completion, at most 600 characters."""
    first_lines = visible(text)[:600].splitlines()[:lines]
    result = "\n".join(first_lines)
    return result if len(result) >= len(text.rstrip("\n")) else result + " ..."


def selection_note(among: int) -> str:
    """Return the warning that the best of `among` evaluations is biased on the rows it was chosen on."""
    return (
        f"chosen as the best of {among} evaluations on these rows: results here are too good, and the interval "
        f"does not know it; report other rows (eval.data), or the last checkpoint"
    )


def evaluation_rows(values: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Return the table of one evaluation with its header: name, value, standard error, 95% interval."""
    rows = [("", "value", "stderr", "95% interval")]
    for name in evaluation_names([values], short=True):
        error, low, high = (values.get(f"{name}_{end}") for end in ("stderr", "low", "high"))
        interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
        rows.append((label(values, name), f"{values[name]:.3f}", "" if error is None else f"{error:.3f}", interval))
    return rows


def evaluation_line(values: Mapping[str, float], step: int) -> str:
    """Return one line about an evaluation after `step`: the results with their change since the first evaluation."""
    names = [
        name
        for name in evaluation_names([values], short=True)
        if not name.startswith(("eval/completions/", "eval/rewards/"))
    ]
    results = [
        f"{label(values, name)} {with_error(values, name)}"
        + (f" ({change({}, values, name)} since the first)" if f"{name}_change" in values else "")
        for name in names
    ]
    return f"held-out rows ({values['eval/rows']:.0f}) after step {step}: {', '.join(results)}"


def label(values: Mapping[str, float], name: str) -> str:
    """Return a metric's name for a table, with avg@K for the mean over several samples of a row."""
    samples = values.get("eval/samples", 1)
    several = f" (avg@{samples:.0f})" if name == "eval/reward" and samples > 1 else ""
    return name.removeprefix("eval/") + several
