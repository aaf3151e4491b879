"""benchmarks/faults.py: a few of rlft's faults end as its results say, and the table is made of results files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "injected"))

import faults
import rlft_faults

BENCHMARKS = Path(faults.__file__).parent


@pytest.mark.parametrize(
    ("fault", "step", "said"),
    [
        ("stale_adapter_unseen", 3, "ParityError: engine and trainer disagree"),
        ("scaled_twice", 1, "EngineError: after loading policy version 0 the engine scales"),
        ("few_sequences_off", 3, "ParityError: engine and trainer disagree about 1 of 20 sequences"),
        ("rendered_twice", 0, "DataError: row 0: the prompt contains <|im_"),
        ("two_bos", 0, "DataError: row 0: the text begins with two BOS tokens"),
        ("packed_hybrid", 0, "ConfigError: model: Lfm2ForCausalLM does not train exactly here"),
        ("update_before_backward", 3, "RuntimeError: layer 1: the adapter was modified in place"),
        ("nan_adapter", 3, "TrainError: the adapter of policy version 3 is not finite"),
        ("dropout", 0, "ConfigError: lora.dropout = 0.05"),
    ],
)
def test_a_fault_stops_the_run_with_the_sentence_that_fits(fault: str, step: int, said: str, tmp_path: Path) -> None:
    found = rlft_faults.RUNS[fault](tmp_path)
    assert (found.metric, found.value, found.note[: len(said)]) == ("stopped_at_step", step, said)


def test_without_a_fault_a_run_ends(tmp_path: Path) -> None:
    found = rlft_faults.RUNS["none"](tmp_path)
    assert (found.metric, found.value, found.note) == ("finished", 6, "trains on; adapter finite")


def test_every_fault_has_its_run_in_both_stacks() -> None:
    source = (BENCHMARKS / "injected" / "trl_faults.py").read_text()
    assert set(faults.FAULTS) == set(rlft_faults.RUNS) and all(f'"{fault}": ' in source for fault in faults.FAULTS)


def test_results_of_a_gpu_come_first_and_what_was_not_run_is_said(tmp_path: Path) -> None:
    def file(device: str, *rows: tuple[str, str, float, str]) -> None:
        made = [dict(zip(("work", "stack", "metric", "value", "note"), ("nan_weight", *r), strict=True)) for r in rows]
        (tmp_path / f"faults_{device}_2026-01-01.json").write_text(json.dumps({"rows": made}))

    file(
        "cpu", ("rlft", "finished", 6, "trains on; x"), ("trl", "finished", 6, "ends green; adapter NOT finite; losses")
    )
    file("gpu", ("rlft", "stopped_at_step", 2, "TrainError: the base; exit code 3"))
    lines = faults.table(tmp_path, ("nan_weight",)).splitlines()
    what = faults.FAULTS["nan_weight"]
    assert lines[2] == f"| {what} | **stops** at step 2: TrainError | ends green: adapter NOT finite | not run yet |"
    assert lines[-1].count("](benchmarks/results/faults_") == 2


def test_a_run_that_hangs_or_crashes_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults.outcome("rlft", "no such fault", 60.0)["metric"] == "crashed"
    found = faults.outcome("rlft", "none", 0.05)
    assert (found["metric"], found["value"]) == ("hung", 0.05)
