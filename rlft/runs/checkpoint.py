"""Checkpoints: one folder per saved step, which exists whole or not at all.

    step-000012/
      adapter_config.json, adapter_model.safetensors   the PEFT adapter: transformers and vLLM load the folder as it is
      trainer.safetensors                              every tensor a resume needs: adapter in fp32, moments, RNG
      state.json                                       rlft.types.State, what it was made from, versions, a digest
    best.json                                          the step that did best on the held-out rows; its folder is kept

It is written under a temporary name, forced to disk, and renamed: a kill at any moment leaves the last one usable.
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
"""Layout of the folder. Raised when an older rlft could not read a new checkpoint, or the other way round."""
LIBRARIES = ("torch", "transformers", "peft")
NOTED = ("model", "rlft", "rope")
"""Parts of the identity that may differ: a base can move to another folder, the layout has a number of its own, and
longrope factors follow the longest sequence."""
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
    """Write root/step-000012, then remove the oldest beyond `keep` and what killed saves left. Returns the folder.

    tensors: any names, dtypes and shapes, no two sharing storage. identity: what they fit, name -> text. write_adapter:
    called with the folder to write the PEFT adapter into. best: the evaluation that did best so far, this step's
    included; its checkpoint stays, however old. A step that was saved before is left as it is: it can only hold the
    same state. Raises ConfigError when the folder cannot be written.
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
        for old in _saved(root)[:-keep]:
            if best is None or old.name != _name(best.step):
                # Renamed first: a kill while files are removed must not leave half a checkpoint under its name.
                old.rename(root / f"{DISCARDED}{old.name}")
        _clean(root)
    except (OSError, SafetensorError) as error:  # PEFT writes with safetensors, which has an error of its own
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError(
            f"{final}: the checkpoint could not be written: {why}; make room there, then go on with --resume"
        ) from error
    return final


def mark_best(root: Path, best: Best | None) -> None:
    """Write root/best.json for whoever looks there: {"checkpoint": "step-000012", "metric": "eval/reward", "value": 1}.

    Without one it is removed. rlft itself asks `Run.best`. Raises ConfigError when it cannot be written.
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
    """State, tensors (on the CPU) and notes to show of a checkpoint that fits `identity`.

    A note is one sentence about another library version, rlft version or name of the same base. Raises ConfigError when
    there is no checkpoint, when it is damaged, in another format, or made from another base or adapter shape.
    """
    from safetensors.torch import load as load_bytes

    record = _read_state(path)
    if record.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: a checkpoint in format {record.get('format')}, and this rlft reads format {FORMAT}; use the rlft "
            f"that wrote it ({_text(record, 'identity', 'rlft')})"
        )
    theirs = record["identity"]
    for name in sorted({*identity, *theirs} - {*NOTED}):
        if identity.get(name) != theirs.get(name):
            raise ConfigError(
                f"{path}: does not fit this run: {name} of the checkpoint is {theirs.get(name)!r} "
                f"(model {theirs.get('model')!r}), here it is {identity.get(name)!r} (model "
                f"{identity.get('model')!r}); resume with the settings it was made with, or start in another folder "
                f"with --out"
            )
    data = _damaged_if(path, OSError, lambda: (path / "trainer.safetensors").read_bytes())
    if _digest(data) != record.get("digest"):
        raise _damaged(path, "trainer.safetensors is not what was written")
    state = _damaged_if(path, TypeError, lambda: State(**record["state"]))
    return state, load_bytes(data), _notes(record, identity)


def continued_from(path: Path) -> dict[str, str]:
    """The identity that a checkpoint was saved with. Raises ConfigError when there is none or it is damaged."""
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
            theirs = _text(record, "identity", name)
            notes.append(f"{name} of the checkpoint is {theirs}, here it is {identity.get(name, 'unknown')}")
    return notes


def _text(record: Mapping[str, Any], section: str, name: str) -> str:
    return str(record[section].get(name, "unknown"))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _saved(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(m[1]), path) for path in root.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name))]
    return [path for _, path in sorted(found)]


def _clean(root: Path) -> None:
    """Remove what saves that were killed left behind."""
    for path in root.iterdir():
        if path.name.startswith((TEMPORARY, DISCARDED)):
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
