"""The reward of countdown: does the expression use the given numbers, each at most once, and make the target?

`shuffled = true` in its arguments is the control: the same rewards, handed to the wrong completions of a step. What
rises under it is not learning.
"""

from __future__ import annotations

import ast
import random
import warnings
from collections import Counter
from fractions import Fraction
from typing import Any

OPERATORS = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / right,
}
LONGEST = 200
"""Characters of an expression; a model may write anything."""


def row(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of reasoning-gym with a short prompt; `numbers` and `target` become columns for the reward."""
    numbers, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
    asked = f"Use the numbers {', '.join(map(str, numbers))}, each at most once, with + - * / to make {target}."
    return {"prompt": f"{asked} Write the expression alone.", "numbers": numbers, "target": target}


def solved(
    completions: list[Any],
    numbers: list[list[int]],
    target: list[int],
    trainer_state: Any,
    shuffled: bool = False,
    **_: Any,
) -> list[float]:
    """1 for the target, 0.1 for any expression of two or more of the numbers, else 0."""
    rewards = [
        score(item if isinstance(item, str) else item[-1]["content"], have, wanted)
        for item, have, wanted in zip(completions, numbers, target, strict=True)
    ]
    return random.Random(trainer_state.global_step).sample(rewards, len(rewards)) if shuffled else rewards


def score(text: str, numbers: list[int], target: int) -> float:
    """The reward of one completion: its first line, up to an equals sign, is read as an expression."""
    line = (text.strip().splitlines() or [""])[0].partition("=")[0].strip().rstrip(".").replace("×", "*")
    if not line or len(line) > LONGEST:
        return 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes and literals in what a model writes
            tree = ast.parse(line, mode="eval").body
        used: Counter[int] = Counter()
        value = evaluate(tree, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    if used - Counter(numbers) or used.total() < 2:
        return 0.0
    return 1.0 if value == target else 0.1


def evaluate(node: ast.expr, used: Counter[int]) -> Fraction:
    """The exact value of an expression of whole numbers; counts them in `used`. Raises ValueError for all else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate(node.left, used), evaluate(node.right, used))
    raise ValueError("not an expression of numbers and + - * /")
