"""The report of one run: key numbers, health messages, evaluations, curves, memory and completions."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from rlft.config import secrets
from rlft.errors import ConfigError
from rlft.monitor import health
from rlft.report import charts
from rlft.report.completions import evenly_spaced, held_out_completions, samples
from rlft.report.curves import Drawing, Mark, figure
from rlft.report.markup import document, navigation, number, section, table, text, tiles
from rlft.runs.disk import reason, remedy, replace_file
from rlft.runs.folder import Run
from rlft.runs.formats import change, duration, evaluation_names, with_error
from rlft.runs.tables import Unreadable

MOST_EVALUATIONS = 6
"""Largest number of columns in the evaluation table."""
SECTIONS = (
    "Damaged files",
    "Health",
    "Evaluation",
    "Curves",
    "Memory",
    "Held-out completions",
    "Completions",
    "Config",
)
Rows = Sequence[Mapping[str, Any]]


def write(folder: Path, out: Path | None = None) -> Path:
    """Write report.html to the run folder (or to `out`) from its current data, and return the path.

    Raises ConfigError when the folder has no run.
    """
    run = Run.resume(folder)
    return write_page(page(run), out or run.report)


def write_page(source: str, path: Path) -> Path:
    """Write a page atomically and return its path. Raises ConfigError when it cannot be written."""
    try:
        replace_file(path, source.encode())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {reason(error)}; {remedy(error)}, then run rlft report"
        ) from error
    return path


def page(run: Run, version: str = "") -> str:
    """Return the HTML of the page. Files that cannot be read are named in it. version: of a page that is served."""
    rows = run.metrics()
    steps, evaluations = parts_of(rows)
    config = config_of(run)
    messages = charts.health_messages(rows, algorithm_of(config))
    toml = tomli_w.dumps(config)
    damaged: list[str] = []
    try:
        plan = run.plan()
    except Unreadable as error:
        plan = {}
        damaged.append(str(error))
    held_out, completions = held_out_completions(run, damaged), samples(run, damaged)
    body = "\n".join(
        [
            section("Damaged files", "".join(f"<p>{text(fault)}</p>" for fault in damaged)),
            section("Health", health_list(messages, steps)),
            section("Evaluation", evaluation_table(evaluations)),
            section("Curves", curves(rows, charts.marks(messages, len(steps)))),
            section("Memory", memory(plan, steps)),
            section("Held-out completions", held_out, "The first held-out rows at the first and the last evaluation."),
            section("Completions", completions),
            section(
                "Config",
                origin(run)
                + (f"<details><summary>config.toml</summary><pre>{text(toml)}</pre></details>" if toml else ""),
            ),
        ]
    )
    top = header(run, config, steps, evaluations, navigation(SECTIONS, body))
    return document(run.path.resolve().name, f"{top}\n{body}", version)


def parts_of(rows: Rows) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Split the metrics rows into steps and evaluations."""
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    return [row for row in rows if any(name != "step" and not name.startswith("eval/") for name in row)], evaluations


def config_of(run: Run) -> dict[str, Any]:
    """Return the run's settings, secrets masked; empty without a readable config.toml.

    What is no section where a config has one, and no number of steps, is left out.
    """
    try:
        config = tomllib.loads(run.config.read_text(encoding="utf-8")) if run.config.exists() else {}
    except (ValueError, RecursionError):  # tomllib's errors, and text that is not UTF-8
        return {}
    wanted = {"algo": dict, "sampling": dict, "steps": int, "prompts_per_step": int}
    return secrets.masked(
        {name: value for name, value in config.items() if type(value) is wanted.get(name, type(value))}
    )


def origin(run: Run) -> str:
    """Return where the newest adapter is, how to sample from it, and which versions saved it; "" without one."""
    if not run.has_checkpoint():
        return ""
    path = run.latest_checkpoint()
    try:
        versions = json.loads((path / "state.json").read_text(encoding="utf-8"))["versions"]
        saved = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):  # damaged, or not ours
        saved = "unknown versions"
    command = shlex.join(["rlft", "generate", str(run.path), "your prompt"])
    return f"<p>Adapter: <code>{text(path)}</code>, saved with {text(saved)}. <code>{text(command)}</code></p>"


def algorithm_of(config: Mapping[str, Any]) -> str:
    """Return `algo.name`, or "" if not set."""
    return str((config.get("algo") or {}).get("name", ""))


# ---- numbers ----


def header(run: Run, config: Mapping[str, Any], steps: Rows, evaluations: Rows, links: str) -> str:
    """Return the header: name, model, and tiles with the key numbers."""
    sampling = config.get("sampling", {})
    about = [config.get("model"), algorithm_of(config)]
    mismatches = health.finite(steps, health.MISMATCH)
    if "prompts_per_step" in config and "group_size" in sampling:
        group = f" x {sampling['group_size']} completions" if mismatches or not steps else ""
        about.append(f"{config['prompts_per_step']} prompts{group} per step")
    cards = [("steps", f"{len(steps):,}", f"of {config['steps']:,}" if config.get("steps") else "")]
    if values := health.finite(evaluations, "eval/reward"):
        cards.append(
            ("held-out reward", first_and_last(values), f"{number(evaluations[-1].get('eval/rows'), '.0f')} rows")
        )
    name, metric = ("training reward", "reward") if mismatches else ("loss", "loss")  # a recorded reward never changes
    if values := health.finite(steps, metric):
        cards.append((name, first_and_last(values), "first and last step" if len(values) > 1 else "first step"))
    if mismatches:
        cards.append(("mismatch", f"{max(mismatches):.1e}", "nat per token, worst step"))
    if values := health.finite(steps, "step_time"):
        cards.append(("time in steps", duration(sum(values)), f"{sum(values) / len(values):.3g} s each"))
    if values := health.finite(steps, "num_tokens"):
        cards.append(("tokens", f"{values[-1]:,.0f}", "prompts and completions"))
    line = " · ".join(text(part) for part in about if part)
    return f"<header><h1>{text(run.path.resolve().name)}</h1><p>{line}</p>{links}{tiles(cards)}</header>"


