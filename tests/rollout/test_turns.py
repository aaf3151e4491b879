"""Processes on one card take turns."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from rlft.rollout.vllm import turns

HOLD = """
import sys, time
from rlft.rollout.vllm.turns import turn
with turn("card"):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has its turn until it reads a line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        yield process
        process.kill()


def test_a_turn_waits_for_that_of_another_process(
    other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            other.communicate("\n")

    monkeypatch.setattr(time, "sleep", pause)
    with turns.turn("another card"):
        assert not waits
    with turns.turn("card"):
        assert len(waits) >= 3
        assert other.returncode == 0


def test_the_end_of_a_process_ends_its_turn(other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    with turns.turn("card"):
        pass


def test_a_process_that_hangs_is_waited_for_so_long_only(
    other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LONGEST", 0.1)
    with turns.turn("card"):
        assert other.poll() is None
    other.communicate("\n")


def test_without_a_cache_folder_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rlft").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with turns.turn("card"):
        pass
