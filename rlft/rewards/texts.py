"""Texts about objects of a user: no object can raise from its repr or str here, or send control codes to a terminal."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

LONGEST = 3000
"""Characters of the description of a fault, at most."""
STRINGS = (
    "completions are strings here, because the prompts are strings: use the text itself, or give the prompts as "
    "lists of messages"
)
MESSAGES = (
    "completions are lists of messages here, because the prompts are messages: the text is "
    'completion[-1]["content"], or give the prompts as strings'
)
NEED_MESSAGES = re.compile(r"^string ind(ices|ex) must be|^'str' object has no attribute '(get|items|keys)'")
NEED_STRINGS = re.compile(r"^'list' object has no attribute|^expected string or bytes-like object, got 'list'|^unhash")
"""What Python says when a function takes completions for messages, or for strings, and they are not."""


def type_name(value: Any) -> str:
    """Return the name of a value's type, whatever its metaclass defines."""
    return type.__dict__["__name__"].__get__(type(value))


def described(value: Any, form: Callable[[Any], str] = repr, most: int = 60) -> str:
    """Return repr or str of a value in at most `most` printable characters. One that raises is named by its type."""
    try:
        text = str.__str__(form(value))  # a subclass of str may define any method
    except KeyboardInterrupt:  # Ctrl-C of the user
        raise
    except BaseException:  # whatever an object raises from its __repr__, SystemExit too
        return f"<{type_name(value)} whose {form.__name__} raises>"
    return printable(text if len(text) <= most else text[:most])


def printable(text: str, most: int = LONGEST) -> str:
    """Return the text with escapes for characters that do not print, and without its middle where it is long."""
    if len(text) > most:
        text = f"{text[: most // 2]}\n...\n{text[-(most // 2) :]}"
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def fault(error: BaseException, completions: Any = ()) -> str:
    """Return what an exception says with its last lines of code, and a hint where its cause is a common one.

    completions: what the function got under this name.
    """
    said = described(error, str, LONGEST)
    try:
        lines = traceback.format_exception(error)[-3:]
    except KeyboardInterrupt:
        raise
    except BaseException:  # it reads attributes of the exception
        lines = []
    hint = _hint(said, completions) if isinstance(error, TypeError | AttributeError) else ""
    text = printable(f"{type_name(error)}: {said}\n{''.join(lines)}".rstrip())
    return f"{text}\n{hint}" if hint else text


def _hint(said: str, completions: Any) -> str:
    first = next(iter(completions), None) if isinstance(completions, list) else None
    if isinstance(first, str) and NEED_MESSAGES.search(said):
        return STRINGS
    return MESSAGES if isinstance(first, list) and NEED_STRINGS.search(said) else ""


def withheld_hint(text: str, names: Sequence[str]) -> str:
    """Return a hint at the environment variables that a fault mentions and that the worker was not given."""
    found = [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    if not found:
        return ""
    listed = ", ".join(f'"{name}"' for name in found)
    return f"\na reward's process gets no variable that looks like a secret; env = [{listed}] in its table gives it"