def first_and_last(values: Sequence[float]) -> str:
    """Format the first and the last value."""
    return f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def evaluation_table(evaluations: Rows) -> str:
    """Return a table with a line per eval/* metric, a column per evaluation, and the change from first to last.

    The change is the one measured by the run, paired by row and with its interval, where available.
    """
    if not evaluations:
        return ""
    selected = [evaluations[i] for i in evenly_spaced(range(len(evaluations)), MOST_EVALUATIONS)]
    lines = []
    for name in evaluation_names(selected):
        cells = [with_error(row, name, interval=True) for row in selected]
        if len(selected) > 1:
            cells.append(change(selected[0], selected[-1], name, interval=True))
        lines.append([name.removeprefix("eval/"), *cells])
    head = ["", *(f"after step {row['step']}" for row in selected), *(["change"] if len(selected) > 1 else [])]
    return table(head, lines, "evaluations" if len(selected) > 1 else "")


# ---- health ----


def health_list(messages: Mapping[str, Sequence[tuple[int, str]]], steps: Rows) -> str:
    """List each rule with messages: its steps, a timeline, and its last message."""
    if not steps:
        return ""
    if not messages:
        return f"<p>Nothing to report: {len(health.RULES)} rules looked at every step.</p>"
    first, last = int(steps[0]["step"]), int(steps[-1]["step"])
    items = []
    for name, entries in messages.items():
        step_numbers = [step for step, _ in entries]
        strip = timeline(
            [
                Mark(start, end, step_ranges([(start, end)]))
                for start, end in charts.spans(step_numbers, max(1, len(steps) // 150))
            ],
            first,
            last,
        )
        items.append(
            f"<li><b>{text(name.replace('_', ' '))}</b> <span>{text(step_ranges(charts.spans(step_numbers)))}</span>"
            f"<p>{text(entries[-1][1])}</p>{strip}</li>"
        )
    return f'<ul class="health">{"".join(items)}</ul>'


def step_ranges(spans: Sequence[tuple[int, int]]) -> str:
    """Format spans of steps: [(1, 3), (7, 7)] -> "steps 1-3, 7"; long lists are truncated."""
    listing = ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in spans[:6])
    more = f" and {len(spans) - 6} more times" if len(spans) > 6 else ""
    return f"step{'s' if len(spans) > 1 or spans[0][0] != spans[0][1] else ''} {listing}{more}"


def timeline(entries: Sequence[Mark], first: int, last: int) -> str:
    """Draw the marks on a timeline from the first to the last step."""
    scale = 1000 / (last - first + 1)
    bars = "".join(
        f'<rect x="{(entry.first - first) * scale:.1f}" '
        f'width="{max((entry.last - entry.first + 1) * scale, 4):.1f}" height="6">'
        f"<title>{text(entry.text)}</title></rect>"
        for entry in entries
    )
    return f'<svg class="timeline" viewBox="0 0 1000 6" preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'


# ---- curves and memory ----


def curves(rows: Rows, marks: Mapping[str, Sequence[Mark]]) -> str:
    """Return all charts with data under their headings, and all other metrics collapsed at the end."""
    steps, evaluations = parts_of(rows)
    by_heading = charts.charts(steps, evaluations)
    out = [grid(title, charts.drawings(rows, selected, marks)) for title, selected in by_heading.items()]
    rest = charts.drawings(
        rows, charts.other_charts(rows, [chart for selected in by_heading.values() for chart in selected]), marks
    )
    if rest:
        out.append(f"<details><summary>{len(rest)} more metrics</summary>{grid('', rest)}</details>")
    return smoothing(steps) + "".join(out)


def smoothing(steps: Rows) -> str:
    """Return the switch for running medians, for runs long enough to have them."""
    if len(steps) < charts.SMOOTH_FROM:
        return ""
    return '<p class="shades"><label><input type="checkbox" name="smooth" checked>running medians</label></p>'


def grid(title: str, figures: Sequence[Drawing]) -> str:
    """Return a grid of figures, or nothing without any."""
    heading = f"<h3>{text(title)}</h3>" if title else ""
    return f'{heading}<div class="grid">{"".join(map(figure, figures))}</div>' if figures else ""


def memory(plan: Mapping[str, int], steps: Rows) -> str:
    """Return bars of the memory that training keeps from step to step, and of the peak."""
    if not plan:
        return ""
    peaks = [peak * 2**30 for peak in health.finite(steps, "perf/peak_GiB")]
    lines = {**plan, "together": sum(plan.values())} | ({"peak of the run": max(peaks)} if peaks else {})
    most = max(*lines.values(), 1)
    body = "".join(
        f'<tr><th>{text(name)}</th><td>{size(value)}</td><td class="bar"><svg viewBox="0 0 1000 10" '
        f'preserveAspectRatio="none" aria-hidden="true"><rect width="{1000 * value / most:.1f}" height="10"/></svg>'
        f"</td></tr>"
        for name, value in lines.items()
    )
    note = (
        "<p>Kept from step to step; activations, the engine's cache and the libraries are what the peak has on top.</p>"
    )
    return f'{note}<div class="wide"><table class="numbers memory">{body}</table></div>'


def size(count: float) -> str:
    """Format bytes, such as "269 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
