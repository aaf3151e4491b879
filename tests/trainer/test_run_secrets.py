"""A run with a key in its rewards: the function gets it, and nothing that the run leaves behind has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from rlft.cli.main import main

KEY = "sk-live-SECRET123"
REWARDS = """
import os
def keyed(completions, api_key, log_extra, **k):
    assert api_key == "sk-live-" + "SECRET123"
    log_extra("seen", ["with " + api_key for text in completions])
    return [float(len(text)) for text in completions]
def failing(completions, options, **k):
    raise ValueError("denied for " + options["password"])
"""
RUN = """
model = "model"
data = "p.jsonl"
steps = 1
prompts_per_step = 2
sampling = {{ group_size = 2, max_tokens = 4 }}
lora = {{ rank = 2 }}
track = {{ use = ["tensorboard", "wandb"], mode = "offline" }}
rewards = [{{ use = "r.py:{function}", args = {args} }}]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model(seed=3).unload().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("p.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(4)))
    Path("r.py").write_text(REWARDS)
    return tmp_path


def having(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("value", [KEY, "env:MY_KEY"])
def test_a_key_is_in_no_file_and_on_no_screen(
    value: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    Path("a.toml").write_text(RUN.format(function="keyed", args=f'{{ api_key = "{value}" }}') + 'out = "a"\n')
    assert main(["train", "a.toml"]) == 0
    shown = "".join(capsys.readouterr())
    assert KEY not in shown and ("looks like a secret" in shown) == (value == KEY)
    assert 'wandb: project "mine"' in shown and "tensorboard: project" not in shown
    assert having(home / "a") == [] and (home / "a").stat().st_mode & 0o077 == 0
    assert ('api_key = "***"' in Path("a/config.toml").read_text()) == (value == KEY)
    # What was masked is asked for before a model is loaded; a reference is resolved again.
    assert main(["train", "a/config.toml", "--resume", "--steps=2"]) == (2 if value == KEY else 0)
    assert ("was masked when this file was written" in "".join(capsys.readouterr())) == (value == KEY)


def test_the_message_of_a_fault_has_no_key(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RUN.format(function="failing", args=f'{{ options = {{ password = "{KEY}" }} }}')
    Path("a.toml").write_text(text + 'out = "a"')
    assert main(["train", "a.toml"]) == 2
    shown = "".join(capsys.readouterr())
    assert "denied for ***" in shown and KEY not in shown and having(home / "a") == []


def test_a_variable_that_is_missing_is_named_before_anything_is_loaded(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    Path("a.toml").write_text(RUN.format(function="keyed", args='{ api_key = "env:MY_KEY" }') + 'out = "a"')
    assert main(["train", "a.toml"]) == 2
    shown = "".join(capsys.readouterr())
    assert 'rewards[0].args.api_key = "env:MY_KEY": the environment variable MY_KEY is not set' in shown
    assert "loading" not in shown and not Path("a").exists()
