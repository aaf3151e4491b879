"""TOML and YAML files to our dataclasses and back.

`from_table` builds any frozen dataclass from a nested dict by its type hints, so a section of a file, an algorithm's
own settings and a parsed command line all take one path and give the same errors: dotted name, value, what is wanted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlft.config.resolve import did_you_mean
from rlft.config.run import Algo, Config, Data, Reward, Source
from rlft.config.trl_names import RENAMED, RENAMED_VALUES, TRL_NAMES, TRL_NOTES
from rlft.errors import ConfigError

T = TypeVar("T")

SHORT = {Data: "path", Source: "path", Reward: "use", Algo: "name"}
"""Sections that may be written as a plain string, and the field it stands for."""

PRESETS = Path(__file__).parent / "presets"


def load_config(path: str | Path) -> Config:
    """The config in a .toml, .yaml or .yml file. Raises ConfigError naming the file or the field at fault."""
    return from_table(Config, with_preset(read(path)))


def preset(name: str, **settings: Any) -> Config:
    """A config from a preset and what it leaves open, as a file that names it would give: `rlft.preset`.

    settings: top-level settings; a section is a dict, for example sampling={"group_size": 16}. Raises ConfigError.
    """
    if name not in presets():
        raise ConfigError(f'no preset "{name}".{did_you_mean(name, presets())} Presets: {", ".join(presets())}')
    algo = settings.get("algo") or {}
    return from_table(Config, with_preset({**settings, "algo": {**algo, "name": name}}))


def presets() -> list[str]:
    """Names of the presets: the files in rlft/config/presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def with_preset(table: dict[str, Any]) -> dict[str, Any]:
    """The settings of `table` laid over those of the preset that its algo.name names; `table` itself without one.

    Tables are merged key by key; anything else of `table`, lists too, takes the place of the preset's.
    """
    algo = table.get("algo") or {}
    name = algo if isinstance(algo, str) else algo.get("name") if isinstance(algo, dict) else None
    if name not in presets():
        return table
    under = read(PRESETS / f"{name}.toml")
    own = {} if isinstance(algo, str) else {k: v for k, v in algo.items() if k != "name"}
    return _laid({**table, "algo": own}, under)


