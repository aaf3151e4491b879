"""Groups that are scored while others are sampled: equal results, the calls that a function asks for, and its end."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import rlft
from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards.overlap import Scoring, groups_by_prompt
from rlft.rewards.parts import FunctionScores
from rlft.rewards.score import RewardFunction, build_rewards, score
from rlft.rollout.engine import Groups
from rlft.types import FinishReason, Prompt, Rollout

SOURCE = r"""
import os, time

def row(text):
    if text.endswith("3"): raise ValueError("no threes")
    if text.endswith("5"): return None
    if text.endswith("7"): return float("nan")
    return float(len(text)) + int(text[-1]) / 7

def rows(completions, log_metric, log_extra, **_):
    values = [row(text) for text in completions]
    log_metric("count", len(completions))
    log_extra("upper", [text.upper() for text in completions])
    return values

def calls(completions, log_extra, **_):
    log_extra("call", [" ".join(completions)] * len(completions))
    return [1.0] * len(completions)

def marks(completions, **_):
    open(f"{FOLDER}/scored", "w").close()
    return [1.0] * len(completions)

def answers(completions, answer, **_): return [float(a is None) for a in answer]
def short(completions, **_): return [1.0] * (len(completions) - ("c0s0" in completions))
def hangs(completions, **_):
    open(f"{FOLDER}/started", "w").close()
    time.sleep(60)
def digits(completions, **_): return [float(sum(c.isdigit() for c in text)) for text in completions]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "overlapping.py"
    path.write_text(f"FOLDER = {str(tmp_path)!r}\n{SOURCE}")
    return path


@pytest.fixture
def make(file: Path):
    opened: list[RewardFunction] = []

    def open_(name: str, batch: Any = None, **settings: Any) -> RewardFunction:
        opened.extend(build_rewards([Reward(f"{file}:{name}", batch=batch, **settings)]))
        return opened[-1]

    yield open_
    for function in opened:
        function.close()


def sampled(groups: int, size: int, texts: Sequence[str] | None = None, **row: Any) -> list[Rollout]:
    made = []
    for i in range(groups):
        prompt = Prompt((1,), {"prompt": f"p{i}"} | {name: values[i] for name, values in row.items()}, i)
        for j in range(size):
            text = f"c{i}s{j}" if texts is None else texts[i * size + j]
            made.append(Rollout(prompt, (1, 2), (True, True), None, text, FinishReason.STOP, j, 0, 0))
    return made


def overlapped(rollouts: list[Rollout], functions: Sequence[RewardFunction], order: Sequence[int]) -> Any:
    """Scores of groups that end in this order."""
    groups = groups_by_prompt(rollouts)
    with Scoring(functions, [group[0].prompt for group in groups], {}) as scoring:
        for i in order:
            scoring.add(groups[i])
            time.sleep(0.002)
        return scoring.finish(rollouts)


def exact(outcome: FunctionScores) -> Any:
    return [repr(value) for value in outcome.values], outcome.invalid, outcome.extras


@pytest.mark.parametrize("batch", ["group", "any"])
def test_rewards_and_invalid_rows_equal_those_of_one_call(batch: str, make) -> None:
    chance = random.Random(0)
    texts = ["x" * chance.randrange(9) + str(chance.randrange(10)) for _ in range(6 * 4)]
    rollouts = sampled(6, 4, texts)
    step, early = make("rows"), make("rows", batch)
    _, parts = score(rollouts, [step], {})
    expected = parts.outcomes["rows"]
    assert any(expected.invalid) and any(math.isnan(value) for value in expected.values)
    for order in (range(6), [5, 2, 0, 4, 1, 3], [3, 1], []):
        found = overlapped(rollouts, [early], order)["rows"]
        assert exact(found) == exact(expected) and found.nans == expected.nans
        assert "no threes" in found.fault


def test_each_function_gets_the_calls_it_asks_for(make) -> None:
    rollouts = sampled(3, 2)
    functions = [make("calls"), make("calls", "group"), make("calls", "any")]
    for function, name in zip(functions, ("step", "group", "any"), strict=True):
        function.name = name
    found = overlapped(rollouts, functions, [2, 0, 1])
    assert found["step"].extras["call"] == ["c0s0 c0s1 c1s0 c1s1 c2s0 c2s1"] * 6
    pairs = ["c0s0 c0s1", "c1s0 c1s1", "c2s0 c2s1"]
    assert found["group"].extras["call"] == [pair for pair in pairs for _ in range(2)]
    seen = found["any"].extras["call"]
    assert all(rollout.text in call for rollout, call in zip(rollouts, seen, strict=True))


