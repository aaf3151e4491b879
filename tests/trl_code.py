"""TRL's own loss code."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import os
import textwrap
from typing import Any

import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def trl(module: str, name: str) -> Any:
    """`name` of `trl.module`."""
    return getattr(importlib.import_module(f"trl.{module}"), name)


def run_block(module: str, owner: str, method: str, condition: str, makes: str, names: dict[str, Any]) -> Any:
    """Run the one `if CONDITION:` statement of a method of TRL that assigns `makes`, and return that. names: the
    variables it reads.

    For formulae that TRL has in the middle of a method which generates and scores.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(trl(module, owner), method))))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == condition]
    found = [node for node in blocks if f"    {makes} = " in ast.unparse(node)]
    assert len(found) == 1, f"{len(found)} statements of {owner}.{method} are: if {condition}"
    names = {"torch": torch, "math": math, "nanstd": trl("trainer.utils", "nanstd"), **names}
    exec(compile(ast.Module(body=[found[0]], type_ignores=[]), owner, "exec"), names)
    return names[makes]
