"""Completions by step and group: rewards, advantage, how each ended, and the numbers of its tokens for the shading.

The page holds the text of a token's completion once; the lengths of its pieces and two numbers per token lie beside it
in attributes, and the script makes elements of them only for the step that is looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlft.report.markup import MOST_TEXT, number, passage, score, text, visible
from rlft.runs.folder import PIECED_GROUPS, Run

MOST_STEPS, MOST_SAMPLES, MOST_ROWS = 40, 8, 8
"""Steps, completions of a group and held-out rows whose texts are in the page, at most."""
BUDGET = 2_500_000
"""Characters of all completions together: with long ones fewer steps are in the page."""
VISIBLE = 0.01
"""Smallest difference that is shaded, in nats."""
SHADES = {
    "d": ("trainer − sampler", "n4 n3 n2 n1", "lower, higher", "p1 p2 p3 p4", "from 0.01, 0.05, 0.2, 1 nat"),
    "p": ("log-prob", "u1 u2 u3 u4", "less likely: from −0.5, −1, −2, −4 nat", "", ""),
    "": ("nothing", "", "", "", ""),
}
"""What tokens can be shaded by: value of the switch -> its label, and the scale that explains the colours."""
DIFFERS = re.compile(r'data-d="[^"]*\d')
Rows = Sequence[Mapping[str, Any]]


def samples(run: Run) -> str:
    """The first groups of some of the steps, one step at a time."""
    steps = spread_out(run.rollout_steps(), MOST_STEPS)
    if not steps:
        return ""
    newest = step_block(run.read_rollouts(steps[-1], PIECED_GROUPS))
    steps = spread_out(steps, max(2, BUDGET // max(1, len(newest))))
    blocks = [step_block(run.read_rollouts(step, PIECED_GROUPS)) for step in steps[:-1]] + [newest]
    shown = [
        f'<div class="step" data-step="{step}"{"" if step == steps[-1] else " hidden"}>{block}</div>'
        for step, block in zip(steps, blocks, strict=True)
    ]
    kept = len(run.rollout_steps())
    some = f"{len(steps)} of {kept} steps are here" if kept > len(steps) else f"all {kept} steps are here"
    note = (
        f"<p>The first {PIECED_GROUPS} groups of a step, best completion first; {some}, all completions are in "
        f"rollouts/. A click on a curve goes to its step.</p>"
    )
    choose = (
        f'<p class="choose"><button type="button" data-move="-1" aria-label="earlier">‹</button>'
        f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="step">'
        f'<button type="button" data-move="1" aria-label="later">›</button> step <output>{steps[-1]}</output></p>'
    )
    shades = switch([*(["d"] if any(DIFFERS.search(block) for block in blocks) else []), "p", ""])
    # Where nothing differs visibly, as in fp32 on one machine, that is said instead of leaving the reader to wonder.
    tokens = any("data-n=" in block for block in blocks)
    differs = any('data-seen="1"' in block for block in blocks)
    same = (
        ""
        if differs or 'value="d"' not in shades
        else f'<p class="note">No token here differs by {VISIBLE} nat or more.</p>'
    )
    return note + choose + (shades + same if tokens else "") + "".join(shown)


def switch(kinds: Sequence[str]) -> str:
    """The switch between kinds of shading, the first one on, and the scale of each."""
    labels = "".join(
        f'<label><input type="radio" name="shade" value="{kind}"{"" if i else " checked"}>{SHADES[kind][0]}</label>'
        for i, kind in enumerate(kinds)
    )
    scales = ""
    for i, kind in enumerate(kinds):
        _, left, words, right, more = SHADES[kind]
        colours = ["".join(f'<i class="{name}"></i>' for name in side.split()) for side in (left, right)]
        shown = " ".join(part for part in (colours[0], words, colours[1], more) if part)
        scales += f'<span class="scale" data-scale="{kind}"{" hidden" if i else ""}>{shown}</span>'
    return f'<p class="shades"><span>Shade tokens by</span>{labels}{scales}</p>'


def spread_out(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spaced, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def step_block(rows: Rows) -> str:
    """The groups of a step, each a card."""
    parts = sorted(name for name in (rows[0] if rows else {}) if name.startswith("rewards/"))
    parts = parts if len(parts) > 1 else []
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return "".join(group_card(group, parts) for group in groups.values())


def group_card(group: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> str:
    """A prompt and its completions, the best first; of a large group the best and the worst."""
    # An invalid reward is no number: it comes last.
    ranked = sorted(group, key=lambda r: -math.inf if r["reward"] is None else r["reward"], reverse=True)
    half = MOST_SAMPLES // 2
    left_out = len(ranked) - MOST_SAMPLES
    cards = [sample(row, parts) for row in ranked]
    if left_out > 0:
        cards = [*cards[:half], f'<p class="note">{left_out} between these</p>', *cards[-half:]]
    return f'<article class="group"><div class="prompt">{passage(group[0]["prompt"])}</div>{"".join(cards)}</article>'


def sample(row: Mapping[str, Any], parts: Sequence[str]) -> str:
    """One completion: its numbers, and its text."""
    advantage = row.get("advantage") or 0
    kind = "up" if advantage > 0 else "down" if advantage < 0 else ""
    facts = [f"<b>{score(row['reward'])}</b>"]
    if row.get("advantage") is not None:
        facts.append(f"<span>advantage {advantage:+.3g}</span>" if advantage else "<span>advantage 0</span>")
    facts += [f"<span>{text(part.removeprefix('rewards/'))} {score(row[part])}</span>" for part in parts]
    ended = ' <i class="cut">cut</i>' if row["finish_reason"] == "length" else ""
    facts.append(f"<span>{row['tokens']} tokens{ended}</span>")
    return f'<div class="sample {kind}"><div class="facts">{"".join(facts)}</div>{completion(row)}</div>'


def completion(row: Mapping[str, Any]) -> str:
    """The text; with its pieces known, also the length of each and two integers per token.

    data-n: UTF-16 units, as the script counts. data-d: trainer less sampler in 1e-4 nat. data-p: the trainer's log-prob
    in 1e-3 nat. Both are empty where a token was not trained.
    """
    pieces, trainer, sampler = row.get("pieces"), row.get("logprobs"), row.get("sampler_logprobs")
    if not pieces or not trainer:
        return passage(row["completion"])
    keep, total = 0, 0
    while keep < len(pieces) and total + len(pieces[keep]) <= MOST_TEXT:
        total += len(pieces[keep])
        keep += 1
    shown = [visible(piece) for piece in pieces[:keep]]
    trainer = trainer[:keep]
    d = [None if a is None or b is None else a - b for a, b in zip(trainer, sampler or [None] * keep, strict=False)]
    seen = any(v is not None and abs(v) >= VISIBLE for v in d)
    data = {
        "n": [len(piece.encode("utf-16-le")) // 2 for piece in shown],
        "d": ["" if v is None else round(v * 1e4) for v in d],
        "p": ["" if v is None else round(v * 1e3) for v in trainer],
    }
    numbers = " ".join(f'data-{name}="{",".join(map(str, values))}"' for name, values in data.items())
    more = f"<i> ... {len(pieces) - keep:,} more tokens</i>" if keep < len(pieces) else ""
    return f'<div class="passage" data-seen="{int(seen)}" {numbers}><span>{text("".join(shown))}</span>{more}</div>'


def held_out(run: Run) -> str:
    """The first held-out rows with their completions at the first and at the last evaluation."""
    steps = run.evaluation_steps()
    if len(steps) < 2:
        return ""
    before, after = run.read_evaluation(steps[0]), run.read_evaluation(steps[-1])
    body = []
    # The held-out rows can change between a run and its resume. Of several samples of a row the first is shown.
    pairs = [(old, new) for old, new in zip(before, after, strict=False) if old["prompt"] == new["prompt"]]
    for old, new in [pair for pair in pairs if not pair[0]["sample"]][:MOST_ROWS]:
        cells = "".join(
            f"<td>{passage(row['completion'])}</td><td>{number(row['reward'], '.3g')}</td>" for row in (old, new)
        )
        body.append(f"<tr><td>{passage(old['prompt'])}</td>{cells}</tr>")
    if not body:
        return ""
    head = f"<th>prompt</th><th>after step {steps[0]}</th><th>reward</th><th>after step {steps[-1]}</th><th>reward</th>"
    return f'<div class="wide"><table class="texts"><tr>{head}</tr>{"".join(body)}</table></div>'
