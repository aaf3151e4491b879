"""The built-in `math`: what is equal, which answers are faults, and what math-verify needs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import records

from rlft.config.data import Data, Reward
from rlft.config.run import Config
from rlft.errors import DataError, RewardError
from rlft.rewards import rows
from rlft.rewards.builtin.math import check_row, math
from rlft.rewards.score import build_rewards, score
from rlft.trainer.validate import problems
from rlft.types import FinishReason, Prompt, Rollout


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (72, r"I tried 71, so \boxed{72}", r"72, no: \boxed{71}"),
        (0.5, r"$\frac{1}{2}$", "$2$"),
        ("72", "The answer is 72.", "The answer is 7."),
        ("3/4", "0.75", "4/3"),
        (r"\frac{3}{4}", r"\boxed{\dfrac34}", r"\boxed{34}"),
        ("x^2+2x+1", "$(x+1)^2$", "$(x-1)^2$"),
        (r"\{1, 2\}", r"$\{2, 1\}$", r"$\{1, 3\}$"),
        ("(1, 2)", r"\boxed{(1,2)}", r"\boxed{(2,1)}"),
        (r"2\sqrt{2}", r"$\sqrt8$", r"$\sqrt2$"),
        ("1,234", "$1234$", "$234$"),
        ("50%", r"\boxed{0.5}", r"\boxed{5}"),
        ("She has 9 * 8 = 72.\n#### 72", "72", "73"),
        (r"Hence $x = 3$, so the sum is \boxed{7}.", r"\boxed{7}", r"\boxed{3}"),
        (r"10 \text{ cm}", r"\boxed{10}", r"\boxed{11}"),
        ("2xy", "$2yx$", "$2x$"),
    ],
)
def test_what_is_equal(answer: Any, right: str, wrong: str) -> None:
    check_row({"answer": answer}, {})
    assert math(completions=[right, wrong, "no idea", ""], answer=[answer] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("answer", ["He has 5 apples", "sqrt(2)", "pi/2", "Paris", "", True, "yes"])
def test_an_answer_that_is_no_mathematics_is_a_fault(answer: Any) -> None:
    with pytest.raises(DataError, match="answer is no mathematics that can be read: "):
        math(completions=["5"], answer=[answer])
    with pytest.raises(DataError, match="answer is no mathematics"):
        check_row({"answer": answer}, {})
    assert math(completions=["5"], answer=[answer], strict=False) == [None]


@pytest.mark.parametrize("answer", [r"$\frac{1}{$", "$$", "\\"])
def test_latex_that_cannot_be_parsed_is_a_fault(answer: str) -> None:
    with pytest.raises(DataError, match="answer is no mathematics"):
        math(completions=["5"], answer=[answer])


def test_a_row_without_answer_is_not_scored_and_what_is_not_read_is_counted() -> None:
    logged: dict[str, float] = {}
    assert math(completions=["5", "5", "hm"], answer=[None, 5, 5], log_metric=logged.__setitem__) == [None, 1.0, 0.0]
    assert logged == {"math/unread": 0.5}


@pytest.mark.parametrize("text", ["$9^{9^{9^{9^9}}}$", "$10000000!$", f"${'(' * 500}1{')' * 500}$", "\\boxed{" * 2000])
def test_what_takes_too_long_is_wrong(text: str) -> None:
    start = time.monotonic()
    assert math(completions=[text], answer=[1], seconds=1) == [0.0]
    assert time.monotonic() - start < 10


def test_outside_of_a_main_thread_it_says_what_to_do() -> None:
    raised: list[BaseException] = []

    def call() -> None:
        try:
            math(completions=["1"], answer=[1])
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert 'name the reward as a string, "math"' in str(raised[0])


def rollouts(pairs: list[tuple[str, Any]]) -> list[Rollout]:
    return [
        Rollout(
            Prompt((1,), {"prompt": "q", "answer": right}, i), (1,), (True,), None, text, FinishReason.STOP, 0, 0, 0
        )
        for i, (text, right) in enumerate(pairs)
    ]


def test_math_by_name_in_its_worker_leaves_the_row_at_fault_out() -> None:
    (function,) = build_rewards(["math"])
    try:
        _, parts = score(rollouts([("5", "5"), ("6", "five apples"), ("$9^{9^{9^{9^9}}}$", 3)]), [function], {})
        assert parts.outcomes["math"].invalid == [False, True, False]
        assert "answer is no mathematics that can be read: 'five apples'" in parts.faults()[0]
        assert records.columns(parts)["math"][::2] == [1.0, 0.0]
    finally:
        function.close()


def test_a_first_call_without_a_usable_answer_names_it() -> None:
    (function,) = build_rewards(["math"])
    try:
        with pytest.raises(RewardError, match="answer is no mathematics that can be read: 'He has five'"):
            score(rollouts([("5", "He has five")]), [function], {})
    finally:
        function.close()


def test_validate_names_the_row_and_the_package_that_is_missing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "q", "answer": "5"}\n{"prompt": "q", "answer": "five apples"}\n')
    cfg = Config(
        model="m/m", data=Data(str(tmp_path / "d.jsonl")), out=str(tmp_path / "a"), steps=1, rewards=(Reward("math"),)
    )
    (problem,) = problems(cfg)
    assert (
        problem.startswith('rewards = "math": row 1: answer is no mathematics') and "(1 of the first 2 rows)" in problem
    )
    find = rows.importlib.util.find_spec
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    assert 'rewards = "math": needs math_verify, which is not installed: pip install math-verify' in problems(cfg)
