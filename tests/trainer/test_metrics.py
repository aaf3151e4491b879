"""Metrics: hand-computed merges, and lines that survive a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlft.errors import ConfigError
from rlft.runs.lines import append_line, read_lines
from rlft.trainer.metrics import Metrics
from rlft.types import Stat


def test_a_mean_is_over_the_whole_step_and_no_mean_of_means() -> None:
    m = Metrics()
    m.add({"entropy": Stat.mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))})
    m.add({"entropy": Stat.mean(torch.tensor([6.0]), torch.tensor([True]))})
    assert m.values() == {"entropy": 3.0}  # (1 + 2 + 6) / 3; the mean of the two means would be 3.75
    assert m.sums() == {"entropy": Stat("mean", 9.0, 3.0)}
    m.add({"entropy": Stat("mean", 3.0, 1.0)})
    assert m.sums() == {"entropy": Stat("mean", 12.0, 4.0)} and m.reduce() is m  # nothing to merge in one process


def test_sums_and_extremes_over_tensors_and_floats() -> None:
    m = Metrics()
    m.add({"s": Stat("sum", 1.5), "low": Stat("min", 3.0), "high": Stat("max", torch.tensor(2.0))})
    m.add({"s": Stat("sum", torch.tensor(2.0)), "low": Stat("min", torch.tensor(-1.0)), "high": Stat("max", 1.0)})
    assert m.values() == {"s": 3.5, "low": -1.0, "high": 2.0}


def test_a_mean_over_nothing_is_left_out() -> None:
    m = Metrics()
    m.add({"entropy": Stat.mean(torch.tensor([math.nan]), torch.tensor([False])), "n": Stat("sum", 0.0)})
    assert m.values() == {"n": 0.0}


def test_a_nan_extreme_is_not_lost() -> None:
    for first, second in ((math.nan, 1.0), (1.0, math.nan)):
        m = Metrics()
        m.add({"x": Stat("max", first)})
        m.add({"x": Stat("max", second)})
        assert math.isnan(m.values()["x"])


def test_numbers_are_kept_without_graph_and_apart_from_the_callers() -> None:
    value = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    m = Metrics()
    m.add({"loss": Stat("sum", value)})
    with torch.no_grad():
        value += 100
    assert m.sums()["loss"] == Stat("sum", 2.0) and m.values() == {"loss": 2.0}


def test_a_sum_past_what_float32_can_count_is_exact() -> None:
    m = Metrics()
    m.add({"n": Stat("sum", torch.tensor(2.0**24))})
    m.add({"n": Stat("sum", torch.tensor(1.0))})
    assert m.values()["n"] == 2**24 + 1  # float32 cannot hold it


def test_numbers_of_several_dtypes_find_their_way_back_to_their_names() -> None:
    m = Metrics()
    for k in range(3):
        m.add(
            {
                "a": Stat("mean", torch.tensor(1.0 + k), torch.tensor(2)),
                "b": Stat("sum", torch.tensor(10.0 + k, dtype=torch.float64)),
                **({"c": Stat("max", torch.tensor(k))} if k != 1 else {}),
                "d": Stat("mean", 5.0, torch.tensor(4)),
            }
        )
    assert m.sums() == {
        "a": Stat("mean", 6.0, 6.0),
        "b": Stat("sum", 33.0, 3.0),
        "c": Stat("max", 2.0, 2.0),
        "d": Stat("mean", 15.0, 12.0),
    }


def test_one_name_cannot_be_merged_in_two_ways() -> None:
    m = Metrics()
    m.add({"x": Stat("sum", 1.0)})
    m.add({"x": Stat("mean", 1.0)})
    with pytest.raises(AssertionError, match="x is a sum and a mean"):
        m.sums()


def test_what_is_not_finite_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append_line(path, {"step": 1, "a": math.nan, "b": math.inf, "c": 0.5})
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 0.5}
    assert text.endswith("\n") and read_lines(path) == [{"step": 1, "a": None, "b": None, "c": 0.5}]


@pytest.mark.parametrize("torn", [b'{"step": 2, "a": 0.', b'{"step": 2, "name": "\xc3', b'"step"', b"\x00\x00"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert read_lines(path) == [{"step": 1}]


@pytest.mark.parametrize(
    "line", ['{"step": 2, "a": 1%s}' % ("0" * 400), '{"step": 9007199254740992}', '{"step": 2, "\\ud800": 1}']
)
def test_what_no_run_writes_is_no_row(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ConfigError, match=r"m\.jsonl: line 2 is no row of metrics"):
        read_lines(path)


def test_rows_are_read_in_the_order_of_their_steps(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 2}\n{"step": 1, "a": 1}\n{"step": 1, "a": 2}\n')
    assert read_lines(path) == [{"step": 1, "a": 1}, {"step": 1, "a": 2}, {"step": 2}]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\nhm\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"m\.jsonl: line 2 is no row of metrics .*: fix or remove the line"):
        read_lines(path)


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none.jsonl") == []
