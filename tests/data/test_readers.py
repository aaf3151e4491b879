"""Files as people have them: what is in a file arrives unchanged, and what cannot be read is named by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlft.config.data import Data
from rlft.data.usable import check_rows
from rlft.errors import ConfigError, DataError

LINES = b'{"prompt": "a", "answer": 3}\n\n{"prompt": "b", "answer": 3.5}\n'
ROWS = [{"prompt": "a", "answer": 3}, {"prompt": "b", "answer": 3.5}]


def read(path: Path, data: bytes, **options: Any) -> list[dict[str, Any]]:
    path.write_bytes(data)
    return list(check_rows(Data(str(path), **options), seed=0))


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.json.bz2", "a.jsonl.zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_are_read_under_any_name_with_or_without_a_bom(name: str, mark: bytes, tmp_path: Path) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    assert read(tmp_path / name, pack(mark + LINES)) == ROWS
    assert read(tmp_path / name, pack(mark + json.dumps(ROWS, indent=1).encode())) == ROWS


def test_a_value_of_json_arrives_as_it_is(tmp_path: Path) -> None:
    """Keys that some rows lack stay missing, a cut emoji and a large integer stay what they are."""
    rows = [{"prompt": "\u2028", "x": {"a": 1}}, {"prompt": "b", "x": {"b": ["\ud83d", 2**80, None]}, "y": 1e400}]
    assert read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode()) == rows


@pytest.mark.parametrize("size", [1, 3000])
def test_a_table_of_text_keeps_line_ends_zeros_and_truth_values(size: int, tmp_path: Path) -> None:
    """With 3,000 rows the file is larger than a block of Arrow's reader."""
    text = "a\r\n" * 200 + "b"
    table = "\ufeffprompt,answer,n\r\n" + f'"{text}",true,007\r\n' * size + "NA,,1e5\r\n"
    rows = read(tmp_path / "a.csv", table.encode())
    assert rows[0] == {"prompt": text, "answer": "true", "n": "007"} == rows[-2] and len(rows) == size + 1
    assert rows[-1] == {"prompt": "NA", "answer": "", "n": "1e5"}
    assert read(tmp_path / "a.tsv", b"prompt\tanswer\na,b\tc\n") == [{"prompt": "a,b", "answer": "c"}]


def test_labels_of_a_table_are_truth_values(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", b"prompt,completion,good\na,b,True\na,c,false\n", columns={"label": "good"})
    assert [row["label"] for row in rows] == [True, False]
    with pytest.raises(DataError, match="column label is 'yes'"):
        read(tmp_path / "a.csv", b"prompt,completion,label\na,b,yes\n")


DEEP = b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_FILES = {
    "a.jsonl": (LINES + DEEP, "a.jsonl, line 4: not valid JSON: nested too deeply"),
    "b.json": (b"[" + DEEP + b"]", "b.json: not valid JSON: nested too deeply"),
    "c.jsonl": (LINES + b'{"prompt": "\xff"}', "c.jsonl, line 4: not UTF-8"),
    "d.jsonl": (LINES.decode().encode("utf-16"), "d.jsonl, line 1: not UTF-8"),
    "e.json": (b'{"a":\n', "e.json: want a list of objects, or one object in each line: Expecting value"),
    "f.json": (b"[[1]]", "f.json: want a list of objects, one per row; item 0 is list"),
    "g.csv": (b"prompt\n\xe9\n", "g.csv.*cannot be read: UnicodeDecodeError"),
    "h.csv": (b"prompt,answer\na\n", "h.csv.*cannot be read: ArrowInvalid: .*Expected 2 columns, got 1"),
    "i.csv": (b"prompt,prompt\na,b\n", "two columns are called prompt"),
    "j.csv": (b"\n", "the dataset is empty"),
    "k.parquet": (b"PAR1" + bytes(50), "k.parquet.*cannot be read: ArrowInvalid"),
    "l.jsonl.gz": (LINES, "l.jsonl.gz.*cannot be read: OSError"),
    "m.jsonl.zst": (zstd(LINES * 999)[:50], "m.jsonl.zst.*cannot be read|the dataset is empty"),
    "n.jsonl": (b"\x00\n", "n.jsonl, line 1: not valid JSON"),
    "o.jsonl": (b'{"prompt": "a", "x": ' + b"9" * 6000 + b"}", "o.jsonl, line 1: not valid JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_one_sentence(name: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[name]
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, data)


@pytest.mark.parametrize(
    "name", ["a" * 300 + ".jsonl", "~nobody-of-this-name/a.jsonl", "a\0.jsonl", "a/" * 3000, "../a"]
)
def test_a_path_that_no_file_has_is_one_sentence(name: str) -> None:
    with pytest.raises((ConfigError, DataError), match=r"data.path = "):
        check_rows(Data(name), seed=0)


@pytest.mark.parametrize("state", ["{", "[]", "{}", '{"_data_files": [{"filename": "../../../etc/passwd"}]}'])
def test_a_damaged_folder_of_datasets_is_one_sentence(state: str, tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "rows"))
    (tmp_path / "rows" / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"rows"):
        check_rows(Data(str(tmp_path / "rows")), seed=0)


def test_a_value_of_a_table_that_cannot_be_read_names_its_row(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a", "b"], "x": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: a value of .*a.parquet cannot be read: UnicodeDecodeError"):
        check_rows(Data(str(tmp_path / "a.parquet")), seed=0)
    rows = check_rows(Data(str(tmp_path / "a.parquet"), on_error="drop"), seed=0)
    assert list(rows) == [{"prompt": "a", "x": "good"}] and rows.drops.counts == {"unreadable value": 1}


def test_answers_of_any_type_and_missing_ones_are_fine_where_no_reward_asks(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": 3},
        {"prompt": "b", "answer": "x"},
        {"prompt": "c", "answer": None},
        {"prompt": "d"},
    ]
    assert read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode()) == rows


def test_no_two_readings_share_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "x": [1]}')
    rows = check_rows(Data(str(tmp_path / "a.jsonl")), seed=0)
    rows[0]["x"].append(2)
    assert rows[0] == {"prompt": "a", "x": [1]} == next(iter(rows))