def test_built_ins_overlap_and_functions_of_users_get_one_call_per_step(make) -> None:
    functions = build_rewards(["number", "exact"])
    assert [function.batch for function in functions] == ["any", "any"]
    assert make("rows").batch == "step"
    for function in functions:
        function.close()


def test_a_group_is_scored_before_the_others_are_sampled(make, tmp_path: Path) -> None:
    function = make("marks", "group")
    rollouts = sampled(2, 2)
    with Scoring([function], [rollouts[0].prompt, rollouts[2].prompt], {}) as scoring:
        groups = Groups(2, 2, scoring.add)
        for i in (1, 0):
            groups.put(0, rollouts[i])
        for _ in range(500):  # what sampling the second group would take
            if (tmp_path / "scored").exists():
                break
            time.sleep(0.01)
        else:
            pytest.fail("the first group waits for the second one")
        groups.put(1, rollouts[2])
        groups.put(1, rollouts[3])
        assert groups.rollouts() == rollouts
        assert scoring.finish(rollouts)["marks"].values == [1.0] * 4


def test_what_an_engine_sampled_again_counts_once(make) -> None:
    function = make("calls", "group")
    first, again = sampled(2, 2), sampled(2, 2)
    with Scoring([function], [first[0].prompt, first[2].prompt], {}) as scoring:
        scoring.add(first[:2])
        scoring.add(again[:2])
        outcome = scoring.finish(again)["calls"]
    assert outcome.values == [1.0] * 4 and outcome.invalid == [False] * 4


def test_a_column_that_only_other_prompts_have_is_none(make) -> None:
    rollouts = sampled(2, 2)
    rollouts[2].prompt.row["answer"] = "a"
    assert overlapped(rollouts, [make("answers", "group")], [0, 1])["answers"].values == [1.0, 1.0, 0.0, 0.0]


def test_a_wrong_count_in_one_group_is_an_error_of_the_step(make) -> None:
    with pytest.raises(RewardError, match="returned 1 rewards for 2 completions"):
        overlapped(sampled(2, 2), [make("short", "group")], [1, 0])


def test_a_call_ends_when_sampling_fails(make, tmp_path: Path) -> None:
    function, rollouts = make("hangs", "group", timeout=math.inf), sampled(1, 2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Scoring([function], [rollouts[0].prompt], {}) as scoring:
        scoring.add(rollouts)
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 20
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rlft-reward")]


def test_the_wait_is_shown_with_the_name_of_the_function(make) -> None:
    shown: list[tuple[str, int, int]] = []
    rollouts = sampled(1, 2)
    with Scoring(
        [make("calls"), make("marks", "any")], [rollouts[0].prompt], {}, lambda *what: shown.append(what)
    ) as scoring:
        scoring.finish(rollouts)
    assert shown == [("reward marks", 0, 2), ("reward calls", 1, 2)]


def test_a_run_is_the_same_with_and_without_overlap(file: Path, tmp_path: Path) -> None:
    import json

    from tiny import tiny_model, tiny_tokenizer

    tiny_model(seed=3).unload().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(12)))

    def rows(batch: str) -> list[dict[str, Any]]:
        cfg = rlft.Config(
            model=str(tmp_path / "model"),
            data=rlft.Data(str(tmp_path / "rows.jsonl")),
            rewards=(Reward(f"{file}:digits", batch=batch),),  # type: ignore[arg-type]
            out=str(tmp_path / batch),
            steps=2,
            prompts_per_step=3,
            sampling=rlft.Sampling(group_size=4, max_tokens=6),
            engine=rlft.Engine(name="eager", batch_size=4),
            lora=rlft.Lora(rank=2),
            parity=rlft.Parity(probe=False),
        )
        rlft.train(cfg)
        lines = (tmp_path / batch / "metrics.jsonl").read_text().splitlines()
        timed = ("time/", "perf/", "step_time")
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]

    assert rows("step") == rows("group") == rows("any")
