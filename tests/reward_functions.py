"""Reward functions in a module that imports nothing: a worker imports the module of its function, PyTorch included."""

from __future__ import annotations

import os


def by_length(completions: list[str], **_: object) -> list[float]:
    return [float(len(text) % 3) for text in completions]


def digits(completions: list[str], **_: object) -> list[float]:
    return [sum(character.isdigit() for character in text) / 6 for text in completions]


def broken_on_rank_1(completions: list[str], **_: object) -> list[float]:
    return [0.0] if os.environ["RANK"] == "1" else digits(completions)
