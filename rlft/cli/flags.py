"""The config as command-line flags: `rlft train run.toml --optim.lr=1e-5`.

Flags are the fields of the config dataclasses with the file's values as defaults, parsed and shown by tyro; `algo.name`
is read first, so that [algo] has the flags and the help of that algorithm. A flag that does not exist, or whose value
is of another type, is told in the words that a file gets (`rlft.config.files`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import operator
import shutil
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from rlft.config import files as config_file
from rlft.config.run import Algo, Config
from rlft.errors import ConfigError

A = TypeVar("A")

WORDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""What stands for a value in the help."""


def parse(command: str, args: list[str], about: str) -> tuple[Config, bool]:
    """The config of `rlft COMMAND FILE --flags ...`, and whether --resume was given. about: what the command does.

    Raises ConfigError for what is wrong in file or flags; tyro exits by itself on --help (0) and a malformed flag (2).
    """
    file, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    if file is None and not {"-h", "--help"} & set(flags):
        raise ConfigError(f"the config file comes first: rlft {command} FILE [--section.field value ...]")
    table = config_file.read(file) if file else {}
    if "resume" in table:
        raise config_file.unknown("resume", "", [])
    name = _given(flags, "--algo.name")
    if name in config_file.presets():
        # The flag lays the preset under the file, whose own algorithm it takes the place of.
        table = {**table, "algo": {**config_file.section(Algo, table.get("algo", {}), "algo").options, "name": name}}
        flags = _without(flags, "--algo.name")
        name = None
    table = config_file.with_preset(table)
    algo = config_file.section(Algo, table.get("algo", {}), "algo")
    name = name or algo.name
    made = _flags_type(name)
    check(flags, made)
    shown = config_file.from_table(made, {**table, "algo": {**algo.options, "name": name}})
    parsed = tyro.cli(
        type(shown),
        default=shown,
        args=flags,
        prog=f"rlft {command} {file or 'FILE'}",
        use_underscores=True,
        description=_description(file, about),
        config=(tyro.conf.AvoidSubcommands,),
    )
    final = config_file.to_table(parsed)
    resume = final.pop("resume")
    return config_file.from_table(Config, final), resume


def _description(file: str | None, about: str) -> str:
    values = f"the values shown are those of {file}, or the defaults" if file else "the values shown are the defaults"
    more = f"Every setting of the file is a flag too: --section.field value, or --section.field=value; {values}."
    return paragraph(f"{about} {more}")


