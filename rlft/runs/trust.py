"""Whether the code that the config.toml of a run folder names may be run: yes for a folder of one's own.

A run signs its config.toml with a key of the user (HMAC-SHA256 over the path of the folder and the bytes of the file).
A folder from elsewhere, one that was moved and one whose config.toml was edited have no valid signature; then a command
that would run code of theirs asks for --trust. `report`, `generate`, `merge` and `push` run none and never ask.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets as random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlft.config import secrets
from rlft.config.resolve import names_user_code
from rlft.config.run import Config
from rlft.errors import ConfigError
from rlft.runs.folder import Run, replace_file

SIGNATURE = ".signature"
"""File of a run folder; its name begins as those do that make no run of a folder."""


def sign(run: Run) -> None:
    """Sign the config.toml of a run. Without a place for the user's key nothing is signed, and commands ask."""
    if (signature := _signature(run)) is not None:
        with run.writing(SIGNATURE):
            replace_file(run.path / SIGNATURE, signature.encode())


def check(run: Run, cfg: Config, trust: bool, rewards: bool = True) -> None:
    """Raise ConfigError where the config of a run folder names code to run and the folder is not the user's own.

    trust: the user says that it may run. rewards: whether the reward functions that it names would be called.
    """
    named = [*code(cfg, rewards), *(_reaching_out(cfg) if rewards else ())]
    if trust or not named:
        return
    path, signature = run.path / SIGNATURE, _signature(run)
    signed = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if signature is None or not hmac.compare_digest(signature, signed):
        raise ConfigError(
            f"{run.path}: its config.toml names what would be run or sent ({'; '.join(named)}), and you did not make "
            f"this folder here, or it was moved or edited since; look at config.toml, then add --trust"
        )


def code(cfg: Config, rewards: bool = True) -> Iterator[str]:
    """Yield the settings of a config that name code of a user, which is run by who uses them. rewards: those too."""
    for field, functions in (("rewards", cfg.rewards), ("eval.rewards", cfg.eval.rewards)):
        names = [str(reward.use) for reward in functions if rewards and names_user_code(str(reward.use))]
        yield from (f'{field} = "{name}"' for name in names)
    for field, data in (("data", cfg.data), ("eval.data", cfg.eval.data)):
        if data is not None and data.template is not None:
            yield f'{field}.template = "{data.template}"'
    values: dict[str, Any] = {"name": cfg.algo.name, **cfg.algo.options}
    for name, value in values.items():
        if name in ("name", "advantage") and names_user_code(str(value)):
            yield f'algo.{name} = "{value}"'


def _reaching_out(cfg: Config) -> Iterator[str]:
    """Yield the rewards of ours whose args hand on a variable of the environment, or name an address to send to."""
    for reward in cfg.eval.rewards or cfg.rewards:
        if not names_user_code(str(reward.use)) and secrets.reaches_out(reward.args):
            yield f'the args of rewards = "{reward.use}"'


def _signature(run: Run) -> str | None:
    key = _key()
    if key is None or not run.config.is_file():
        return None
    message = os.fsencode(run.path.resolve()) + b"\0" + run.config.read_bytes()
    return hmac.new(key, message, "sha256").hexdigest()


def _key() -> bytes | None:
    """Return the key of this user, made at the first use; None where it has no place."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        path = state / "rlft" / "key"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = path.with_name(f".key-{os.getpid()}")
            temporary.touch(mode=0o600)
            temporary.write_bytes(random.token_bytes(32))
            with contextlib.suppress(FileExistsError):  # another process was first, and its key is everybody's
                path.hardlink_to(temporary)
            temporary.unlink()
        return path.read_bytes() or None
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return None
