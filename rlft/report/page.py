"""The page of one run: its numbers, what its health rules said and when, its curves, memory and completions."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlft.errors import ConfigError
from rlft.monitor import health
from rlft.report import charts
from rlft.report.completions import held_out, samples, spread_out
from rlft.report.curves import Drawing, Mark, figure
from rlft.report.markup import document, navigation, number, section, table, text, tiles
from rlft.runs.folder import Run, reason

MOST_EVALUATIONS = 6
"""Columns of the evaluation table."""
SECTIONS = ("Health", "Evaluation", "Curves", "Memory", "Held-out completions", "Completions", "Config")
Rows = Sequence[Mapping[str, Any]]


def write(folder: Path, out: Path | None = None) -> Path:
    """Write report.html into the run folder (or to `out`) from what is in it so far; returns its path.

    Raises ConfigError when the folder holds no run.
    """
    run = Run.resume(folder)
    return write_page(page(run), out or run.path / "report.html")


def write_page(source: str, path: Path) -> Path:
    """Write a page whole or not at all; returns its path. Raises ConfigError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(source, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {reason(error)}; make room or make it writable, then run rlft report"
        ) from error
    return path


def page(run: Run) -> str:
    """The whole page as text."""
    rows = run.metrics()
    steps, evaluations = parts_of(rows)
    config = config_of(run)
    told = charts.described(rows, algorithm_of(config))
    toml = run.config.read_text(encoding="utf-8") if run.config.exists() else ""
    body = "\n".join(
        [
            section("Health", health_list(told, steps)),
            section("Evaluation", evaluation_table(evaluations)),
            section("Curves", curves(rows, charts.marks(told, len(steps)))),
            section("Memory", memory(run.plan(), steps)),
            section(
                "Held-out completions", held_out(run), "The first held-out rows at the first and the last evaluation."
            ),
            section("Completions", samples(run)),
            section(
                "Config", f"<details><summary>config.toml</summary><pre>{text(toml)}</pre></details>" if toml else ""
            ),
        ]
    )
    return document(
        run.path.resolve().name, header(run, config, steps, evaluations, navigation(SECTIONS, body)) + "\n" + body
    )


def parts_of(rows: Rows) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The rows of steps and those of evaluations."""
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    return [row for row in rows if any(k != "step" and not k.startswith("eval/") for k in row)], evaluations


def config_of(run: Run) -> dict[str, Any]:
    """The run's settings; empty where there is no readable config.toml."""
    try:
        return tomllib.loads(run.config.read_text(encoding="utf-8")) if run.config.exists() else {}
    except tomllib.TOMLDecodeError:
        return {}


def algorithm_of(config: Mapping[str, Any]) -> str:
    """`algo.name`, "" where it is not said."""
    return str((config.get("algo") or {}).get("name", ""))


# ---- numbers ----


def header(run: Run, config: Mapping[str, Any], steps: Rows, evaluations: Rows, links: str) -> str:
    """Name, model, and tiles with the numbers that matter most."""
    sampling = config.get("sampling", {})
    about = [config.get("model"), algorithm_of(config)]
    sampled = health.finite(steps, health.MISMATCH)
    if "prompts_per_step" in config and "group_size" in sampling:
        group = f" x {sampling['group_size']} completions" if sampled or not steps else ""
        about.append(f"{config['prompts_per_step']} prompts{group} per step")
    cards = [("steps", f"{len(steps):,}", f"of {config['steps']:,}" if config.get("steps") else "")]
    if found := health.finite(evaluations, "eval/reward"):
        cards.append(("held-out reward", ends(found), f"{number(evaluations[-1].get('eval/rows'), '.0f')} rows"))
    name, of = ("training reward", "reward") if sampled else ("loss", "loss")  # a recorded reward never changes
    if found := health.finite(steps, of):
        cards.append((name, ends(found), "first and last step" if len(found) > 1 else "first step"))
    if sampled:
        cards.append(("mismatch", f"{max(sampled):.1e}", "nat per token, worst step"))
    if found := health.finite(steps, "step_time"):
        cards.append(("time in steps", duration(sum(found)), f"{sum(found) / len(found):.3g} s each"))
    if found := health.finite(steps, "num_tokens"):
        cards.append(("tokens", f"{found[-1]:,.0f}", "prompts and completions"))
    line = " · ".join(text(part) for part in about if part)
    return f"<header><h1>{text(run.path.resolve().name)}</h1><p>{line}</p>{links}{tiles(cards)}</header>"


