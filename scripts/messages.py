"""Every error message of rlft, read from its source into docs/messages.md: `python scripts/messages.py`.

Walks the syntax trees of rlft/ for exceptions of rlft.errors that are made, sentences that `validate` and `environment`
find, and `require(...)` in the config. `tests/test_messages.py` fails when the page is out of date.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from rlft import errors

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "messages.md"
CODES = {name: cls.exit_code for name, cls in inspect.getmembers(errors, inspect.isclass)}
SENTENCES = ("validate.py", "environment.py")
"""Files whose yielded and appended strings are problems of a run (a ConfigError with all of them)."""
HEAD = """\
# Messages
Every error that rlft raises on purpose, by the file that raises it: made by `python scripts/messages.py`, checked by
`tests/test_messages.py`. `{...}` stands for a value. What only a bug of ours can cause is an `assert` and not here;
warnings during a run are the rules in `rlft/monitor/health.py`. An UnsupportedModel ends in
`; set engine.name = "eager"`.

| exit code | means |
| --- | --- |
| 0 | done |
| 1 | the engine or memory; also a bug of ours, with a short traceback |
| 2 | a setting, the data, a reward's first call, or a folder that cannot be written to: mend it and start again |
| 3 | stopped by a guard: parity, rewards mid-run, gradients that are not finite |
| 130 | interrupted by Ctrl-C or SIGTERM, after saving the step |
"""


Words = dict[str, str]
"""Names of a function that stand for a string -> that string."""


def template(node: ast.expr, words: Words) -> str:
    """A string expression as text, with {...} for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(v.value if isinstance(v, ast.FormattedValue) else v, words) for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and kind(node.right) in ("JoinedStr", "IfExp"):
        return template(node.left, words) + template(node.right, words)
    if isinstance(node, ast.IfExp) and "Constant" in (kind(node.body), kind(node.orelse)):
        sides = [template(side, words) for side in (node.body, node.orelse)]
        return f"[{' | '.join(side for side in sides if side)}]"
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    return f"{{{_hole(node)}}}"


def kind(node: ast.AST) -> str:
    """The name of a node's class."""
    return type(node).__name__


def _hole(node: ast.expr) -> str:
    """What an expression is about: the name of the value itself, without what is called on it."""
    if isinstance(node, ast.Attribute) and node.attr == "__name__":
        return f"type of {_hole(node.value)}"
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_") if _hole(node.value) in ("self", "cfg") else f"{_hole(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        of = node.args[0] if node.args else node.func
        return f"{_hole(of)}, ..." if ast.unparse(node.func).endswith(".join") else _hole(of)
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    inner = [child for child in ast.walk(node) if isinstance(child, ast.Name)]
    return inner[-1].id if inner else "..."


def messages(path: Path) -> Iterator[tuple[str, int, str]]:
    """(exception, exit code, message) of one file, in its order."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.name == "refuse":
            continue
        words: Words = {}
        codes: dict[str, int] = {}
        rows: list[tuple[str, str, str]] = []
        assigned: set[ast.AST] = set()
        # Parents come before their children, so that an assignment is seen before what it assigns.
        for node in sorted(_own(function), key=lambda n: getattr(n, "lineno", 0)):
            found = _message(node, path.name, words)
            if found and node not in assigned:
                rows.append((*found, ""))
            if isinstance(node, ast.Assign):
                target = ast.unparse(node.targets[0])
                if isinstance(node.value, ast.Constant) and target.endswith(".exit_code"):
                    codes[target.removesuffix(".exit_code")] = int(str(node.value.value))
                elif isinstance(node.value, ast.Constant | ast.JoinedStr) and isinstance(node.targets[0], ast.Name):
                    words[target] = template(node.value, words)
                made = _message(node.value, path.name, words)
                if made:
                    rows.append((*made, target))
                    assigned.add(node.value)
        for name, text, target in rows:
            yield name, codes.get(target, CODES[name]), text


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions in it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _own(node)


def _message(node: ast.AST, file: str, words: Words) -> tuple[str, str] | None:
    """(exception, message) of a node that makes one."""
    if isinstance(node, ast.Yield) and file in SENTENCES and isinstance(node.value, ast.Constant | ast.JoinedStr):
        return "ConfigError", template(node.value, words)
    if isinstance(node, ast.Return) and file == "section.py" and isinstance(node.value, ast.JoinedStr):
        sentence = template(node.value, words)
        return ("ConfigError", sentence) if ": " in sentence else None
    if not isinstance(node, ast.Call) or not node.args:
        return None
    called, args = ast.unparse(node.func), node.args
    if called in CODES and isinstance(args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
        return called, template(args[0], words)
    if called == "refuse" and isinstance(args[1], ast.Constant | ast.JoinedStr):
        return "ConfigError", template(args[1], words)
    if called.endswith(".append") and file in SENTENCES and isinstance(args[0], ast.JoinedStr):
        return "ConfigError", template(args[0], words)
    if called == "Reply" and template(args[0], words) == "bad":
        return "RewardError", f'reward "{{name}}" {template(args[2], words)}'
    return None


def page() -> str:
    """The text of docs/messages.md."""
    parts = [HEAD]
    for path in sorted((ROOT / "rlft").rglob("*.py")):
        found = list(dict.fromkeys(messages(path)))
        if found:
            parts += [f"\n## {path.relative_to(ROOT)}", "| error | exit | message |", "| --- | --- | --- |"]
            parts += [f"| {name} | {code} | {_cell(text)} |" for name, code, text in found]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
