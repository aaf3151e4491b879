"""Tables of the recipes' runs, for their READMEs and docs/recipes.md: held-out reward by step, per seed and control."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from page_cells import gib, link, markdown_row, newest, share, value

NAME = "recipes"
RECIPES = ("countdown", "long_context", "dpo_from_samples", "sft_then_rl", "gsm_style")
RUNS = {"seed 1": "1", "seed 2": "2", "seed 3": "3", "control": "control"}
"""Head of a column -> run."""


def curve(recipe: str, run: str) -> dict[int, float]:
    """Return step -> reward of an evaluation on held-out rows."""
    rows = [row for row in newest(NAME)[1]["rows"] if row["work"] == f"recipe/{recipe}/{run}"]
    (note,) = (row["note"] for row in rows if row["metric"] == "reward_after")
    return {int(step): float(reward) for step, reward in re.findall(r"(\d+): (-?[\d.]+)", note.partition("by step")[2])}


def cells(recipe: str, metric: str, how: Callable[[float], str]) -> list[str]:
    """Return a value of each run."""
    values = (value(NAME, f"recipe/{recipe}/{run}", "rlft", metric) for run in RUNS.values())
    return ["" if number is None else how(number) for number in values]


def one(recipe: str, folder: str) -> list[str]:
    """Return the table of a recipe. folder: that of the results, seen from the page."""
    curves = [curve(recipe, run) for run in RUNS.values()]
    lines = [markdown_row(["reward on held-out rows", *RUNS]), markdown_row(["---"] * (1 + len(RUNS)))]
    for step in curves[0]:
        lines.append(markdown_row([f"after step {step}", *(share(points[step]) for points in curves)]))
    lines.append(markdown_row(["minutes, beside the other recipes", *cells(recipe, "minutes", gib)]))
    lines.append(markdown_row(["GiB reserved at most, vLLM's cache included", *cells(recipe, "peak_GiB", gib)]))
    return [*lines, "", f"Measured: {link(NAME, folder)}."]


def summary(folder: str) -> list[str]:
    """Return the table of all recipes: before, after, and the control after."""
    heads = ["recipe", "before", "after", "control, before", "control, after"]
    lines = [markdown_row(heads), markdown_row(["---"] * len(heads))]
    for recipe in RECIPES:
        ends = [list(curve(recipe, run).values()) for run in RUNS.values()]
        seeds, control = ends[:-1], ends[-1]
        texts = [", ".join(share(run[place]) for run in seeds) for place in (0, -1)]
        lines.append(markdown_row([f"`{recipe}`", *texts, share(control[0]), share(control[-1])]))
    return [*lines, "", f"Measured: {link(NAME, folder)}."]


LISTS: dict[str, Callable[[str], list[str]]] = {
    "recipes": summary,
    **{f"recipe-{name.replace('_', '-')}": partial(one, name) for name in RECIPES},
}
