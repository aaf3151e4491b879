"""Decode a .gguf file once, into folders that transformers reads in a second.

transformers reads the metadata of a .gguf file in Python, entry by entry, once for each of config, tokenizer and model:
SmolLM2-135M takes over half a minute of a processor, and a second as a folder. The folders are
`rlft/gguf/<key>/tokenizer` and `/<dtype>` in `$XDG_CACHE_HOME` or `~/.cache`; the key is made of the file's SHA-256 and
transformers' version. Nothing is kept of a file larger than `LARGEST`, since its folder would be several times as
large, and where there is no room: the file is then decoded each time. A folder that lacks a file, or has one of another
size than was written, is written again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlft.environment import cache_folder, version

LARGEST = 2**30
"""Bytes of a file whose decoded form is kept."""
ROOM = 10
"""Free bytes that a folder may need, per byte of the file: 4 bits become fp32."""
FILES = "rlft.json"
"""Names and sizes of what was written into a folder, written last."""


def model_folder(file: Path, dtype: torch.dtype) -> Path | None:
    """Return the folder of a file's decoded model; None where none is kept. Raises what transformers does.

    dtype: of the model to be loaded; float32, which weights are decoded to, serves float64.
    """
    dtype = torch.float32 if dtype == torch.float64 else dtype
    return _folder(file, str(dtype).removeprefix("torch."), lambda: decode(file, dtype, torch.device("cpu")))


def tokenizer_folder(file: Path) -> Path | None:
    """Return the folder of a file's tokenizer; None where none is kept. Raises what transformers does."""
    return _folder(file, "tokenizer", lambda: _tokenizer(file))


def licence(file: Path) -> str | None:
    """Return the licence that a file names."""
    state = file.stat()
    return _licence(file, state.st_size, state.st_mtime_ns)


def decode(file: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model of a .gguf file with its weights decoded by transformers."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True, gguf_file=file.name),
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": device},
        trust_remote_code=False,
    )
    if hasattr(model.config, "quantization_config"):
        # The weights are decoded; a leftover quantization config would mislead PEFT and save_pretrained.
        delattr(model.config, "quantization_config")
    return model


def _tokenizer(file: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


@functools.lru_cache(maxsize=4)
def _licence(file: Path, size: int, changed: int) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    return field.contents() if field else None


def _folder(file: Path, name: str, make: Callable[[], Any]) -> Path | None:
    """Return a whole folder of a file, written where it is not there; None where none is kept.

    make: what is saved into it. One process writes at a time, and finds what another has written before.
    """
    before = file.stat()
    home = cache_folder("gguf") if before.st_size <= LARGEST else None
    if home is None:
        return None
    digest = _digest(file, before.st_size, before.st_mtime_ns)
    folder = home / f"{digest}-{version('transformers')}" / name
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        lock = (folder.parent / f"{name}.lock").open("w")
    except OSError:
        return None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _whole(folder):
            return folder
        for left in (folder, *folder.parent.glob(f"{name}-*")):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed, or whose files were removed
        if shutil.disk_usage(home).free < ROOM * before.st_size:
            return None
        made = make()
        kept = _save(made, folder) if _same(file.stat(), before) else False
    return folder if kept else None


def _save(made: Any, folder: Path) -> bool:
    """Write a model or a tokenizer into a folder; returns False where there is no room for it."""
    new = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        made.save_pretrained(new)
        sizes = {path.name: path.stat().st_size for path in new.iterdir()}
        (new / FILES).write_text(json.dumps(sizes), encoding="utf-8")
        os.replace(new, folder)
    except (OSError, SafetensorError):
        shutil.rmtree(new, ignore_errors=True)
        return False
    return True


def _whole(folder: Path) -> bool:
    """Return whether a folder has all files that were written into it, with their sizes."""
    try:
        sizes = json.loads((folder / FILES).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _digest(file: Path, size: int, changed: int) -> str:
    """Return 32 hex digits of a file's content. size, changed: a file that changes is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
