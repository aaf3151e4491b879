"""The settings of a config as command-line flags: `rlft train run.toml --optim.lr=1e-5`.

A flag sets what a line of the file would, so both are checked together, with the same sentences. tyro prints the help:
every setting with its docstring and the file's value.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import tyro

from rlft.cli.arguments import paragraph
from rlft.config import secrets
from rlft.config.files import read, to_table, with_preset
from rlft.config.run import Algo, Config, overlaid
from rlft.config.section import from_short, options_of, plain, unknown
from rlft.errors import ConfigError
from rlft.runs.formats import visible

HELP = ("-h", "--help")
ALGO = "The algorithm; the other flags of this section are its own."
RESUME = "Go on from the newest checkpoint in `out`; --resume auto starts the run where `out` holds none."


def parse(command: str, args: list[str], about: str) -> tuple[Config, bool]:
    """The config of `rlft COMMAND FILE --flags ...`, and whether --resume was given. about: what the command does.

    Raises ConfigError for everything that is wrong in file and flags. --help prints and raises SystemExit(0).
    """
    file, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    show_help = bool(set(HELP) & set(flags))
    if file is None and not show_help:
        raise ConfigError(f"the config file comes first: rlft {command} FILE [--section.field value ...]")
    table = read(file) if file else {}
    if "resume" in table:
        raise ConfigError(unknown("resume", "", []))
    flags, resume = split_resume(flags)
    changes = table_of([flag for flag in flags if flag not in HELP], table)
    if resume == "auto":
        if changes.get("if_exists", "resume") != "resume":
            raise ConfigError(f"--resume auto is --if_exists resume, and --if_exists {changes['if_exists']} is given")
        changes["if_exists"] = "resume"
    settings = overlaid(changes, table)
    if show_help:
        _print_help(command, file, _harmless(secrets.masked(with_preset(settings))), about)
    cfg = Config(**settings)
    from rlft.algos.algorithm import loss_class  # imports torch, which no error above waits for

    # Every setting of the algorithm is written out, as those of the other sections are.
    options = options_of(loss_class(cfg.algo.name), cfg.algo.options, "algo", known=("name",))
    return dataclasses.replace(cfg, algo=Algo(cfg.algo.name, to_table(options))), resume == "always"


def split_resume(args: list[str]) -> tuple[list[str], Literal["never", "auto", "always"]]:
    """Return the arguments without --resume or --resume auto, and which of the two was given."""
    for i, arg in enumerate(args):
        if arg == "--resume=auto" or args[i : i + 2] == ["--resume", "auto"]:
            return [*args[:i], *args[i + (1 if "=" in arg else 2) :]], "auto"
    rest = [arg for arg in args if arg != "--resume"]
    return rest, "always" if len(rest) < len(args) else "never"


# ---- flags to a table --------------------------------------------------------------------------------------------


def table_of(flags: list[str], table: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that flags stand for: "--optim.lr=1e-5" is {"optim": {"lr": 1e-5}}.

    table: the file's, whose lists of tables can be changed by number ("--rewards.0.timeout 5"). Raises ConfigError for
    what is no flag, and for a flag without a value.
    """
    changes: dict[str, Any] = {}
    for name, values in _groups(flags):
        *sections, key = name.split(".")
        hint = _hint(name)
        if hint is None and key.startswith("no_") and plain(_hint(".".join([*sections, key[3:]]))) is bool:
            key, values = key[3:], ["false"]
            hint = bool
        section = plain(_hint(".".join(sections))) if sections else Config
        if hint is None and not values and dataclasses.is_dataclass(section):
            raise ConfigError(unknown(key, ".".join(sections), [field.name for field in dataclasses.fields(section)]))
        if not values and plain(hint) is not bool:
            raise ConfigError(f"--{name}: a value is missing; want --{name} VALUE, or --{name}=VALUE")
        into = _section(changes, table, sections, name)
        into[key] = _value(hint, values)
    return changes


def _section(changes: dict[str, Any], table: dict[str, Any], sections: list[str], name: str) -> dict[str, Any]:
    """The table of `changes` that a flag goes into, made where it is missing; a numbered one begins as the file's."""
    into: Any = changes
    for depth, section in enumerate(sections):
        following = sections[depth + 1] if depth + 1 < len(sections) else ""
        table = table.get(section, {}) if isinstance(table, dict) else {}
        if section.isdigit():
            if int(section) >= len(into):
                raise ConfigError(f"--{name}: there are {len(into)} of them, numbered from 0")
            item = plain(typing.get_args(plain(_hint(".".join(sections[:depth]))))[0])
            into[int(section)] = {**from_short(item, into[int(section)])}
            into = into[int(section)]
        elif following.isdigit():
            into = into.setdefault(section, [*table] if isinstance(table, list) else [])
        else:
            into = into.setdefault(section, {})
    return into


