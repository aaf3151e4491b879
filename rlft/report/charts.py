"""Which curves a run has, from its metrics; long runs thinned, noisy ones with a running median, health marked on them.

A chart names metrics; what a run did not log is left out, and what no chart names gets a small chart of its own at the
end, so that nothing logged is out of sight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any, NamedTuple

from rlft.monitor import health
from rlft.report.curves import Drawing, Line, Mark

MOST_POINTS = 300
"""Points of a curve: the steps of a longer run are drawn as means of two, three, ... with a band of their extremes."""
SMOOTH_FROM = 60
"""Points from which on a running median is drawn over a curve: unlike a mean it does not spread a spike."""
MOST_OTHERS = 40
ERRORS = ("_low", "_high", "_stderr", "_change")
"""Endings of the numbers that belong to another eval/* metric."""
PHASES = ("generate", "reward", "train", "sync", "idle")
Rows = Sequence[Mapping[str, Any]]


class Chart(NamedTuple):
    """One card with curves, by the names of their metrics."""

    title: str
    lines: Mapping[str, str]
    """Legend -> metric."""
    spread: str = ""
    """Metric drawn as a band of plus and minus its value around the first line."""
    edges: tuple[str, str] = ("", "")
    """Metrics of the lower and upper edge of the first line's band."""
    log: bool = False
    stacked: bool = False
    note: str = ""


def charts(steps: Rows, evaluations: Rows) -> dict[str, list[Chart]]:
    """Heading -> its charts. `drawings` leaves out those without data."""
    names = {name for row in steps for name in row}
    sampled = health.MISMATCH in names
    return {
        "Learning": _learning(names, evaluations, sampled),
        "Optimisation": _optimisation(sampled),
        "Engine against trainer": _agreement(sampled),
        "Time and memory": _resources(),
    }


def _learning(names: set[str], evaluations: Rows, sampled: bool) -> list[Chart]:
    means = sorted(n for n in names if n.startswith("rewards/") and n.endswith("/mean"))
    parts = {n.removeprefix("rewards/").removesuffix("/mean"): n for n in means}
    scored = sampled or bool(means)  # recorded completions bring rewards that say nothing: 1, or 1 and -1
    tried = {n for row in evaluations for n in row if n.startswith(("eval/pass@", "eval/avg@"))}
    passed = sorted((n for n in tried if not n.endswith(ERRORS)), key=lambda n: (len(n), n))
    eval_edges = next(
        ((f"{n}_low", f"{n}_high") for n in ["eval/reward"] if any(f"{n}_low" in row for row in evaluations)), ("", "")
    )
    return [
        Chart(
            "Reward",
            {"mean": "reward"} if scored else {},
            spread="reward_std",
            note="Band: plus and minus one standard deviation over completions.",
        ),
        Chart(
            "Held-out reward",
            {"mean": "eval/reward"},
            edges=eval_edges,
            spread="" if eval_edges[0] else "eval/reward_stderr",
            note="Band: 95% interval." if eval_edges[0] else "Band: plus and minus one standard error.",
        ),
        Chart("Held-out loss", {"loss": "eval/loss"}),
        Chart("Held-out, by number of tries", {n.removeprefix("eval/"): n for n in passed}),
        Chart("Reward by function", parts if len(parts) > 1 else {}),
        Chart(
            "Implicit rewards",
            {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"},
        ),
        Chart("Pairs in the right order", {"share": "rewards/accuracies"}),
        Chart(
            "Completion length, tokens",
            {"mean": "completions/mean_length"},
            edges=("completions/min_length", "completions/max_length"),
            note="Band: shortest to longest.",
        ),
        Chart(
            "Shares",
            {
                "cut at max_tokens": "completions/clipped_ratio",
                "groups of equal rewards": "frac_reward_zero_std",
                "invalid rewards": "frac_reward_invalid",
            }
            if scored
            else {},
        ),
        Chart("Entropy, nat per token", {"mean": "entropy"}),
    ]


def _optimisation(sampled: bool) -> list[Chart]:
    return [
        Chart(
            "Loss",
            {"loss": "loss"},
            note="A policy gradient's loss does not fall as the policy learns: near 0 is usual. Look at the reward."
            if sampled
            else "",
        ),
        Chart("Gradient norm", {"before clipping": "grad_norm"}),
        Chart("Learning rate", {"last update": "learning_rate"}),
        Chart("Loss scale of fp16", {"next update": "loss_scale"}, log=True),
        Chart(
            "Clipped ratios",
            {"all": "clip_ratio/region_mean", "low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"},
            note="Share of tokens whose ratio left the band; 0 with one update per step.",
        ),
        Chart("KL to the reference", {"k1": "kl"}),
        Chart(
            "Groups drawn and kept",
            {"drawn": "dynamic_sampling/drawn", "kept": "dynamic_sampling/kept", "missing": "dynamic_sampling/short"},
        ),
    ]


def _agreement(sampled: bool) -> list[Chart]:
    return [
        Chart(
            "Mismatch, nat per token",
            {
                "mean": health.MISMATCH,
                "p50": "mismatch/p50",
                "p90": "mismatch/p90",
                "p99": "mismatch/p99",
                "max": "sampling/sampling_logp_difference/max",
                "limit of the mean": "parity/limit",
            }
            if sampled
            else {},
            log=True,
            note="Size of the difference of trainer and sampler log-probs.",
        ),
        Chart("Tokens off by over 10%", {"share": "mismatch/outside"}),
    ]


def _resources() -> list[Chart]:
    return [
        Chart("Seconds per step", {phase: f"time/{phase}" for phase in PHASES}, stacked=True),
        Chart("Tokens per second", {"sampling": "perf/rollout_tokens_per_s", "training": "perf/training_tokens_per_s"}),
        Chart("Peak memory, GiB", {"peak": "perf/peak_GiB"}),
    ]


def others(rows: Rows, shown: Iterable[Chart]) -> list[Chart]:
    """A chart for each metric that is in none of `shown`. rows: steps and evaluations."""
    used = {"step", "epoch", "num_tokens", "step_time", "eval/rows", "eval/samples"}
    used |= {n for chart in shown if chart.lines for n in (*chart.lines.values(), chart.spread, *chart.edges)}
    names = sorted({n for row in rows for n in row} - used)
    return [Chart(name, {"": name}) for name in names if not name.endswith(ERRORS)][:MOST_OTHERS]


def drawings(rows: Rows, chosen: Iterable[Chart], marks: Mapping[str, Sequence[Mark]]) -> list[Drawing]:
    """What there is to draw of these charts. rows: steps and evaluations; marks: metric -> what was said about it."""
    made = []
    for chart in chosen:
        own = {row_id: row for row_id, row in enumerate(rows) if any(n in row for n in chart.lines.values())}
        binned = bins(list(own.values()))
        lines = [line for i, item in enumerate(chart.lines.items()) if (line := series(binned, chart, i, *item))]
        if lines:
            names = {*chart.lines.values(), chart.spread, *chart.edges}
            said = [m for name in names for m in marks.get(name, ())]
            every = len(binned[-1]) if binned else 1
            made.append(Drawing(chart.title, lines, chart.log, chart.stacked, said, chart.note, every))
    return made


def bins(rows: Rows) -> list[Rows]:
    """The rows in at most MOST_POINTS runs of equal length, counted from the end: the newest row is always in."""
    size = math.ceil(len(rows) / MOST_POINTS) or 1
    return [rows[max(0, end - size) : end] for end in range(len(rows), 0, -size)][::-1]


def series(binned: Sequence[Rows], chart: Chart, i: int, legend: str, name: str) -> Line | None:
    """The i-th line of a chart; None without a number to draw (a positive one on a log axis)."""
    found = [health.finite(rows, name) for rows in binned]
    if not any(v > 0 or not chart.log for values in found for v in values):
        return None
    values = [mean(v) if v else None for v in found]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    if i == 0 and chart.spread:
        spread = [mean(v) if (v := health.finite(rows, chart.spread)) else None for rows in binned]
        pairs = list(zip(values, spread, strict=True))
        low, high = ([None if v is None or d is None else v + sign * d for v, d in pairs] for sign in (-1, 1))
    elif i == 0 and chart.edges[0]:
        low, high = ([mean(v) if (v := health.finite(rows, n)) else None for rows in binned] for n in chart.edges)
    elif len(binned[-1]) > 1 and not chart.stacked:
        low, high = ([pick(v) if v else None for v in found] for pick in (min, max))
    smooth: Sequence[float | None] = ()
    if len(binned) >= SMOOTH_FROM and not chart.stacked and not chart.log:
        smooth = running(values)
        if i == 0 and (chart.spread or chart.edges[0]):  # but extremes stay what they were
            low, high = running(low), running(high)
    newest = health.newest(binned[-1], name)
    return Line(legend, [int(rows[-1]["step"]) for rows in binned], values, newest, low, high, smooth, i)


def running(values: Sequence[float | None]) -> list[float | None]:
    """Median of a 25th of the values around each, smoothed once more by their mean; None where a value is missing."""
    reach = max(1, len(values) // 50)

    def pass_(of: Sequence[float | None], middle: Callable[[list[float]], float]) -> list[float | None]:
        near = ([v for v in of[max(0, i - reach) : i + reach + 1] if v is not None] for i in range(len(of)))
        return [None if value is None else middle(v) for value, v in zip(of, near, strict=True)]

    return pass_(pass_(values, median), mean)


def described(rows: Rows, algorithm: str) -> dict[str, list[tuple[int, str]]]:
    """Rule -> (step, text) of each time that it spoke. rows: steps and evaluations as they came."""
    told: dict[str, list[tuple[int, str]]] = {}
    for i, row in enumerate(rows):
        for name, message in health.check(rows[max(0, i + 1 - health.WINDOW) : i + 1], algorithm):
            told.setdefault(name, []).append((int(row["step"]), message))
    return told


def spans(steps: Sequence[int], gap: int = 1) -> list[tuple[int, int]]:
    """[1, 2, 3, 7] -> [(1, 3), (7, 7)]. gap: steps that are at most so far apart are one span."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(steps), start=1) if b > a + gap)]
    return [(steps[a], steps[b - 1]) for a, b in zip(starts, [*starts[1:], len(steps)], strict=True)] if steps else []


def marks(told: Mapping[str, Sequence[tuple[int, str]]], steps: int) -> dict[str, list[Mark]]:
    """Metric -> what the rules about it said. steps: of the run; what is closer than a 150th of it is one mark."""
    found: dict[str, list[Mark]] = {}
    for rule in health.RULES:
        said = told.get(rule.name, ())
        for first, last in spans([step for step, _ in said], max(1, steps // 150)):
            message = next(text for step, text in said if step == first)
            where = f"step {first}" if first == last else f"steps {first} to {last}"
            found.setdefault(rule.metric, []).append(Mark(first, last, f"{where}: {message}"))
    return found
