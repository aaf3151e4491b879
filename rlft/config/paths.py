"""From what a user wrote to a path that the system takes."""

from __future__ import annotations

from pathlib import Path

from rlft.errors import ConfigError


def user_path(text: str | Path, field: str) -> Path:
    """The path that a text names, with "~" expanded; it need not exist. field: the setting it is from.

    Raises ConfigError for what the system refuses to look up: an unknown user after "~", a name that is too long, a NUL
    or half a character, a folder that may not be entered, links in a circle.
    """
    if not isinstance(text, str | Path):
        raise ConfigError(f"{field} is a {type(text).__name__}: give a path")
    try:
        path = Path(text).expanduser()
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return path
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f'{field} = "{text!s:.80}": cannot be a path here: {why}; give another one') from None
    return path
