"""Out of memory inside a step: answered once by planning again with less, to the same weights.

A GPU's error is raised by hand, in the pass that is asked for: the loop's answer is the same on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_updates import adapter, config, home, metrics  # noqa: F401  (home is a fixture)

from rlft.config.data import Reward
from rlft.config.run import Algo, Optim
from rlft.errors import TrainError
from rlft.models.policy import Policy
from rlft.trainer.loop import train
from rlft.trainer.out_of_memory import with_advice

FULL = "CUDA out of memory. Tried to allocate 1.50 GiB."


def failing(monkeypatch: pytest.MonkeyPatch, method: str, at: set[int]) -> list[int]:
    """Make the calls `at` of a method of Policy run out of memory; returns the list of calls."""
    calls: list[int] = []
    run = getattr(Policy, method)

    def counted(self: Policy, *args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] in at:
            raise torch.OutOfMemoryError(FULL)
        return run(self, *args, **options)

    monkeypatch.setattr(Policy, method, counted)
    return calls


OPTIM = Optim(lr=1e-2, minibatches=2, passes=2)


@pytest.mark.parametrize(("method", "at"), [("logprobs", {0}), ("logprobs", {4}), ("logprobs", {9}), ("score", {3})])
def test_a_step_that_ran_out_of_memory_ends_with_the_same_weights(
    method: str, at: set[int], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """In the first update, in later ones (old log-probs are of the adapter that the step began with), while scoring."""
    options: dict[str, Any] = {"optim": OPTIM, "steps": 2, "rewards": (Reward(f"{home}/rewards.py:digits"),)}
    train(config(home, tmp_path / "calm", **options))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        calls = failing(patch, method, at)
        train(config(home, tmp_path / "full", **options))
    assert len(calls) > max(at) + 4
    assert torch.equal(adapter(tmp_path / "calm", 2), adapter(tmp_path / "full", 2))
    assert metrics(tmp_path / "calm") == metrics(tmp_path / "full")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("out of memory (CUDA out of memory. Tried to allocate 1.50 GiB.): planned again with 85%") == 1


def test_a_policy_that_does_not_move_clips_nothing_after_it_either(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "logprobs", {5})
    algo = Algo("gspo", {"clip_low": 0.0, "clip_high": 0.0})
    train(config(home, tmp_path / "run", optim=Optim(lr=0.0, minibatches=2, passes=2), algo=algo, steps=1))
    assert metrics(tmp_path / "run")[0]["clip_ratio/region_mean"] == 0


def test_running_out_of_memory_twice_in_a_pass_is_an_error_that_says_what_to_lower(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "logprobs", {2, 3})
    with pytest.raises(
        TrainError, match=r"out of memory \(CUDA.*The plan of the last pass.*Lower packing.tokens_per_micro_batch"
    ) as e:
        train(config(home, tmp_path / "run", optim=OPTIM))
    assert e.value.exit_code == 1


def test_nothing_of_the_failed_pass_is_held_while_memory_is_given_back() -> None:
    class Big:
        alive = 0

        def __init__(self) -> None:
            Big.alive += 1

        def __del__(self) -> None:
            Big.alive -= 1

    tries: list[int] = []

    def run() -> str:
        held = Big()
        tries.append(Big.alive)
        if len(tries) == 1:
            raise torch.OutOfMemoryError(FULL)
        return f"done with {held.alive}"

    def lower() -> str:
        assert Big.alive == 0
        return "less"

    said: list[str] = []
    assert with_advice(run, lower, said.append) == "done with 1" and said == [f"out of memory ({FULL}): less"]
