"""Code that a run folder names is run for the user who made the folder, and for others only where they say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlft.cli.main import main
from rlft.config.data import Reward
from rlft.config.files import to_toml
from rlft.config.run import Config
from rlft.errors import ConfigError
from rlft.runs import trust
from rlft.runs.folder import Run


def config(**settings: Any) -> Config:
    return Config(**{"model": "m", "data": "d.jsonl", "out": "run", "steps": 1, **settings})  # type: ignore[arg-type]


CODE = {
    "reward": config(rewards=["r.py:f"]),
    "function of an installed package": config(rewards=[Reward("shutil:rmtree", args={"path": "/"})]),
    "reward of the evaluation": config(rewards=["number"], eval={"rows": 1, "rewards": ["r.py:f"]}),
    "template": config(data={"path": "d", "template": "t.py:row"}),
    "template of held-out rows": config(eval={"rows": 1, "data": {"path": "d", "template": "t.py:row"}}),
    "loss": config(algo="loss.py"),
    "advantage": config(algo={"name": "grpo", "advantage": "a.py:f"}),
    "key of the reader": config(rewards=[Reward("number", args={"x": "env:HF_TOKEN"})]),
    "address": config(rewards=[Reward("number", args={"urls": ["https://host/v1"]})]),
}


@pytest.mark.parametrize("name", CODE)
def test_the_code_of_a_folder_from_elsewhere_is_asked_for(name: str, tmp_path: Path) -> None:
    run, cfg = Run.create(tmp_path / "run"), CODE[name]
    run.write_config(to_toml(cfg))
    with pytest.raises(ConfigError, match="add --trust"):
        trust.check(run, cfg, trust=False)
    trust.check(run, cfg, trust=True)
    trust.sign(run)
    trust.check(run, cfg, trust=False)
    moved = Run(Path(shutil.copytree(run.path, tmp_path / "moved")))
    with pytest.raises(ConfigError, match="add --trust"):
        trust.check(moved, cfg, trust=False)
    run.write_config(to_toml(cfg) + "\n# edited")
    with pytest.raises(ConfigError, match="add --trust"):
        trust.check(run, cfg, trust=False)


def test_the_key_is_of_one_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cfg = Run.create(tmp_path / "run"), CODE["reward"]
    run.write_config(to_toml(cfg))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "me"))
    trust.sign(run)
    key = tmp_path / "me" / "rlft" / "key"
    assert key.stat().st_mode & 0o077 == 0 and len(key.read_bytes()) == 32 and len(list(key.parent.iterdir())) == 1
    trust.check(run, cfg, trust=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "you"))
    with pytest.raises(ConfigError, match="add --trust"):
        trust.check(run, cfg, trust=False)


def test_a_user_without_a_home_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    run = Run.create(tmp_path / "run")
    run.write_config(to_toml(CODE["reward"]))
    trust.sign(run)
    with pytest.raises(ConfigError, match="add --trust"):
        trust.check(run, CODE["reward"], trust=False)


def test_what_runs_nothing_is_not_asked_for(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    trust.check(run, config(rewards=["number", Reward("exact", args={"a": 1})]), trust=False)
    trust.check(run, CODE["reward"], trust=False, rewards=False)
    with pytest.raises(ConfigError):  # the folder is one that is asked for where something runs
        trust.check(run, CODE["reward"], trust=False)


def test_eval_runs_nothing_of_a_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.create("run")
    run.write_config(to_toml(config(rewards=["run/evil.py:f"], eval={"rows": 1})))
    (tmp_path / "run" / "evil.py").write_text("open('RAN', 'w').close()\ndef f(completions): return [1.0]\n")
    assert main(["eval", "run"]) == 2
    assert 'rewards = "run/evil.py:f"' in capsys.readouterr().err and not Path("RAN").exists()


def test_reward_check_runs_no_template_of_a_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Run.create("run").write_config(to_toml(config(data={"path": "d.jsonl", "template": "run/evil.py:f"})))
    Path("run/evil.py").write_text("open('RAN', 'w').close()\ndef f(row): return row\n")
    Path("d.jsonl").write_text(json.dumps({"prompt": "a", "answer": "1"}) + "\n")
    assert main(["reward-check", "number", "--run", "run"]) == 2
    assert 'data.template = "run/evil.py:f"' in capsys.readouterr().err and not Path("RAN").exists()
    assert main(["reward-check", "number", "--run", "run", "--trust"]) == 2
    assert "holds no rollouts yet" in capsys.readouterr().err and Path("RAN").exists()


def test_a_run_folder_is_its_owners(tmp_path: Path) -> None:
    assert Run.create(tmp_path / "a").path.stat().st_mode & 0o777 == 0o700
    assert Run.create(tmp_path / "b", share=True).path.stat().st_mode & 0o555 == 0o555
