"""Every setting is checked alike, with the same sentence, from Python, TOML, YAML and a flag."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml

from rlft.cli.main import parse
from rlft.config.run import Config
from rlft.config.section import SECTIONS, paths, plain
from rlft.errors import ConfigError

RUN: dict[str, Any] = {"model": "m", "data": {"path": "d"}, "out": "o", "steps": 1}
BY_VALUE = ("algo", "args", "columns", "chat_template_kwargs")
"""Settings whose flags depend on a value, or that take any table."""


def hint_of(path: str) -> Any:
    hint: Any = Config
    for part in path.split("."):
        hint = typing.get_type_hints(plain(hint), include_extras=True)[part]
    return hint


SETTINGS = [
    path
    for path in paths()
    if path.rpartition(".")[2] not in BY_VALUE
    and not path.startswith(("algo", "rewards.", "data.sources.", "eval.rewards.", "eval.data"))
    and plain(hint_of(path)) not in SECTIONS
]


def wrong_for(hint: Any) -> Any:
    """A value that no setting of this type takes, and that a file can hold: a truth value, or for one a number."""
    kind = plain(hint)
    return 7 if bool in (kind, *map(plain, typing.get_args(kind))) else True


def nested(path: str, value: Any) -> dict[str, Any]:
    section, _, field = path.rpartition(".")
    table = {key: dict(part) if isinstance(part, dict) else part for key, part in RUN.items()}
    if not section:
        return {**table, field: value}
    return {**table, section: {**table.get(section, {}), field: value}}


def sentence(make: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


@pytest.mark.parametrize("path", SETTINGS)
def test_a_wrong_value_gets_the_same_sentence_from_everywhere(path: str, tmp_path: Path) -> None:
    value = wrong_for(hint_of(path))
    table = nested(path, value)
    expected = sentence(lambda: Config(**table))
    assert expected.startswith(f"{path} = {json.dumps(value)}: want ")
    toml, yml, plain_file = tmp_path / "run.toml", tmp_path / "run.yaml", tmp_path / "plain.toml"
    toml.write_text(tomli_w.dumps(table))
    yml.write_text(yaml.safe_dump(table))
    plain_file.write_text(tomli_w.dumps(RUN))
    assert sentence(lambda: Config.load(toml)) == expected
    assert sentence(lambda: Config.load(yml)) == expected
    section, _, field = path.rpartition(".")
    classes = {name: cls for cls, name in SECTIONS.items()}
    if section and section != "data":
        assert sentence(lambda: classes[section](**{field: value})) == expected
    kind = plain(hint_of(path))
    # A flag of a list or a text takes any word as an item.
    if kind not in (bool, str) and "tuple" not in str(kind) and str not in typing.get_args(kind):
        assert sentence(lambda: parse("train", [str(plain_file), f"--{path}={json.dumps(value)}"])) == expected


def test_the_walk_sees_every_kind_of_setting() -> None:
    kinds = {str(plain(hint_of(path))) for path in SETTINGS}
    assert len(SETTINGS) > 75 and len(kinds) > 8


@pytest.mark.parametrize("path", SETTINGS)
def test_the_default_of_a_setting_passes_its_own_check(path: str) -> None:
    section, _, field = path.rpartition(".")
    whole = Config(**RUN)
    part = getattr(whole, section) if section else whole
    assert dataclasses.replace(part, **{field: getattr(part, field)}) == part


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda m: Config(**RUN, step=3), 'step: unknown setting. Did you mean "steps"?'),
        (
            lambda m: m["sampling"](num_generations=4),
            "sampling.num_generations: unknown setting. TRL's num_generations is sampling.group_size here",
        ),
        (lambda m: m["optim"](lr="fast"), 'optim.lr = "fast": want a number'),
        (
            lambda m: Config("m", "d", "o", steps=1, loss_type="dapo"),
            'loss_type: unknown setting. TRL\'s loss_type = "dapo" is algo.aggregation = "token_mean" here',
        ),
        (
            lambda m: Config("m", "d", "o", steps=1, warmup_ratio=0.1),
            "warmup_ratio: unknown setting. TRL's "
            "warmup_ratio is optim.warmup here: a share of all updates there, a number of updates here",
        ),
        (lambda m: Config("m", 3, "o", steps=1), "data = 3: want a string (path) or a table with path, split, "),
    ],
)
def test_python_callers_get_our_sentences(make: Any, expected: str) -> None:
    assert sentence(lambda: make({name: cls for cls, name in SECTIONS.items()})).startswith(expected)


def test_short_forms_are_taken_everywhere(tmp_path: Path) -> None:
    table = {**RUN, "data": "rows.jsonl", "algo": "gspo", "rewards": ["number", {"use": "exact", "weight": 0.5}]}
    cfg = Config(**table, optim={"lr": "1e-5"})
    assert (cfg.data.path, cfg.algo.name, cfg.optim.lr) == ("rows.jsonl", "gspo", 1e-5)
    assert [(reward.use, reward.weight) for reward in cfg.rewards] == [("number", 1.0), ("exact", 0.5)]
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps({**table, "optim": {"lr": "1e-5"}}))
    assert Config.load(file) == cfg
    assert Config(**RUN, algo={"name": "grpo", "clip_high": 0.28}).algo.options == {"clip_high": 0.28}


def test_a_change_of_a_section_keeps_what_a_plain_text_there_stands_for(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\ndata = "rows.jsonl"\nout = "o"\nalgo = "cispo"\n')
    cfg = Config.load(file, data={"epochs": 2}, algo={"clip_max": 4.0})
    assert (cfg.data.path, cfg.data.epochs, cfg.algo.name, cfg.algo.options) == (
        "rows.jsonl",
        2.0,
        "cispo",
        {"clip_max": 4.0},
    )
    by_flags, _ = parse("train", [str(file), "--data.epochs=2", "--algo.clip_max=4.0"])
    assert (by_flags.data, by_flags.algo.name, by_flags.algo.options["clip_max"]) == (cfg.data, "cispo", 4.0)
