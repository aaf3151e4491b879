"""Settings of version 0.1 are refused with the name they have now."""

from __future__ import annotations

import pytest

from rlft.algos.algorithm import build_algorithm
from rlft.cli.main import parse
from rlft.config.run import Algo, Config
from rlft.config.section import paths
from rlft.config.trl_names import RENAMED, RENAMED_VALUES
from rlft.errors import ConfigError

BASE = {"model": "m", "data": "d.jsonl", "out": "o", "steps": 1}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one(old: str, new: str) -> None:
    section, _, field = old.rpartition(".")
    with pytest.raises(ConfigError, match=rf"{old}: is called {new} now"):
        if section == "algo":
            build_algorithm(Algo("grpo", {field: 0.5}))
        else:
            Config(**{**BASE, **({section: {field: 1}} if section else {field: {"rounds": 1}})})
    assert section == "algo" or new in {*paths(), *(path.partition(".")[0] for path in paths())}


@pytest.mark.parametrize(("setting", "new"), RENAMED_VALUES.items())
def test_an_old_value_is_refused_with_the_new_one(setting: tuple[str, str], new: str, tmp_path) -> None:
    path, value = setting
    section, _, field = path.partition(".")
    with pytest.raises(ConfigError, match=f'{path} = "{value}": is called "{new}" now'):
        Config(**{**BASE, section: {field: value}})
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\ndata = "d.jsonl"\nout = "o"\nsteps = 1\n')
    with pytest.raises(ConfigError, match=f'{path} = "{value}": is called "{new}" now'):
        parse("train", [str(file), f"--{path}={value}"])
