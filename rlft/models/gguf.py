"""Decode a .gguf file once, into folders that transformers reads in a second.

transformers reads the metadata of a .gguf file in Python, entry by entry, once for each of config, tokenizer and model:
SmolLM2-135M takes over half a minute of a processor, and a second as a folder. The folders are
`rlft/gguf/<digest>/tokenizer` and `/<dtype>` in `$XDG_CACHE_HOME` or `~/.cache`, by the SHA-256 of the file. A file
larger than `LARGEST` is decoded each time, since its folder would be several times as large.
"""

from __future__ import annotations

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

from rlft.environment import cache_folder

FORMAT = "1"
"""Changes when what is written changes."""
LARGEST = 2**30
"""Bytes of a file whose decoded form is kept."""
DETAILS = "rlft.json"


def model_folder(file: Path, dtype: torch.dtype) -> Path | None:
    """Return the folder of a file's decoded model; None where none is kept. Raises what transformers does.

    dtype: of the model to be loaded; float32, which weights are decoded to, serves float64.
    """
    dtype = torch.float32 if dtype == torch.float64 else dtype

    def write(folder: Path) -> None:
        decode(file, dtype, torch.device("cpu")).save_pretrained(folder)

    return _folder(file, str(dtype).removeprefix("torch."), write)


def tokenizer_folder(file: Path) -> Path | None:
    """Return the folder of a file's tokenizer; None where none is kept. Raises what transformers does."""

    def write(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
        (folder / DETAILS).write_text(json.dumps({"license": _licence(file)}))

    return _folder(file, "tokenizer", write)


def licence(file: Path) -> str | None:
    """Return the licence that a file names."""
    folder = tokenizer_folder(file)
    return _licence(file) if folder is None else json.loads((folder / DETAILS).read_text())["license"]


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


def _licence(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    return field.contents() if field else None


def _folder(file: Path, name: str, write: Callable[[Path], None]) -> Path | None:
    """Return a folder of a file, written by `write` where it is missing; None where none is kept."""
    state = file.stat()
    home = cache_folder("gguf") if state.st_size <= LARGEST else None
    if home is None:
        return None
    folder = home / f"{_digest(file, state.st_size, state.st_mtime_ns)}-{FORMAT}" / name
    if not folder.is_dir():
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            write(made)
            # Another process may have been faster.
            if not folder.is_dir():
                os.replace(made, folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


@functools.lru_cache(maxsize=4)
def _digest(file: Path, size: int, changed: int) -> str:
    """Return 32 hex digits of a file's content. size, changed: a file that changes is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
