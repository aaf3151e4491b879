"""Read the files of a model or an adapter, any of which may be damaged, or made by someone who means harm.

Nothing in them is run: transformers gets trust_remote_code=False, and pickles are read by PyTorch's restricted
unpickler. What a library raises over them becomes one ConfigError that names the file; see `reading`.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rlft.errors import ConfigError, RlftError

PLAIN = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
"""Exceptions whose text says enough without their names."""
LONGEST = 240
"""Characters of what a library says that are shown."""


@contextlib.contextmanager
def reading(setting: str, folder: str | Path, failure: str, remedy: str) -> Iterator[None]:
    """Turn what a library raises over the files in a folder into a ConfigError that names the file at fault.

    setting: with its value, as `model = "x"`. failure: what could not be done, where no file can be named. remedy: what
    to do. Running out of memory, and a GPU that fails, are no faults of the files and pass.
    """
    try:
        yield
    except (RlftError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):  # PyTorch's CPU allocator has no class for it
            raise
        found = damaged(Path(folder), error)
        what = f"{found} is damaged" if found else failure
        raise ConfigError(f"{setting}: {what} ({reason(error)}); {remedy}") from error


def reason(error: BaseException) -> str:
    """Return what an exception says, on one line and not too long, with its name where it says little."""
    text = " ".join(str(error).split())
    # What these say is about the caller's arguments, or advises to run what is in the files.
    if "ignore_mismatched_sizes" in text:
        return "the weights have other shapes than config.json says"
    if "trust_remote_code" in text:
        return "it wants code of its own to be run, and rlft runs no code that comes with a model"
    if isinstance(error, pickle.UnpicklingError):
        return "a pickle that is torn, or holds more than tensors, of which nothing was run"
    text = text if text and isinstance(error, PLAIN) else f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def damaged(folder: Path, error: BaseException) -> Path | None:
    """Return a file in a folder that cannot be what its name says; None where there is none, or no such folder.

    error: what was raised over the files.
    """
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            read_object(path)
        except ConfigError:
            return path
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError):
            return path
    pickled = isinstance(error, pickle.UnpicklingError) or "PytorchStreamReader" in str(error)
    return next(iter(sorted(folder.glob("*.bin"))), None) if pickled else None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError that names the file for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no JSON file ({reason(error)})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: want a JSON object, not {type(value).__name__}")
    return value


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in a .safetensors file, or in a .bin file, of which nothing is run.

    Raises ConfigError that names the file where it is damaged, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the readers raise a dozen kinds
        raise ConfigError(
            f"{path}: damaged, or no file of tensors ({reason(error)}); put the whole file there"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise ConfigError(f"{path}: holds something else than tensors; give the file that PEFT saved")
    return {str(name): tuple(tensor.shape) for name, tensor in held.items()}
