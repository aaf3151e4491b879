"""Reward functions from what a config or a script names: built-ins, functions of files and modules, callables."""

from __future__ import annotations

import ast
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlft.config import resolve
from rlft.config.data import Reward
from rlft.config.paths import user_path
from rlft.config.trl_names import TRL_REWARDS
from rlft.errors import ConfigError, RewardError
from rlft.rewards.event_loop import Loop
from rlft.rewards.function import RewardFunction
from rlft.rewards.pool import InProcess, Subprocess

BUILTIN = "rlft.rewards.builtin"
"""Package with one file per built-in reward."""


def build_rewards(rewards: Sequence[Any] | Reward | str | Callable[..., Any]) -> list[RewardFunction]:
    """Build the reward functions, imported and with distinct names.

    rewards: one or several names, callables or Reward objects, whose `use` may be a callable. Raises RewardError and
    ConfigError for functions that do not exist or cannot be called, after closing those already started.
    """
    if isinstance(rewards, Reward | str) or callable(rewards):
        rewards = [rewards]
    functions: list[RewardFunction] = []
    loop = Loop()
    try:
        for reward in rewards:
            function = _make(reward if isinstance(reward, Reward) else Reward(reward), loop)
            used_names = [other.name for other in functions]
            names = itertools.chain([function.name], (f"{function.name}_{i}" for i in itertools.count(2)))
            function.name = next(name for name in names if name not in used_names)
            functions.append(function)
            function.open()
    except BaseException:
        for function in functions:
            function.close()
        raise
    return functions


def builtin(name: str, field: str) -> Any:
    """Return the module of a built-in reward. Raises ConfigError that says what to write for any other name."""
    known = resolve.names_in(BUILTIN)
    if name.endswith(".py"):
        functions = _functions_of(user_path(name, field), f'{field} = "{name}"')
        raise ConfigError(
            f'{field} = "{name}": which function of it? It has {", ".join(functions) or "none"}; give '
            f'"{name}:{functions[-1] if functions else "FUNCTION"}"'
        )
    if name in TRL_REWARDS and name not in known:
        raise ConfigError(f'{field} = "{name}": {TRL_REWARDS[name]}')
    return resolve.module(name, BUILTIN, field)


def _functions_of(path: Path, start: str) -> list[str]:
    """Return the names of a file's functions, which is not run. start: of the message of an error."""
    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{start}: {error.strerror or error} (looked for it from {Path.cwd()})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{start}: is no Python: {error}") from None
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [name for name in names if not name.startswith("_")]


def _make(reward: Reward, loop: Loop) -> RewardFunction:
    use: Any = reward.use
    if isinstance(use, str):
        if ":" in use:
            return RewardFunction(use.rpartition(":")[2], Subprocess(use, reward), reward)
        # A built-in scores each completion by itself, unless it says otherwise.
        batch = getattr(builtin(use, "rewards"), "BATCH", "any")
        return RewardFunction(use, Subprocess(f"{BUILTIN}.{use}:{use}", reward), reward, batch=batch)
    if isinstance(use, torch.nn.Module) or not callable(use):
        raise RewardError(
            f"rewards: {type(use).__name__} is no reward function; give one, which may call a model: "
            f"def reward(prompts, completions, **columns) -> list[float]"
        )
    plain = use
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = getattr(plain, "__name__", type(plain).__name__)
    target = _importable(use)
    if target is not None:
        return RewardFunction(name, Subprocess(target, reward), reward)
    executor = InProcess(use, loop)
    _check_in_process(name, reward, executor.is_async)
    note = (
        f'reward "{name}" can only be called in this process (a closure, a lambda, an object or a function of '
        f"__main__), so it cannot be stopped when it hangs; put it in a file and name it file.py:{name} to change that"
    )
    return RewardFunction(name, executor, reward, note)


def _check_in_process(name: str, reward: Reward, is_async: bool) -> None:
    """Raise RewardError for a setting that needs a separate process."""
    needs = {
        "memory_mb": reward.memory_mb is not None,
        "file_mb": reward.file_mb != Reward("any").file_mb,
        "env": bool(reward.env),
        "network": not reward.network,
        "batch": reward.batch not in (None, "step") and not is_async,
    }
    for setting, is_set in needs.items():
        if is_set:
            raise RewardError(
                f'reward "{name}": {setting} needs a separate process; put it in a file, as file.py:{name}'
            )


def _importable(function: Callable[..., Any]) -> str | None:
    """Return "module:name" if another process can import this very function by it; None otherwise."""
    name, qualname = str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", ""))
    module = sys.modules.get(name)
    if module is None or name == "__main__" or not qualname.isidentifier():
        return None
    if getattr(module, qualname, None) is not function:
        return None
    # sys.modules is not enough: a file may have been loaded under a name that cannot be imported.
    path, origin = None, None
    parts = name.split(".")
    for i in range(len(parts)):
        specs = (finder.find_spec(".".join(parts[: i + 1]), path) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return None
        path, origin = spec.submodule_search_locations, spec.origin
    return f"{name}:{qualname}" if origin == getattr(module, "__file__", None) else None
