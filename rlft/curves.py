"""The curves of the report as SVG: which charts there are, and how axes, lines, bands and bars are drawn.

Drawn here and not by a library, so that the page needs none. Colours are classes: the page's style has them for light
and dark.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlft import health

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 180, 48, 8, 8, 24
"""Of a chart and its margins, in SVG units."""
MOST_POINTS = 1000
"""Steps in a curve: a longer run is drawn at every second, third, ... step."""
PHASES = ("generate", "reward", "train", "sync", "idle")
Rows = Sequence[Mapping[str, Any]]
Axis = Callable[[float], float]


class Chart(NamedTuple):
    """One card with curves."""

    title: str
    lines: Mapping[str, str]
    """Legend -> metric."""
    spread: str = ""
    """Metric drawn as a band of plus and minus its value around the first line."""
    log: bool = False
    stacked: bool = False
    """Bars on top of each other instead of lines."""


def text(value: object) -> str:
    """Escaped for HTML, in element or attribute; control characters made visible."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return html.escape(shown)


def number(value: Any, form: str = ".4g") -> str:
    """A number as shown, "-" for null, nan and what was not logged."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def charts(steps: Rows) -> list[Chart]:
    """The charts of a run; those without data are left out by `drawable`."""
    names = {name for row in steps for name in row}
    means = sorted(n for n in names if n.startswith("rewards/") and n.endswith("/mean"))
    parts = {n.removeprefix("rewards/").removesuffix("/mean"): n for n in means}
    return [
        Chart("Reward", {"mean": "reward"}, spread="reward_std"),
        Chart("Reward by function", parts if len(parts) > 1 else {}),
        Chart("Completion length, tokens", {"mean": "completions/mean_length", "longest": "completions/max_length"}),
        Chart("Shares", {
            "cut at max_tokens": "completions/clipped_ratio", "equal groups": "frac_reward_zero_std",
            "invalid": "frac_reward_invalid",
        }),
        Chart("Entropy, nat", {"mean": "entropy"}),
        Chart("Loss", {"loss": "loss"}),
        Chart("Gradient norm", {"before clipping": "grad_norm"}),
        Chart("Engine against trainer, nat per token", {
            "mean": health.MISMATCH, "99th percentile": "mismatch/p99", "limit of the mean": "parity/limit",
        }, log=True),
        Chart("Seconds per step", {phase: f"time/{phase}" for phase in PHASES}, stacked=True),
        Chart("Tokens per second", {"sampling": "perf/rollout_tokens_per_s", "training": "perf/training_tokens_per_s"}),
        Chart("KL to the reference", {"k1": "kl"}),
    ]  # fmt: skip


def drawable(steps: Rows, chart: Chart) -> bool:
    """True when there is a number to draw (a positive one on a log axis)."""
    return any(v > 0 or not chart.log for name in chart.lines.values() for v in health.finite(steps, name))


def figure(steps: Rows, chart: Chart) -> str:
    """A chart as a figure: title, legend with the newest values, SVG, and the data that the script reads."""
    # Counted from the end: the newest step is always in.
    rows = steps[:: -math.ceil(len(steps) / MOST_POINTS)][::-1]
    lines = {legend: name for legend, name in chart.lines.items() if health.finite(rows, name)}
    data = {"steps": [row["step"] for row in rows], "lines": [[row.get(n) for row in rows] for n in lines.values()]}
    legends = "".join(
        f'<span><i class="c{i}"></i>{text(legend)} <b>{number(rows[-1].get(name))}</b></span>'
        for i, (legend, name) in enumerate(lines.items())
    )
    caption = f"<figcaption><h3>{text(chart.title)}</h3><p>{legends}</p></figcaption>"
    return f'<figure data-curves="{text(json.dumps(data))}">{caption}{svg(rows, chart, list(lines.values()))}</figure>'


def svg(rows: Rows, chart: Chart, names: Sequence[str]) -> str:
    """The drawing: grid, axis labels, then a band, bars or lines."""
    first, last = rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5
    low, high = limits(rows, chart, names)
    ticks = log_ticks(low, high) if chart.log else nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        up = math.log10(value / low) / math.log10(high / low) if chart.log else (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    out = [
        f'<line class="tick" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t)}" y2="{y(t)}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 4}" text-anchor="end">{tick(t)}</text>'
        for t in ticks
    ]
    marks = sorted({round(t) for t in nice_ticks(rows[0]["step"], rows[-1]["step"]) if first <= t <= last})
    out += [f'<text x="{x(t)}" y="{HEIGHT - 8}" text-anchor="middle">{t}</text>' for t in marks]
    if chart.stacked:
        out += bars(rows, names, x, y, 0.8 * (x(first + 1) - x(first)))
    else:
        if chart.spread:
            pair = [(r["step"], r.get(names[0]), r.get(chart.spread)) for r in rows]
            whole = [(s, v, d) for s, v, d in pair if v is not None and d is not None]
            edge = [(x(s), y(v + d)) for s, v, d in whole] + [(x(s), y(v - d)) for s, v, d in reversed(whole)]
            out.append(f'<polygon class="band" points="{" ".join(f"{a},{b}" for a, b in edge)}"/>')
        for i, name in enumerate(names):
            points = [(r["step"], r.get(name)) for r in rows]
            out += line([(x(s), y(v)) if v is not None and (v > 0 or not chart.log) else None for s, v in points], i)
    span = f'data-first="{first}" data-last="{last}"'
    cursor = f'<line class="cursor" x1="-9" x2="-9" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    name = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(chart.title)}"'
    return f"<svg {name} {span}>{''.join(out)}{cursor}</svg>"


def limits(rows: Rows, chart: Chart, names: Sequence[str]) -> tuple[float, float]:
    """Lowest and highest value to show, never equal."""
    if chart.stacked:
        return 0.0, max(
            sum(health.finite([row], n)[0] for n in names if health.finite([row], n)) for row in rows
        ) or 1.0
    values = [v for n in names for v in health.finite(rows, n) if v > 0 or not chart.log]
    if chart.spread:
        both = [(r.get(names[0]), r.get(chart.spread)) for r in rows]
        values += [v + sign * d for v, d in both if v is not None and d is not None for sign in (-1, 1)]
    low, high = min(values), max(values)
    if chart.log:
        return low, max(high, low * 10)
    # A length or a share is read against 0; a loss around 0.002 is not.
    low = 0.0 if 0 < low < 0.6 * high else low
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def line(points: Sequence[tuple[float, float] | None], i: int) -> list[str]:
    """A polyline of series i, broken where a value is missing, with dots when there are few."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    out = [
        f'<polyline class="l{i}" points="{" ".join(f"{a},{b}" for a, b in piece)}"/>'
        for piece in pieces
        if len(piece) > 1
    ]
    # A value between two gaps would be invisible as a line.
    dots = [p for piece in pieces if len(points) <= 30 or len(piece) == 1 for p in piece]
    return out + [f'<circle class="c{i}" cx="{a}" cy="{b}" r="2.5"/>' for a, b in dots]


def bars(rows: Rows, names: Sequence[str], x: Axis, y: Axis, width: float) -> list[str]:
    """A bar per step, its series on top of each other. x, y: value -> SVG units."""
    out = []
    for row in rows:
        below = 0.0
        for i, name in enumerate(names):
            for value in health.finite([row], name):
                top, bottom = y(below + value), y(below)
                place = (
                    f'x="{x(row["step"]) - width / 2:.1f}" y="{top}" width="{width:.1f}" height="{bottom - top:.1f}"'
                )
                out.append(f'<rect class="c{i}" {place}/>')
                below += value
    return out


def tick(value: float) -> str:
    """The label of a tick."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that cover [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    start = math.floor(low / size + 1e-9)
    return [round(i * size, 12) for i in range(start, math.ceil(high / size - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high], at most seven."""
    start, end = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = max(1, math.ceil((end - start) / 6))
    return [10.0**i for i in range(start, end + every, every)]
