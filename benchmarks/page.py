"""Write the tables and the charts of README.md and docs/ from the files in benchmarks/results.

python benchmarks/page.py            # writes every table between its marks; tests/test_pages.py holds them equal

A table stands between `<!-- table: NAME -->` and `<!-- end -->`: one of `page_tables.TABLES`, or of `LISTS` below
(TRL's names, health rules). No figure is typed by hand; the newest results file of a name counts.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import faults
import page_recipes
from page_cells import RESULTS, markdown_row
from page_chart import chart
from page_curve import curve
from page_tables import TABLES

import rlft
from rlft.config.trl_names import TRL_NAMES, TRL_NOTES
from rlft.monitor.health import RULES

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/*.md", "examples/*/README.md")
"""Where tables may stand, relative to the repository."""


def trl_names(_folder: str) -> list[str]:
    """Return TRL's settings beside ours."""
    lines = [markdown_row(["TRL", "rlft", "note"]), markdown_row(["---"] * 3)]
    for name, ours in TRL_NAMES.items():
        values = "; ".join(f"`{json.dumps(theirs)}`: `{mine}`" for theirs, mine in ours.values.items())
        lines.append(
            markdown_row([f"`{name}`", f"`{ours.ours}`", "; ".join(part for part in (ours.note, values) if part)])
        )
    return lines


def trl_notes(_folder: str) -> list[str]:
    """Return TRL's settings that have no counterpart."""
    return [
        markdown_row(["TRL", "here"]),
        markdown_row(["---"] * 2),
        *(markdown_row([f"`{name}`", text]) for name, text in TRL_NOTES.items()),
    ]


def health_rules(_folder: str) -> list[str]:
    """Return what a run warns of, and its advice."""
    lines = [markdown_row(["a run says", "what to do"]), markdown_row(["---"] * 2)]
    return lines + [markdown_row([re.sub(r"\{[^}]*\}", "N", rule.sentence), rule.advice]) for rule in RULES]


def injected_faults(folder: str) -> list[str]:
    """Return what each stack does with each injected fault."""
    text = faults.table(RESULTS, tuple(fault for fault in faults.FAULTS if fault != faults.CONTROL))
    return text.replace("benchmarks/results", folder).splitlines()


def api_names(_folder: str) -> list[str]:
    """Return the names of the package with what they are."""
    lines = [markdown_row(["`rlft.`", "what it is"]), markdown_row(["---"] * 2)]
    for name in (each for each in rlft.__all__ if each != "__version__"):
        text = inspect.cleandoc(getattr(rlft, name).__doc__ or "").split("\n\n")[0]
        lines.append(markdown_row([f"`{name}`", " ".join(text.split())]))
    return lines


LISTS: dict[str, Callable[[str], list[str]]] = {
    "trl-names": trl_names,
    "trl-notes": trl_notes,
    "health": health_rules,
    "api-names": api_names,
    "faults": injected_faults,
    **page_recipes.LISTS,
}

MARKS = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, folder: str) -> str:
    """Return a page with the tables between its marks written again. folder: that of the results, seen from it."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        lines = LISTS[name](folder) if name in LISTS else TABLES[name].lines(folder)
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return MARKS.sub(table, text)


def pages() -> list[Path]:
    """Return the pages in which tables may stand."""
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def filled(path: Path) -> str:
    """Return the content of a page with its tables written again."""
    up = "../" * len(path.parent.relative_to(ROOT).parts)
    return fill(path.read_text(encoding="utf-8"), f"{up}benchmarks/results")


CHARTS = {ROOT / "docs" / "assets" / "steps.svg": chart, ROOT / "docs" / "assets" / "curve.svg": curve}

if __name__ == "__main__":
    for picture, draw in CHARTS.items():
        picture.write_text(draw(), encoding="utf-8")
    for path in pages():
        path.write_text(filled(path), encoding="utf-8")
