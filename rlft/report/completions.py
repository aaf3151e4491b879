"""Show completions by step and group: rewards, advantage, finish reason, and per-token numbers for the shading.

The page contains the text of a completion once, with the lengths of its pieces and two numbers per token in attributes.
The script creates token elements only for the selected step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlft.report.markup import MOST_TEXT, columns, conversation, number, passage, pictures, score, text, visible
from rlft.runs.folder import PIECED_GROUPS, Run
from rlft.runs.tables import Unreadable

MOST_STEPS, MOST_SAMPLES, MOST_ROWS = 40, 8, 8
"""Largest numbers of steps, completions of a group and held-out rows with texts in the page."""
BUDGET = 2_500_000
"""Limit on the characters of all completions; with long completions the page has fewer steps."""
VISIBLE = 0.01
"""Smallest shaded difference, in nats."""
SHADES = {
    "d": ("trainer − sampler", "n4 n3 n2 n1", "lower, higher", "p1 p2 p3 p4", "from 0.01, 0.05, 0.2, 1 nat"),
    "p": ("log-prob", "u1 u2 u3 u4", "less likely: from −0.5, −1, −2, −4 nat", "", ""),
    "": ("nothing", "", "", "", ""),
}
"""Kinds of token shading: value of the switch -> its label and the colour scale."""
DIFFERS = re.compile(r'data-d="[^"]*\d')
Rows = Sequence[Mapping[str, Any]]


def readable(
    steps: Sequence[int], read: Callable[[int], list[dict[str, Any]]], damaged: list[str]
) -> dict[int, list[dict[str, Any]]]:
    """Read the files of these steps; append to `damaged` a sentence on each that cannot be read."""
    tables = {}
    for step in steps:
        try:
            tables[step] = read(step)
        except Unreadable as error:
            damaged.append(str(error))
    return tables


def samples(run: Run, damaged: list[str]) -> str:
    """Return the first groups of selected steps, with a control to choose the step. damaged: as `readable`."""
    chosen = evenly_spaced(run.rollout_steps(), MOST_STEPS)
    tables = readable(chosen, lambda step: run.read_rollouts(step, PIECED_GROUPS), damaged)
    if not tables:
        return ""
    steps = list(tables)
    newest = step_block(tables[steps[-1]])
    steps = evenly_spaced(steps, max(2, BUDGET // max(1, len(newest))))
    blocks = [step_block(tables[step]) for step in steps[:-1]] + [newest]
    pages = [
        f'<div class="step" data-step="{step}"{"" if step == steps[-1] else " hidden"}>{block}</div>'
        for step, block in zip(steps, blocks, strict=True)
    ]
    available = len(run.rollout_steps())
    coverage = (
        f"{len(steps)} of {available} steps are here" if available > len(steps) else f"all {available} steps are here"
    )
    note = (
        f"<p>The first {PIECED_GROUPS} groups of a step, best completion first; {coverage}, all completions are in "
        f"rollouts/. A click on a curve goes to its step.</p>"
    )
    control = (
        f'<p class="choose"><button type="button" data-move="-1" aria-label="earlier">‹</button>'
        f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="step">'
        f'<button type="button" data-move="1" aria-label="later">›</button> step <output>{steps[-1]}</output></p>'
    )
    control += (
        '<p class="choose"><input type="search" placeholder="search prompts and completions" aria-label="search">'
        '<label>reward from <input type="number" step="any" name="from" aria-label="lowest reward"></label>'
        '<label>to <input type="number" step="any" name="to" aria-label="highest reward"></label>'
        '<output class="matches"></output></p>'
    )
    shades = switch([*(["d"] if any(DIFFERS.search(block) for block in blocks) else []), "p", ""])
    # Where nothing differs visibly, as in fp32 on one machine, a note says so.
    tokens = any("data-n=" in block for block in blocks)
    differs = any('data-seen="1"' in block for block in blocks)
    same = (
        ""
        if differs or 'value="d"' not in shades
        else f'<p class="note">No token here differs by {VISIBLE} nat or more.</p>'
    )
    return note + control + (shades + same if tokens else "") + "".join(pages)


def switch(kinds: Sequence[str]) -> str:
    """Return the switch between kinds of shading, the first one selected, with the scale of each."""
    labels = "".join(
        f'<label><input type="radio" name="shade" value="{kind}"{"" if i else " checked"}>{SHADES[kind][0]}</label>'
        for i, kind in enumerate(kinds)
    )
    scales = ""
    for i, kind in enumerate(kinds):
        _, low, description, high, thresholds = SHADES[kind]
        colours = ["".join(f'<i class="{name}"></i>' for name in side.split()) for side in (low, high)]
        content = " ".join(part for part in (colours[0], description, colours[1], thresholds) if part)
        scales += f'<span class="scale" data-scale="{kind}"{" hidden" if i else ""}>{content}</span>'
    return f'<p class="shades"><span>Shade tokens by</span>{labels}{scales}</p>'


def evenly_spaced(steps: Sequence[int], most: int) -> list[int]:
    """Select at most `most` of the steps, evenly spaced and including the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def step_block(rows: Rows) -> str:
    """Return the groups of a step as cards."""
    parts = sorted(name for name in (rows[0] if rows else {}) if name.startswith("rewards/"))
    parts = parts if len(parts) > 1 else []
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return "".join(group_card(group, parts) for group in groups.values())


