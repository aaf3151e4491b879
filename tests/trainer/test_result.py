"""A run as an object: what `rlft.train` returns and `rlft.open` opens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
from peft import PeftModel
from reward_functions import by_length

import rlft
from rlft.errors import ConfigError
from rlft.trainer.result import Result


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Result:
    folder = tmp_path_factory.mktemp("result")
    tiny.save_tiny(folder / "model")
    (folder / "data.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(8)))
    cfg = rlft.Config(
        model=str(folder / "model"),
        data=str(folder / "data.jsonl"),
        out=str(folder / "run"),
        steps=2,
        prompts_per_step=2,
        sampling=rlft.Sampling(group_size=2, max_tokens=4),
        eval=rlft.Eval(rows=2),
    )
    return rlft.train(cfg, rewards=[by_length])


def test_a_result_is_what_open_finds_in_the_folder(result: Result) -> None:
    opened = rlft.open(result.out)
    assert (opened.steps, opened.adapter, opened.report) == (2, result.adapter, result.report)
    assert opened.before == result.before and opened.after == result.after
    assert "eval/reward_change" in opened.after and opened.adapter.name == "step-000002"
    assert repr(opened) == repr(result) and "2 steps" in repr(result)


def test_metrics_and_rollouts_are_tables(result: Result) -> None:
    frame = result.metrics()
    assert list(frame[frame["loss"].notna()]["step"]) == [1, 2]
    rollouts = result.rollouts()
    assert len(rollouts) == 4 and set(rollouts["step"]) == {2} and "reward" in rollouts
    assert len(result.rollouts(1)) == 4 and len(result.rollouts(0, held_out=True)) == 2
    with pytest.raises(ConfigError, match=r"step = 7: .* has rollouts of the steps 1, 2"):
        result.rollouts(7)


def test_without_pandas_tables_are_columns(result: Result, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    columns = result.metrics()
    assert len(columns["step"]) == len(columns["loss"]) and None in columns["loss"]


def test_a_notebook_shows_curves_and_the_evaluation(result: Result, tmp_path: Path) -> None:
    shown = result._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and "Held-out reward" in shown and "after step 2" in shown
    page = result.plot("loss", "entropy").save(tmp_path / "curves.html").read_text()
    assert page.count("<svg") == 2 and "entropy" in page
    with pytest.raises(ConfigError, match='no metric "los"'):
        result.plot("los")


def test_a_result_generates_and_evaluates(result: Result) -> None:
    one = result.generate("say 1", temperature=0, max_tokens=3)
    assert isinstance(one, str)
    assert result.generate(["say 1", "say 2"], temperature=0, max_tokens=3)[0] == one
    again = result.evaluate(rewards=[by_length])
    assert again["eval/reward"] == pytest.approx(result.after["eval/reward"]) and again["step"] == 2


def test_the_model_of_a_result_is_peft(result: Result) -> None:
    model, tokenizer = result.model()
    assert isinstance(model, PeftModel) and tokenizer.decode(tokenizer("ab")["input_ids"]) == "ab"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        rlft.open(tmp_path)
