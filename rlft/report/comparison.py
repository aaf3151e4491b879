"""The page of several runs: final numbers, evaluations, the settings that differ, and curves over each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rlft.monitor import health
from rlft.report import charts
from rlft.report.curves import Drawing
from rlft.report.markup import document, navigation, number, section, table, text
from rlft.report.page import (
    algorithm_of,
    config_of,
    duration,
    evaluation_names,
    grid,
    parts_of,
    where,
    with_error,
    write_page,
)
from rlft.runs.folder import Run

LAST = 10
"""Steps at the end of a run that its final numbers are means over: one step alone is noise."""
SECTIONS = ("Final numbers", "Evaluation", "Settings that differ", "Curves", "Health")
Rows = Sequence[Mapping[str, Any]]


class Column(NamedTuple):
    """One of the runs."""

    name: str
    config: dict[str, Any]
    rows: Rows
    steps: Rows
    evaluations: Rows


def write(folders: Sequence[Path], out: Path) -> Path:
    """Write the page that compares the runs in these folders to `out`; returns its path.

    Raises ConfigError when a folder holds no run.
    """
    runs = [Run.resume(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_page(page(runs), out)


def page(runs: Sequence[Run]) -> str:
    """The whole page as text."""
    columns = [
        Column(name, config_of(run), rows, *parts_of(rows))
        for name, run in zip(names_of([run.path for run in runs]), runs, strict=True)
        if (rows := run.metrics()) is not None
    ]
    body = "\n".join(
        [
            section("Final numbers", final(columns), f"Means over the last {LAST} steps where a step has the number."),
            section("Evaluation", evaluations(columns), "The last evaluation of each run, and where it began."),
            section("Settings that differ", settings(columns)),
            section("Curves", curves(columns)),
            section("Health", description(columns)),
        ]
    )
    key = "".join(f'<span><i class="c{i % 8}"></i>{text(column.name)}</span>' for i, column in enumerate(columns))
    head = f"<h1>{len(columns)} runs compared</h1>{navigation(SECTIONS, body)}"
    return document("runs compared", f'<header>{head}</header><p class="legend key">{key}</p>\n{body}')


def names_of(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names  # the same folder twice


def final(columns: Sequence[Column]) -> str:
    """A line per number, a column per run."""

    def lately(name: str) -> Callable[[Column], str]:
        return lambda c: number(mean(values)) if (values := health.finite(c.steps, name)[-LAST:]) else "-"

    lines: dict[str, Callable[[Column], str]] = {
        "algorithm": lambda c: algorithm_of(c.config) or "-",
        "steps": lambda c: f"{len(c.steps):,}",
        "reward": lately("reward"),
        "loss": lately("loss"),
        "completion length, tokens": lately("completions/mean_length"),
        "cut at max_tokens": lately("completions/clipped_ratio"),
        "groups of equal rewards": lately("frac_reward_zero_std"),
        "entropy, nat": lately("entropy"),
        "gradient norm": lately("grad_norm"),
        "clipped ratios": lately("clip_ratio/region_mean"),
        "KL to the reference": lately("kl"),
        "pairs in the right order": lately("rewards/accuracies"),
        "mismatch, nat, worst step": lambda c: number(
            max(health.finite(c.steps, health.MISMATCH), default=None), ".2g"
        ),
        "seconds per step": lately("step_time"),
        "time in steps": lambda c: duration(sum(s)) if (s := health.finite(c.steps, "step_time")) else "-",
        "sampling, tokens per second": lately("perf/rollout_tokens_per_s"),
        "training, tokens per second": lately("perf/training_tokens_per_s"),
        "tokens": lambda c: number(max(health.finite(c.steps, "num_tokens"), default=None), ",.0f"),
        "peak memory, GiB": lambda c: number(max(health.finite(c.steps, "perf/peak_GiB"), default=None), ".3g"),
    }
    made = [[name, *map(of, columns)] for name, of in lines.items()]
    return table(["", *(c.name for c in columns)], [line for line in made if set(line[1:]) != {"-"}])


def evaluations(columns: Sequence[Column]) -> str:
    """A line per eval/* metric: the first and the last value of each run."""
    names = evaluation_names([row for c in columns for row in c.evaluations])

    def cell(column: Column, name: str) -> str:
        measured = [row for row in column.evaluations if row.get(name) is not None]
        if not measured:
            return "-"
        last = with_error(measured[-1], name)
        return f"{number(measured[0][name])} → {last}" if len(measured) > 1 else last

    lines = [[name.removeprefix("eval/"), *(cell(c, name) for c in columns)] for name in names]
    after = ["after step", *(str(c.evaluations[-1]["step"]) if c.evaluations else "-" for c in columns)]
    return table(["", *(c.name for c in columns)], [after, *lines]) if names else ""


def settings(columns: Sequence[Column]) -> str:
    """The settings that are not the same in all runs; their folders of course are not."""
    flat = [{k: v for k, v in flatten(c.config).items() if k != "out"} for c in columns]
    names = dict.fromkeys(name for settings in flat for name in settings)
    differ = [n for n in names if len({settings.get(n, "-") for settings in flat}) > 1]
    if not differ:
        return "<p>None: every setting is the same.</p>"
    return table(["", *(c.name for c in columns)], [[n, *(s.get(n, "-") for s in flat)] for n in differ])


def flatten(config: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """{"optim": {"lr": 1e-5}} -> {"optim.lr": "1e-05"}."""
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= flatten(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": str(value)}
    return found


def curves(columns: Sequence[Column]) -> str:
    """A chart per metric, with a line per run."""
    known = charts.charts([row for c in columns for row in c.steps], [row for c in columns for row in c.evaluations])
    out = []
    for title, chosen in known.items():
        drawn = []
        for chart in chosen:
            for legend, name in chart.lines.items():
                if name == "parity/limit":
                    continue  # a setting, not a course
                heading = chart.title if len(chart.lines) == 1 else f"{chart.title}: {legend}"
                if made := overlay(columns, charts.Chart(heading, {legend: name}, log=chart.log), name):
                    drawn.append(made)
        out.append(grid(title, drawn))
    return "".join(out)


def overlay(columns: Sequence[Column], chart: charts.Chart, name: str) -> Drawing | None:
    """The curves of one metric; None where no run has it."""
    lines = []
    for i, column in enumerate(columns):
        binned = charts.bins([row for row in column.rows if name in row])
        line = charts.series(binned, chart, 0, column.name, name) if binned else None
        if line:
            lines.append(line._replace(low=(), high=(), colour=i))
    return Drawing(chart.title, lines, chart.log) if lines else None


def description(columns: Sequence[Column]) -> str:
    """What the health rules said about each run: when, and the last text."""
    lines = []
    for column in columns:
        for name, said in charts.described(column.rows, algorithm_of(column.config)).items():
            at = where(charts.spans([step for step, _ in said]))
            lines.append([column.name, name.replace("_", " "), at, said[-1][1]])
    return table(["run", "rule", "when", "what"], lines) if lines else "<p>Nothing to report about any of them.</p>"
