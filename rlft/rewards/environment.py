r"""The environment of a worker: the run's variables without those that look like secrets.

A variable is a secret when a part of its name between underscores ends with a word of `ENDINGS` or is one of `PARTS`
(HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, GITHUBTOKEN, DB_PASS, SSH_AUTH_SOCK), or when its value is a URL with
a password or begins like a key of a well-known service. A reward asks for one by name: env = ["OPENAI_API_KEY"].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlft.errors import RewardError

ENDINGS = (
    "TOKEN",
    "TOKENS",
    "KEY",
    "KEYS",
    "SECRET",
    "SECRETS",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "CREDENTIAL",
    "CREDENTIALS",
)
PARTS = ("PASS", "PW", "PWD", "AUTH", "PAT", "DSN", "COOKIE", "COOKIES", "CREDS", "PRIVATE", "SIGNATURE")
"""Words that are secret only as a whole part of a longer name: DB_PWD, not PWD."""
VALUES = re.compile(
    r"\w+://[^/\s:@]*:[^/\s@]+@|-----BEGIN|"
    r"(hf_|sk-|sk_live_|rk_live_|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|AKIA|ASIA|AIza|ya29\.|npm_|pypi-|dckr_pat_)\w"
)
"""What a value begins with that is a secret under any name."""


class Environment(NamedTuple):
    """The variables of a worker."""

    variables: dict[str, str]
    withheld: tuple[str, ...]
    """Names of the run's variables that the worker does not get."""


def is_secret(name: str, value: str) -> bool:
    """Return True for a variable that a worker gets only when its reward asks for it."""
    parts = re.split(r"[^A-Z0-9]+", name.upper())
    longer = len([part for part in parts if part]) > 1
    named = any(part.endswith(ENDINGS) or (longer and part in PARTS) for part in parts)
    return named or VALUES.match(value.strip()) is not None


def of_worker(variables: Mapping[str, str], wanted: Sequence[str], reward: str) -> Environment:
    """Return the environment of a worker. wanted: secrets it is given. Raises RewardError for one that is not set."""
    missing = [name for name in wanted if name not in variables]
    if missing:
        raise RewardError(
            f'reward "{reward}": env names {missing[0]}, which is not set here; export it, or leave it out'
        )
    withheld = [name for name, value in variables.items() if name not in wanted and is_secret(name, value)]
    kept = {name: value for name, value in variables.items() if name not in withheld}
    return Environment(kept, tuple(withheld))
