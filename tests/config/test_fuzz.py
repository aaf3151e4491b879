"""Configs that hypothesis makes up: what is wrong with them comes out as ConfigError, and what is right survives."""

from __future__ import annotations

import contextlib
import json
import typing
from collections import Counter
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlft.algos.algorithm import build_algorithm, describe
from rlft.cli import flags
from rlft.config.files import presets, to_table, to_toml
from rlft.config.run import Algo, Config
from rlft.config.secrets import masked
from rlft.config.section import SECTIONS, paths, plain
from rlft.errors import ConfigError

BOUNDED = settings(
    max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
"""The same examples at every run, all of them in less than half a minute."""
WHOLE = {"model": "m", "data": "d.jsonl", "out": "runs/a", "steps": 3, "rewards": ["number"]}
TEXT = st.text(st.characters(codec=None), max_size=12)
ODD = st.sampled_from(
    ["", "\0", "\ud800", "~nosuchuser/x", "x" * 300, "env:", "env:NOT_SET", "***", "1e-5", "nan", "None", "a.py:", "(("]
)
NUMBER = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**53, 2**64, 10**400, 0.5, -0.0])
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT | ODD | st.binary(max_size=3) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(paths()), inner, max_size=3),
    max_leaves=6,
)


def fitting(hint: Any) -> st.SearchStrategy[Any]:
    """Values of about the right type for a setting, so that checks beyond the type are reached."""
    kind = plain(hint)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return st.sampled_from(args)
    if kind in (int, float):
        return st.integers(-1, 8) | st.floats(0, 1, width=16) | NUMBER
    if kind is bool:
        return st.booleans()
    if kind is str:
        return TEXT | ODD
    if origin in (tuple, list):
        return st.lists(fitting(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(TEXT, VALUE if args[1] is Any else fitting(args[1]), max_size=3)
    if kind in SECTIONS:
        return tables(kind)
    return st.one_of([fitting(arg) for arg in args if arg is not type(None)]) if args else VALUE


@st.composite
def tables(draw: st.DrawFn, kind: Any) -> dict[str, Any]:
    """A few settings of a section, mostly of the right type."""
    hints = typing.get_type_hints(kind, include_extras=True)
    names = draw(st.lists(st.sampled_from(sorted(hints)), max_size=2, unique=True))
    table = {name: draw(VALUE if draw(st.integers(0, 19)) == 0 else fitting(hints[name])) for name in names}
    needed = {name: WHOLE.get(name, "number") for name in ("path", "use") if name in hints}
    return {
        **needed,
        **table,
        **(draw(st.dictionaries(TEXT, VALUE, min_size=1)) if draw(st.integers(0, 19)) == 0 else {}),
    }


def as_text(cfg: Config) -> str:
    """The settings of a config, secrets masked: NaN in args is equal to itself only as text."""
    return json.dumps(masked(to_table(cfg)), sort_keys=True)


def test_a_config_is_refused_by_name_or_survives_its_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    file, outcomes = tmp_path_factory.mktemp("fuzz") / "a.toml", Counter[str]()

    @settings(BOUNDED, max_examples=300)
    @given(table=tables(Config))
    @example(table={"algo": {"options": None, "x": 1}})
    def run(table: dict[str, Any]) -> None:
        try:
            cfg = Config(**{**WHOLE, **table})
            text = to_toml(cfg)
        except ConfigError as error:
            assert 0 < len(str(error).strip()) < 20_000
            outcomes["refused"] += 1
            return
        outcomes["taken"] += 1
        file.write_bytes(text.encode())
        assert as_text(Config.load(file)) == as_text(cfg)

    run()
    assert min(outcomes["refused"], outcomes["taken"]) > 60, outcomes


@BOUNDED
@given(data=st.binary(max_size=60), kind=st.sampled_from(["toml", "yaml"]), lines=st.lists(TEXT | ODD, max_size=4))
def test_a_file_of_anything(data: bytes, kind: str, lines: list[str], tmp_path_factory: Any) -> None:
    file = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    start = b'model = "m"\n' if kind == "toml" else b"model: m\n"
    file.write_bytes(start + data + "\n".join(lines).encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):  # it lacks data and out, whatever else is in it
        Config.load(file)


@BOUNDED
@given(flag=st.sampled_from(paths()) | TEXT, values=st.lists(TEXT | ODD | VALUE.map(str), max_size=3))
def test_flags_of_anything(flag: str, values: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        cfg = Config(**{**WHOLE, **flags.table_of([f"--{flag}", *values], WHOLE)})
        assert cfg.model and as_text(cfg)


OPTIONS = ["advantage", "clip_low", "clip_high", "kl_coef", "kl", "aggregation", "correction_cap", "entropy_coef"]


@BOUNDED
@given(
    name=st.sampled_from(["grpo", "dpo", "sft", "gspo", *presets()]) | TEXT | ODD,
    options=st.dictionaries(st.sampled_from(OPTIONS) | TEXT, VALUE | NUMBER, max_size=3),
)
def test_an_algorithm_of_anything(name: str, options: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        assert describe(build_algorithm(Algo(name, options), 1))
