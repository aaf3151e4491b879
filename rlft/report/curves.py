"""Draw curves as SVG: axes, lines, bands, stacks, and marks on the time axis.

Generated without a library, so that the page needs none. Colours are CSS classes, defined in the page's style for light
and dark mode.

Legend: x and y map a step and a value to SVG coordinates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlft.report.markup import number, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 190, 48, 10, 14, 24
"""Size of a chart and its margins, in SVG units."""
COLOURS = 8
"""Number of series colours in report.css."""
Values = Sequence[float | None]
Axis = Callable[[float], float]


class Line(NamedTuple):
    """One series over steps, with None for missing values."""

    legend: str
    steps: Sequence[int]
    values: Values
    newest: float | None = None
    """Value in the legend while there is no cursor."""
    low: Values = ()
    """Lower edge of a band, as long as `values`; () for none."""
    high: Values = ()
    smooth: Values = ()
    """Running median, drawn over the thin line of `values`; () for none."""
    colour: int = 0
    dashed: bool = False
    """For a line that lies on another one, which stays visible between the dashes."""


class Mark(NamedTuple):
    """A health message about steps `first` to `last`."""

    first: int
    last: int
    text: str


class Drawing(NamedTuple):
    """A chart to draw."""

    title: str
    lines: Sequence[Line]
    log: bool = False
    stacked: bool = False
    """Stacked areas instead of lines; all lines have the same steps."""
    marks: Sequence[Mark] = ()
    note: str = ""
    """A sentence on how to read the chart."""
    every: int = 1
    """Number of steps per point."""


def figure(drawing: Drawing) -> str:
    """Return a figure: title, legend with the newest values, SVG, and data for the script."""
    steps: list[Sequence[int]] = []
    for line in drawing.lines:
        if line.steps not in steps:
            steps.append(line.steps)
    lines = [[steps.index(line.steps), [short(value) for value in line.values]] for line in drawing.lines]
    data = json.dumps(
        {"steps": [list(group) for group in steps], "lines": lines, "every": drawing.every}, separators=(",", ":")
    )
    legends = "".join(
        f'<span><i class="c{line.colour % COLOURS}"></i>{text(line.legend)} <b>{number(line.newest)}</b></span>'
        for line in drawing.lines
    )
    note = f'<p class="note">{text(drawing.note)}</p>' if drawing.note else ""
    caption = f'<figcaption><h4>{text(drawing.title)}</h4><output></output><p class="legend">{legends}</p></figcaption>'
    return f'<figure data-curves="{text(data)}">{caption}{svg(drawing)}{note}</figure>'


def short(value: float | None) -> float | None:
    """Round to six digits, which suffices for the cursor and halves the size."""
    return None if value is None else float(f"{value:.6g}")


def svg(drawing: Drawing) -> str:
    """Return the SVG: grid, axis labels, marks, then areas or bands and lines."""
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
        f'<line class="tick" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level)}" y2="{y(level)}"/>'
        f'<text x="{LEFT - 6}" y="{y(level) + 4}" text-anchor="end">{tick(level)}</text>'
        for level in ticks
    ]
    whole = sorted({round(level) for level in nice_ticks(start, end) if first <= level <= last})
    out += [
        f'<text x="{min(x(level), WIDTH - 1 - 3.3 * len(tick(level)))}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{tick(level)}</text>"
        for level in whole
    ]
    if drawing.stacked:
        out += stack(drawing.lines, x, y)
    else:
        out += [part for line in drawing.lines for part in band(line, x, y)]
        out += [part for line in drawing.lines for part in curve(line, x, y, drawing.log)]
    out += [mark(entry, x) for entry in drawing.marks]
    cursor = f'<line class="cursor" x1="-9" x2="-9" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    name = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(drawing.title)}"'
    span = f'data-first="{first}" data-last="{last}" data-left="{LEFT / WIDTH}" data-right="{1 - RIGHT / WIDTH}"'
    return f"<svg {name} {span}>{''.join(out)}{cursor}</svg>"


def limits(drawing: Drawing) -> tuple[float, float]:
    """Return the lowest and the highest value to show, never equal."""
    if drawing.stacked:
        return 0.0, max(
            sum(value or 0.0 for value in column)
            for column in zip(*(line.values for line in drawing.lines), strict=True)
        ) or 1.0
    values = [
        value
        for line in drawing.lines
        for part in (line.values, line.low, line.high)
        for value in part
        if value is not None and (value > 0 or not drawing.log)
    ]
    low, high = min(values), max(values)
    if drawing.log:
        return low, max(high, low * 10)
    # The axis of a length or a share starts at 0; that of a loss around 0.002 does not.
    low = 0.0 if 0 < low < 0.6 * high else low
    if low == high == 0:
        return 0.0, 1.0  # a share or a count that stays at 0
    return (low, high) if high > low else (low - 0.5 * abs(low), high + 0.5 * abs(high))


def split_at_gaps(points: Sequence[tuple[float, ...] | None]) -> list[list[tuple[float, ...]]]:
    """Split the points at gaps."""
    pieces: list[list[tuple[float, ...]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [piece for piece in pieces if piece]


def curve(line: Line, x: Axis, y: Axis, log: bool) -> list[str]:
    """Draw a polyline, broken at missing values, with dots if there are few; thin under a running median."""
    colour = line.colour % COLOURS

    def points(values: Values) -> list[tuple[float, ...] | None]:
        return [
            (x(step), y(value)) if value is not None and (value > 0 or not log) else None
            for step, value in zip(line.steps, values, strict=True)
        ]

    pieces = split_at_gaps(points(line.values))
    dashed = " dashed" if line.dashed else ""
    thin = " thin" if line.smooth else ""
    out = [polyline(piece, f"l{colour}{thin}{dashed}") for piece in pieces if len(piece) > 1]
    # A single value between two gaps would not be visible as a line.
    dots = [point for piece in pieces if len(line.values) <= 30 or len(piece) == 1 for point in piece]
    out += [f'<circle class="c{colour}" cx="{left}" cy="{top}" r="2.5"/>' for left, top in dots]
    return out + [
        polyline(piece, f"l{colour} smooth{dashed}")
        for piece in split_at_gaps(points(line.smooth or [None] * len(line.steps)))
    ]


def polyline(piece: Sequence[tuple[float, ...]], kind: str) -> str:
    """Draw a line through points."""
    return f'<polyline class="{kind}" points="{" ".join(f"{left},{top}" for left, top in piece)}"/>'


def band(line: Line, x: Axis, y: Axis) -> list[str]:
    """Draw the area between `low` and `high`, split at missing values."""
    edges = zip(line.steps, line.low, line.high, strict=False)
    pieces = split_at_gaps(
        [None if low is None or high is None else (x(step), y(low), y(high)) for step, low, high in edges]
    )
    return [
        area([(point[0], point[1], point[2]) for point in piece], f"band c{line.colour % COLOURS}")
        for piece in pieces
        if len(piece) > 1
    ]


def area(edge: Sequence[tuple[float, float, float]], kind: str) -> str:
    """Draw a polygon from points (x, lower y, upper y)."""
    corners = [(x, low) for x, low, _ in edge] + [(x, high) for x, _, high in reversed(edge)]
    return f'<polygon class="{kind}" points="{" ".join(f"{left},{top}" for left, top in corners)}"/>'


def stack(lines: Sequence[Line], x: Axis, y: Axis) -> list[str]:
    """Draw stacked series: a bar per step, or areas where bars would be too thin."""
    steps, below = lines[0].steps, [0.0] * len(lines[0].steps)
    width = 0.8 * (x(1) - x(0))
    out = []
    for line in lines:
        above = [base + (value or 0.0) for base, value in zip(below, line.values, strict=True)]
        colour = f"c{line.colour % COLOURS}"
        if len(steps) > 60:
            out.append(
                area([(x(step), y(base), y(top)) for step, base, top in zip(steps, below, above, strict=True)], colour)
            )
        else:
            out += [
                f'<rect class="{colour}" x="{x(step) - width / 2:.1f}" y="{y(top)}" width="{width:.1f}" '
                f'height="{y(base) - y(top):.1f}"/>'
                for step, base, top in zip(steps, below, above, strict=True)
                if top > base
            ]
        below = above
    return out


def mark(entry: Mark, x: Axis) -> str:
    """Draw a bar above the plot and a faint column through it, with the text on hover."""
    left, right = x(entry.first - 0.5), x(entry.last + 0.5)
    middle = (left + right) / 2
    width = max(right - left, 1.0)
    place = f'x="{middle - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
    column = f'<rect class="column" {place}/>'
    # Wide enough for touch.
    flag = max(width, 7.0)
    flag = f'<rect class="flag" x="{middle - flag / 2:.1f}" y="{TOP - 9}" width="{flag:.1f}" height="7" rx="2"/>'
    return f'<g class="mark"><title>{text(entry.text)}</title>{column}{flag}</g>'


def tick(value: float) -> str:
    """Return the label of a tick, at most six characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def nice_ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers that cover [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    start = math.floor(low / size + 1e-9)
    return [round(i * size, 12) for i in range(start, math.ceil(high / size - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most seven powers of ten that cover [low, high]."""
    start, end = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = max(1, math.ceil((end - start) / 6))
    return [10.0**i for i in range(start, end + every, every)]
