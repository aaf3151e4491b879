"""Datasets by name: files, folders, generated tasks, mixtures, templates, column mapping; every fault by its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlft.config.data import Data, Source
from rlft.data.usable import check_rows
from rlft.errors import DataError


def load_rows(data: Data, seed: int) -> list[dict[str, Any]]:
    return list(check_rows(data, seed))


ROWS = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(6)]
COLUMNS = {"prompt": "question"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same six rows as each kind of file and as a datasets folder."""
    paths = {kind: tmp_path / f"rows.{kind}" for kind in ("jsonl", "json", "parquet", "csv")}
    paths["jsonl"].write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    paths["json"].write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), paths["parquet"])
    paths["csv"].write_text("question,answer\n" + "".join(f"{r['question']},x{r['answer']}\n" for r in ROWS))
    paths["folder"] = tmp_path / "folder"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(paths["folder"]))
    return paths


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "folder"])
def test_every_kind_of_file_gives_the_same_rows_with_our_column_names(kind: str, files: dict[str, Path]) -> None:
    rows = load_rows(Data(str(files[kind]), columns=COLUMNS), seed=0)
    assert [r["prompt"] for r in rows] == [r["question"] for r in ROWS] and "question" not in rows[0]
    assert rows[3]["answer"] == ("x4" if kind == "csv" else "4")


def test_a_reasoning_gym_task_is_seeded_and_takes_its_own_arguments() -> None:
    data = Data("reasoning_gym:chain_sum", args={"size": 5, "min_terms": 2, "max_terms": 2})
    rows = load_rows(data, seed=1)
    assert rows == load_rows(data, seed=1) != load_rows(data, seed=2)
    assert len(rows) == 5 and rows[0].keys() == {"prompt", "answer", "task", "metadata"}


def test_a_template_and_a_mapping_apply_in_that_order(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def row(r):\n    return {'q': r['question'] + '?', 'answer': r['answer']}\n")
    rows = load_rows(Data(str(files["jsonl"]), template=f"{tmp_path}/my.py:row", columns={"prompt": "q"}), 0)
    assert rows[0] == {"answer": "1", "prompt": "0 + 1?"}


def test_a_mixture_has_the_asked_shares_and_no_row_twice(tmp_path: Path) -> None:
    """Weights 3 : 1 over 30 and 100 rows: the first is the scarcest, 30 + 10."""
    for name, n in (("a", 30), ("b", 100)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": f"{name}{i}"}) for i in range(n)))
    data = Data(sources=(Source(f"{tmp_path}/a.jsonl", weight=3), Source(f"{tmp_path}/b.jsonl", weight=1)))
    prompts = [r["prompt"] for r in load_rows(data, seed=5)]
    assert len(set(prompts)) == len(prompts) == 40 and sum(p[0] == "a" for p in prompts) == 30
    assert prompts == [r["prompt"] for r in load_rows(data, seed=5)] != [r["prompt"] for r in load_rows(data, seed=6)]


FAULTS = {
    "no file": (Data("nowhere.jsonl"), r'data.path = "nowhere.jsonl": no such file'),
    "no folder": (Data("./nowhere"), r'data.path = "./nowhere": no such file or folder'),
    "unknown task": (Data("reasoning_gym:chain_smu"), r'no such task. Did you mean "chain_sum"\?'),
    "bad argument": (Data("reasoning_gym:chain_sum", args={"terms": 2}), r"data.args = .*chain_sum does not take them"),
    "arguments of a file": (Data("a.jsonl", args={"size": 2}), r'only "reasoning_gym:TASK" takes arguments'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_named(fault: str) -> None:
    data, message = FAULTS[fault]
    with pytest.raises(DataError, match=message):
        load_rows(data, seed=0)


def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    bad = {
        "a.jsonl": '{"prompt": "x"}\n{"prompt": \n',
        "b.jsonl": '{"prompt": "x"}\n[1]\n',
        "c.json": '{"a":\n 1}',
        "d.parquet": "no",
        "e.jsonl": "",
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    for name, message in {
        "a.jsonl": "a.jsonl, line 2: not valid JSON",
        "b.jsonl": "line 2: want an object with columns, got list",
        "c.json": "want a list of objects",
        "d.parquet": 'd.parquet": cannot be read: ArrowInvalid: ',
        "e.jsonl": "the dataset is empty",
    }.items():
        with pytest.raises(DataError, match=message):
            load_rows(Data(str(tmp_path / name)), seed=0)


def test_a_column_that_is_not_there_lists_those_that_are(files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match='prompt = "problem", but row 0 has no such column; it has question, answer'):
        load_rows(Data(str(files["jsonl"]), columns={"prompt": "problem"}), seed=0)


def test_a_split_that_is_not_there_lists_those_that_are(files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r'data.split = "test": .* has train'):
        load_rows(Data(str(files["folder"]), split="test"), seed=0)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r'data.path = "nobody/nothing": no such file here, and the hub did not give it'
    ):
        load_rows(Data("nobody/nothing"), seed=0)
