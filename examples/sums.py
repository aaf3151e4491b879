"""The demo's rows: reasoning-gym's additions with the wording of its chain_sum task."""

from __future__ import annotations

from typing import Any


def row(entry: dict[str, Any]) -> dict[str, Any]:
    """A raw row with another prompt: "Calculate 4 + 13." is asked as an unfinished equation."""
    terms = entry["prompt"].removeprefix("Calculate ").removesuffix(".")
    return entry | {"prompt": f"State the final answer to the following arithmetic problem: {terms} ="}
