"""One format for durations, numbers and evaluation results."""

from __future__ import annotations

import math

from rlft.runs.formats import change, duration, evaluation_names, number, visible, with_error

MEASURED = {"a": 0.7234, "a_stderr": 0.0312, "a_low": 0.66, "a_high": 0.78, "a_change": 0.25, "a_change_stderr": 0.04}


def test_durations_have_a_unit() -> None:
    assert [duration(seconds) for seconds in (0, 18, 75, 600, 3675, 7200)] == [
        "0 s",
        "18 s",
        "1.2 min",
        "10.0 min",
        "1.0 h",
        "2.0 h",
    ]


def test_numbers_are_short_and_large_ones_have_no_exponent() -> None:
    assert [number(value) for value in (None, math.nan, 0.25, 1234567.0)] == ["-", "-", "0.25", "1,234,567"]
    assert [number(value, "+.4g") for value in (0.25, -0.25, 1234567.0)] == ["+0.25", "-0.25", "+1,234,567"]


def test_a_result_has_its_error_or_where_there_is_room_its_interval() -> None:
    assert with_error(MEASURED, "a") == "0.723 ± 0.031"
    assert with_error(MEASURED, "a", interval=True) == "0.723\n0.660 to 0.780"
    assert (
        with_error(MEASURED, "a_change", "+")
        == with_error(MEASURED, "a_change", "+", interval=True)
        == "+0.250 ± 0.040"
    )
    assert with_error({"a": 9.0}, "a") == "9" and with_error({"a": 9.0}, "a", "+") == "+9"
    assert with_error({}, "a") == with_error({"a": math.nan}, "a") == with_error({"a": None}, "a") == "-"


def test_a_change_is_the_one_that_was_measured_else_the_difference() -> None:
    assert change({"a": 0.5}, MEASURED, "a") == "+0.250 ± 0.040"
    assert change({"a": 0.5}, {"a": 0.25}, "a") == "-0.25"
    assert (
        change({"a": 0.5}, {}, "a")
        == change({"a": None}, {"a": 0.5}, "a")
        == change({"a": math.nan}, {"a": 1.0}, "a")
        == "-"
    )


def test_all_results_are_listed_and_a_short_list_has_the_main_ones() -> None:
    row = {
        "step": 3.0,
        "loss": 0.1,
        "eval/rows": 4.0,
        "eval/pass@8": 0.9,
        "eval/pass@8_stderr": 0.1,
        "eval/pass@1": 1.0,
        "eval/reward": 1.0,
        "eval/rewards/a/mean": 1.0,
        "eval/rewards/a/std": 0.0,
        "eval/rewards/a/invalid": 0.0,
        "eval/invalid": 0.0,
        "eval/completions/mean_length": 5.0,
        "eval/logps/chosen": -3.0,
    }
    assert evaluation_names([row]) == [
        "eval/reward",
        "eval/rewards/a/mean",
        "eval/pass@1",
        "eval/pass@8",
        "eval/logps/chosen",
        "eval/completions/mean_length",
    ]
    assert "eval/rows" in evaluation_names([row, row | {"eval/rows": 8.0}])
    short = ["eval/reward", "eval/pass@8", "eval/completions/mean_length"]
    assert evaluation_names([row], short=True) == short
    other = {**row, "eval/rewards/b/mean": 1.0, "eval/invalid": 2.0, "eval/pass@1": 0.5}
    assert evaluation_names([other], short=True) == [
        "eval/reward",
        "eval/rewards/a/mean",
        "eval/rewards/b/mean",
        "eval/pass@1",
        "eval/pass@8",
        "eval/invalid",
        "eval/completions/mean_length",
    ]


def test_control_characters_are_replaced_and_lines_stay() -> None:
    assert visible("a\x1b[2Jb\rc\x07") == "a\ufffd[2Jb\ufffdc\ufffd"
    assert visible("tab\tand\nline ü 你") == "tab\tand\nline ü 你"
