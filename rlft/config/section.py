"""What a section of a config is: a frozen dataclass that pydantic validates, with our sentences for what is wrong.

A value is checked alike whether it comes from a TOML or YAML file, a flag or Python. Beyond pydantic's rules: a number
is never taken from true or false, a whole number never from a text or a fraction, a text never from a number, and no
number is NaN, or infinite where its field does not say `INFINITE`. A number may be written as text, since YAML reads
`1e-6` as one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform

import pydantic
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError

from rlft.config import secrets
from rlft.config.resolve import did_you_mean
from rlft.config.trl_names import RENAMED, RENAMED_VALUES, TRL_NAMES, TRL_NOTES
from rlft.errors import ConfigError

Section = TypeVar("Section")
LARGEST = 2**53
"""Bound of every whole number: a float still holds it exactly. No sentence mentions it."""
BOUNDS = {Ge: ("ge", "at least {}"), Gt: ("gt", "above {}"), Le: ("le", "at most {}"), Lt: ("lt", "below {}")}
BOUNDS |= {MinLen: ("min_length", "not empty")}
"""Bound -> its attribute, and how a sentence names it."""
LIMITS = ("greater_than", "less_than", "too_short", "string_too_short")
"""What pydantic's errors about bounds begin with."""
INFINITE = AllowInfNan(True)
"""Mark of a float that may be infinite, with a bound that NaN does not meet."""
SECTIONS: dict[type, str] = {}
"""Section class -> its name in a config, such as "optim"."""


@dataclass_transform(frozen_default=True)
def section(
    name: str,
    short: str = "",
    rest: str = "",
    rows: str = "",
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[type[Section]], type[Section]]:
    """Make a class with annotated fields the section `name` of a config.

    short: the field that a plain text in place of the section stands for. rest: the field, a dict, that takes settings
    which are no fields. rows: the field that a list or another object with rows in place of the section stands for.
    prepare: what is done to the settings before they are checked.
    """

    def make(cls: type[Section]) -> type[Section]:
        cls.SHORT, cls.REST, cls.ROWS = short, rest, rows  # type: ignore[attr-defined]
        hints = typing.get_type_hints(cls, include_extras=True)
        cls.__annotations__ = {field: strict(hint) for field, hint in hints.items() if _origin(hint) is not ClassVar}
        options = ConfigDict(extra="forbid", use_attribute_docstrings=True)
        checked = pydantic.dataclasses.dataclass(frozen=True, config=options)(cls)
        validate = checked.__init__

        @functools.wraps(validate)
        def __init__(self: Any, *args: Any, **settings: Any) -> None:
            if rows and args and holds_rows(args[0]):
                args, settings = ("", *args[1:]), {**settings, rows: args[0]}
            given = settings
            try:
                settings = prepare(settings) if prepare else settings
                validate(self, *args, **_gathered(checked, settings))
            except ValidationError as error:
                lines = sentences(error, checked, name, settings)
                raise ConfigError("\n".join(_with_origin(line, given, settings) for line in lines)) from None

        checked.__init__ = __init__  # type: ignore[method-assign]
        checked.__repr__ = _repr  # type: ignore[method-assign]
        SECTIONS[checked] = name
        return checked  # type: ignore[return-value]

    return make


def refuse(wrong: bool, sentence: str) -> None:
    """Raise ConfigError with `sentence` where something is wrong: for checks that need more than one field."""
    if wrong:
        raise ConfigError(sentence)


