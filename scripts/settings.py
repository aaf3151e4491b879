"""Every setting with its type, default and docstring, in docs/settings.md: `python scripts/settings.py`.

Read from the sections of rlft/config and from the built-in losses. `tests/config/test_settings_page.py` fails when the
page is out of date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "settings.md"
LOSSES = ("grpo", "gspo", "dpo", "kto", "sft")
HEAD = """\
# Settings
Every setting of a run. In a file, `[section]` is a table and a setting a key in it; on the command line the same is
`--section.setting VALUE`; in Python, `rlft.Section(setting=...)` in `rlft.Config(section=...)`. `rlft train FILE
--help` shows them with the values of a file. The page is made by `python scripts/settings.py`.
"""


def page() -> str:
    """Return the text of the page."""
    from rlft.algos.algorithm import loss_class
    from rlft.config.run import Config
    from rlft.config.section import SECTIONS

    sections = [cls for cls in SECTIONS if cls is not Config]
    parts = [HEAD, "## The run", *table(Config, described(Config))]
    for cls in sections:
        title = f"## [{SECTIONS[cls]}]" if SECTIONS[cls] else f"## {cls.__name__}"
        parts += ["", title, f"{first_line(cls)} `rlft.{cls.__name__}` in Python.", "", *table(cls, described(cls))]
    parts += [
        "",
        "## [algo] by its name",
        "Beside `name`; the other losses have most of these ([algorithms](algorithms.md)).",
    ]
    for name in LOSSES:
        cls = loss_class(name)
        parts += ["", f"### {name}", *table(cls, documented(cls))]
    return "\n".join(parts) + "\n"


def table(cls: Any, docs: dict[str, str]) -> list[str]:
    """Return the rows of a dataclass's fields. docs: field -> what it is."""
    hints = typing.get_type_hints(cls, include_extras=True)
    lines = ["| setting | type | default | what it is |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.init and not field.name.startswith("_"):
            text = " ".join(docs.get(field.name, "").split())
            if not text and of_type(hints[field.name]) == "table":
                text = f"see [{field.name}]"
            cells = [f"`{field.name}`", of_type(hints[field.name]), default(field), text]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def described(cls: Any) -> dict[str, str]:
    """Return field -> docstring of a section."""
    return {name: field.description or "" for name, field in cls.__pydantic_fields__.items()}


def documented(cls: Any) -> dict[str, str]:
    """Return field -> docstring of a plain dataclass, those of its bases included."""
    docs: dict[str, str] = {}
    for each in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for before, after in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and is_text:
                docs[before.target.id] = str(after.value.value)  # type: ignore[attr-defined]
    return docs


def of_type(hint: Any) -> str:
    """Return a type as a reader of a config file knows it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return of_type(args[0])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(of_type(part) for part in args if part is not type(None)))
    if origin is tuple or hint is tuple:
        return "list"
    if origin in (list, dict):
        return {list: "list", dict: "table"}[origin]
    names = {int: "number, whole", float: "number", bool: "true or false", str: "text", Path: "text", Any: "any"}
    return names.get(hint) or ("table" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", "any"))


def default(field: Any) -> str:
    """Return the default of a field as TOML has it; "" for none, "required" where a value must be given."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    value = getattr(value, "default", value) if type(value).__name__ == "FieldInfo" else value
    if value is None or dataclasses.is_dataclass(value):
        return ""
    try:
        return f"`{json.dumps(value)}`"
    except TypeError:
        return ""


def first_line(cls: Any) -> str:
    """Return the first line of a class's docstring."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
