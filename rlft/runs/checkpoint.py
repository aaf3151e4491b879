"""Write and read checkpoints: one folder per saved step, written atomically.

    step-000012/
      adapter_config.json, adapter_model.safetensors   the PEFT adapter: transformers and vLLM can load the folder
      tokenizer.json, chat_template.jinja, ...         the tokenizer, so that the folder is enough to load both
      trainer.safetensors                              every tensor that a resume needs: adapter in fp32, moments
      state.json                                       rlft.types.State, the identity, versions, digests of all files
      README.md                                        the model card; written again when more is known of the run
    best.json                                          the best step on the held-out rows; its folder is kept

A checkpoint is written under a temporary name, synced to disk and renamed, so that a kill or a power cut at any moment
leaves the previous one usable. Digests cover every file but README.md, and whoever reads a checkpoint checks them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rlft.errors import ConfigError
from rlft.runs.disk import make_subfolder, reason, remedy, replace_file, sync
from rlft.types import Best, State

FORMAT = 2
"""Version of the folder layout, incremented when old and new rlft cannot read each other's checkpoints."""
LIBRARIES = ("torch", "transformers", "peft")
GIVEN = "given"
"""Entry of a checkpoint's identity that says which objects its run was given."""
UNNAMED = "model without a name"
"""Part of that entry for a model object that does not say what it was loaded from."""
NOTED = ("model", "rlft", "rope", GIVEN)
"""Parts of the identity that may differ and are only reported: a base can move to another folder, the layout has
FORMAT, longrope factors follow the longest sequence, and what was given is checked before a resume."""
TENSORS = "trainer.safetensors"
STATE = "state.json"
CARD = "README.md"
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
    every: int = 0,
) -> Path:
    """Write root/step-000012, then remove the oldest beyond `keep` and the remains of killed saves.

    Returns the folder. tensors: any names, dtypes and shapes, no two sharing storage. identity: properties of the run
    that the tensors belong to. write_adapter: called with the folder to write the PEFT adapter and its tokenizer to.
    best: the best evaluation so far, including this step's; its checkpoint is always kept. every: checkpoints of other
    steps than its multiples go as soon as there is a newer one; 0: they all count alike. A step that is already saved
    is not rewritten, since its state is the same. Raises ConfigError when the folder cannot be written.
    """
    assert keep >= 1, keep
    final = root / _name(state.step)
    temporary = root / f"{TEMPORARY}{final.name}"
    with _saving(final, "the checkpoint could not be written"):
        make_subfolder(root)
        _clean(root)
        if not final.exists():
            temporary.mkdir()
            write_adapter(temporary)
            _write_state(temporary, state, tensors, identity)
            for path in sorted(temporary.rglob("*")):
                sync(path)
            sync(temporary)
            temporary.rename(final)
            sync(root)
        mark_best(root, best)
        for old in _superseded(_checkpoints(root), keep, every):
            if best is None or old.name != _name(best.step):
                # Renamed first, so that a kill during removal does not leave a partial checkpoint under its name.
                old.rename(root / f"{DISCARDED}{old.name}")
        sync(root)
        _clean(root)
    return final


