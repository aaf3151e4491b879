"""A run in a notebook's cell: curves and the table of evaluations, as a small page in a frame."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlft.config.paths import user_path
from rlft.config.resolve import did_you_mean
from rlft.errors import ConfigError
from rlft.report import charts
from rlft.report.charts import Chart
from rlft.report.curves import figure
from rlft.report.markup import document
from rlft.report.page import evaluation_table, parts_of, write_page
from rlft.runs.folder import Run

HEIGHT = 330
"""Pixels of a row of curves in a notebook."""


@dataclass(frozen=True)
class Picture:
    """A page that a notebook shows in its cell, and that `save` writes to a file."""

    title: str
    body: str
    """HTML."""
    height: int
    """Pixels in a notebook."""

    def _repr_html_(self) -> str:
        # In a frame, so that the page's style and the notebook's do not meet.
        page = html.escape(document(self.title, self.body), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:{self.height}px;border:0"></iframe>'

    def save(self, path: str | Path) -> Path:
        """Write the page to an HTML file. Raises ConfigError when it cannot be written."""
        return write_page(document(self.title, self.body), user_path(path, "path"))


def plot(run: Run, names: Sequence[str] = ()) -> Picture:
    """Draw metrics of a run over its steps, a chart for each. names: () for what the run learns by.

    Raises ConfigError for a metric that the run does not have.
    """
    rows = run.metrics()
    known = sorted({name for row in rows for name in row} - {"step"})
    unknown = [name for name in names if name not in known]
    if unknown:
        close = did_you_mean(unknown[0], known)
        raise ConfigError(f'no metric "{unknown[0]}" in {run.path}; it has {", ".join(known) or "none yet"}.{close}')
    wanted = [Chart(name, {"": name}) for name in names] or learning(rows)
    figures = [figure(drawing) for drawing in charts.drawings(rows, wanted, {})]
    body = f'<div class="grid">{"".join(figures)}</div>' if figures else "<p>No metrics yet.</p>"
    return Picture(run.path.resolve().name, body, HEIGHT * max(1, (len(figures) + 1) // 2))


def learning(rows: charts.Rows) -> list[Chart]:
    """Return the first two charts of the report that have data: rewards, or losses of recorded completions."""
    steps, evaluations = parts_of(rows)
    selected = charts.charts(steps, evaluations)["Learning"]
    return [chart for chart in selected if charts.drawings(rows, [chart], {})][:2]


def summary(run: Run) -> Picture:
    """Show a run: its curves and, where it was evaluated, the table of its evaluations."""
    picture = plot(run)
    table = evaluation_table(parts_of(run.metrics())[1])
    return Picture(picture.title, picture.body + table, picture.height + (260 if table else 0))
