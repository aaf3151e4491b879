"""One HTML file about a run, from its folder: no network, no library, no account. It opens in any browser.

Curves are SVG drawn here; the little script in the page moves a cursor over them and chooses the step whose completions
are shown. Everything that came from a model or a dataset is escaped, and the page's own policy forbids it any request.
"""

from __future__ import annotations

import contextlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlft import health
from rlft.curves import LEFT, RIGHT, WIDTH, charts, drawable, figure, number, text
from rlft.runs import Run

MOST_STEPS, MOST_GROUPS, MOST_ROWS, MOST_TEXT = 40, 4, 8, 3000
"""Steps, groups of a step and held-out rows whose completions are in the page, characters of a text: it stays small."""
Rows = Sequence[Mapping[str, Any]]


def write(folder: Path) -> Path:
    """Write report.html into the run folder from what is in it so far; returns its path.

    Raises ConfigError when the folder holds no run.
    """
    run = Run.resume(folder)
    path = run.path / "report.html"
    temporary = path.with_name(".report.html.tmp")
    temporary.write_text(page(run), encoding="utf-8")
    temporary.replace(path)
    return path


def page(run: Run) -> str:
    """The whole page as text."""
    rows = run.metrics()
    evaluations = [row for row in rows if "eval/reward" in row]
    steps = [row for row in rows if any(k != "step" and not k.startswith("eval/") for k in row)]
    toml = run.config.read_text(encoding="utf-8") if run.config.exists() else ""
    curves = [chart for chart in charts(steps) if drawable(steps, chart)]
    parts = [
        header(run, toml, steps, evaluations),
        evaluation_table(evaluations),
        section(
            "Curves", f'<div class="grid">{"".join(figure(steps, chart) for chart in curves)}</div>' if curves else ""
        ),
        section("Health", health_list(steps)),
        section("Held-out completions, before and after", held_out(run)),
        section("Sampled completions", samples(run)),
        section("Config", f"<details><summary>config.toml</summary><pre>{text(toml)}</pre></details>" if toml else ""),
    ]
    title = text(run.path.resolve().name)
    return PAGE.format(
        title=title,
        style=STYLE,
        body="\n".join(parts),
        script=f"const WIDTH = {WIDTH}, LEFT = {LEFT}, PLOT = {WIDTH - LEFT - RIGHT};{SCRIPT}",
    )


def section(title: str, body: str) -> str:
    """A section; nothing for an empty body."""
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


# ---- numbers ----


def header(run: Run, toml: str, steps: Rows, evaluations: Rows) -> str:
    """Name, model, and tiles with the numbers that matter most."""
    try:
        config = tomllib.loads(toml)
    except tomllib.TOMLDecodeError:
        config = {}
    sampling = config.get("sampling", {})
    about = [config.get("model"), (config.get("algo") or {}).get("name")]
    if "prompts_per_step" in config and "group_size" in sampling:
        about.append(f"{config['prompts_per_step']} prompts x {sampling['group_size']} completions per step")
    tiles = [("steps", str(len(steps)), f"of {config['steps']}" if config.get("steps") else "")]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        change = number(first["eval/reward"], ".3f")
        if len(evaluations) > 1:
            change += f" → {number(last['eval/reward'], '.3f')}"
        tiles.append(("held-out reward", change, f"{number(last.get('eval/rows'), '.0f')} rows"))
    rewards = health.finite(steps, "reward")
    if rewards:
        ends = f"{rewards[0]:.3f} → {rewards[-1]:.3f}" if len(rewards) > 1 else f"{rewards[0]:.3f}"
        tiles.append(("training reward", ends, "first and last step" if len(rewards) > 1 else "first step"))
    mismatch = health.finite(steps, health.MISMATCH)
    if mismatch:
        tiles.append(("mismatch", f"{max(mismatch):.1e}", "nat per token, worst step"))
    seconds, tokens = sum(health.finite(steps, "step_time")), health.finite(steps, "num_tokens")
    if seconds:
        tiles.append(
            (
                "time in steps",
                f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s",
                f"{seconds / len(steps):.1f} s each",
            )
        )
    if tokens:
        tiles.append(("tokens", f"{tokens[-1]:,.0f}", "prompts and completions"))
    cards = "".join(
        f'<div class="tile"><span>{text(n)}</span><b>{text(v)}</b><span>{text(s)}</span></div>' for n, v, s in tiles
    )
    line = " · ".join(text(part) for part in about if part)
    return f'<header><h1>{text(run.path.resolve().name)}</h1><p>{line}</p><div class="tiles">{cards}</div></header>'


