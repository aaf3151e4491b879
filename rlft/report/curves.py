"""Curves as SVG: axes, lines, bands, stacks, and marks on the time axis.

Drawn here and not by a library, so that the page needs none. Colours are classes: the page's style has them for light
and dark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlft.report.markup import number, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 190, 48, 10, 14, 24
"""Of a chart and its margins, in SVG units."""
COLOURS = 8
"""Series colours in report.css."""
Values = Sequence[float | None]
Axis = Callable[[float], float]


class Line(NamedTuple):
    """One series over steps. Missing values are None."""

    legend: str
    steps: Sequence[int]
    values: Values
    newest: float | None = None
    """What the legend shows until the cursor is somewhere."""
    low: Values = ()
    """Lower edge of a band, as long as `values`; () for none."""
    high: Values = ()
    smooth: Values = ()
    """Running median, drawn over the thin line of `values`; () for none."""
    colour: int = 0


class Mark(NamedTuple):
    """Something that was said about steps `first` to `last`."""

    first: int
    last: int
    text: str


class Drawing(NamedTuple):
    """One card with curves."""

    title: str
    lines: Sequence[Line]
    log: bool = False
    stacked: bool = False
    """Areas on top of each other instead of lines; every line has the same steps."""
    marks: Sequence[Mark] = ()
    note: str = ""
    """How to read it, in a sentence."""
    every: int = 1
    """Steps behind each point."""


def figure(drawing: Drawing) -> str:
    """A card: title, legend with the newest values, SVG, and the data that the script reads."""
    steps: list[Sequence[int]] = []
    for line in drawing.lines:
        if line.steps not in steps:
            steps.append(line.steps)
    lines = [[steps.index(line.steps), [short(v) for v in line.values]] for line in drawing.lines]
    data = json.dumps(
        {"steps": [list(s) for s in steps], "lines": lines, "every": drawing.every}, separators=(",", ":")
    )
    legends = "".join(
        f'<span><i class="c{line.colour % COLOURS}"></i>{text(line.legend)} <b>{number(line.newest)}</b></span>'
        for line in drawing.lines
    )
    note = f'<p class="note">{text(drawing.note)}</p>' if drawing.note else ""
    caption = f'<figcaption><h4>{text(drawing.title)}</h4><output></output><p class="legend">{legends}</p></figcaption>'
    return f'<figure data-curves="{text(data)}">{caption}{svg(drawing)}{note}</figure>'


def short(value: float | None) -> float | None:
    """Six digits: what a cursor can show, at half the bytes."""
    return None if value is None else float(f"{value:.6g}")


def svg(drawing: Drawing) -> str:
    """The drawing: grid, axis labels, marks, then areas or bands and lines."""
    start = min(line.steps[0] for line in drawing.lines)
    end = max(line.steps[-1] for line in drawing.lines)
    first, last = start - 0.5, end + 0.5
    low, high = limits(drawing)
    ticks = log_ticks(low, high) if drawing.log else nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        up = (value - low) / (high - low)
        if drawing.log:
            up = math.log10(max(value, low) / low) / math.log10(high / low)
        return round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    out = [
        f'<line class="tick" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t)}" y2="{y(t)}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 4}" text-anchor="end">{tick(t)}</text>'
        for t in ticks
    ]
    whole = sorted({round(t) for t in nice_ticks(start, end) if first <= t <= last})
    out += [
        f'<text x="{min(x(t), WIDTH - 1 - 3.3 * len(tick(t)))}" y="{HEIGHT - 8}" text-anchor="middle">{tick(t)}</text>'
        for t in whole
    ]
    if drawing.stacked:
        out += stack(drawing.lines, x, y)
    else:
        out += [part for line in drawing.lines for part in band(line, x, y)]
        out += [part for line in drawing.lines for part in curve(line, x, y, drawing.log)]
    out += [mark(m, x) for m in drawing.marks]
    cursor = f'<line class="cursor" x1="-9" x2="-9" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    name = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(drawing.title)}"'
    span = f'data-first="{first}" data-last="{last}" data-left="{LEFT / WIDTH}" data-right="{1 - RIGHT / WIDTH}"'
    return f"<svg {name} {span}>{''.join(out)}{cursor}</svg>"


def limits(drawing: Drawing) -> tuple[float, float]:
    """Lowest and highest value to show, never equal."""
    if drawing.stacked:
        return 0.0, max(
            sum(v or 0.0 for v in at) for at in zip(*(line.values for line in drawing.lines), strict=True)
        ) or 1.0
    values = [
        v
        for line in drawing.lines
        for part in (line.values, line.low, line.high)
        for v in part
        if v is not None and (v > 0 or not drawing.log)
    ]
    low, high = min(values), max(values)
    if drawing.log:
        return low, max(high, low * 10)
    # A length or a share is read against 0; a loss around 0.002 is not.
    low = 0.0 if 0 < low < 0.6 * high else low
    if low == high == 0:
        return 0.0, 1.0  # a share or a count that stays at 0
    return (low, high) if high > low else (low - 0.5 * abs(low), high + 0.5 * abs(high))


def runs_of(points: Sequence[tuple[float, ...] | None]) -> list[list[tuple[float, ...]]]:
    """The points in pieces without a gap."""
    pieces: list[list[tuple[float, ...]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [piece for piece in pieces if piece]


def curve(line: Line, x: Axis, y: Axis, log: bool) -> list[str]:
    """A polyline, broken where a value is missing, with dots when there are few; thin under its running median."""
    colour = line.colour % COLOURS

    def points(values: Values) -> list[tuple[float, ...] | None]:
        return [
            (x(s), y(v)) if v is not None and (v > 0 or not log) else None
            for s, v in zip(line.steps, values, strict=True)
        ]

    pieces = runs_of(points(line.values))
    thin = " thin" if line.smooth else ""
    out = [polyline(piece, f"l{colour}{thin}") for piece in pieces if len(piece) > 1]
    # A value between two gaps would be invisible as a line.
    dots = [p for piece in pieces if len(line.values) <= 30 or len(piece) == 1 for p in piece]
    out += [f'<circle class="c{colour}" cx="{a}" cy="{b}" r="2.5"/>' for a, b in dots]
    return out + [polyline(piece, f"l{colour}") for piece in runs_of(points(line.smooth or [None] * len(line.steps)))]


def polyline(piece: Sequence[tuple[float, ...]], kind: str) -> str:
    """A line through points."""
    return f'<polyline class="{kind}" points="{" ".join(f"{a},{b}" for a, b in piece)}"/>'


def band(line: Line, x: Axis, y: Axis) -> list[str]:
    """The area between `low` and `high`, in pieces where they are missing."""
    edges = zip(line.steps, line.low, line.high, strict=False)
    pieces = runs_of([None if a is None or b is None else (x(s), y(a), y(b)) for s, a, b in edges])
    return [
        area([(p[0], p[1], p[2]) for p in piece], f"band c{line.colour % COLOURS}")
        for piece in pieces
        if len(piece) > 1
    ]


def area(edge: Sequence[tuple[float, float, float]], kind: str) -> str:
    """A polygon from points (x, lower y, upper y)."""
    corners = [(x, low) for x, low, _ in edge] + [(x, high) for x, _, high in reversed(edge)]
    return f'<polygon class="{kind}" points="{" ".join(f"{a},{b}" for a, b in corners)}"/>'


def stack(lines: Sequence[Line], x: Axis, y: Axis) -> list[str]:
    """The series on top of each other: a bar per step, or areas where bars would be too thin to see."""
    steps, below = lines[0].steps, [0.0] * len(lines[0].steps)
    width = 0.8 * (x(1) - x(0))
    out = []
    for line in lines:
        above = [b + (v or 0.0) for b, v in zip(below, line.values, strict=True)]
        colour = f"c{line.colour % COLOURS}"
        if len(steps) > 60:
            out.append(area([(x(s), y(b), y(a)) for s, b, a in zip(steps, below, above, strict=True)], colour))
        else:
            out += [
                f'<rect class="{colour}" x="{x(s) - width / 2:.1f}" y="{y(a)}" width="{width:.1f}" '
                f'height="{y(b) - y(a):.1f}"/>'
                for s, b, a in zip(steps, below, above, strict=True)
                if a > b
            ]
        below = above
    return out


def mark(m: Mark, x: Axis) -> str:
    """A bar above the plot and a faint column through it, with its text on hover."""
    left, right = x(m.first - 0.5), x(m.last + 0.5)
    middle = (left + right) / 2
    width = max(right - left, 1.0)
    place = f'x="{middle - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
    column = f'<rect class="column" {place}/>'
    # Wide enough to be found by a finger.
    flag = max(width, 7.0)
    flag = f'<rect class="flag" x="{middle - flag / 2:.1f}" y="{TOP - 9}" width="{flag:.1f}" height="7" rx="2"/>'
    return f'<g class="mark"><title>{text(m.text)}</title>{column}{flag}</g>'


def tick(value: float) -> str:
    """The label of a tick, at most six characters: there is no room for more."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
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
