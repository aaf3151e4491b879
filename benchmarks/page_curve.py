"""Draw docs/assets/curve.svg: reward against time of one GRPO run by each library, from the results file."""

from __future__ import annotations

import math
from collections.abc import Callable

from page_cells import newest

STACKS = {
    "trl": ("TRL", "#9aa0a6"),
    "trl-vllm": ("TRL with vLLM", "#5f6368"),
    "unsloth": ("Unsloth", "#c58f3d"),
    "rlft": ("rlft", "#3f51b5"),
}
WIDTH, HEIGHT = 900, 330
LEFT, RIGHT, TOP, BOTTOM = 60, 760, 20, 280
"""Pixels: the edges of the axes."""
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Seconds that the axis names; it is logarithmic, since the slowest takes many times what the fastest does."""
Curve = list[tuple[float, float]]


def curves() -> dict[str, Curve]:
    """Return stack -> seconds since its first step and mean reward, after each step."""
    rows = newest("learning_curve")[1]["rows"]
    columns: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        columns.setdefault((row["stack"], row["metric"]), []).append(row["value"])
    found = {stack: (columns.get((stack, "step_end_seconds")), columns.get((stack, "reward"))) for stack in STACKS}
    return {stack: list(zip(x, y, strict=True)) for stack, (x, y) in found.items() if x and y}


def curve() -> str:
    """Return the picture: a line for each library, and their names in its colours."""
    known = curves()
    first = min(points[0][0] for points in known.values())
    last = max(points[-1][0] for points in known.values())
    most = max(reward for points in known.values() for _, reward in points)

    def x(seconds: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(seconds / first) / math.log(last / first)

    def y(reward: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * reward / most

    parts = axis(x, y, (first, last), most)
    for i, (stack, points) in enumerate(known.items()):
        label, colour = STACKS[stack]
        line = " ".join(f"{x(seconds):.1f},{y(reward):.1f}" for seconds, reward in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<text x="{LEFT + 16}" y="{TOP + 20 + 20 * i}" fill="{colour}">{label}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="14">\n<style>.s{font-size:12px;fill:#333}</style>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def axis(x: Callable[[float], float], y: Callable[[float], float], ends: tuple[float, float], most: float) -> list[str]:
    """Return the lines and numbers of both axes. ends: first and last second."""
    parts = []
    for seconds in TICKS:
        if ends[0] <= seconds <= ends[1]:
            label = f'y="{BOTTOM + 18}" text-anchor="middle" class="s">{seconds:g}</text>'
            parts.append(f'<text x="{x(seconds):.1f}" {label}')
    for tenths in range(0, int(most * 10) + 1, 2):
        height = y(tenths / 10)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        label = f'y="{height + 4:.1f}" text-anchor="end" class="s">{tenths / 10:.1f}</text>'
        parts.append(f'<text x="{LEFT - 8}" {label}')
    middle = (LEFT + RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle" class="s">seconds since step 1 began</text>'
    )
    centre = (TOP + BOTTOM) / 2
    turned = f'transform="rotate(-90 16 {centre})" text-anchor="middle" class="s">mean reward of a step</text>'
    parts.append(f'<text x="16" y="{centre}" {turned}')
    return parts
