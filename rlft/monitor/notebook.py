"""Show a run in a notebook: one output of the cell that is updated, with progress, curve and the newest completion.

IPython is not a dependency: it is used where a kernel has imported it, and never imported otherwise.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from rlft.monitor import health
from rlft.monitor.console import Console
from rlft.monitor.panel import Example, clock, outcome, plain_line, rows, shorten
from rlft.runs.formats import number, visible

MOST_LINES = 20
"""Largest number of permanent lines shown; log.txt has all."""
MOST_POINTS = 400
"""Largest number of points of the curve; of a longer run every n-th step is drawn, and the newest."""
SECONDS = 0.5
"""Shortest time between two updates within a step."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 620, 150, 48, 20, 8
"""Size of the curve and its margins, in SVG units."""
BLUE = "#3b82f6"
"""Readable on white and on black; every other colour is the notebook's own."""
FAINT = "opacity:.7;font-size:90%"


def display(verbose: bool = False) -> Console:
    """Return the display for this process: a cell's output in a notebook, else the console. verbose: details too."""
    return Notebook(verbose) if in_notebook() else Console(verbose=verbose)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None  # a terminal's shell has none


class Notebook(Console):
    """The display of a run in the output of a cell."""

    def __init__(self, verbose: bool = False) -> None:
        """Set up the display; nothing is shown yet. verbose: show details too."""
        super().__init__(plain=False, verbose=verbose)
        self._lines: list[str] = []
        self._curve: list[tuple[int, float]] = []
        """Step and value of what the run is judged by."""
        self._handle: Any = None
        self._shown = 0.0
        self._thread = threading.get_ident()

    def close(self) -> None:
        """Show the last state. May be called twice."""
        self.panel.enter("")
        self._changed()

    def _changed(self, soon: bool = False) -> None:
        # Another thread's output would go to whatever cell runs then.
        if threading.get_ident() != self._thread or (soon and time.monotonic() - self._shown < SECONDS):
            return
        from IPython.display import display as show

        self._remember()
        data = {"text/html": self.page(), "text/plain": self._plain_text()}
        if self._handle is None:
            self._handle = show(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
        self._shown = time.monotonic()

    def _print(self, text: str, style: str = "", indent: int = 0) -> None:
        self._record(text)
        self._lines = [*self._lines, text][-MOST_LINES:]
        self._changed()

    def _remember(self) -> None:
        """Add the newest step to the curve."""
        history = self.panel.history
        if not history or (self._curve and self._curve[-1][0] == self.panel.done):
            return
        value = health.newest(history, outcome(history[-1])[0][1])
        if value is not None:
            self._curve.append((self.panel.done, value))

    def _plain_text(self) -> str:
        history, panel = self.panel.history, self.panel
        newest = [plain_line(history[-1], panel.steps, panel.seconds_left())] if history else []
        return "\n".join([*self._lines, *newest])

    def page(self) -> str:
        """Return the HTML of the output."""
        panel = self.panel
        parts = [self._progress()]
        if panel.history:
            parts += [curve(self._curve, outcome(panel.history[-1])[0][0]), _numbers(panel.history)]
        parts += [f'<div style="color:#d97706">! {_text(message.text)}</div>' for message in panel.warnings]
        if panel.example is not None:
            parts.append(_example(panel.example))
        if self._lines:
            lines = _text("\n".join(self._lines))
            parts.append(f'<pre style="white-space:pre-wrap;margin:8px 0 0;{FAINT}">{lines}</pre>')
        return f'<div style="max-width:{WIDTH + 100}px;line-height:1.5">{"".join(parts)}</div>'

    def _progress(self) -> str:
        panel = self.panel
        phase = panel.phase_text()
        if not panel.steps:
            return f"<div>{_text(phase)}</div>"
        left = panel.seconds_left()
        remaining = f", {clock(left)} left" if left is not None and panel.done < panel.steps else ""
        line = f"step {panel.done}/{panel.steps} &nbsp; {clock(time.monotonic() - panel.began)}{remaining}"
        bar = (
            f'<div style="height:6px;border-radius:3px;background:rgba(128,128,128,.3);max-width:{WIDTH}px">'
            f'<div style="height:6px;border-radius:3px;background:{BLUE};width:{100 * panel.done / panel.steps:.1f}%">'
            f"</div></div>"
        )
        return f'<div><b>{line}</b> &nbsp; <span style="{FAINT}">{_text(phase)}</span></div>{bar}'


def curve(points: Sequence[tuple[int, float]], name: str) -> str:
    """Return a curve over steps as inline SVG; empty for fewer than two points. name: of what it shows."""
    if len(points) < 2:
        return ""
    every = -(-len(points) // MOST_POINTS)
    points = points[(len(points) - 1) % every :: every]
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def place(step: int, value: float) -> str:
        across = (step - steps[0]) / (steps[-1] - steps[0])
        up = (value - low) / (high - low)
        return f"{LEFT + across * (WIDTH - LEFT - 8):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP):.1f}"

    def label(left: float, top: float, text: str, anchor: str) -> str:
        return (
            f'<text x="{left}" y="{top}" text-anchor="{anchor}" font-size="11" fill="currentColor" opacity=".7">'
            f"{_text(text)}</text>"
        )

    ends = (HEIGHT - BOTTOM, TOP)
    lines = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{top}" y2="{top}" stroke="currentColor" opacity=".2"/>' for top in ends
    )
    labels = [
        label(LEFT - 6, TOP + 8, number(max(values), ".3g"), "end"),
        label(LEFT - 6, HEIGHT - BOTTOM, number(min(values), ".3g"), "end"),
        label(LEFT, HEIGHT - 5, f"step {steps[0]}", "start"),
        label(WIDTH - 8, HEIGHT - 5, f"step {steps[-1]}", "end"),
        label(WIDTH / 2, HEIGHT - 5, name, "middle"),
    ]
    path = " ".join(place(step, value) for step, value in points)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" style="width:100%;max-width:{WIDTH}px;display:block;margin-top:8px" '
        f'role="img" aria-label="{_text(name)} by step">{lines}{"".join(labels)}'
        f'<polyline points="{path}" fill="none" stroke="{BLUE}" stroke-width="2" stroke-linejoin="round"/></svg>'
    )


def _numbers(history: Sequence[dict[str, float]]) -> str:
    values = [(name.strip(), health.newest(history, key), form) for name, key, form in rows(history[-1])]
    shown = [(name, form(value)) for name, value, form in values if value is not None]
    return "<div>" + " &nbsp; ".join(f"{_text(name)} <b>{_text(value)}</b>" for name, value in shown) + "</div>"


def _example(example: Example) -> str:
    """Return a completion with its prompt, reward and label."""
    scores, style = example.scores(), "white-space:pre-wrap;overflow-wrap:anywhere"
    prompt = f'<div style="{style};{FAINT}">{_text(shorten(example.prompt, 4))}</div>' if example.prompt else ""
    end = f'<div style="{FAINT}">{_text(scores)}</div>' if scores else ""
    return (
        f'<div style="border-left:3px solid rgba(128,128,128,.4);padding-left:10px;margin-top:8px">{prompt}'
        f'<div style="{style}">{_text(shorten(example.completion, 12, 1200))}</div>{end}</div>'
    )


def _text(value: str) -> str:
    return html.escape(visible(value))
