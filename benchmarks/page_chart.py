"""Draw docs/assets/steps.svg: seconds of one optimiser step of TRL, Unsloth and rlft, from the results files."""

from __future__ import annotations

from page_cells import seconds, value
from page_tables import STEPS

STACKS = (("TRL", "trl", "#9aa0a6"), ("Unsloth", "unsloth", "#c58f3d"), ("rlft", "rlft", "#3f51b5"))
ROWS = (STEPS[0], STEPS[3], STEPS[4], STEPS[5])
LEFT, WIDTH, BAR, GAP = 330, 900, 16, 26
"""Pixels: where bars begin, of the picture, height of a bar, between works."""


def chart() -> str:
    """Return the picture. Bars of a work are drawn to the scale of its slowest; each has its seconds behind it."""
    y, parts = 20, []
    for label, name, work in ROWS:
        known = {stack: value(name, work, stack, "seconds") for _, stack, _ in STACKS}
        slowest = max(number for number in known.values() if number is not None)
        middle, work_name = y + 1.5 * BAR + 5, label.replace("prompts of 256 tokens, ", "")
        parts.append(f'<text x="{LEFT - 90}" y="{middle}" text-anchor="end">{work_name}</text>')
        for head, stack, colour in STACKS:
            number = known[stack]
            assert number is not None, (name, stack)
            length = max(2.0, (WIDTH - LEFT - 70) * number / slowest)
            parts.append(f'<text x="{LEFT - 8}" y="{y + BAR - 4}" text-anchor="end" class="s">{head}</text>')
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 3}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + BAR - 4}" class="s">{seconds(number)} s</text>')
            y += BAR
        y += GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="14">\n'
        "<style>text{fill:#333}.s{font-size:12px}</style>\n"
        f'<rect width="{WIDTH}" height="{y}" rx="6" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