def evaluation_table(evaluations: Rows) -> str:
    """Every evaluation: step, reward with its standard error, and the other eval/* numbers."""
    hidden = ("eval/reward_stderr", "/invalid", "/std", "/seconds")
    names = sorted({n for row in evaluations for n in row if n.startswith("eval/") and not n.endswith(hidden)})
    names.sort(key=lambda n: (n != "eval/reward", n != "eval/accuracy", n))
    if not evaluations:
        return ""
    head = "".join(f"<th>{text(n.removeprefix('eval/'))}</th>" for n in names)
    body = []
    for row in evaluations:
        cells = [number(row.get(n)) for n in names]
        if row.get("eval/reward_stderr") is not None:
            cells[names.index("eval/reward")] += f" ± {number(row['eval/reward_stderr'], '.2g')}"
        body.append(f"<tr><th>{row['step']}</th>{''.join(f'<td>{text(c)}</td>' for c in cells)}</tr>")
    table = f'<div class="wide"><table class="numbers"><tr><th>after step</th>{head}</tr>{"".join(body)}</table></div>'
    return section("Evaluation", table)


def health_list(steps: Rows) -> str:
    """Each rule that spoke: at which steps, and what it said last."""
    told: dict[str, tuple[list[int], str]] = {}
    for i, row in enumerate(steps):
        for name, message in health.check(steps[max(0, i + 1 - health.WINDOW) : i + 1]):
            told.setdefault(name, ([], ""))[0].append(int(row["step"]))
            told[name] = (told[name][0], message)
    if not told:
        return "<p>Nothing to report.</p>" if steps else ""
    items = (f"<li><b>{text(spans(at))}</b> {text(message)}</li>" for at, message in told.values())
    return f'<ul class="health">{"".join(items)}</ul>'


