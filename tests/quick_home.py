"""The files of kill_soak.py's runs, with rewards that do not wait, for tests that run them in their own process."""

from __future__ import annotations

from pathlib import Path

from kill_soak import make_home

REWARDS = """
def digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
held = digits
"""


def make_quick_home(folder: Path) -> None:
    """Write model, rows and rewards into a folder."""
    make_home(folder)
    (folder / "rewards.py").write_text(REWARDS)
