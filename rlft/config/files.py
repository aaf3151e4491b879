"""Config files: TOML and YAML to nested dicts and back, and presets laid under them."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from rlft.config import secrets
from rlft.config.paths import user_path
from rlft.config.section import dotted
from rlft.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
LARGEST_FILE = 2**20
"""Bytes."""
DEEPEST, MOST_VALUES = 16, 10_000
"""Tables within tables, and values in all, of a file; YAML's aliases count as often as they are used."""


def presets() -> list[str]:
    """Names of the presets: the files in rlft/config/presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def with_preset(table: dict[str, Any]) -> dict[str, Any]:
    """The settings of `table` laid over those of the preset that its algo.name names; `table` itself without one.

    Tables are merged key by key; anything else of `table`, lists too, takes the place of the preset's.
    """
    algo = table.get("algo") or {}
    name = algo if isinstance(algo, str) else algo.get("name") if isinstance(algo, dict) else None
    if not name or name not in presets():
        return table
    under = read(PRESETS / f"{name}.toml")
    for section in under:
        if dataclasses.is_dataclass(table.get(section)):
            raise ConfigError(
                f'algo = "{name}": a preset that sets {section} too, so it cannot be merged with a whole '
                f'{type(table[section]).__name__}; give {section} as a dict, or rlft.Algo("{name}") for the loss alone'
            )
    options = {} if isinstance(algo, str) else {key: value for key, value in algo.items() if key != "name"}
    return merged({**table, "algo": options}, under)


def merged(over: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
    """Two tables as one: tables in both are merged, anything else of `over` takes the place of `under`'s."""
    both = [key for key, value in under.items() if isinstance(value, dict) and isinstance(over.get(key), dict)]
    return {**under, **over, **{key: merged(over[key], under[key]) for key in both}}


def read(path: str | Path) -> dict[str, Any]:
    """The table in a .toml, .yaml or .yml file; its settings are not checked. Raises ConfigError."""
    path = user_path(path, "config file")
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"{path}: a config file ends in .toml, .yaml or .yml")
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ConfigError(f"{path}: over {LARGEST_FILE} bytes, which no config is; give the config file")
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        table = tomllib.loads(text) if kind == "TOML" else _yaml(text)
        _check_size(table)
    except RecursionError:
        raise ConfigError(f"{path}: not valid {kind}: nested too deeply") from None
    except ValueError as error:  # a TOML or YAML error, a date that is none, a number of thousands of digits
        raise ConfigError(f"{path}: not valid {kind}: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: want settings at the top (model: ..., data: ...), not {table!r:.80}")
    return table


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        # Its own text quotes the lines of the file, which may hold a secret.
        parts = ((error.context, error.context_mark), (error.problem, error.problem_mark))
        places = [
            f"{what}{f' (line {mark.line + 1}, column {mark.column + 1})' if mark else ''}"
            for what, mark in parts
            if what
        ]
        raise ValueError(", ".join(places)) from None
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # A value that is not of the type its tag names raises what Python's conversion does.
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _check_size(value: Any) -> None:
    """Raise ValueError for a table that is too deep, contains itself, is too large or has keys that are no text."""
    stack, count = [(value, 0)], 0
    while stack:
        value, depth = stack.pop()
        count += 1
        if depth > DEEPEST:
            raise ValueError(f"over {DEEPEST} tables within each other")
        if count > MOST_VALUES:
            raise ValueError(f"over {MOST_VALUES} values")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"the key {key!r:.80} is no text; put it in quotes")
            stack += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list):
            stack += [(part, depth + 1) for part in value]


def to_table(value: Any) -> Any:
    """A section, or the settings of an algorithm, as a nested dict of what TOML holds; tuples become lists.

    A field that is None by default and by value is left out, since TOML has no null.
    """
    if dataclasses.is_dataclass(value):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        table = {field.name: to_table(part) for field, part in pairs if not (part is None and field.default is None)}
        return table | table.pop(getattr(value, "REST", ""), {})
    if isinstance(value, dict):
        return {key: to_table(part) for key, part in value.items()}
    return [to_table(part) for part in value] if isinstance(value, list | tuple) else value


def to_toml(cfg: Any) -> str:
    """A `Config` with every value it has, secrets masked, as TOML; without secrets, loading it gives an equal one.

    Raises ConfigError for a value that TOML cannot hold (None or an object in `args`, half a character).
    """
    import tomli_w

    table = secrets.masked(to_table(cfg))
    _check_values(table, "")
    return tomli_w.dumps(table)


def _check_values(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _check_values(part, dotted(where, key))
    elif isinstance(value, list):
        for part in value:
            _check_values(part, where)
    elif isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(f"{where} = {value!a:.80}: half of a surrogate pair, which no file can hold; mend it")
    elif not isinstance(value, bool | int | float):
        raise ConfigError(
            f"{where} = {value!r}: a config file cannot hold this value; leave it out or give it as a string"
        )
