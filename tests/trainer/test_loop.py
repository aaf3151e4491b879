"""The loop reads like the algorithm: short, flat, and the loop of examples/grpo_from_scratch.py name by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sums import ROOT

STEP = ["sample_and_score", "advantages", "losses", "update", "record"]
"""A step, in the words that both loops share."""
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def function(path: str, name: str) -> ast.FunctionDef:
    tree = ast.parse((ROOT / path).read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def names(loop: ast.AST) -> list[str]:
    """The names that a loop reads, in the order of the text."""
    found = [(n.lineno, n.col_offset, n.id) for n in ast.walk(loop) if isinstance(n, ast.Name)]
    return [name for *_, name in sorted(found)]


def test_the_loop_and_the_loop_written_out_take_the_same_steps_in_the_same_order() -> None:
    ours = next(n for n in ast.walk(function("rlft/trainer/loop.py", "loop")) if isinstance(n, ast.While))
    example = function("examples/grpo_from_scratch.py", "main")
    written_out = next(n for n in ast.walk(example) if isinstance(n, ast.For))
    for loop in (ours, written_out):
        assert [name for name in names(loop) if name in STEP] == STEP


def test_the_loop_is_short_and_flat() -> None:
    loop = function("rlft/trainer/loop.py", "loop")
    assert loop.end_lineno and loop.end_lineno - loop.lineno < 60
    for outer in (n for n in ast.walk(loop) if isinstance(n, COMPREHENSIONS)):
        assert not [n for n in ast.walk(outer) if isinstance(n, COMPREHENSIONS) and n is not outer]


@pytest.mark.parametrize("folder", ["algos", "trainer"])
def test_no_attribute_is_read_by_a_name_in_a_string(folder: str) -> None:
    calls = [
        f"{path.name}:{n.lineno}"
        for path in Path(ROOT, "rlft", folder).rglob("*.py")
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in ("getattr", "hasattr", "setattr")
        if isinstance(n.args[1], ast.Constant)
    ]
    assert calls == []