@contextlib.contextmanager
def _saving(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        system = error if isinstance(error, OSError) else _of_safetensors(error)
        raise ConfigError(f"{path}: {what}: {reason(system)}; {remedy(system)}, then go on with --resume") from error


def _of_safetensors(error: SafetensorError) -> OSError:
    """Return the error of the system that safetensors names in its text: "... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), "") if number else OSError(str(error))


def _superseded(checkpoints: list[Path], keep: int, every: int) -> list[Path]:
    """Return the checkpoints to remove, given all of them, oldest first."""
    *older, _ = checkpoints
    regular = [path for path in older if not every or int(path.name.removeprefix("step-")) % every == 0]
    kept = regular[len(regular) - min(keep - 1, len(regular)) :]
    return [path for path in older if path not in kept]


def mark_best(root: Path, best: Best | None) -> None:
    """Write root/best.json: {"checkpoint": "step-000012", "metric": "eval/reward", "value": 1}.

    It is removed if `best` is None. The file is for users; rlft itself uses `Run.best`. Raises ConfigError when it
    cannot be written.
    """
    path = root / "best.json"
    with _saving(path, "cannot be written"):
        if best is None:
            path.unlink(missing_ok=True)
            return
        record = {"checkpoint": _name(best.step), "metric": best.metric, "value": best.value}
        replace_file(path, (json.dumps(record) + "\n").encode())


def load_checkpoint(path: Path, identity: Mapping[str, str]) -> tuple[State, dict[str, Tensor], list[str]]:
    """Load state, tensors (on the CPU) and notes of a checkpoint that fits `identity`.

    A note is a message about a different library version, rlft version or name of the same base. Raises ConfigError
    when there is no checkpoint, when it is damaged, in another format, or made from another base or adapter shape.
    """
    from safetensors.torch import load as load_bytes

    record = check(path)
    saved = record["identity"]
    for name in sorted({*identity, *saved} - {*NOTED}):
        if identity.get(name) != saved.get(name):
            raise ConfigError(
                f"{path}: does not fit this run: {name} of the checkpoint is {saved.get(name)!r} "
                f"(model {saved.get('model')!r}), here it is {identity.get(name)!r} (model "
                f"{identity.get('model')!r}); resume with the settings it was made with, or start in another folder "
                f"with --out"
            )
    data = _damaged_if(path, OSError, lambda: (path / TENSORS).read_bytes())
    return State(**record["state"]), load_bytes(data), _notes(record, identity)


def check(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint but README.md against its digest, and return what state.json holds.

    Raises ConfigError when there is no checkpoint, when it is damaged or has another format.
    """
    record = _read_state(path)
    for name, digest in record["files"].items():
        if _damaged_if(path, OSError, lambda name=name: _digest_of(path / name)) != digest:
            raise _damaged(path, f"{name} is not what was written")
    state = _damaged_if(path, TypeError, lambda: State(**record["state"]))
    if path.name != _name(state.step):
        raise _damaged(path, f"its state is of step {state.step}")
    return record


def portable(path: Path) -> list[Path]:
    """Return the files of a checkpoint that others than rlft can use: the adapter and its tokenizer."""
    return [path / name for name in sorted(_read_state(path)["files"]) if name != TENSORS]


def continued_from(path: Path) -> dict[str, str]:
    """Return the identity of a checkpoint. Raises ConfigError when there is no checkpoint or it is damaged."""
    return dict(_read_state(path)["identity"])


def given_tokenizer(path: Path | None) -> Path | None:
    """Return the folder of the tokenizer that a checkpoint's run was given; None where it used the model's own."""
    return path if "tokenizer" in _given(path) else None


def check_named(path: Path | None, model: str) -> None:
    """Raise ConfigError if the run of a checkpoint was given a model object that cannot be loaded by a name.

    model: what the run's config calls it.
    """
    if UNNAMED in _given(path):
        raise ConfigError(
            f'model = "{model}": the run was given a model object that does not say what it was loaded from, so it '
            f"cannot be loaded again; put the adapter on that object: "
            f'peft.PeftModel.from_pretrained(model, "{path}")'
        )


def _given(path: Path | None) -> list[str]:
    """Return the objects that the run of a checkpoint was given."""
    return [] if path is None else continued_from(path).get(GIVEN, "").split(", ")


def _write_state(folder: Path, state: State, tensors: Mapping[str, Tensor], identity: Mapping[str, str]) -> None:
    """Write the tensors, and state.json with the digests of all files."""
    from safetensors.torch import save as to_bytes

    data = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    (folder / TENSORS).write_bytes(data)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    record = {
        "format": FORMAT,
        "state": dataclasses.asdict(state),
        "identity": dict(identity),
        "versions": _versions(),
        "files": {str(path.relative_to(folder)): _digest_of(path) for path in files},
    }
    record["digest"] = _digest_of_record(record)
    (folder / STATE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _read_state(path: Path) -> dict[str, Any]:
    """Read state.json as it was written. Raises ConfigError."""
    if not path.exists():
        raise ConfigError(f"{path}: no checkpoint there")
    data = _damaged_if(path, OSError, lambda: (path / STATE).read_bytes())
    record = _damaged_if(path, (ValueError, RecursionError), lambda: json.loads(data))
    sections = ("state", "identity", "versions")
    if not isinstance(record, dict) or not all(isinstance(record.get(name), dict) for name in sections):
        raise _damaged(path, "state.json lacks entries")
    if record.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: a checkpoint in format {record.get('format')}, and this rlft reads format {FORMAT}; use the rlft "
            f"that wrote it ({_text(record, 'identity', 'rlft')})"
        )
    if record.pop("digest", None) != _digest_of_record(record):
        raise _damaged(path, "state.json is not what was written")
    return record


def _damaged_if(path: Path, errors: type[Exception] | tuple[type[Exception], ...], read: Callable[[], Any]) -> Any:
    try:
        return read()
    except errors as error:
        why = (
            f"{Path(error.filename).name}: {reason(error)}" if isinstance(error, OSError) and error.filename else error
        )
        raise _damaged(path, str(why)) from error


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


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_of_record(record: Mapping[str, Any]) -> str:
    """Return the digest of what state.json says, however it is laid out."""
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


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
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
