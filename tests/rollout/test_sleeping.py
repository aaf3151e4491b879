"""vLLM sleeps and wakes, and processes on one card take turns at it; the card is made up."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from rlft.errors import EngineError
from rlft.rollout.vllm import sleeping

HOLD = """
import sys, time
from rlft.rollout.vllm.sleeping import turn
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
    with sleeping.turn("another card"):
        assert not waits
    with sleeping.turn("card"):
        assert len(waits) >= 3
        assert other.returncode == 0


def test_the_end_of_a_process_ends_its_turn(other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    other.kill()
    other.wait()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with sleeping.turn("card"):
        assert not waits


def test_a_process_that_hangs_is_waited_for_so_long_only(
    other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleeping, "LONGEST", 0.1)
    with sleeping.turn("card"):
        assert other.poll() is None
    other.communicate("\n")


def test_without_a_cache_folder_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rlft").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with sleeping.turn("card"):
        assert [path.name for path in tmp_path.iterdir()] == ["rlft"]


GIB = 2**30
GPU = torch.device("cuda", 0)


class Sleeper:
    """vLLM's LLM as far as it sleeps; frees and takes 4 GiB of a card."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.level = error, 0

    def sleep(self, level: int) -> None:
        self.level = level
        if self.error is not None:
            raise self.error
        Card.free += 4 * GIB

    def wake_up(self) -> None:
        if self.error is not None:
            raise self.error
        Card.free -= 4 * GIB


class Card:
    """Free memory of the card."""

    free = 10 * GIB


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Card, "free", 10 * GIB)
    monkeypatch.setattr(sleeping, "card", lambda device: "card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (Card.free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def release() -> None:
    Card.free += 3 * GIB


@pytest.mark.usefixtures("a_card")
def test_what_sleep_frees_is_taken_again() -> None:
    llm = Sleeper()
    assert sleeping.sleep(llm, GPU) == 4 * GIB and llm.level == 2
    sleeping.wake(llm, GPU, 4 * GIB, GIB, release)
    assert Card.free == 10 * GIB, "the trainer's memory is left alone where there is room"


@pytest.mark.usefixtures("a_card")
def test_the_trainers_memory_is_released_where_there_is_too_little() -> None:
    Card.free = 3 * GIB
    sleeping.wake(Sleeper(), GPU, 4 * GIB, GIB, release)
    assert Card.free == 2 * GIB
    Card.free = 0
    with pytest.raises(EngineError, match=r"wants 4.00 GiB back to wake and 3.00 GiB are free.*kv_gib \(1.00\)"):
        sleeping.wake(Sleeper(), GPU, 4 * GIB, GIB, release)


@pytest.mark.usefixtures("a_card")
def test_memory_that_another_process_takes_meanwhile_is_an_error_of_the_engine() -> None:
    with pytest.raises(EngineError, match=r"did not go to sleep .*another program took memory"):
        sleeping.sleep(Sleeper(AssertionError("Memory usage increased after sleeping.")), GPU)
    with pytest.raises(EngineError, match=r"wants 4.00 GiB back"):
        sleeping.wake(
            Sleeper(RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:139")), GPU, 4 * GIB, 1, release
        )


@pytest.mark.usefixtures("a_card")
@pytest.mark.parametrize("error", [AssertionError("something else"), RuntimeError("illegal memory access")])
def test_other_errors_of_vllm_are_left_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        sleeping.sleep(Sleeper(error), GPU)
    with pytest.raises(type(error), match=str(error)):
        sleeping.wake(Sleeper(error), GPU, 4 * GIB, 1, release)
