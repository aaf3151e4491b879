"""The comparison of several runs: final numbers, evaluations, differing settings, and overlaid curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rlft.monitor import health
from rlft.report import charts
from rlft.report.curves import Drawing, Line
from rlft.report.markup import document, navigation, number, section, table, text
from rlft.report.page import algorithm_of, config_of, grid, parts_of, step_ranges, write_page
from rlft.runs.folder import Run
from rlft.runs.formats import duration, evaluation_names, with_error

LAST = 10
"""Number of last steps over which the final numbers are averaged, since a single step is noisy."""
SECTIONS = ("Final numbers", "Evaluation", "Settings that differ", "Curves", "Health")
Rows = Sequence[Mapping[str, Any]]


class Column(NamedTuple):
    """The data of one run."""

    name: str
    config: dict[str, Any]
    rows: Rows
    steps: Rows
    evaluations: Rows


def write(folders: Sequence[Path], out: Path) -> Path:
    """Write the comparison of the runs in these folders to `out`, and return its path.

    Raises ConfigError when a folder has no run.
    """
    runs = [Run.resume(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_page(page(runs), out)


def page(runs: Sequence[Run]) -> str:
    """Return the HTML of the page."""
    columns = [
        Column(name, config_of(run), rows, *parts_of(rows))
        for name, run in zip(names_of([run.path for run in runs]), runs, strict=True)
        if (rows := run.metrics()) is not None
    ]
    body = "\n".join(
        [
            section(
                "Final numbers", final_table(columns), f"Means over the last {LAST} steps where a step has the number."
            ),
            section("Evaluation", evaluations(columns), "The last evaluation of each run, and where it began."),
            section("Settings that differ", settings(columns)),
            section("Curves", curves(columns)),
            section("Health", health_table(columns)),
        ]
    )
    key = "".join(f'<span><i class="c{i % 8}"></i>{text(column.name)}</span>' for i, column in enumerate(columns))
    head = f"<h1>{len(columns)} runs compared</h1>{navigation(SECTIONS, body)}"
    return document("runs compared", f'<header>{head}</header><p class="legend key">{key}</p>\n{body}')


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many parent parts as needed to make them distinct."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names  # the same folder occurs twice


def final_table(columns: Sequence[Column]) -> str:
    """Return a table of final numbers with a column per run."""

    def recent_mean(name: str) -> Callable[[Column], str]:
        return lambda column: number(mean(values)) if (values := health.finite(column.steps, name)[-LAST:]) else "-"

    lines: dict[str, Callable[[Column], str]] = {
        "algorithm": lambda column: algorithm_of(column.config) or "-",
        "steps": lambda column: f"{len(column.steps):,}",
        "reward": recent_mean("reward"),
        "loss": recent_mean("loss"),
        "completion length, tokens": recent_mean("completions/mean_length"),
        "cut at max_tokens": recent_mean("completions/clipped_ratio"),
        "groups of equal rewards": recent_mean("frac_reward_zero_std"),
        "entropy, nat": recent_mean("entropy"),
        "gradient norm": recent_mean("grad_norm"),
        "clipped ratios": recent_mean("clip_ratio/region_mean"),
        "KL to the reference": recent_mean("kl"),
        "pairs in the right order": recent_mean("rewards/accuracies"),
        "mismatch, nat, worst step": lambda column: number(
            max(health.finite(column.steps, health.MISMATCH), default=None), ".2g"
        ),
        "seconds per step": recent_mean("step_time"),
        "time in steps": lambda column: (
            duration(sum(seconds)) if (seconds := health.finite(column.steps, "step_time")) else "-"
        ),
        "sampling, tokens per second": recent_mean("perf/rollout_tokens_per_s"),
        "training, tokens per second": recent_mean("perf/training_tokens_per_s"),
        "tokens": lambda column: number(max(health.finite(column.steps, "num_tokens"), default=None), ",.0f"),
        "peak memory, GiB": lambda column: number(
            max(health.finite(column.steps, "perf/peak_GiB"), default=None), ".3g"
        ),
    }
    table_lines = [[name, *map(value_of, columns)] for name, value_of in lines.items()]
    return table(["", *(column.name for column in columns)], [line for line in table_lines if set(line[1:]) != {"-"}])


def evaluations(columns: Sequence[Column]) -> str:
    """Return a table with a line per eval/* metric: the first and the last value of each run."""
    names = evaluation_names([row for column in columns for row in column.evaluations])

    def cell(column: Column, name: str) -> str:
        rows = [row for row in column.evaluations if row.get(name) is not None]
        if not rows:
            return "-"
        last = with_error(rows[-1], name, interval=True)
        return f"{number(rows[0][name])} → {last}" if len(rows) > 1 else last

    lines = [[name.removeprefix("eval/"), *(cell(column, name) for column in columns)] for name in names]
    after = ["after step", *(str(column.evaluations[-1]["step"]) if column.evaluations else "-" for column in columns)]
    return table(["", *(column.name for column in columns)], [after, *lines]) if names else ""


def settings(columns: Sequence[Column]) -> str:
    """Return a table of the settings that differ between runs, except the run folder."""
    flattened = [{key: value for key, value in flatten(column.config).items() if key != "out"} for column in columns]
    names = dict.fromkeys(name for run_settings in flattened for name in run_settings)
    differ = [name for name in names if len({run_settings.get(name, "-") for run_settings in flattened}) > 1]
    if not differ:
        return "<p>None: every setting is the same.</p>"
    return table(
        ["", *(column.name for column in columns)],
        [[name, *(run_settings.get(name, "-") for run_settings in flattened)] for name in differ],
    )


def flatten(config: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Flatten nested settings: {"optim": {"lr": 1e-5}} -> {"optim.lr": "1e-05"}."""
    flat_settings: dict[str, str] = {}
    for key, value in config.items():
        flat_settings |= (
            flatten(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": str(value)}
        )
    return flat_settings


def curves(columns: Sequence[Column]) -> str:
    """Return a chart per metric, with a line per run."""
    by_heading = charts.charts(
        [row for column in columns for row in column.steps], [row for column in columns for row in column.evaluations]
    )
    out = []
    for title, selected in by_heading.items():
        figures = []
        for chart in selected:
            for legend, name in chart.lines.items():
                if name == "parity/limit":
                    continue  # a setting, not a measured curve
                heading = chart.title if len(chart.lines) == 1 else f"{chart.title}: {legend}"
                if drawing := overlay(columns, charts.Chart(heading, {legend: name}, log=chart.log), name):
                    figures.append(drawing)
        out.append(grid(title, figures))
    return "".join(out)


def overlay(columns: Sequence[Column], chart: charts.Chart, name: str) -> Drawing | None:
    """Return the curves of one metric; None if no run has it."""
    lines: list[Line] = []
    equal: list[str] = []
    for i, column in enumerate(columns):
        row_bins = charts.bins([row for row in column.rows if name in row])
        line = charts.series(row_bins, chart, 0, column.name, name) if row_bins else None
        if not line:
            continue
        same = [other for other in lines if (other.steps, other.values) == (line.steps, line.values)]
        equal += [f"{line.legend} equals {same[0].legend}"] if same else []
        lines.append(line._replace(low=(), high=(), colour=i, dashed=bool(same)))
    note = f"{'; '.join(equal)}." if equal else ""
    return Drawing(chart.title, lines, chart.log, note=note) if lines else None


def health_table(columns: Sequence[Column]) -> str:
    """Return a table of health messages of each run: steps and last text."""
    lines = []
    for column in columns:
        for name, messages in charts.health_messages(column.rows, algorithm_of(column.config)).items():
            steps_text = step_ranges(charts.spans([step for step, _ in messages]))
            lines.append([column.name, name.replace("_", " "), steps_text, messages[-1][1]])
    return table(["run", "rule", "when", "what"], lines) if lines else "<p>Nothing to report about any of them.</p>"
