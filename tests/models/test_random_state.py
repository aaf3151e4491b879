"""The random state that is kept is that of the CPU and of one GPU, and no other GPU is initialised."""

from __future__ import annotations

from pathlib import Path

import torch

from rlft.models.random_state import kept_random_state

PACKAGE = Path(__file__).parents[2] / "rlft"


def test_what_is_drawn_inside_changes_nothing_outside() -> None:
    with kept_random_state():
        first = torch.rand(3)
    with kept_random_state():
        torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def test_only_the_current_gpu_is_kept(monkeypatch) -> None:
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.random, "fork_rng", devices.append)
    kept_random_state()
    assert devices == [[1]]


def test_nothing_else_forks_the_random_state() -> None:
    """`torch.random.fork_rng()` would take memory on every GPU of the machine, on each of its ranks."""
    files = [path.name for path in PACKAGE.rglob("*.py") if "fork_rng(" in path.read_text(encoding="utf-8")]
    assert files == ["random_state.py"]
