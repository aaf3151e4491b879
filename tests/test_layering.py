"""The structure of the package: which package may import which, how long a file and a function may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlft"
FILES = sorted(ROOT.rglob("*.py"))

LINE = [
    "errors upload environment routes",
    "types",
    "positions",
    "batch dist",
    "config",
    "data rewards kernels",
    "models",
    "rollout algos",
    "runs",
    "monitor",
    "report",
    "trainer",
    "cli",
    "__main__",
]
"""Packages and root modules of rlft along the journey of a row of data; each imports only what stands before its
line."""

PLACE = {name: place for place, names in enumerate(LINE) for name in names.split()}


def part(module: str) -> str:
    """The package or root module: "rlft.models.load" -> "models", "rlft" -> "__init__"."""
    return module.split(".")[1] if "." in module else "__init__"


def name_of(path: Path) -> str:
    """ "rlft/models/load.py" -> "rlft.models.load"; a folder's __init__.py is the folder."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Modules of rlft that a file imports anywhere in it, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "rlft")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}: write the full name"
            if node.module and node.module.split(".")[0] == "rlft":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    is_module = (ROOT.parent / inner.replace(".", "/")).is_dir() or (
                        ROOT.parent / (inner.replace(".", "/") + ".py")
                    ).is_file()
                    yield inner if is_module else node.module


def allowed(importer: str, imported: str) -> bool:
    """True when `imported` stands before `importer`. `__init__` looks its names up lazily and holds the version."""
    if importer == imported or "__init__" in (importer, imported):
        return True
    return PLACE[imported] < PLACE[importer]


def cycle_in(arrows: dict[str, set[str]]) -> list[str]:
    """One cycle as the names along it, or []."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(arrows.get(name, ())):
            found = walk(following, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def test_every_import_points_to_an_earlier_package() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in FILES
        for module in imports(path)
        if not allowed(part(name_of(path)), part(module))
    ]
    assert wrong == []


def test_every_package_has_a_place_in_the_line() -> None:
    assert {part(name_of(path)) for path in FILES} == {*PLACE, "__init__"}


def test_the_tree_in_the_readme_is_what_lies_in_the_folder() -> None:
    tree = (ROOT.parent / "README.md").read_text().split("\nrlft/\n")[1].split("```")[0]
    words = {word for line in tree.splitlines() for word in line.split("  ") if line.startswith("  ")}
    shown = {name for word in words for name in word.split() if name.endswith((".py", "/"))}
    packages = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.name for path in ROOT.glob("*.py") if not path.name.startswith("__")}
    assert packages | modules <= shown


def test_the_line_forbids_what_it_should() -> None:
    assert allowed("trainer", "monitor") and not allowed("monitor", "trainer") and not allowed("rollout", "algos")


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    # `rlft` itself is left out: its lazy names point at train, and everything may ask it for __version__.
    arrows = {
        name_of(p): {m for m in imports(p) if m not in ("rlft", name_of(p))} for p in FILES if name_of(p) != "rlft"
    }
    assert cycle_in(arrows) == []


def test_the_search_for_circles_finds_one() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= 400, f"{path.name} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{path.name}: {node.name} has {length} lines, at most 60"


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("package", ["rewards", "rewards/builtin", "config"])
def test_packages_that_a_reward_worker_imports_are_empty(package: str) -> None:
    """A worker must load nothing but the user's file."""
    assert (ROOT / package / "__init__.py").read_text() == ""


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(run.stdout.split())


HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "vllm", "wandb", "triton", "numpy", "trl"}


@pytest.mark.parametrize(
    "module", ["rlft", "rlft.config.run", "rlft.config.files", "rlft.errors", "rlft.environment", "rlft.cli.main"]
)
def test_importing_what_needs_no_model_loads_nothing_heavy(module: str) -> None:
    assert not modules_after(f"import {module}") & HEAVY


@pytest.mark.parametrize(("code", "seconds"), [("import rlft", 0.3), ("import rlft; rlft.Config", 1.0)])
def test_importing_rlft_is_quick(code: str, seconds: float) -> None:
    """In seconds of the processor: other work on the machine does not count."""
    code = f"import time; t = time.process_time(); {code}; print(time.process_time() - t)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert float(run.stdout) < seconds


def test_training_code_adds_little_to_the_import_of_its_libraries() -> None:
    """`import rlft.trainer.loop` after torch, transformers and peft, whose own import is not ours to answer for."""
    code = (
        "import time\nbegin = time.process_time()\n"
        "import torch, transformers, peft, rich, tyro, triton\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig\n"
        "libraries = time.process_time(); import rlft.trainer.loop\n"
        "print((time.process_time() - libraries) / (libraries - begin))"
    )

    def share() -> float:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
        return float(run.stdout)

    # A share, since processors differ; the least of a few tries, since other processes lengthen processor time.
    assert any(share() < 0.15 for _ in range(4))


def test_the_public_names_are_all_there() -> None:
    import rlft

    assert [name for name in rlft.__all__ if not hasattr(rlft, name)] == []