def group_card(group: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> str:
    """Return a prompt and its completions, best first; of a large group the best and the worst."""
    # Invalid rewards (None) come last.
    by_reward = sorted(group, key=lambda row: -math.inf if row["reward"] is None else row["reward"], reverse=True)
    half = MOST_SAMPLES // 2
    hidden = len(by_reward) - MOST_SAMPLES
    cards = [sample(row, parts) for row in by_reward]
    if hidden > 0:
        cards = [*cards[:half], f'<p class="note">{hidden} between these</p>', *cards[-half:]]
    return f'<article class="group"><div class="prompt">{prompt(group[0])}</div>{"".join(cards)}</article>'


def prompt(row: Mapping[str, Any]) -> str:
    """Return the prompt of a completion, with roles where it is messages, and the other columns of its row."""
    shown = conversation(row["prompt"]) if row.get("prompt_is_messages") else passage(row["prompt"])
    return shown + pictures(row.get("thumbnails") or ()) + columns(row.get("data"))


def sample(row: Mapping[str, Any], parts: Sequence[str]) -> str:
    """Return one completion: its numbers and its text."""
    advantage = row.get("advantage") or 0
    kind = "up" if advantage > 0 else "down" if advantage < 0 else ""
    facts = [f"<b>{score(row['reward'])}</b>"]
    if row.get("advantage") is not None:
        facts.append(f"<span>advantage {advantage:+.3g}</span>" if advantage else "<span>advantage 0</span>")
    facts += [f"<span>{text(part.removeprefix('rewards/'))} {score(row[part])}</span>" for part in parts]
    cut_note = ' <i class="cut">cut</i>' if row["finish_reason"] == "length" else ""
    facts.append(f"<span>{row['tokens']} tokens{cut_note}</span>")
    reward = "" if row["reward"] is None else f"{row['reward']:.6g}"
    body = f'<div class="facts">{"".join(facts)}</div>{completion(row)}'
    return f'<div class="sample {kind}" data-reward="{reward}">{body}</div>'


def completion(row: Mapping[str, Any]) -> str:
    """Return the text of a completion and, if its pieces are known, their lengths and two integers per token.

    data-n: lengths in UTF-16 units, as in JavaScript. data-d: trainer - sampler in 1e-4 nat. data-p: the trainer's
    log-prob in 1e-3 nat. Both are empty for tokens that were not trained.
    """
    pieces, trainer, sampler = row.get("pieces"), row.get("logprobs"), row.get("sampler_logprobs")
    if not pieces or not trainer:
        return passage(row["completion"])
    count, total = 0, 0
    while count < len(pieces) and total + len(pieces[count]) <= MOST_TEXT:
        total += len(pieces[count])
        count += 1
    texts = [visible(piece) for piece in pieces[:count]]
    trainer = trainer[:count]
    differences = [
        None if own is None or other is None else own - other
        for own, other in zip(trainer, sampler or [None] * count, strict=False)
    ]
    is_visible = any(value is not None and abs(value) >= VISIBLE for value in differences)
    data = {
        "n": [len(piece.encode("utf-16-le")) // 2 for piece in texts],
        "d": ["" if value is None else round(value * 1e4) for value in differences],
        "p": ["" if value is None else round(value * 1e3) for value in trainer],
    }
    numbers = " ".join(f'data-{name}="{",".join(map(str, values))}"' for name, values in data.items())
    more = f"<i> ... {len(pieces) - count:,} more tokens</i>" if count < len(pieces) else ""
    return (
        f'<div class="passage" data-seen="{int(is_visible)}" {numbers}><span>{text("".join(texts))}</span>{more}</div>'
    )


def held_out_completions(run: Run, damaged: list[str]) -> str:
    """Return the first held-out rows with their completions at the first and the last evaluation.

    damaged: as `readable`.
    """
    steps = run.evaluation_steps()
    if len(steps) < 2:
        return ""
    tables = readable([steps[0], steps[-1]], run.read_evaluation, damaged)
    if len(tables) < 2:
        return ""
    before, after = tables.values()
    body = []
    # The held-out rows can change at a resume. Only the first sample of a row is shown.
    pairs = [(old, new) for old, new in zip(before, after, strict=False) if old["prompt"] == new["prompt"]]
    for old, new in [pair for pair in pairs if not pair[0]["sample"]][:MOST_ROWS]:
        cells = "".join(
            f"<td>{passage(row['completion'])}</td><td>{number(row['reward'], '.3g')}</td>" for row in (old, new)
        )
        body.append(f"<tr><td>{prompt(old)}</td>{cells}</tr>")
    if not body:
        return ""
    head = f"<th>prompt</th><th>after step {steps[0]}</th><th>reward</th><th>after step {steps[-1]}</th><th>reward</th>"
    return f'<div class="wide"><table class="texts"><tr>{head}</tr>{"".join(body)}</table></div>'
