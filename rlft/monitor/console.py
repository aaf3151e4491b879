"""Show the progress of a run: a live view where stdout is a terminal, else one plain line per step.

A thread of rich redraws the live view in place twice a second; the methods here only update the data it draws. The
cursor is never hidden and no alternate screen is used, so that even `kill -9` leaves the terminal usable. Everything
that is shown, and every detail that is not, is also written to a log file once `keep_log` names it.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console as Terminal
from rich.live import Live
from rich.text import Text

from rlft.environment import rank
from rlft.monitor import health
from rlft.monitor.panel import Example, Panel, plain_line
from rlft.runs.formats import change, evaluation_names, printed, visible, with_error

if TYPE_CHECKING:  # its module imports torch, and the first line must not wait for that
    from rlft.types import Best

NAMED = 16
"""Columns of the names in front of the results of a run."""


class Level(Enum):
    """Whom a note is for."""

    NOTE = ""
    """Every user: always shown."""
    DETAIL = "dim"
    """Who looks into a run: in the log file, and shown with --verbose."""
    WARNING = "yellow"
    """A user who should act on it: always shown, with a mark."""


class Console:
    """The display of a run, a context manager that closes it."""

    def __init__(self, plain: bool | None = None, terminal: Terminal | None = None, verbose: bool = False) -> None:
        """Set up the display.

        plain: lines instead of the live view; None: unless stdout is a terminal. terminal: for tests. verbose: show
        details too. Of the ranks that torchrun starts, the lead alone prints.
        """
        self._out = terminal or Terminal(highlight=False, quiet=rank() > 0)
        # Asks the file and not rich, which treats any file as a terminal under FORCE_COLOR, as in a CI.
        live = self._out.file.isatty() and not self._out.is_dumb_terminal and not self._out.quiet
        self.plain = not live if plain is None else plain
        self.panel = Panel()
        self._verbose = verbose
        self._live: Live | None = None
        self._closed = False
        self._log: Path | None = None
        self._unwritten: list[str] = []
        """Lines of the log from before `keep_log`."""

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def keep_log(self, path: Path) -> None:
        """Append everything from the beginning on to a log file, details included."""
        lines, self._unwritten, self._log = self._unwritten, [], path
        self._append(lines)

    def start(self, title_lines: Sequence[str], steps: int, done: int = 0) -> None:
        """Print the title and open the view. steps: of the whole run. done: completed steps of a resumed run."""
        for line in title_lines:
            self._print(line)
        self.panel.steps, self.panel.done, self.panel.began = steps, done, time.monotonic()
        self._changed()

    def phase(self, what: str, line: bool = False) -> None:
        """Show what is being waited for, with its time. line: where there is no live view, print one line about it."""
        self.panel.enter(what)
        if line and self.plain:
            self._print(what)
        else:
            self._record(what)
        self._changed()

    def progress(self, what: str, done: int, total: int) -> None:
        """Update the progress within a step: `done` of `total` in the phase `what`. Not shown in plain lines."""
        self.panel.enter(what, done, total)
        self._changed(soon=True)

    def generating(self, done: int, total: int) -> None:
        """Update the progress of the phase "generating"; the callback of engines."""
        self.progress("generating", done, total)

    def step(
        self,
        values: Mapping[str, float],
        example: Example | None,
        new: Sequence[health.Message] = (),
        active: Sequence[health.Message] = (),
    ) -> None:
        """Show a finished step.

        values: the step's metrics and `step`. example: a completion to show. new: health messages to print. active:
        health messages that apply now, for the live view.
        """
        panel = self.panel
        panel.add(values)
        panel.example, panel.warnings = example, tuple(active)
        line = plain_line(values, panel.steps, panel.seconds_left())
        if self.plain:
            self._print(line)
        else:
            self._record(line)
        self._warn(panel.done, new)
        self._changed()

    def evaluation(
        self,
        step: int,
        values: Mapping[str, float],
        new: Sequence[health.Message] = (),
        active: Sequence[health.Message] = (),
    ) -> None:
        """Show an evaluation after `step` in one line. values: its eval/* metrics. new, active: as in `step`."""
        self.panel.warnings = tuple(active)
        self.panel.enter("")
        self._print(evaluation_line(values, step))
        self._warn(step, new)
        self._changed()

    def _warn(self, step: int, messages: Sequence[health.Message]) -> None:
        for message in messages:
            self.warn(f"step {step}: {message.text}")

    def note(self, text: str, level: Level = Level.NOTE) -> None:
        """Print a permanent line. level: a detail is shown with --verbose only, and always in the log file."""
        shown = f"! {text}" if level is Level.WARNING else text
        if level is Level.DETAIL and not self._verbose:
            self._record(shown)
        else:
            self._print(shown, level.value)

    def detail(self, text: str) -> None:
        """Note something for who looks into a run."""
        self.note(text, Level.DETAIL)

    def warn(self, text: str) -> None:
        """Note something that a user should act on."""
        self.note(text, Level.WARNING)

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
            self._print(f"{'checkpoints:':<{NAMED}}{text}", indent=NAMED)
        for name, value in (("adapter", str(adapter)), ("report", str(report)), ("sample from it", again)):
            self._print(f"{name + ':':<{NAMED}}{value}", indent=NAMED)
        self._changed()

    def close(self) -> None:
        """Stop the live view and leave its last state on the screen. May be called twice."""
        self._closed = True
        live, self._live = self._live, None
        if live is not None:
            # A wait that is over, or that an error ended, says nothing any more; a run's last state does.
            live.transient = not self.panel.done
            live.stop()

    # ---- drawing ----

    def _changed(self, soon: bool = False) -> None:
        """Show the panel as it is now. soon: there will be many such calls, so one may be left out."""
        if self.plain or self._closed or self._live is not None:
            return
        live = Live(
            console=self._out, get_renderable=lambda: self.panel, refresh_per_second=2, vertical_overflow="crop"
        )
        self._live = live
        live.start()
        self._out.show_cursor(True)

    def _print(self, text: str, style: str = "", indent: int = 0) -> None:
        """Print a permanent line and log it. indent: of the lines after the first, where it does not fit into one."""
        self._record(text)
        if self._out.quiet:
            return
        if self.plain:
            print(printed(text, self._out.file), file=self._out.file, flush=True)
        else:
            # Without a live view, a long path stays on one line for copying; with one, rich must count every line.
            wrapped = wrap(visible(text), self._out.width, indent)
            self._out.print(Text(wrapped, style), soft_wrap=self._live is None)

    def _record(self, text: str) -> None:
        self._append([f"{time.strftime('%Y-%m-%d %H:%M:%S')} {visible(text)}"])

    def _append(self, lines: Sequence[str]) -> None:
        if self._log is None:
            self._unwritten += lines
            return
        # The log repeats what the screen and metrics.jsonl have; a full disk is reported by what must not be lost.
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{line}\n" for line in lines)


def wrap(text: str, width: int, indent: int = 0) -> str:
    """Break lines that are too long at words, with `indent` spaces before the rest of each.

    A word that is too long for a line, such as a path, stays whole and where it is.
    """
    out = []
    for line in text.split("\n"):
        current = ""
        for space, word in re.findall(r"( *)([^ ]+)", line):
            full = len(current) + len(space) + len(word) > width
            if full and current.strip() and indent + len(word) <= width:
                out.append(current)
                current = " " * indent + word
            else:
                current += space + word
        out.append(current)
    return "\n".join(out)


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
    rows = f" ({values['eval/rows']:.0f})" if "eval/rows" in values else ""  # not in a line of metrics.jsonl by others
    return f"held-out rows{rows} after step {step}: {', '.join(results)}"


def label(values: Mapping[str, float], name: str) -> str:
    """Return a metric's name for a table, with avg@K for the mean over several samples of a row."""
    samples = values.get("eval/samples", 1)
    several = f" (avg@{samples:.0f})" if name == "eval/reward" and samples > 1 else ""
    return name.removeprefix("eval/") + several