def _with_origin(line: str, given: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """A sentence, and which of the settings it names were not given but come from a preset."""
    if settings is given:
        return line
    added = set(_names(settings, "")) - set(_names(given, ""))
    named = [name for name in re.findall(r"([a-z_]+(?:\.[a-z_]+)*) = ", line) if name in added]
    return f"{line} ({', '.join(named)}: set by the preset)" if named else line


def _names(table: Mapping[str, Any], where: str) -> Iterator[str]:
    """Dotted names of the settings of nested tables."""
    for key, value in table.items():
        yield dotted(where, key)
        if isinstance(value, Mapping):
            yield from _names(value, dotted(where, key))


def _repr(section: Any) -> str:
    """What dataclasses make, with secrets masked."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    texts = [f"{name}={secrets.masked(value, name)!r}" for name, value in values.items()]
    return f"{type(section).__qualname__}({', '.join(texts)})"


def refuse_all(*checks: tuple[bool, str]) -> None:
    """Raise ConfigError with the sentences of all checks that found something wrong, a line each."""
    refuse(any(wrong for wrong, _ in checks), "\n".join(sentence for wrong, sentence in checks if wrong))


def strict(hint: Any) -> Any:
    """The type `hint` with the rules of the module docstring, and the short form where it is a section."""
    if hint is float:
        return Annotated[float, BeforeValidator(_not_bool), AllowInfNan(False)]
    if hint is int:
        return Annotated[int, Strict(), Le(LARGEST)]
    if hint is bool:
        return Annotated[bool, Strict()]
    if hint in SECTIONS and hint.SHORT:
        return Annotated[hint, BeforeValidator(functools.partial(from_short, hint))]
    origin, args = _origin(hint), typing.get_args(hint)
    if origin is Annotated and INFINITE in args[1:]:
        marks = [mark for mark in args[1:] if mark != INFINITE]
        return Annotated[(float, BeforeValidator(_not_bool), *marks)]
    if origin is Annotated:
        inner = strict(args[0])
        return Annotated[(inner, *args[1:])]
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(lambda a, b: a | b, (strict(arg) for arg in args))  # type: ignore[operator]
    if origin is tuple and args[1:] == (Ellipsis,) and (plain(args[0]) is str or getattr(args[0], "SHORT", "")):
        return Annotated[tuple[strict(args[0]), ...], BeforeValidator(_as_list)]  # type: ignore[misc]
    if origin in (tuple, list, dict) and args:
        return origin[tuple(arg if arg is Ellipsis else strict(arg) for arg in args)]  # type: ignore[index]
    return hint


def _as_list(value: Any) -> Any:
    """One text, or one table, in place of a list of them."""
    return [value] if isinstance(value, str | Mapping) else value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a truth value is no number")
    return value


def from_short(cls: Any, value: Any) -> Any:
    """The table that a plain text, or an object with rows, in place of the section `cls` stands for; else the value."""
    if cls.ROWS and holds_rows(value) and not isinstance(value, cls):
        return {cls.ROWS: value}
    return {cls.SHORT: value} if isinstance(value, str) else _gathered(cls, value)


def holds_rows(value: Any) -> bool:
    """Whether a value may be rows of a dataset: a list, a table or an iterable, and no table of settings."""
    if isinstance(value, str | bytes) or type(value) is dict:
        return False
    return isinstance(value, Iterable) or hasattr(value, "__arrow_c_stream__")


def _gathered(cls: Any, value: Any) -> Any:
    """A table with what is no field of `cls` under the name of its `rest`."""
    if not cls.REST or not isinstance(value, dict):
        return value
    known = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(value.get(cls.REST, {}), dict):
        return value  # which is refused
    more = {key: part for key, part in value.items() if key not in known}
    return {key: part for key, part in value.items() if key in known} | (
        {cls.REST: {**value.get(cls.REST, {}), **more}} if more else {}
    )


def options_of(cls: type[Section], table: dict[str, Any], where: str, known: Sequence[str] = ()) -> Section:
    """The settings `cls` of an algorithm, a plain frozen dataclass, from a table. where: the table's name in a config.

    known: further names for the hint at a mistyped one. Raises ConfigError for unknown names and mistyped values, all
    of them, and for what `cls` itself refuses.
    """
    assert dataclasses.is_dataclass(cls), cls
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    values, problems = {}, []
    for name, value in table.items():
        path = dotted(where, name)
        if name not in names:
            problems.append(unknown(name, where, [*known, *names], value))
            continue
        try:
            values[name] = TypeAdapter(strict(hints[name])).validate_python(value)
        except ValidationError:
            # A bound that never acts is infinite; whether that makes sense is for the loss to say.
            if isinstance(value, float) and math.isinf(value):
                values[name] = value
            else:
                problems.append(mistyped(hints[name], value, path))
    if problems:
        raise ConfigError("\n".join(problems))
    return cls(**values)


EXAMPLES = {"model": "Qwen/Qwen3-8B", "data": "train.jsonl", "out": "runs/first", "use": "number", "path": "a.jsonl"}
"""A value of each setting that has no default."""

# ---- what is wrong -----------------------------------------------------------------------------------------------


def sentences(error: ValidationError, cls: type, name: str, settings: Mapping[str, Any]) -> list[str]:
    """One sentence for each wrong setting, in the order of `settings`: its dotted name, value and what is wanted.

    name: of the section `cls`.
    """
    texts: dict[str, str] = {}
    for problem in sorted(error.errors(include_url=False), key=lambda each: _order(settings, each["loc"])):
        loc, kind, value = problem["loc"], problem["type"], problem["input"]
        if kind == "missing" and loc and isinstance(loc[-1], int):  # a tuple that is too short
            loc, kind = loc[:-1], "too_few"
        path, hint = _place(cls, name, loc)
        refusal = problem.get("ctx", {}).get("error")
        if isinstance(refusal, ConfigError):
            text, own = str(refusal), SECTIONS.get(plain(hint), path)
            texts.setdefault(path, text if own == path else text.replace(f"{own}.", f"{path}."))
        elif kind == "unexpected_keyword_argument":
            where, _, key = path.rpartition(".")
            texts[path] = unknown(key, where, [field.name for field in dataclasses.fields(plain(hint))], value)
        elif kind in ("missing", "missing_argument"):
            last = path.rpartition(".")[2]
            texts[path] = f'{path} is missing: it has no default; for example {last} = "{EXAMPLES[last]}"'
        elif kind == "unexpected_positional_argument":
            texts[name] = f"{cls.__name__}: {len(dataclasses.fields(cls))} positional values at most"  # type: ignore[arg-type]
        else:
            limits = kind.startswith(LIMITS) and not (isinstance(value, int) and abs(value) > LARGEST)
            texts.setdefault(path, mistyped(hint, value, path, limits))
    # Where a list takes one member of a union, only what is wrong with its items is of interest.
    shown_ = [text for path, text in texts.items() if not any(other.startswith(f"{path}[") for other in texts)]
    return [line for text in shown_ for line in text.splitlines()]


def _order(settings: Any, loc: tuple[int | str, ...]) -> list[int]:
    """Where a location stands in nested settings; after everything where it is missing."""
    order = []
    for step in loc:
        keys = list(settings) if isinstance(settings, Mapping) else []
        order.append(step if isinstance(step, int) else keys.index(step) if step in keys else LARGEST)
        settings = settings[step] if step in keys else None
    return order


def _place(cls: type, name: str, loc: tuple[int | str, ...]) -> tuple[str, Any]:
    """Dotted name and type of what pydantic's location points at; its last part may be an unknown key."""
    path, hint = name, cls
    for step, following in itertools.zip_longest(loc, loc[1:]):
        kind = plain(hint)
        args = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            names = [field.name for field in dataclasses.fields(kind)]
            key = names[step] if isinstance(step, int) and step < len(names) else str(step)
            path = dotted(path, key)
            if key in names:
                hint = typing.get_type_hints(kind, include_extras=True)[key]
        elif isinstance(step, int) and _origin(kind) in (tuple, list):
            path = f"{path}[{step}]"
            hint = args[min(step, len(args) - 1)] if Ellipsis not in args else args[0]
        elif _origin(kind) is dict:
            path = dotted(path, str(step))
            hint = args[1]
        elif isinstance(following, int):
            hint = next((arg for arg in args if _origin(plain(arg)) in (tuple, list)), hint)
        # What is left is pydantic's name for a member of a union, which is no part of a setting's name.
    return path, hint


def plain(hint: Any) -> Any:
    """The type without annotations, and without None where that leaves one member."""
    if _origin(hint) is Annotated:
        return plain(typing.get_args(hint)[0])
    if _origin(hint) in (typing.Union, types.UnionType):
        members = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return plain(members[0]) if len(members) == 1 else hint
    return hint


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def unknown(key: str, where: str, known: list[str], value: Any = None) -> str:
    """The sentence for a setting that does not exist in the section `where`, with the likeliest right one.

    known: the names that do exist there. value: what it was set to.
    """
    path = dotted(where, key)
    if path in RENAMED:
        return f"{path}: is called {RENAMED[path]} now"
    start = f"{path}: unknown setting."
    if key in TRL_NAMES and TRL_NAMES[key].ours != path:
        return f"{start} {TRL_NAMES[key].sentence(key, value)}"
    if key in TRL_NOTES:
        return f"{start} {TRL_NOTES[key][0].upper()}{TRL_NOTES[key][1:]}"
    everywhere = paths()
    elsewhere = [other for other in everywhere if other.rpartition(".")[2] == key]
    if elsewhere:
        return f"{start} Did you mean {' or '.join(elsewhere)}?"
    return start + (did_you_mean(key, known) or did_you_mean(key, everywhere) or f" Known here: {', '.join(known)}")


def mistyped(hint: Any, value: Any, path: str, bounds_only: bool = False) -> str:
    """The sentence for a value that is not of the type `hint`, or outside of its bounds."""
    if isinstance(value, str) and (path, value) in RENAMED_VALUES:
        return f'{path} = "{value}": is called "{RENAMED_VALUES[path, value]}" now'
    want = (bounds(hint) if bounds_only else "") or words(hint)
    known = [str(arg) for arg in typing.get_args(plain(hint))] if _origin(plain(hint)) is Literal else []
    close = did_you_mean(value, known) if isinstance(value, str) else ""
    return (
        f"{path} = {shown(secrets.masked(value, path.rpartition('.')[2]))}: want {want}{'.' + close if close else ''}"
    )


def bounds(hint: Any) -> str:
    """The bounds of a type as text: "at least 1, at most 64"."""
    if _origin(hint) in (typing.Union, types.UnionType):
        texts = [
            text
            for arg in typing.get_args(hint)
            if (text := bounds(arg) or (words(arg) if arg is not type(None) else ""))
        ]
        return " or ".join(texts)
    if _origin(hint) is not Annotated:
        return ""
    inner, *marks = typing.get_args(hint)
    marks = [mark for outer in marks for mark in (outer if isinstance(outer, typing.Iterable) else (outer,))]
    texts = [
        BOUNDS[type(mark)][1].format(getattr(mark, BOUNDS[type(mark)][0]))
        for mark in marks
        if type(mark) in BOUNDS and mark != Le(LARGEST)
    ]
    return ", ".join(text for text in (bounds(inner), *texts) if text)


def words(hint: Any) -> str:
    """A type as text that a user of a config file understands."""
    hint = typing.get_args(hint)[0] if _origin(hint) is Annotated else hint
    origin, args = _origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " or ".join(shown(arg) for arg in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list, each item {words(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(words(arg) for arg in args)}"
    if hint in SECTIONS:
        table = f"a table with {', '.join(field.name for field in dataclasses.fields(hint))}"
        return f"a string ({hint.SHORT}) or {table}" if hint.SHORT else table
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a table"}
    return names.get(origin, str(hint))


def shown(value: object) -> str:
    """A value as the user wrote it, shortened."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def dotted(where: str, name: str) -> str:
    """The dotted name of a setting in the section `where`."""
    return f"{where}.{name}" if where else name


def paths() -> list[str]:
    """Dotted names of all settings of a config, without those of an algorithm: ["model", "data.path", ...]."""
    (config,) = [cls for cls, name in SECTIONS.items() if not name]
    return list(_paths(config, ""))


def _paths(cls: type, where: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        path = dotted(where, field.name)
        if path != "algo.options":
            yield path
        for hint in (hints[field.name], *typing.get_args(hints[field.name])):
            if hint in SECTIONS:
                yield from _paths(hint, path)