def _laid(over: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
    both = {k: _laid(over[k], v) for k, v in under.items() if isinstance(v, dict) and isinstance(over.get(k), dict)}
    return {**under, **over, **both}


def read(path: str | Path) -> dict[str, Any]:
    """The nested dict in a .toml, .yaml or .yml file, unchecked. Raises ConfigError when it cannot be read."""
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"{path}: a config file ends in .toml, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    import yaml

    try:
        table = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: want settings at the top (model: ..., data: ...), not {_shown(table)}")
    return table


def from_table(cls: type[T], table: dict[str, Any], where: str = "") -> T:
    """An instance of the dataclass `cls` from a nested dict, typed by its hints.

    where: dotted name of the section, for errors. A number may be written as a string where a float is wanted (YAML
    reads `1e-6` as one). Raises ConfigError for unknown keys, missing or mistyped values (all of them, one a line), and
    what `cls` refuses.
    """
    assert dataclasses.is_dataclass(cls), cls
    if issubclass(cls, Algo):
        table = {"name": table.get("name", "grpo"), "options": {k: v for k, v in table.items() if k != "name"}}
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in table.items():
        try:
            if key not in fields:
                raise unknown(str(key), where, list(fields))
            values[key] = _value(hints[key], value, _dot(where, key))
        except ConfigError as error:
            wrong.append(str(error))
    for name, f in fields.items():
        if name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            wrong.append(f"{_dot(where, name)} is missing: it has no default")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return cls(**values)


def unknown(key: str, where: str, known: list[str]) -> ConfigError:
    """The error for a setting that does not exist in the section `where`, with the likeliest right one.

    known: the names that do exist there.
    """
    if _dot(where, key) in RENAMED:
        return ConfigError(f"{_dot(where, key)}: is called {RENAMED[_dot(where, key)]} now")
    start = f"{_dot(where, key)}: unknown setting."
    if key in TRL_NAMES and TRL_NAMES[key] != _dot(where, key):
        return ConfigError(f"{start} TRL's {key} is {TRL_NAMES[key]} here")
    if key in TRL_NOTES:
        return ConfigError(f"{start} {TRL_NOTES[key][0].upper()}{TRL_NOTES[key][1:]}")
    moved = [path for path in paths() if path.rpartition(".")[2] == key]
    if moved:
        return ConfigError(f"{start} Did you mean {' or '.join(moved)}?")
    hint = did_you_mean(key, known) or did_you_mean(key, paths()) or f" Known here: {', '.join(known)}"
    return ConfigError(start + hint)


def paths(cls: type = Config, where: str = "") -> list[str]:
    """Dotted names of all settings of a config, without those of an algorithm: ["model", "data.path", ...]."""
    found = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        inner = [t for t in (hints[f.name], *typing.get_args(hints[f.name])) if dataclasses.is_dataclass(t)]
        path = _dot(where, f.name)
        if cls is Algo and f.name == "options":
            continue
        found += [path, *(p for t in inner if isinstance(t, type) for p in paths(t, path))]
    return found


def _dot(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _shown(value: object) -> str:
    """A value as the user wrote it, shortened."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _value(args[0], value, where)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return section(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _union(hint, value, where)
    if origin is Literal:
        if value in args:
            return value
        if isinstance(value, str) and (where, value) in RENAMED_VALUES:
            raise mistyped(hint, value, where)
        close = did_you_mean(value, [str(a) for a in args]) if isinstance(value, str) else ""
        raise ConfigError(f"{where} = {_shown(value)}: want {_want(hint)}{'.' + close if close else ''}")
    if origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) == len(args):
            return tuple(_value(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if origin in (dict, list) and isinstance(value, origin):
        return _collection(args, value, where)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise mistyped(hint, value, where) from None
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise mistyped(hint, value, where)


def _collection(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    return {_value(args[0], k, where): _value(args[1], v, _dot(where, str(k))) for k, v in value.items()}


def section(cls: type, value: Any, where: str) -> Any:
    """An instance of `cls` from a table or from its short form, a plain string. Raises as `from_table` does."""
    if dataclasses.is_dataclass(value) and isinstance(value, cls):
        return value
    field = next((SHORT[base] for base in cls.__mro__ if base in SHORT), None)
    if isinstance(value, str) and field:
        value = {field: value}
    if not isinstance(value, dict):
        raise mistyped(cls, value, where)
    return from_table(cls, value, where)


def _union(hint: Any, value: Any, where: str) -> Any:
    members = [m for m in typing.get_args(hint) if m is not type(None)]
    if value is None and len(members) < len(typing.get_args(hint)):
        return None
    if len(members) == 1:
        return _value(members[0], value, where)
    for member in members:
        # A list is meant for the list member, so that its own error (which item is wrong) is the one shown.
        if isinstance(value, list) == (typing.get_origin(member) in (tuple, list)):
            try:
                return _value(member, value, where)
            except ConfigError:
                if isinstance(value, list):
                    raise
    raise mistyped(hint, value, where)


def mistyped(hint: Any, value: Any, where: str) -> ConfigError:
    """The error for a value that is not of the type `hint`. where: its dotted name."""
    if isinstance(value, str) and (where, value) in RENAMED_VALUES:
        return ConfigError(f'{where} = "{value}": is called "{RENAMED_VALUES[where, value]}" now')
    return ConfigError(f"{where} = {_shown(value)}: want {_want(hint)}")


def _want(hint: Any) -> str:
    """A type in words a user of a config file knows."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_want(a) for a in args if a is not type(None))
    if origin is Literal:
        return " or ".join(_shown(a) for a in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list, each item {_want(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(_want(a) for a in args)}"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        short = next((SHORT[base] for base in hint.__mro__ if base in SHORT), None)
        text = f"a table with {', '.join(f.name for f in dataclasses.fields(hint))}"
        return f"a string ({short}) or {text}" if short else text
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a table"}
    return words.get(origin or hint, str(hint))


def to_table(value: Any) -> Any:
    """A dataclass as the nested dict that `from_table` builds an equal one from; tuples become lists.

    A field that is None by default and by value is left out, since TOML has no null.
    """
    if isinstance(value, Algo):
        return {"name": value.name, **to_table(value.options)}
    if dataclasses.is_dataclass(value):
        pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: to_table(v) for f, v in pairs if not (v is None and f.default is None)}
    if isinstance(value, dict):
        return {k: to_table(v) for k, v in value.items()}
    return [to_table(v) for v in value] if isinstance(value, list | tuple) else value


def to_toml(cfg: Config) -> str:
    """The config with every value it has, as TOML; loading it gives an equal Config.

    Raises ConfigError for a value that TOML cannot hold (None or an object in `args`).
    """
    return _table(to_table(cfg), "").lstrip("\n")


def _table(table: dict[str, Any], where: str) -> str:
    """Scalars, then tables, then lists of tables: TOML reads what follows a header as part of that section."""
    plain, sections = [], []
    for key, value in table.items():
        path = _dot(where, _key(key))
        inline = path.rpartition(".")[2] in ("args", "columns", "chat_template_kwargs")
        if isinstance(value, dict) and not inline:
            sections.append(f"\n[{path}]\n{_table(value, path)}")
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            sections += [f"\n[[{path}]]\n{_table(v, path)}" for v in value]
        else:
            plain.append(f"{_key(key)} = {_toml(value, path)}\n")
    return "".join(plain + sections)


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _toml(key, "")


def _toml(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are a subset of TOML's; DEL is the one character that only TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(_toml(v, where) for v in value)}]"
    if isinstance(value, dict):
        pairs = (f"{_key(k)} = {_toml(v, _dot(where, _key(k)))}" for k, v in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    raise ConfigError(f"{where} = {value!r}: a config file cannot hold this value; leave it out or give it as a string")
