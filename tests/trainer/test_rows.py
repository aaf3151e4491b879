"""Rows from Python, and rows that are left out: what a run does with them, and what its folder keeps of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_train import grpo, home, metrics, sft  # noqa: F401

import rlft
from rlft.config.data import Data, Eval
from rlft.config.run import Checkpoint, Config
from rlft.errors import ConfigError, DataError, RlftError
from rlft.runs.folder import Run
from rlft.trainer.reopen import evaluate_run

ROWS = [{"q": f"say {i}", "answer": str(i % 10)} for i in range(8)]
KINDS = {"list": lambda: ROWS, "dataset": lambda: datasets.Dataset.from_list(ROWS)}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_from_python_are_copied_and_a_resume_needs_the_folder_alone(kind: str, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cfg = grpo(home, out, data=Data(rows=KINDS[kind](), columns={"prompt": "q"}), checkpoint=Checkpoint(every=1))
    whole = grpo(home, tmp_path / "file", steps=2, data=Data(str(tmp_path / "rows.jsonl"), columns={"prompt": "q"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    rlft.train(cfg, steps=1)
    assert Path(Config.load(out / "config.toml").data.path).parent == out
    rlft.train(out / "config.toml", resume=True, steps=2)
    rlft.train(whole)
    assert metrics(out) == metrics(tmp_path / "file")


def test_data_of_train_takes_the_place_of_the_files(home: Path, tmp_path: Path) -> None:
    """Its other settings hold."""
    out = tmp_path / "run"
    cfg = grpo(home, out, data=Data("nowhere.jsonl", columns={"prompt": "q"}), eval=Eval(rows=2))
    rlft.train(cfg, steps=1, data=ROWS)
    data = Config.load(out / "config.toml").data
    assert data.columns == {"prompt": "q"} and data.path == str(out / "data.jsonl")
    assert [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()] == ROWS
    assert evaluate_run(out)["eval/rows"] == 2


def test_rows_of_the_evaluation_are_copied_too(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    held = [{"prompt": "tell 1", "answer": "1"}, {"prompt": "tell 2", "answer": "2"}]
    rlft.train(grpo(home, out, steps=1, eval=Eval(rows=2, data=Data(rows=held))))
    assert Config.load(out / "config.toml").eval.data == Data(str(out / "eval-data.jsonl"))
    assert evaluate_run(out)["eval/rows"] == 2


@pytest.mark.parametrize("rows", [3, "rows", {"prompt": ["a"]}, None])
def test_what_holds_no_rows_is_refused(rows: Any, home: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.rows = .*: want a list of dicts|give one of data.path"):
        Data(rows=rows)


def test_a_value_that_the_folder_cannot_keep_is_named(home: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "say 1"}, {"prompt": "say 2", "x": object()}]
    with pytest.raises(ConfigError, match="row 1 cannot be kept in the run folder: a value is a object"):
        rlft.train(grpo(home, tmp_path / "run", data=Data(rows=rows)))


BAD = [
    {"prompt": "say 1", "chosen": "a", "rejected": None},
    {"chosen": "a"},
    {"prompt": "", "chosen": "a", "rejected": "b"},
    {"prompt": "<|im_start|>", "chosen": "a", "rejected": "b"},
]
"""Rows that are refused, the last one by the chat template."""


def test_wrong_rows_stop_a_run_or_are_left_out_and_kept(home: Path, tmp_path: Path, capsys) -> None:
    good = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in range(6)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [*good[:3], *BAD, *good[3:]])) + "\n{")
    cfg = sft(home, tmp_path / "run", data=Data(str(path)), algo=rlft.Algo("dpo"), steps=1)
    with pytest.raises(ConfigError, match=r"row 3: column rejected .*\(3 more rows are wrong\); data.on_error = .drop"):
        rlft.train(cfg)
    rlft.train(cfg, data={"on_error": "drop"})
    lines = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    assert {line["row"]: line["values"] for line in lines} == {**dict(enumerate(BAD, 3)), 10: None}
    assert all(line["message"] and line["reason"] for line in lines)
    assert "data: 5 rows are left out: " in capsys.readouterr().out
    path.write_text("\n".join(map(json.dumps, BAD)))
    with pytest.raises(RlftError, match=r"no row of the dataset can be used; .*: 4 rows are left out"):
        rlft.train(sft(home, tmp_path / "none", data=Data(str(path), on_error="drop"), algo=rlft.Algo("dpo")))


def test_an_iterable_gives_as_many_rows_as_the_run_can_draw(home: Path, tmp_path: Path, capsys) -> None:
    """In its order; a resume needs the folder alone."""
    out = tmp_path / "run"
    endless = ({"prompt": f"say {i}", "answer": str(i)} for i in itertools.count())
    rlft.train(grpo(home, out, steps=2, data=Data(rows=endless), checkpoint=Checkpoint(every=1)))
    assert "data: the first 6 rows of the iterable are used, in its order" in capsys.readouterr().out
    assert next(endless)["answer"] == "6" and len((out / "data.jsonl").read_text().splitlines()) == 6
    assert [row["row"] for row in Run.resume(out).read_rollouts(1)][::4] == [0, 1, 2]
    data = Config.load(out / "config.toml").data
    assert not data.shuffle and data.path == str(out / "data.jsonl")
    with pytest.raises(ConfigError, match=r"data.epochs: the rows are an iterable, whose length is not known"):
        rlft.train(grpo(home, tmp_path / "no", steps=None, data=Data(rows=iter(ROWS), epochs=1)))
    with pytest.raises(DataError, match=r"data.rows: the iterable raised ZeroDivisionError: .* after row 1"):
        rlft.train(grpo(home, tmp_path / "no", data=Data(rows=({"prompt": str(1 // (2 - i))} for i in range(9)))))
