"""Choose the charts of a run from its metrics, with binning, running medians and health marks.

A chart lists metrics. Metrics that a run did not log are omitted, and logged metrics that are in no chart get a
separate small chart at the end, so that everything logged is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any, NamedTuple

from rlft.monitor import health
from rlft.report.curves import Drawing, Line, Mark
from rlft.rewards.parts import CUSTOM
from rlft.runs.formats import ERRORS

MOST_POINTS = 300
"""Largest number of points per curve: longer runs are drawn as means of bins, with a band of the extremes."""
SMOOTH_FROM = 30
"""Smallest number of points for a running median, which unlike a mean does not spread a spike."""
MOST_OTHERS = 40
PHASES = ("generate", "reward", "train", "sync", "idle")
Rows = Sequence[Mapping[str, Any]]


class Chart(NamedTuple):
    """A chart, defined by the names of its metrics."""

    title: str
    lines: Mapping[str, str]
    """Legend -> metric."""
    spread: str = ""
    """Metric whose value is drawn as a band of plus and minus around the first line."""
    edges: tuple[str, str] = ("", "")
    """Metrics of the lower and upper edge of the band of the first line."""
    log: bool = False
    stacked: bool = False
    note: str = ""


def charts(steps: Rows, evaluations: Rows) -> dict[str, list[Chart]]:
    """Return heading -> charts. `drawings` omits those without data."""
    names = {name for row in steps for name in row}
    is_sampled = health.MISMATCH in names
    return {
        "Learning": _learning(names, evaluations, is_sampled),
        "Optimisation": _optimisation(is_sampled),
        "Engine against trainer": _agreement(is_sampled),
        "Time and memory": _resources(),
    }


def _learning(names: set[str], evaluations: Rows, is_sampled: bool) -> list[Chart]:
    means = sorted(name for name in names if name.startswith("rewards/") and name.endswith("/mean"))
    parts = {name.removeprefix("rewards/").removesuffix("/mean"): name for name in means}
    has_rewards = is_sampled or bool(means)  # the rewards of recorded completions (1, or 1 and -1) carry no information
    variants = {name for row in evaluations for name in row if name.startswith(("eval/pass@", "eval/avg@"))}
    pass_names = sorted((name for name in variants if not name.endswith(ERRORS)), key=lambda name: (len(name), name))
    eval_edges = next(
        (
            (f"{name}_low", f"{name}_high")
            for name in ["eval/reward"]
            if any(f"{name}_low" in row for row in evaluations)
        ),
        ("", ""),
    )
    return [
        Chart(
            "Reward",
            {"mean": "reward"} if has_rewards else {},
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
        Chart("Held-out, by number of tries", {name.removeprefix("eval/"): name for name in pass_names}),
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
            if has_rewards
            else {},
        ),
        Chart("Entropy, nat per token", {"mean": "entropy"}),
    ]


def _optimisation(is_sampled: bool) -> list[Chart]:
    return [
        Chart(
            "Loss",
            {"loss": "loss"},
            note="A policy gradient's loss does not fall as the policy learns: near 0 is usual. Look at the reward."
            if is_sampled
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


def _agreement(is_sampled: bool) -> list[Chart]:
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
            if is_sampled
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


def other_charts(rows: Rows, shown: Iterable[Chart]) -> list[Chart]:
    """Return a chart for each metric that is not in `shown`, at most MOST_OTHERS. rows: steps and evaluations."""
    covered = {"step", "epoch", "num_tokens", "step_time", "eval/rows", "eval/samples"}
    covered |= {name for chart in shown if chart.lines for name in (*chart.lines.values(), chart.spread, *chart.edges)}
    remaining = {name for row in rows for name in row} - covered
    remaining = {name for name in remaining if name.startswith(CUSTOM) or not name.endswith(ERRORS)}
    # A reward function may log any number of names, so these come last.
    in_order = sorted(remaining, key=lambda name: (name.startswith(CUSTOM), name))
    return [Chart(metric, {"": metric}) for metric in in_order][:MOST_OTHERS]


def drawings(rows: Rows, selected: Iterable[Chart], marks: Mapping[str, Sequence[Mark]]) -> list[Drawing]:
    """Build the drawings of charts that have data. rows: steps and evaluations. marks: metric -> health marks."""
    result = []
    for chart in selected:
        with_data = {
            row_id: row for row_id, row in enumerate(rows) if any(name in row for name in chart.lines.values())
        }
        row_bins = bins(list(with_data.values()))
        lines = [line for i, item in enumerate(chart.lines.items()) if (line := series(row_bins, chart, i, *item))]
        if lines:
            names = {*chart.lines.values(), chart.spread, *chart.edges}
            entries = [entry for name in names for entry in marks.get(name, ())]
            every = len(row_bins[-1]) if row_bins else 1
            result.append(Drawing(chart.title, lines, chart.log, chart.stacked, entries, chart.note, every))
    return result


def bins(rows: Rows) -> list[Rows]:
    """Split the rows into at most MOST_POINTS bins of equal size, counted from the end to include the newest row."""
    size = math.ceil(len(rows) / MOST_POINTS) or 1
    return [rows[max(0, end - size) : end] for end in range(len(rows), 0, -size)][::-1]


def series(row_bins: Sequence[Rows], chart: Chart, i: int, legend: str, name: str) -> Line | None:
    """Build the i-th line of a chart; None without a value to draw (a positive one on a log axis)."""
    values_by_bin = [health.finite(rows, name) for rows in row_bins]
    if not any(numbers > 0 or not chart.log for values in values_by_bin for numbers in values):
        return None
    values = [mean(numbers) if numbers else None for numbers in values_by_bin]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    if i == 0 and chart.spread:
        spread = [mean(numbers) if (numbers := health.finite(rows, chart.spread)) else None for rows in row_bins]
        pairs = list(zip(values, spread, strict=True))
        low, high = (
            [
                None if numbers is None or deviation is None else numbers + sign * deviation
                for numbers, deviation in pairs
            ]
            for sign in (-1, 1)
        )
    elif i == 0 and chart.edges[0]:
        low, high = (
            [mean(numbers) if (numbers := health.finite(rows, edge)) else None for rows in row_bins]
            for edge in chart.edges
        )
    elif len(row_bins[-1]) > 1 and not chart.stacked:
        low, high = ([pick(numbers) if numbers else None for numbers in values_by_bin] for pick in (min, max))
    smooth: Sequence[float | None] = ()
    if len(row_bins) >= SMOOTH_FROM and not chart.stacked and not chart.log:
        smooth = running_median(values)
        if i == 0 and (chart.spread or chart.edges[0]):  # extremes are not smoothed
            low, high = running_median(low), running_median(high)
    newest = health.newest(row_bins[-1], name)
    return Line(legend, [int(rows[-1]["step"]) for rows in row_bins], values, newest, low, high, smooth, i)


def running_median(values: Sequence[float | None]) -> list[float | None]:
    """Return the running median over a 25th of the values, smoothed by a running mean; None at missing values."""
    reach = max(1, len(values) // 50)

    def pass_(numbers: Sequence[float | None], middle: Callable[[list[float]], float]) -> list[float | None]:
        windows = (
            [window for window in numbers[max(0, i - reach) : i + reach + 1] if window is not None]
            for i in range(len(numbers))
        )
        return [None if value is None else middle(window) for value, window in zip(numbers, windows, strict=True)]

    return pass_(pass_(values, median), mean)


def health_messages(rows: Rows, algorithm: str) -> dict[str, list[tuple[int, str]]]:
    """Return rule -> (step, text) of each of its messages. rows: steps and evaluations in order."""
    messages: dict[str, list[tuple[int, str]]] = {}
    for i, row in enumerate(rows):
        for name, message in health.check(rows[max(0, i + 1 - health.WINDOW) : i + 1], algorithm):
            messages.setdefault(name, []).append((int(row["step"]), message))
    return messages


def spans(steps: Sequence[int], gap: int = 1) -> list[tuple[int, int]]:
    """Group steps into spans: [1, 2, 3, 7] -> [(1, 3), (7, 7)]. gap: largest distance within a span."""
    starts = [0, *(i for i, (left, right) in enumerate(pairwise(steps), start=1) if right > left + gap)]
    return (
        [(steps[left], steps[right - 1]) for left, right in zip(starts, [*starts[1:], len(steps)], strict=True)]
        if steps
        else []
    )


def marks(messages: Mapping[str, Sequence[tuple[int, str]]], steps: int) -> dict[str, list[Mark]]:
    """Return metric -> health marks. steps: of the run; messages closer than a 150th of it become one mark."""
    by_metric: dict[str, list[Mark]] = {}
    for rule in health.RULES:
        entries = messages.get(rule.name, ())
        for first, last in spans([step for step, _ in entries], max(1, steps // 150)):
            message = next(text for step, text in entries if step == first)
            where = f"step {first}" if first == last else f"steps {first} to {last}"
            by_metric.setdefault(rule.metric, []).append(Mark(first, last, f"{where}: {message}"))
    return by_metric
