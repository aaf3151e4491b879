"""What keeps the repository in order besides its code: hooks, workflows, the version, decisions, references."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlft

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

DATE = r"\d{4}-\d{2}-\d{2}"

HISTORY = ("CHANGELOG.md", "benchmarks/results/")
"""Records of what was. They may name documents that are gone."""

OF_OTHERS = {"README.md", "SKILL.md", "AGENTS.md"}
"""Names that stand for a file of a user or of the hub, such as a model card."""


def tracked() -> list[str]:
    """Paths of every file that git tracks or would track, relative to the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("lists the files by git, and this is no checkout")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for path in listing.stdout.splitlines() if (ROOT / path).is_file()]


def parsed(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in parsed(workflow)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_parses_and_may_only_read(path: Path) -> None:
    workflow = parsed(path)
    # YAML 1.1 reads the key `on` as True.
    assert workflow[True] and workflow["permissions"] == {"contents": "read"}
    for step in steps(path):
        assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_continuous_integration_runs_scripts_test_on_every_python() -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    assert "scripts/test" in [step.get("run") for step in steps(workflow)]
    low = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert parsed(workflow)["jobs"]["test"]["strategy"]["matrix"]["python"][0] == low


def test_the_hooks_are_the_commands_of_scripts_check() -> None:
    commands = [line for line in (ROOT / "scripts" / "check").read_text().splitlines() if line.startswith(".venv/")]
    assert [hook["entry"] for repo in parsed(HOOKS)["repos"] for hook in repo["hooks"]] == commands


def test_the_wheel_has_every_file_that_is_not_python() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["rlft"]
    matches = {pattern: {path for path in (ROOT / "rlft").glob(pattern)} for pattern in patterns}
    assert [pattern for pattern, paths in matches.items() if not paths] == []
    others = {ROOT / path for path in tracked() if path.startswith("rlft/") and not path.endswith(".py")}
    # The demo's reward function is a file to copy, not a module.
    assert set().union(*matches.values()) - {ROOT / "rlft/cli/demo_files/rewards.py"} == others


def test_the_version_is_written_in_one_place() -> None:
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "rlft.__version__"}
    code = [path for path in tracked() if path.startswith(("rlft/", "scripts/")) or path == "pyproject.toml"]
    having = [path for path in code if f'"{rlft.__version__}"' in (ROOT / path).read_text(encoding="utf-8")]
    assert having == ["rlft/__init__.py"]


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_has_a_date_three_headings_and_a_line_in_the_index(path: Path) -> None:
    assert re.fullmatch(r"\d{3}(-[a-z0-9]+)+", path.stem)
    text = path.read_text(encoding="utf-8")
    assert re.match(rf"# \S.*\n\nDate: {DATE}(, {DATE})*\n\n## Context\n", text)
    assert re.findall(r"^## (.*)", text, re.M) == ["Context", "Decision", "Evidence"]
    index = (path.parent / "README.md").read_text(encoding="utf-8")
    title = text.splitlines()[0].removeprefix("# ")
    assert re.search(rf"^- \[{path.stem[:3]}\]\({path.name}\) .*{re.escape(title)}", index, re.M)


def test_decisions_are_numbered_from_1() -> None:
    assert [int(path.stem[:3]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))


def test_every_document_that_is_named_exists() -> None:
    files = tracked()
    names = {Path(path).name for path in files} | OF_OTHERS
    dead = []
    for path in files:
        if path.startswith(HISTORY) or path == "tests/test_habits.py":
            continue
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            documents = [Path(name).name for name in re.findall(r"[\w./-]*\w\.md\b", line)]
            if re.search(r"\bDESIGN\b", line) or not names.issuperset(documents):
                dead.append(f"{path}:{number}: {line.strip()}")
    assert dead == []


def test_every_test_of_a_gpu_is_in_a_group_of_the_script_that_runs_them() -> None:
    """By name, without the suffix, as the groups have them."""
    script = (ROOT / "scripts" / "gpu_tests").read_text(encoding="utf-8")
    mark = re.compile(r"^(pytestmark = .*|@|.*marks=.*)pytest\.mark\.gpu", re.MULTILINE)
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if mark.search(path.read_text(encoding="utf-8"))]
    names = [path.relative_to(ROOT / "tests").with_suffix("").as_posix() for path in files]
    assert len(names) > 15
    assert [name for name in names if not re.search(rf"{name}\b", script)] == [], "add it to scripts/gpu_tests"
