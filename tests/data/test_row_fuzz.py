"""Random rows and files: only rlft's own errors come out, and with on_error = "drop" every row is used or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from rlft.config.data import Data
from rlft.data.prompts import load_prompts
from rlft.errors import DataError

TOKENIZER = tiny_tokenizer()
TEXT = st.text(st.characters(), max_size=8)  # lone surrogates and control characters among them
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
CALL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": JSON})}) | JSON
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON, "content": TEXT | JSON},
    optional={"tool_calls": st.lists(CALL, max_size=2) | JSON, "weight": JSON, "train": JSON, "name": JSON},
)
SHAREGPT = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]) | JSON, "value": TEXT | JSON})
SPEECH = TEXT | st.lists(MESSAGE, max_size=4) | JSON
IDS = st.lists(st.integers(-2, 120), max_size=6) | JSON
COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("prompt", "completion", "messages", "text", "chosen", "rejected"), SPEECH),
    **dict.fromkeys(("input_ids", "labels", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids"), IDS),
    "conversations": st.lists(SHAREGPT, max_size=4) | JSON,
    **dict.fromkeys(("instruction", "input", "output", "system", "label", "answer", "tools"), JSON),
}
ROW = st.lists(st.sampled_from(list(COLUMNS)), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: COLUMNS[name] for name in names})
)
KINDS = """\
prompt, prompt answer, prompt completion, prompt completion label, messages, messages tools, text, chosen rejected,
prompt chosen rejected, conversations, input_ids labels, prompt_ids completion_ids, instruction input output"""
ROWS = st.sampled_from([kind.split() for kind in KINDS.split(",")]).flatmap(
    lambda names: st.lists(st.fixed_dictionaries({name: COLUMNS[name] for name in names}) | ROW, min_size=1, max_size=5)
)
"""Rows mostly of one kind, whose columns hold what they should, nearly, or not at all."""

SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst"])

BOUNDED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@BOUNDED
@given(ROWS, st.sampled_from(["stop", "drop"]), st.booleans())
def test_rows_are_used_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], on_error: Any, lines: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    for data in (Data(str(path), on_error=on_error), Data(rows=rows, on_error=on_error)):
        try:
            loaded = load_prompts(data, TOKENIZER, 0)
        except DataError as error:
            assert str(error)
            continue
        assert len(loaded.prompts) + len(loaded.drops) == len(rows) and (on_error == "drop" or not loaded.drops)
        assert all(len(prompt.ids) or prompt.recorded for prompt in loaded.prompts)
        loaded.drops.write(path.with_name("dropped.jsonl"))


@BOUNDED
@given(
    st.binary(max_size=60) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst"]),
)
def test_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = Path(tmp_path_factory.getbasetemp() / f"fuzz{suffix}")
    path.write_bytes(data)
    with pytest.raises(DataError):
        load_prompts(Data(str(path)), TOKENIZER, 0)
        raise DataError("it was read")
