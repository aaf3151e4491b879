"""Find the model that a string names, and its tokenizer.

The string is a hub id, a folder, a .gguf file, or an installed package that contains one .gguf file.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols

from rlft.config.paths import user_path
from rlft.errors import ConfigError
from rlft.models import gguf
from rlft.models.files import reading, reason


@dataclass(frozen=True)
class Location:
    """The arguments by which `from_pretrained` finds a model."""

    path: str
    """Hub id or folder."""
    gguf: str | None = None
    """Name of the .gguf file in the folder."""

    @property
    def gguf_file(self) -> Path | None:
        """Path of the .gguf file."""
        return Path(self.path) / self.gguf if self.gguf else None


def locate(model: str) -> Location:
    """Return the location that a model string names. Raises ConfigError for a missing file and an ambiguous package."""
    path = user_path(model, "model")
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
        try:
            spec = importlib.util.find_spec(model)
        except ValueError:  # a module without a spec, such as __main__
            spec = None
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


def load_tokenizer(model: str, folder: Path | None = None) -> Any:
    """Load the model's tokenizer. Raises ConfigError if it is not found or cannot be loaded, its chat template too.

    folder: where another one was saved, to load in its place.
    """
    from transformers import AutoTokenizer

    location = locate(model) if folder is None else Location(str(folder))
    with explained(model, location, "its tokenizer"):
        written = gguf.tokenizer_folder(location.gguf_file) if location.gguf_file else None
        options: dict[str, Any] = {"gguf_file": location.gguf} if location.gguf and not written else {}
        # False: code from the hub is not run, and transformers does not prompt for it.
        tokenizer = AutoTokenizer.from_pretrained(written or location.path, trust_remote_code=False, **options)
        _check_templates(tokenizer.chat_template)
    return tokenizer


class _Generation(Extension):
    """The tag {% generation %} of transformers: what is between it and {% endgeneration %} is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 (as in the base)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_templates(template: Any) -> None:
    """Raise ValueError for a chat template, or one of several by name, that is no template. It is not run."""
    environment = Environment(extensions=[loopcontrols, _Generation])
    for name, text in (template if isinstance(template, dict) else {"": template}).items():
        if text is None:
            continue
        what = f"the chat template {name}".rstrip()
        if not isinstance(text, str):
            raise ValueError(f"{what} is no text but {type(text).__name__}")
        try:
            environment.parse(text)
        except (TemplateSyntaxError, RecursionError) as error:
            where = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise ValueError(f"{what}{where}: {reason(error)}") from None


@contextlib.contextmanager
def explained(model: str, location: Location, what: str) -> Iterator[None]:
    """Turn what transformers raises over the files of a model into a ConfigError. what: it loads."""
    setting, folder = f'model = "{model}"', Path(location.path)
    with reading(setting, folder, f"transformers cannot load {what}", "check its files, or give another model"):
        try:
            yield
        except OSError as error:
            if folder.is_dir():
                raise
            raise ConfigError(
                f"{setting}: not a folder, a .gguf file or an installed package, and the hub did not have it or could "
                f"not be reached ({reason(error)}). Check the name and the network, or give a local folder."
            ) from error