def _groups(flags: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, values) of each flag, given as "--name=value" or "--name value ..."."""
    current: tuple[str, list[str]] | None = None
    for flag in flags:
        if flag.startswith("--") and len(flag) > 2:
            if current:
                yield current
            name, equals, value = flag[2:].partition("=")
            current = (name.replace("-", "_"), [value] if equals else [])
        elif current is None:
            raise ConfigError(f"{flag}: want --section.field value after the config file")
        else:
            current[1].append(flag)
    if current:
        yield current


def _hint(name: str) -> Any:
    """The type of the setting with this dotted name; None where there is none, or its name depends on a value."""
    hint: Any = Config
    for part in name.split("."):
        if not dataclasses.is_dataclass(plain(hint)):
            return None
        hint = typing.get_type_hints(plain(hint), include_extras=True).get(part)
    return hint


def _value(hint: Any, values: list[str]) -> Any:
    """What the texts after a flag stand for, as a file would hold it; what is no TOML stays text."""
    kind = typing.get_origin(plain(hint)) or plain(hint)
    if not values:
        return True
    members = _members(hint)
    choices = [str(choice) for member in members if typing.get_origin(member) is Literal for choice in member.__args__]
    is_list = any((typing.get_origin(member) or member) in (tuple, list) for member in members)
    if (is_list and values[0] not in (*choices, "None")) or (len(values) > 1 and kind is not dict):
        items = [_scalar(str in members, value) for value in values]
        return items if len(values) > 1 or not values[0].startswith("[") else _toml(values[0])
    if kind is dict and len(values) > 1:
        return dict(zip(values[::2], [_toml(value) for value in values[1::2]], strict=False))
    return _scalar(plain(hint) is str, values[0])


def _scalar(text: bool, value: str) -> Any:
    return None if value == "None" else value if text else _toml(value)


def _members(hint: Any) -> list[Any]:
    """The type and the types within it."""
    return [plain(hint), *(member for arg in typing.get_args(plain(hint)) for member in _members(arg))]


def _toml(value: str) -> Any:
    """The value as TOML reads it ("1e-5", "true", "[1, 2]"); the text itself where it is no TOML."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return value


# ---- help --------------------------------------------------------------------------------------------------------


def _harmless(value: Any) -> Any:
    """Settings of a file as they may be printed: no text in them steers the terminal."""
    if isinstance(value, dict):
        return {_harmless(key): _harmless(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_harmless(part) for part in value]
    return visible(value) if isinstance(value, str) else value


def _print_help(command: str, file: str | None, settings: dict[str, Any], about: str) -> None:
    """Print every setting as a flag, with its docstring and its value in `settings`."""
    from rlft.algos.algorithm import loss_class

    algo = settings.get("algo", {})
    name = algo if isinstance(algo, str) else algo.get("name", "grpo")
    options = {key: value for key, value in algo.items() if key != "name"} if isinstance(algo, dict) else {}
    algorithm = dataclasses.make_dataclass(
        "Algo", [("name", Annotated[str, tyro.conf.arg(help=ALGO)], name)], bases=(loss_class(name),), frozen=True
    )
    fields: list[tuple[str, Any, Any]] = [
        ("resume", Annotated[bool, tyro.conf.arg(help=RESUME), tyro.conf.FlagCreatePairsOff], False)
    ]
    # What a file must have and this one lacks stands in for the checks, and is shown as required or without a value.
    data = settings.get("data", "?")
    counted = "steps" in settings or (isinstance(data, dict) and "epochs" in data)
    complete: dict[str, Any] = {"model": "?", "out": "?", **settings, "data": data}
    cfg = Config(**complete if counted else {**complete, "steps": 1})
    for field, hint in typing.get_type_hints(Config, include_extras=True).items():
        value = getattr(cfg, field)
        if field == "algo":
            hint, value = algorithm, options_of(algorithm, options, "algo", known=("name",))
        elif field == "data":
            hint, value = _without(value, "rows")
        elif field not in settings and field in ("model", "out", "steps"):
            value = None if field == "steps" else tyro.MISSING
        description = Config.__pydantic_fields__[field].description  # type: ignore[attr-defined]
        fields.append((field, Annotated[hint, tyro.conf.arg(help=description)], dataclasses.field(default=value)))
    values = f"the values shown are those of {file}, or the defaults" if file else "the values shown are the defaults"
    more = f"Every setting of the file is a flag too: --section.field value, or --section.field=value; {values}."
    tyro.cli(
        dataclasses.make_dataclass("Flags", fields, frozen=True),
        args=["--help"],
        prog=f"rlft {command} {file or 'FILE'}",
        use_underscores=True,
        description=paragraph(f"{about} {more}"),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.DisallowNone),
    )


def _without(section: Any, name: str) -> tuple[type, Any]:
    """Return a section's class and value for the help without a field that only Python can give."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    described = type(section).__pydantic_fields__
    fields = [
        (field.name, Annotated[hints[field.name], tyro.conf.arg(help=described[field.name].description)])
        for field in dataclasses.fields(section)
        if field.name != name
    ]
    shown = dataclasses.make_dataclass(type(section).__name__, fields, frozen=True)
    return shown, shown(**{field: getattr(section, field) for field, _ in fields})