def ends(values: Sequence[float]) -> str:
    """The first and the last value."""
    return f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def duration(seconds: float) -> str:
    """18 -> "18 s", 600 -> "10.0 min", 7200 -> "2.0 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def with_error(row: Mapping[str, Any], name: str, form: str = ".3f") -> str:
    """A metric with its interval or standard error where there is one; "-" where it was not measured. form: of the
    metric and the ends of its interval."""
    low, high, error = (row.get(name + ending) for ending in ("_low", "_high", "_stderr"))
    if low is not None and high is not None:
        return f"{number(row.get(name), form)}\n{low:{form}} to {high:{form}}"
    return f"{number(row.get(name), form)} ± {error:.3f}" if error is not None else number(row.get(name))


def evaluation_names(evaluations: Rows) -> list[str]:
    """The eval/* metrics that get a line of their own, the most asked for first."""
    names = {n for row in evaluations for n in row if n.startswith("eval/")}
    names = {n for n in names if not n.endswith((*charts.ERRORS, "/std", "/seconds", "/invalid"))}
    if any(row.get("eval/invalid") for row in evaluations):
        names.add("eval/invalid")
    first = ("eval/reward", "eval/loss", "eval/avg@", "eval/pass@", "eval/rewards/")

    def place(name: str) -> tuple[int, int, str]:
        return next((i for i, f in enumerate(first) if name.startswith(f)), len(first)), len(name), name

    return sorted(names, key=place)


def evaluation_table(evaluations: Rows) -> str:
    """A line per eval/* metric, a column per evaluation, and the change from the first to the last: as the run measured
    it, row by row and with its own interval, where it did."""
    if not evaluations:
        return ""
    shown = [evaluations[i] for i in spread_out(range(len(evaluations)), MOST_EVALUATIONS)]
    lines = []
    for name in evaluation_names(shown):
        first, last = shown[0].get(name), shown[-1].get(name)
        change = f"{last - first:+.3g}" if first is not None and last is not None else "-"
        if f"{name}_change" in shown[-1]:
            change = with_error(shown[-1], f"{name}_change", "+.3f")
        cells = [with_error(row, name) for row in shown]
        lines.append([name.removeprefix("eval/"), *cells, *([change] if len(shown) > 1 else [])])
    head = ["", *(f"after step {row['step']}" for row in shown), *(["change"] if len(shown) > 1 else [])]
    return table(head, lines)


# ---- health ----


def health_list(told: Mapping[str, Sequence[tuple[int, str]]], steps: Rows) -> str:
    """Each rule that spoke: at which steps, on a line of time, and what it said last."""
    if not steps:
        return ""
    if not told:
        return f"<p>Nothing to report: {len(health.RULES)} rules looked at every step.</p>"
    first, last = int(steps[0]["step"]), int(steps[-1]["step"])
    items = []
    for name, said in told.items():
        at = [step for step, _ in said]
        strip = timeline(
            [Mark(a, b, where([(a, b)])) for a, b in charts.spans(at, max(1, len(steps) // 150))], first, last
        )
        items.append(
            f"<li><b>{text(name.replace('_', ' '))}</b> <span>{text(where(charts.spans(at)))}</span>"
            f"<p>{text(said[-1][1])}</p>{strip}</li>"
        )
    return f'<ul class="health">{"".join(items)}</ul>'


def where(found: Sequence[tuple[int, int]]) -> str:
    """[(1, 3), (7, 7)] -> "steps 1-3, 7"; long lists are cut."""
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found[:6])
    more = f" and {len(found) - 6} more times" if len(found) > 6 else ""
    return f"step{'s' if len(found) > 1 or found[0][0] != found[0][1] else ''} {shown}{more}"


def timeline(found: Sequence[Mark], first: int, last: int) -> str:
    """When something was said, from the first to the last step."""
    scale = 1000 / (last - first + 1)
    bars = "".join(
        f'<rect x="{(m.first - first) * scale:.1f}" width="{max((m.last - m.first + 1) * scale, 4):.1f}" height="6">'
        f"<title>{text(m.text)}</title></rect>"
        for m in found
    )
    return f'<svg class="timeline" viewBox="0 0 1000 6" preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'


# ---- curves and memory ----


def curves(rows: Rows, said: Mapping[str, Sequence[Mark]]) -> str:
    """Every chart with data, under its heading; what no chart names folded away at the end."""
    steps, evaluations = parts_of(rows)
    known = charts.charts(steps, evaluations)
    out = [grid(title, charts.drawings(rows, chosen, said)) for title, chosen in known.items()]
    rest = charts.drawings(rows, charts.others(rows, [c for chosen in known.values() for c in chosen]), said)
    if rest:
        out.append(f"<details><summary>{len(rest)} more metrics</summary>{grid('', rest)}</details>")
    return "".join(out)


def grid(title: str, drawn: Sequence[Drawing]) -> str:
    """Figures side by side; nothing without one."""
    heading = f"<h3>{text(title)}</h3>" if title else ""
    return f'{heading}<div class="grid">{"".join(map(figure, drawn))}</div>' if drawn else ""


def memory(plan: Mapping[str, int], steps: Rows) -> str:
    """What the training keeps from step to step, as bars, and the peak."""
    if not plan:
        return ""
    peaks = [p * 2**30 for p in health.finite(steps, "perf/peak_GiB")]
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
    """Bytes -> "269 MiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
