"""Write and read checkpoints: one folder per saved step, written atomically.

    step-000012/
      adapter_config.json, adapter_model.safetensors   the PEFT adapter: transformers and vLLM can load the folder
      trainer.safetensors                              every tensor that a resume needs: adapter in fp32, moments
      state.json                                       rlft.types.State, the identity, versions, a digest
    best.json                                          the best step on the held-out rows; its folder is kept

A checkpoint is written under a temporary name, synced to disk and renamed, so that a kill at any moment leaves the
previous one usable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rlft.errors import ConfigError
from rlft.types import Best, State

FORMAT = 1
"""Version of the folder layout, incremented when old and new rlft cannot read each other's checkpoints."""
LIBRARIES = ("torch", "transformers", "peft")
NOTED = ("model", "rlft", "rope")
"""Parts of the identity that may differ and are only reported: a base can move to another folder, the layout has
FORMAT, and longrope factors follow the longest sequence."""
TEMPORARY = ".saving-"
DISCARDED = ".discarded-"


def save_checkpoint(
    root: Path,
    state: State,
    tensors: Mapping[str, Tensor],
    identity: Mapping[str, str],
    write_adapter: Callable[[Path], None],
    keep: int,
    best: Best | None = None,
) -> Path:
    """Write root/step-000012, then remove the oldest beyond `keep` and the remains of killed saves.

    Returns the folder. tensors: any names, dtypes and shapes, no two sharing storage. identity: properties of the run
    that the tensors belong to. write_adapter: called with the folder to write the PEFT adapter to. best: the best
    evaluation so far, including this step's; its checkpoint is always kept. A step that is already saved is not
    rewritten, since its state is the same. Raises ConfigError when the folder cannot be written.
    """
    assert keep >= 1, keep
    final = root / _name(state.step)
    temporary = root / f"{TEMPORARY}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        if not final.exists():
            temporary.mkdir()
            write_adapter(temporary)
            _write_state(temporary, state, tensors, identity)
            for path in sorted(temporary.rglob("*")):
                _sync(path)
            _sync(temporary)
            temporary.rename(final)
            _sync(root)
        mark_best(root, best)
        for old in _checkpoints(root)[:-keep]:
            if best is None or old.name != _name(best.step):
                # Renamed first, so that a kill during removal does not leave a partial checkpoint under its name.
                old.rename(root / f"{DISCARDED}{old.name}")
        _clean(root)
    except (OSError, SafetensorError) as error:  # PEFT writes with safetensors, which raises SafetensorError
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError(
            f"{final}: the checkpoint could not be written: {why}; make room there, then go on with --resume"
        ) from error
    return final


def mark_best(root: Path, best: Best | None) -> None:
    """Write root/best.json: {"checkpoint": "step-000012", "metric": "eval/reward", "value": 1}.

    It is removed if `best` is None. The file is for users; rlft itself uses `Run.best`. Raises ConfigError when it
    cannot be written.
    """
    path = root / "best.json"
    try:
        if best is None:
            path.unlink(missing_ok=True)
            return
        temporary = root / f".{path.name}.tmp"
        record = {"checkpoint": _name(best.step), "metric": best.metric, "value": best.value}
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {os.strerror(error.errno or 0)}; make room there, then go on with --resume"
        ) from error


def load_checkpoint(path: Path, identity: Mapping[str, str]) -> tuple[State, dict[str, Tensor], list[str]]:
    """Load state, tensors (on the CPU) and notes of a checkpoint that fits `identity`.

    A note is a message about a different library version, rlft version or name of the same base. Raises ConfigError
    when there is no checkpoint, when it is damaged, in another format, or made from another base or adapter shape.
    """
    from safetensors.torch import load as load_bytes

    record = _read_state(path)
    if record.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: a checkpoint in format {record.get('format')}, and this rlft reads format {FORMAT}; use the rlft "
            f"that wrote it ({_text(record, 'identity', 'rlft')})"
        )
    saved = record["identity"]
    for name in sorted({*identity, *saved} - {*NOTED}):
        if identity.get(name) != saved.get(name):
            raise ConfigError(
                f"{path}: does not fit this run: {name} of the checkpoint is {saved.get(name)!r} "
                f"(model {saved.get('model')!r}), here it is {identity.get(name)!r} (model "
                f"{identity.get('model')!r}); resume with the settings it was made with, or start in another folder "
                f"with --out"
            )
    data = _damaged_if(path, OSError, lambda: (path / "trainer.safetensors").read_bytes())
    if _digest(data) != record.get("digest"):
        raise _damaged(path, "trainer.safetensors is not what was written")
    state = _damaged_if(path, TypeError, lambda: State(**record["state"]))
    return state, load_bytes(data), _notes(record, identity)


def continued_from(path: Path) -> dict[str, str]:
    """Return the identity of a checkpoint. Raises ConfigError when there is no checkpoint or it is damaged."""
    return dict(_read_state(path)["identity"])


def _write_state(folder: Path, state: State, tensors: Mapping[str, Tensor], identity: Mapping[str, str]) -> None:
    from safetensors.torch import save as to_bytes

    data = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    (folder / "trainer.safetensors").write_bytes(data)
    record = {
        "format": FORMAT,
        "state": dataclasses.asdict(state),
        "identity": dict(identity),
        "versions": _versions(),
        "digest": _digest(data),
    }
    (folder / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ConfigError(f"{path}: no checkpoint there")
    text = _damaged_if(path, OSError, lambda: (path / "state.json").read_text(encoding="utf-8"))
    record = _damaged_if(path, ValueError, lambda: json.loads(text))
    sections = ("state", "identity", "versions")
    if not isinstance(record, dict) or not all(isinstance(record.get(name), dict) for name in sections):
        raise _damaged(path, "state.json lacks entries")
    return record


def _damaged_if(path: Path, error_type: type[Exception], read: Callable[[], Any]) -> Any:
    try:
        return read()
    except error_type as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path}: damaged checkpoint: {why}; remove that folder and resume from the one before it")


def _notes(record: Mapping[str, Any], identity: Mapping[str, str]) -> list[str]:
    notes = [
        f"the checkpoint was made with {name} {_text(record, 'versions', name)}, this is {version}: results may differ "
        f"in the last bits"
        for name, version in _versions().items()
        if _text(record, "versions", name) != version
    ]
    for name in NOTED:
        if _text(record, "identity", name) != identity.get(name, "unknown"):
            saved = _text(record, "identity", name)
            notes.append(f"{name} of the checkpoint is {saved}, here it is {identity.get(name, 'unknown')}")
    return notes


def _text(record: Mapping[str, Any], section: str, name: str) -> str:
    return str(record[section].get(name, "unknown"))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    checkpoints = [
        (int(match[1]), path) for path in root.iterdir() if (match := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [path for _, path in sorted(checkpoints)]


def _clean(root: Path) -> None:
    """Remove the remains of killed saves."""
    for path in root.iterdir():
        if path.name.startswith((TEMPORARY, DISCARDED)):
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Sync a file's bytes, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
