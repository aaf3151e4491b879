"""Secrets in a config: which values they are, how they are shown, and "env:NAME" in their place.

A value is a secret by the words of its name: `api_key`, `hfToken`, `DB_PASSWORD`, but not `max_tokens` or `sort_key`.
The password of a URL is one under any name. What rlft writes, prints or sends has `MASK` in place of a secret.
"env:NAME" stands for the environment variable NAME: it is written as it is, and read where the value is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlft.errors import ConfigError

MASK = "***"
"""What is shown in place of a secret."""
REFERENCE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
"""A value that is read from the environment."""
URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):([^/\s@]+)@")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""One word of a name in snake_case, kebab-case or camelCase."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SECRET = _words(
    "password passwords passwd pwd passphrase secret secrets credential credentials auth authorization bearer "
    "cookie apikey apikeys accesskey secretkey privatekey authkey apitoken authtoken accesstoken hftoken"
)
"""Words that make the value of a name secret."""
ACCESS = _words("api access auth secret private bearer refresh hf hub wandb openai license")
"""Words before "keys" and "tokens" that make those secret: `api_keys`, but not `max_tokens`."""
PLAIN_KEY = _words(
    "answer sort column row dict json primary foreign public group cache label field target prompt completion "
    "response message messages score reward metric lookup index map num n hot"
)
"""Words before "key" that make it the name of something."""
PLAIN_TOKEN = _words(
    "pad eos bos unk sep cls mask stop start end begin special added extra image audio video think thinking tool "
    "max min num n per new next first last prompt completion each any"
)
"""Words before "token" that make it a token of text."""
PLAIN_AFTER = _words(
    "id ids count counts budget limit length level levels mean sum weight weights penalty type types prob probs "
    "logprob logprobs value values heads size dim"
)
"""Words after "key" and "token" that do the same."""
PLACE = _words("file path name env var variable column field")
"""Last words of a name whose value says where a secret is, and is none."""
SHORTEST = 4
"""Characters of the shortest secret that `hidden` looks for in a text."""


def secret(name: str) -> bool:
    """Return True when a value of this name is a secret."""
    words = [word.lower() for word in WORD.findall(name)]
    if not words or words[-1] in PLACE:
        return False
    return any(_secret(words, place) for place in range(len(words)))


def _secret(words: list[str], place: int) -> bool:
    word = words[place]
    before, after = ("", *words)[place], (*words, "")[place + 1]
    if word == "key":
        return before not in PLAIN_KEY and after not in PLAIN_AFTER
    if word == "token":
        return before not in PLAIN_TOKEN and after not in PLAIN_AFTER
    return word in SECRET or (word in ("keys", "tokens") and before in ACCESS)


def masked(value: Any, name: str = "", inside: bool = False) -> Any:
    """Return a value of a config, such as a table, with MASK in place of every secret in it.

    name: of the value. inside: it is part of a secret. References to the environment stay as they are.
    """
    inside = inside or secret(name)
    if isinstance(value, Mapping):
        # The values of data.columns are names of columns.
        return dict(value) if name == "columns" else {key: masked(value[key], str(key), inside) for key in value}
    if isinstance(value, list | tuple):
        return type(value)(masked(item, "", inside) for item in value) if type(value) in (list, tuple) else value
    if inside and isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
        return value if isinstance(value, str) and REFERENCE.fullmatch(value) else MASK
    return URL_PASSWORD.sub(rf"\1:{MASK}@", value) if isinstance(value, str) else value


def refers(value: Any) -> bool:
    """Return True when a value, or one inside it, is a reference to the environment."""
    if isinstance(value, Mapping):
        return any(refers(item) for item in value.values())
    if isinstance(value, list):
        return any(refers(item) for item in value)
    return isinstance(value, str) and REFERENCE.fullmatch(value) is not None


def resolved(value: Any, where: str) -> Any:
    """Return a value with what its references stand for, the same object where it has none.

    where: the setting that has the value, for the error. Raises ConfigError for a variable that is not set.
    """
    if not refers(value):
        return value
    if isinstance(value, Mapping):
        return {key: resolved(value[key], f"{where}.{key}") for key in value}
    if isinstance(value, list):
        return [resolved(item, where) for item in value]
    match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    if not os.environ.get(match[1]):
        raise ConfigError(
            f'{where} = "{value}": the environment variable {match[1]} is not set, or empty; set it before rlft starts'
        )
    return os.environ[match[1]]


def problems(value: Any, where: str) -> Iterator[str]:
    """Yield what keeps the secrets in a value from being used: variables that are not set, values that were masked."""
    for path, part in _leaves(value, where):
        name = path.rpartition(".")[2]
        if isinstance(part, str) and (MASK if secret(name) else f":{MASK}@") in part:
            yield f'{path} = "{part}": was masked when this file was written; give the value again, best as "env:NAME"'
        elif isinstance(part, str) and REFERENCE.fullmatch(part):
            try:
                resolved(part, path)
            except ConfigError as error:
                yield str(error)
        elif isinstance(part, str) and part.startswith("env:") and secret(name):
            yield f'{path} = "{part}": want "env:NAME", where NAME is the name of an environment variable'


def literals(value: Any, where: str) -> list[str]:
    """Return the dotted names of the secrets that are written out in a value."""
    return [path for path, part in _leaves(value, where) if masked(part, path.rpartition(".")[2]) != part]


def advice(value: Any, where: str) -> list[str]:
    """Return a sentence on each secret that is written out in a value."""
    return [
        f'{path}: looks like a secret, so whatever rlft writes has "{MASK}" in its place, and `rlft eval` cannot know '
        f'it; write "env:NAME" and set the environment variable NAME'
        for path in literals(value, where)
    ]


def reaches_out(value: Any) -> bool:
    """Return True for a value with a reference to the environment or a URL: its user may send something away."""
    texts = [part for _, part in _leaves(value, "") if isinstance(part, str)]
    return any(REFERENCE.fullmatch(text) or "://" in text for text in texts)


def values(value: Any) -> list[str]:
    """Return the secrets in a value as texts, those of the environment too, longest first; for `hidden`."""
    found = set()
    for path, part in _leaves(value, ""):
        if isinstance(part, str) and (match := REFERENCE.fullmatch(part)):
            found.add(os.environ.get(match[1], ""))
        elif masked(part, path.rpartition(".")[2]) == MASK:
            found.add(str(part))
        elif isinstance(part, str):
            found |= {match[2] for match in URL_PASSWORD.finditer(part)}
    return sorted((text for text in found if len(text) >= SHORTEST), key=len, reverse=True)


def hidden(text: str, secrets: list[str]) -> str:
    """Return a text with MASK in place of each of the secrets."""
    for each in secrets:
        text = text.replace(each, MASK)
    return text


def _leaves(value: Any, where: str, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of what is no table and no list. Parts of a secret have its name at their end."""
    name = name or (where if secret(where.rpartition(".")[2]) else "")
    if isinstance(value, Mapping):
        for key in value:
            inner = f"{where}.{key}" if where else str(key)
            yield from _leaves(value[key], inner, name)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, where, name)
    else:
        yield (name or where), value
