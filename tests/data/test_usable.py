"""Rows that cannot be used: they stop a run, or are left out and counted by reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from rlft.config.data import Data
from rlft.data.prompts import TOO_LONG, load_prompts
from rlft.data.usable import check_rows
from rlft.errors import DataError

GOOD = {"prompt": "a", "completion": "b"}
BAD = [{"prompt": "a"}, {"prompt": "", "completion": "b"}, {"text": "a"}, {"prompt": "<|im_end|>", "completion": "b"}]


def write(folder: Path, rows: list[dict[str, Any]], template: str = "") -> Data:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if template:
        (folder / "my.py").write_text(template)
    return Data(str(folder / "rows.jsonl"), template=f"{folder}/my.py:row" if template else None)


def with_drop(data: Data, **more: Any) -> Data:
    return replace(data, on_error="drop", **more)


def test_wrong_rows_are_left_out_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    data = write(tmp_path, [BAD[0], GOOD, *BAD[1:], GOOD])
    loaded = load_prompts(with_drop(data), tiny_tokenizer(), 0)
    assert [prompt.index for prompt in loaded.prompts] == [1, 5] and [prompt.row for prompt in loaded.prompts] == [
        GOOD
    ] * 2
    assert [dropped.row for dropped in loaded.drops] == [0, 2, 3, 4]
    assert [dropped.values for dropped in loaded.drops] == BAD
    assert sum(loaded.drops.counts.values()) == 4 and "data: 4 rows are left out: " in loaded.drops.note("data")
    loaded.drops.write(tmp_path / "dropped.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == [{"row", "reason", "message", "values"}] * 4


def test_the_kind_of_most_rows_is_the_kind_of_all_where_wrong_rows_are_left_out(tmp_path: Path) -> None:
    data = write(tmp_path, [{"text": "a"}, {"nothing": 1}, GOOD, GOOD])
    rows = check_rows(with_drop(data), 0)
    assert rows.kind == "completion" and list(rows) == [GOOD, GOOD] and len(rows.drops) == 2


@pytest.mark.parametrize("row", range(3))
def test_the_first_wrong_row_stops_and_the_others_are_counted(row: int, tmp_path: Path) -> None:
    rows = [GOOD, *[BAD[row]] * 3]
    with pytest.raises(DataError, match=r'row 1: .*\(2 more rows are wrong\); data.on_error = "drop" leaves such'):
        check_rows(write(tmp_path, rows), 0)
    with pytest.raises(DataError, match=r"^row 0: ((?!on_error).)*$"):  # advice that would leave nothing is not given
        check_rows(write(tmp_path, [{**BAD[0], "completion": None}]), 0)


def test_a_dataset_without_a_row_that_can_be_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row of the dataset can be used; .*: 2 rows are left out: "):
        check_rows(with_drop(write(tmp_path, [{"prompt": ""}, {"prompt": ""}])), 0)
    with pytest.raises(DataError, match="no row of the dataset can be used"):
        load_prompts(with_drop(write(tmp_path, BAD[3:])), tiny_tokenizer(), 0)


TEMPLATE = """
class Silent(Exception):
    def __str__(self): raise RuntimeError

def row(r):
    if r["i"] == 1: return None
    if r["i"] == 2: raise KeyError("answer")
    if r["i"] == 3: return [r]
    if r["i"] == 4: raise Silent
    if r["i"] == 6: exit()
    return {"prompt": str(r["i"]), "x": (1, {2})}
"""


def test_a_template_leaves_rows_out_by_none_and_its_errors_are_those_of_a_row(tmp_path: Path) -> None:
    data = write(tmp_path, [{"i": i} for i in range(7)], TEMPLATE)
    with pytest.raises(DataError, match=r'row 2: data.template = ".*" raised KeyError: .answer. \(my.py, line 7\)'):
        check_rows(data, 0)
    rows = check_rows(with_drop(data), 0)
    assert [row["prompt"] for row in rows] == ["0", "5"] and rows[0]["x"] == (1, {2})
    assert list(rows.drops.counts) == [
        "template returned None",
        "template raised KeyError",
        "template returned no dict",
        "template raised Silent",
        "template raised SystemExit",
    ]
    only_none = write(tmp_path, [{"i": i} for i in (0, 1, 5)], TEMPLATE)
    assert check_rows(only_none, 0).drops.counts == {"template returned None": 1}


def test_a_long_prompt_follows_its_own_setting(tmp_path: Path) -> None:
    data = write(tmp_path, [{"prompt": "a"}, {"prompt": "a" * 99}])
    with pytest.raises(DataError, match="row 1: the prompt has"):
        load_prompts(with_drop(data, max_prompt_tokens=60, long_prompts="error"), tiny_tokenizer(), 0)
    assert load_prompts(with_drop(data, max_prompt_tokens=60), tiny_tokenizer(), 0).drops.counts == {TOO_LONG: 1}


def test_a_mapped_column_may_be_missing_in_some_rows_and_not_in_all(tmp_path: Path) -> None:
    data = replace(
        write(tmp_path, [{"q": "a"}, {"q": "b", "solution": 1}]), columns={"prompt": "q", "answer": "solution"}
    )
    rows = check_rows(data, 0)
    assert list(rows) == [{"prompt": "a"}, {"prompt": "b", "answer": 1}] and rows.columns == ("prompt", "answer")
    with pytest.raises(DataError, match='answer = "nowhere", but no row has such a column; they have'):
        check_rows(replace(data, columns={"prompt": "q", "answer": "nowhere"}), 0)


def test_rows_stand_in_the_place_of_a_path() -> None:
    assert list(check_rows(Data([GOOD]), 0)) == [GOOD] == list(check_rows(Data(rows=(GOOD,)), 0))