def spans(steps: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "steps 1-3, 7"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"step{'s' if len(steps) > 1 else ''} {shown}"


# ---- completions ----


def samples(run: Run) -> str:
    """For some of the steps: of the first groups, the completions with the highest and the lowest reward."""
    steps = spread_out(run.rollout_steps(), MOST_STEPS)
    if not steps:
        return ""
    blocks = []
    for step in steps:
        shown = "" if step == steps[-1] else " hidden"
        blocks.append(f'<div class="step wide" data-step="{step}"{shown}>{sample_table(run.read_rollouts(step))}</div>')
    choose = (
        f'<p class="choose"><button type="button" data-move="-1">‹</button>'
        f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="step">'
        f'<button type="button" data-move="1">›</button> step <output>{steps[-1]}</output></p>'
    )
    note = (
        f"<p>The best and the worst completion of the first {MOST_GROUPS} prompts of a step; all are in rollouts/.</p>"
    )
    return note + choose + "".join(blocks)


def spread_out(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spaced, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def sample_table(rows: Rows) -> str:
    """A table of a step's chosen completions."""
    parts = sorted(name for name in (rows[0] if rows else {}) if name.startswith("rewards/"))
    parts = parts if len(parts) > 1 else []
    head = "".join(
        f"<th>{text(n)}</th>"
        for n in ("prompt", "completion", "reward", *(p[8:] for p in parts), "advantage", "tokens")
    )
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    body = []
    for group in list(groups.values())[:MOST_GROUPS]:
        # An invalid reward is no number: it comes last.
        ranked = sorted(group, key=lambda r: -math.inf if r["reward"] is None else r["reward"], reverse=True)
        chosen = ranked[:1] + ranked[1:][-1:]
        for n, row in enumerate(chosen):
            prompt = f'<td rowspan="{len(chosen)}">{passage(row["prompt"])}</td>' if n == 0 else ""
            scores = "".join(f"<td>{score(row[p])}</td>" for p in ("reward", *parts, "advantage"))
            cut = " cut" if row["finish_reason"] == "length" else ""
            kind = "up" if (row["advantage"] or 0) > 0 else "down" if (row["advantage"] or 0) < 0 else ""
            completion = f'<td class="{kind}">{passage(row["completion"])}</td>'
            body.append(f"<tr>{prompt}{completion}{scores}<td>{row['tokens']}{cut}</td></tr>")
    return f'<table class="texts"><tr>{head}</tr>{"".join(body)}</table>'


def held_out(run: Run) -> str:
    """The first held-out rows with their completions at the first and at the last evaluation."""
    steps = run.evaluation_steps()
    if len(steps) < 2:
        return ""
    before, after = run.read_evaluation(steps[0]), run.read_evaluation(steps[-1])
    body = []
    # The held-out rows can change between a run and its resume.
    pairs = [(old, new) for old, new in zip(before, after, strict=False) if old["prompt"] == new["prompt"]]
    for old, new in pairs[:MOST_ROWS]:
        cells = "".join(f"<td>{passage(row['completion'])}</td><td>{score(row['reward'])}</td>" for row in (old, new))
        body.append(f"<tr><td>{passage(old['prompt'])}</td>{cells}</tr>")
    head = f"<th>prompt</th><th>after step {steps[0]}</th><th>reward</th><th>after step {steps[-1]}</th><th>reward</th>"
    return f'<div class="wide"><table class="texts"><tr>{head}</tr>{"".join(body)}</table></div>'


def score(value: Any) -> str:
    """A reward, or what a reward function logged, in a cell."""
    return text(value) if isinstance(value, str) else number(value, ".3g")


def passage(value: str) -> str:
    """A prompt or completion: messages as "role: content", long ones cut, spaces and line ends kept by the style."""
    if value.startswith("["):
        # A text may only start like JSON: it is then shown as it is.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            value = "\n".join(f"{m['role']}: {m['content']}" for m in json.loads(value))
    cut = f" ... ({len(value) - MOST_TEXT:,} more characters)" if len(value) > MOST_TEXT else ""
    return f'<div class="passage">{text(value[:MOST_TEXT] + cut) or "<i>empty</i>"}</div>'


# ---- the page ----

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --ink: #1d1f23; --dim: #6b7078; --rule: #e4e4e1;
  --c0: #2f6fde; --c1: #d9730d; --c2: #2a9461; --c3: #b0408a; --c4: #7a7f87; --bad: #a15c00; --bad-back: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --card: #1e2126; --ink: #e6e7ea; --dim: #9aa0a9;
  --rule: #30343b; --c0: #6ea3ff; --c1: #ff9f4a; --c2: #4fc98d; --c3: #e57fc0; --c4: #a2a8b2; --bad: #ffc46b;
  --bad-back: #33291a; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 1180px;
  margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 10px; } h3 { font-size: 14px; margin: 0; }
p { margin: 4px 0 10px; color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 16px; }
.tile, figure, .wide, details { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tile { padding: 12px 14px; } .tile span { display: block; color: var(--dim); font-size: 13px; min-height: 1.5em; }
.tile b { font-size: 19px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 12px 14px 6px; }
figcaption p { font-size: 13px; display: flex; flex-wrap: wrap; gap: 0 14px; }
figcaption b { color: var(--ink); font-variant-numeric: tabular-nums; }
figcaption i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 11.5px; }
.tick { stroke: var(--rule); } .cursor { stroke: var(--dim); stroke-dasharray: 3 3; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; } .band { fill: var(--c0); opacity: .14; }
.l0 { stroke: var(--c0); } .l1 { stroke: var(--c1); } .l2 { stroke: var(--c2); }
.l3 { stroke: var(--c3); } .l4 { stroke: var(--c4); }
.c0 { fill: var(--c0); background: var(--c0); } .c1 { fill: var(--c1); background: var(--c1); }
.c2 { fill: var(--c2); background: var(--c2); } .c3 { fill: var(--c3); background: var(--c3); }
.c4 { fill: var(--c4); background: var(--c4); }
.health { padding: 0; list-style: none; margin: 0; } .health li { background: var(--bad-back); color: var(--bad);
  padding: 8px 14px; border-radius: 8px; margin-bottom: 6px; } .health b { margin-right: 8px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px; border-bottom: 1px solid var(--rule); }
tr:last-child > * { border-bottom: 0; } th { color: var(--dim); font-weight: 500; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; } .passage { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 180px;
  max-height: 15em; overflow-y: auto; font: 12.5px/1.45 ui-monospace, monospace; }
.up { box-shadow: inset 3px 0 var(--c2); } .down { box-shadow: inset 3px 0 var(--c1); }
.choose { display: flex; align-items: center; gap: 8px; } .choose input { width: 260px; }
output { color: var(--ink); font-weight: 600; } button { font: inherit; padding: 0 10px; }
details { padding: 10px 14px; } pre { overflow-x: auto; font-size: 12.5px; }
"""

SCRIPT = """
const figures = [...document.querySelectorAll("figure")].map(f => (
  { svg: f.querySelector("svg"), values: f.querySelectorAll("b"), ...JSON.parse(f.dataset.curves) }));
const shown = v => v == null ? "-" : Number(v.toPrecision(4)).toString();
function point(step) {
  for (const f of figures) {
    const i = f.steps.reduce((best, s, k) => Math.abs(s - step) < Math.abs(f.steps[best] - step) ? k : best, 0);
    const { first, last } = f.svg.dataset, cursor = f.svg.querySelector(".cursor");
    const x = LEFT + (f.steps[i] - first) / (last - first) * PLOT;
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    f.values.forEach((b, n) => { b.textContent = shown(f.lines[n][i]); });
  }
}
for (const { svg } of figures) {
  svg.addEventListener("pointermove", e => {
    const box = svg.getBoundingClientRect(), { first, last } = svg.dataset;
    point(+first + ((e.clientX - box.left) / box.width * WIDTH - LEFT) / PLOT * (last - first));
  });
}
const blocks = [...document.querySelectorAll(".step")], range = document.querySelector(".choose input");
function choose(i) {
  range.value = i;
  blocks.forEach((b, k) => { b.hidden = k != range.value; });
  document.querySelector("output").textContent = blocks[range.value].dataset.step;
}
if (range) {
  range.addEventListener("input", () => choose(+range.value));
  for (const b of document.querySelectorAll("[data-move]"))
    b.addEventListener("click", () => choose(+range.value + +b.dataset.move));
}
"""
