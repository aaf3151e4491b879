"""Texts that are no path for the system end in one sentence, wherever a path is given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rlft.cli.main import main
from rlft.config.data import Data
from rlft.config.paths import user_path
from rlft.data.sources import load_rows
from rlft.errors import ConfigError
from rlft.models.continued import read_adapter_config
from rlft.models.load import load_tokenizer
from rlft.runs.folder import Run

NO_PATH = {"user": "~nosuchuser/x", "long": "x" * 300, "deep": "a/" * 3000, "nul": "a\0b", "half": "a\ud83d"}
USES = {
    "model": load_tokenizer,
    "out": Run.create,
    "run": Run.resume,
    "data": lambda text: load_rows(Data(text), 0),
    "lora.resume_from": read_adapter_config,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", NO_PATH)
def test_a_text_that_cannot_be_a_path(name: str, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot be a path here") as error:
        USES[use](NO_PATH[name])
    assert len(str(error.value)) < 400 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NO_PATH)
def test_a_config_file_or_reward_of_that_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"{NO_PATH[name]}.toml"]) == 2
    assert main(["reward-check", f"{NO_PATH[name]}.py:f", "--data", "d.jsonl"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("out", [3, None, [], b"runs"])
def test_what_is_no_text_and_no_path_is_named(out: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^out is a {type(out).__name__}: give a path$"):
        user_path(out, "out")


def test_a_loop_of_links_and_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConfigError, match="Too many levels"):
        user_path(tmp_path / "a", "out")
    (tmp_path / "file").touch()
    assert user_path(tmp_path / "file" / "x", "out") == tmp_path / "file" / "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    with pytest.raises(ConfigError, match="Permission denied"):
        user_path(tmp_path / "closed" / "x", "out")


def test_a_file_name_that_is_no_utf8_is_a_path() -> None:
    assert os.fsencode(user_path(os.fsdecode(b"caf\xe9"), "out")) == b"caf\xe9"