def paragraph(text: str) -> str:
    """The text as wide as the terminal, indented: tyro wraps everything but descriptions, and keeps such lines."""
    width = min(120, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _given(flags: list[str], name: str) -> str | None:
    """The last value given for a flag, as "--flag=value" or "--flag value"."""
    values = [f.partition("=")[2] for f in flags if f.startswith(f"{name}=")]
    values += [value for f, value in itertools.pairwise(flags) if f == name]
    return values[-1] if values else None


def _without(flags: list[str], name: str) -> list[str]:
    """The flags without `name`, given as "--flag=value" or "--flag value"."""
    kept, skip = [], False
    for flag in flags:
        if not skip and flag != name and not flag.startswith(f"{name}="):
            kept.append(flag)
        skip = not skip and flag == name
    return kept


# ---- what is wrong with a flag -----------------------------------------------------------------------------------


def check(flags: list[str], cls: type) -> None:
    """Raise ConfigError for a flag that no field of the dataclass `cls` has, or whose value is of another type.

    What has no name in `cls` (arguments of a task, the settings of one reward among several) is left to tyro.
    """
    known = _hints(cls)
    for i, flag in enumerate(flags):
        if not flag.startswith("--") or flag == "--help":
            continue
        name, equals, value = flag.removeprefix("--").partition("=")
        path = name.replace("-", "_")
        where, _, key = path.rpartition(".")
        if f"{where}.{key}".lstrip(".").replace("no_", "", 1) in known and key.startswith("no_"):
            continue
        if path in known:
            following = flags[i + 1] if i + 1 < len(flags) else "--"
            if not equals and following.startswith("--") and known[path] is not bool:
                raise ConfigError(f"{flag}: a value is missing; want {flag} VALUE, or {flag}=VALUE")
            _check_value(known[path], value if equals else following, path)
        elif not any(_open(hint) and path.startswith(f"{p}.") for p, hint in known.items()):
            here = [p.rpartition(".")[2] for p in known if p.rpartition(".")[0] == where]
            raise config_file.unknown(key, where, here)


def _hints(cls: type, where: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field that has one name: {"model": str, "optim.lr": float, ...}."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        path = f"{where}.{name}".lstrip(".")
        inner = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found |= _hints(hint, path) if inner else {path: hint}
    return found


def _open(hint: Any) -> bool:
    """True for a field whose flags depend on its value: a table, or tables in a list or in place of None."""
    inner = typing.get_args(hint)
    return typing.get_origin(hint) is dict or any(dataclasses.is_dataclass(t) for t in inner)


def _check_value(hint: Any, text: str, path: str) -> None:
    kinds = [t for t in _members(hint) if t is not type(None)]
    if len(kinds) != 1 or (len(kinds) < len(_members(hint)) and text == "None"):
        return
    kind = kinds[0]
    try:
        right = kind not in (int, float) or kind(text) is not None
    except ValueError:
        right = False
    if typing.get_origin(kind) is Literal:
        right = text in map(str, typing.get_args(kind))
    if not right:
        raise config_file.mistyped(hint, text, path)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


# ---- the dataclasses that tyro shows -----------------------------------------------------------------------------


def _flags_type(algorithm: str) -> type:
    """A Config for the command line: unchecked, with `resume`, and with the algorithm's own settings under `algo`."""
    from rlft.algos.algorithm import module_of

    options = _unchecked(module_of(algorithm).Config)
    name = Annotated[
        str, tyro.conf.arg(help="The algorithm; the other flags of this section are its own.", metavar="NAME")
    ]
    # The fields of the last base come first.
    head = dataclasses.make_dataclass("Head", [("name", name, dataclasses.field(default=algorithm))], frozen=True)
    algo = _extended(options, [], head)
    about = "Go on from the newest checkpoint in `out`."
    resume = Annotated[bool, tyro.conf.arg(help=about, help_behavior_hint=""), tyro.conf.FlagCreatePairsOff]
    return _extended(_unchecked(Config), [("algo", algo, None), ("resume", resume, False)])


def _extended(cls: type, fields: list[tuple[str, Any, Any]], *bases: type) -> type:
    """A subclass of the dataclass `cls` (and `bases`) with these (name, type, default) fields; its help stays."""
    added = [(name, hint, dataclasses.field(default=default)) for name, hint, default in fields]
    same = {"__doc__": cls.__doc__}
    return dataclasses.make_dataclass(cls.__name__, added, bases=(cls, *bases), frozen=True, namespace=same)


def _unchecked(hint: Any) -> Any:
    """The type `hint` with every dataclass in it replaced by a subclass that accepts any value.

    A file may lack what a flag gives, so checks come after both are merged; a missing field becomes a required flag.
    """
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints, docs = typing.get_type_hints(hint), field_docs(hint)
        # Each type is made once: tyro wants a default to be an instance of the very class its field names.
        types_of = {f.name: _unchecked(hints[f.name]) for f in dataclasses.fields(hint)}
        fields = [
            (f.name, _shown(types_of[f.name], docs.get(f.name)), _default(f, types_of[f.name]))
            for f in dataclasses.fields(hint)
        ]
        made = {"__post_init__": lambda self: None, "__doc__": hint.__doc__}
        return dataclasses.make_dataclass(hint.__name__, fields, bases=(hint,), frozen=True, namespace=made)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, (_unchecked(a) for a in args))
    if origin is None or origin is Literal:
        return hint
    return origin[tuple(_unchecked(a) for a in args)]


def _default(field: dataclasses.Field[Any], hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return dataclasses.field(default_factory=hint)
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=tyro.MISSING if field.default is dataclasses.MISSING else field.default)


# ---- what the help says ------------------------------------------------------------------------------------------


def worded(cls: type[A]) -> type[A]:
    """The dataclass with the words of this help for its fields; it makes instances of a subclass of `cls`.

    For the flags of a command: what is None or False there was not given, which the help need not say.
    """
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    fields = [
        (
            f.name,
            _shown(
                hints[f.name],
                docs.get(f.name, "").replace("; None: ", "; without it ").replace("None: ", "Without it: "),
                given=True,
            ),
            _default(f, hints[f.name]),
        )
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
    ]
    same = {"__doc__": cls.__doc__}
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True, namespace=same)


def _shown(hint: Any, doc: str | None, given: bool = False) -> Any:
    """The type with its words for the help; one that has no flag of its own is as it was. given: as in `worded`."""
    plain, *extra = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    word = _word(plain)
    if word is None or (extra and not given) or tyro.conf.Positional in extra:
        return hint

    def default(text: str) -> str:
        return "" if given and text in ("None", "False") else f"(default: {text.strip(chr(39)) or 'none'})"

    named = next((x.metavar for x in extra if getattr(x, "metavar", None)), None)
    word = named or (word.removesuffix("|None") if given else word) or None
    marks = tuple(x for x in extra if not hasattr(x, "metavar"))
    return Annotated[(plain, *marks, tyro.conf.arg(help=doc, metavar=word, help_behavior_hint=default))]


def _word(hint: Any) -> str | None:
    """What stands for a value: "N", "X|None", "TEXT ..."; "" where tyro's own word is good, None for a section."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        text = ",".join(map(str, args))
        return f"{{{text}}}" if "," in text else text
    if origin in (typing.Union, types.UnionType):
        words = [_word(a) for a in args if a is not type(None)]
        if None in words:
            return None
        return "|".join([w for w in words if w] + ["None"] * (type(None) in args))
    if origin is dict and args == (str, str):
        return "NAME TEXT ..."
    if origin is tuple and Ellipsis in args:
        word = _word(args[0])
        return None if word is None else f"{word} ..."
    if origin is tuple:
        return " ".join(_word(a) or "" for a in args)
    return "" if hint is bool else WORDS.get(hint)


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the docstring under it, on one line; without those of a class whose source is not at hand."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, doc in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return found
