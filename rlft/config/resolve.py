"""Names to objects: "grpo", "rewards.py:correct", "package.module:attr".

A thing of ours is found by its file's name, so adding one is adding a file: no registry, no decorator.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rlft.config.paths import user_path
from rlft.errors import ConfigError


def did_you_mean(name: str, known: list[str], cutoff: float = 0.6) -> str:
    """A hint for a mistyped name: ' Did you mean "x"?', or nothing when nothing is close.

    cutoff: from 0 for any name to 1 for the same name.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f' Did you mean "{close[0]}"?' if close else ""


def names_in(package: str) -> list[str]:
    """Names of the public modules of a package, sorted."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    return sorted(
        module.name
        for module in pkgutil.iter_modules(spec.submodule_search_locations)
        if not module.name.startswith("_")
    )


def load_file(path: Path, field: str = "file") -> ModuleType:
    """Import a Python file by its path. field: the setting it is from, for the error.

    The file's folder goes on sys.path first, so that it can import its neighbours as it would when run as a script.
    Raises ConfigError when there is no such file; what the file itself raises passes through.
    """
    where = "" if path.is_absolute() else f" (looked for it from {Path.cwd()}, where rlft was started)"
    path = user_path(path, field).resolve()
    if not path.is_file():
        raise ConfigError(f"no file {path}{where}")
    # A separate name: a user's "random.py" must not become the standard library's.
    name = f"rlft_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, as import does it: dataclasses and pickle look the module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def names_user_code(name: str) -> bool:
    """Whether a name stands for something of the user: "file.py", "file.py:name" or "package.module:name"."""
    return ":" in name or name.endswith(".py")


def user_module(reference: str, field: str) -> ModuleType:
    """The module that "file.py", or "file.py:name" or "package.module:name" before the colon, stands for.

    `field` is the setting it was given in, for the error. Raises ConfigError when file or module is missing.
    """
    where = reference.rpartition(":")[0] or reference
    try:
        if where.endswith(".py"):
            return load_file(Path(where), field)
        if not all(part.isidentifier() for part in where.split(".")):
            raise ConfigError(f'"{where}" is the name of no module')
        return importlib.import_module(where)
    except (ConfigError, ModuleNotFoundError) as error:
        raise ConfigError(f'{field} = "{reference}": {error}') from None


def attribute(reference: str, field: str) -> Any:
    """The object that "file.py:name" or "package.module:name" stands for.

    `field` is the setting it was given in, for the error. Raises ConfigError when file, module or name is missing.
    """
    where, _, name = reference.rpartition(":")
    if not where:
        raise ConfigError(f'{field} = "{reference}": want "file.py:name" or "package.module:name"')
    module = user_module(reference, field)
    if not hasattr(module, name):
        raise ConfigError(f'{field} = "{reference}": {where} has no "{name}".{did_you_mean(name, dir(module))}')
    return getattr(module, name)


def module(name: str, package: str, field: str) -> ModuleType:
    """The module `package.name`, for a built-in named by its file. Raises ConfigError listing the known names."""
    known = names_in(package)
    if name not in known:
        raise ConfigError(
            f'{field} = "{name}": unknown.{did_you_mean(name, known)} Known: {", ".join(known)}; '
            f'or give "file.py:name" or "package.module:name"'
        )
    return importlib.import_module(f"{package}.{name}")
