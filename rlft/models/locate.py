"""Find the model that a string names, and its tokenizer.

The string is a hub id, a folder, a .gguf file, or an installed package that contains one .gguf file.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlft.errors import ConfigError


@dataclass(frozen=True)
class Location:
    """The arguments by which `from_pretrained` finds a model."""

    path: str
    """Hub id or folder."""
    gguf: str | None = None
    """Name of the .gguf file in the folder."""


def locate(model: str) -> Location:
    """Return the location that a model string names. Raises ConfigError for a missing file and an ambiguous package."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f'model = "{model}": no such file')
        return Location(str(path.parent), path.name)
    if path.is_file():
        raise ConfigError(f'model = "{model}": a file; give the folder of a saved model, or a .gguf file')
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f'model = "{model}": the folder has no config.json; give the folder of a saved model')
        return Location(str(path))
    if model.isidentifier():
        spec = importlib.util.find_spec(model)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            files = sorted(Path(folder).glob("*.gguf"))
            if len(files) == 1:
                return Location(folder, files[0].name)
            if files:
                raise ConfigError(
                    f'model = "{model}": the package holds {len(files)} .gguf files; give one by its path'
                )
        if spec is not None:
            raise ConfigError(f'model = "{model}": the installed package holds no .gguf file')
    return Location(model)


def load_tokenizer(model: str) -> Any:
    """Load the model's tokenizer. Raises ConfigError if the model is not found."""
    from transformers import AutoTokenizer

    location = locate(model)
    try:
        return AutoTokenizer.from_pretrained(location.path, **({"gguf_file": location.gguf} if location.gguf else {}))
    except OSError as error:
        raise not_found_error(model, error) from error


def not_found_error(model: str, error: Exception) -> ConfigError:
    """Build the error for a model that neither this machine nor the hub has."""
    first_line = str(error).strip().splitlines()[0]
    return ConfigError(
        f'model = "{model}": not a folder, a .gguf file or an installed package, and the hub did not have it or could '
        f"not be reached ({first_line}). Check the name and the network, or give a local folder."
    )
