"""What a machine can see of the prose: short first sentences, no dialect, no history, names of more than a letter."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rlft").rglob("*.py"))
LONGEST = 25
"""Words of the first sentence of a docstring."""
DIALECT = re.compile(
    r"\b(lent|lends?|lender|mend(ed|s)?|anew|told|(its|their|his|our|my|your) own$|of (its|their|his|our|my|your) own|"
    r"goes past|in words|gone through|is to have|brought|brings?|hands? out|so many|said|spoken)\b"
)
HISTORY = re.compile(r"\b(used to|no longer|formerly|previously|until then|since then|had been|was found|came to)\b")
LETTER = re.compile(r"[a-zA-Z]")
FORMATTED_BY_HAND = 35
"""`# fmt: skip` in the repository, at most."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of fields too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    match = re.match(r"(.+?[.:!?])(\s|$)", re.sub(r"\b(e\.g|i\.e|cf|vs|et al)\.", r"\1", paragraph))
    return match[1] if match else paragraph


def letters(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of one letter, but for indices and what the docstring at the head of the file explains."""
    legend = ast.get_docstring(tree) or ""
    for node in ast.walk(tree):
        names: list[tuple[int, str]] = []
        if isinstance(node, ast.FunctionDef):
            names = [(arg.lineno, arg.arg) for arg in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs)]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [(node.lineno, node.id)]
        for line, name in names:
            if LETTER.fullmatch(name) and name not in "ijk" and not re.search(rf"(?<!\w){name}(?![\w'])", legend):
                yield line, name


def faults(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    documented = list(docstrings(tree))
    for line, doc in documented:
        words = len(first_sentence(doc).split())
        if words > LONGEST:
            yield f"{path.name}:{line}: a first sentence of {words} words"
    for line, prose in (*documented, *comments(text)):
        for match in (*DIALECT.finditer(prose), *HISTORY.finditer(prose)):
            yield f"{path.name}:{line}: {match[0]!r}"
    for line, name in letters(tree):
        yield f"{path.name}:{line}: the name {name!r}, which the head of the file does not explain"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain(path: Path) -> None:
    assert list(faults(path)) == []


def test_the_search_finds_what_it_should(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        '"""Of the head."""\n\n\ndef f(x):\n    """' + "word " * 26 + 'end."""\n    # lent until then\n    return x\n'
    )
    found = " ".join(faults(bad))
    assert "sentence of 27 words" in found and "'lent'" in found and "'until then'" in found and "name 'x'" in found


def test_almost_everything_is_formatted_by_ruff() -> None:
    files = [
        path
        for folder in ("rlft", "tests", "benchmarks", "examples", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    ]
    mark = "# fmt: " + "skip"
    assert sum(path.read_text(encoding="utf-8").count(mark) for path in files) <= FORMATTED_BY_HAND
