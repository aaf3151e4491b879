"""Starting vLLM: what it is made with, the folder it reads, and leaving this process as it was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rlft.config.run import Engine as Options
from rlft.rollout.vllm.memory import EngineMemory, EngineMode
from rlft.rollout.vllm.shared_weights import slot_rank


def version() -> str:
    """vLLM's version."""
    import vllm

    return vllm.__version__


def minor() -> str:
    """ "0.23" of 0.23.0."""
    return ".".join(version().split(".")[:2])


def model_folder(base: Any, tokenizer: Any) -> str:
    """A folder with the model's config and tokenizer: vLLM takes a folder or a hub name. It stays, under a name made
    from what is in it, since vLLM finds what it compiled earlier by this name among others."""
    from vllm import envs

    config = type(base.config).from_dict(base.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(base).__name__]
    root = Path(envs.VLLM_CACHE_ROOT) / "rlft"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as made:
        config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        digest = hashlib.sha256()
        for file in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            digest.update(str(file.relative_to(made)).encode() + b"\0" + file.read_bytes())
        folder = root / digest.hexdigest()[:16]
        if not folder.exists():
            shutil.copytree(made, folder, dirs_exist_ok=True)
    return str(folder)


def arguments(
    options: Options,
    choice: EngineMode,
    sizes: EngineMemory,
    ranks: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    provider: int,
) -> dict[str, Any]:
    """What vLLM's LLM is made with. ranks: of the adapter, by module. provider: its number."""
    gpu = device.type == "cuda"
    slots = sorted((module, slot_rank(rank)) for module, rank in ranks.items() if choice.mode != "merged")
    made: dict[str, Any] = {
        "load_format": "rlft",
        "model_loader_extra_config": {"provider": provider},
        "quantization": "rlft-shared" if choice.mode == "shared" else "rlft-dequantized",
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": sizes.longest,
        "max_num_seqs": options.max_seqs,
        "worker_extension_cls": "rlft.rollout.vllm.hooks.WorkerExtension",
        "kv_cache_memory_bytes": choice.kv_bytes,
        "max_num_batched_tokens": max(sizes.batched, options.max_seqs),
        "enforce_eager": not (gpu and options.graphs),
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "seed": 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": sys.stderr.isatty(),
        # Part of what vLLM looks compiled code up by: our operators are where there are slots, of their shapes.
        "additional_config": {"rlft": hashlib.sha256(str(slots).encode()).hexdigest()},
    }
    if gpu:
        free, total = torch.cuda.mem_get_info(device)
        # Not used, since the cache has a size of its own, but compared with what is free.
        made |= {"gpu_memory_utilization": 0.5 * free / total, "enable_sleep_mode": True}
        made |= {"compilation_config": _compilation(options)} if options.graphs else {}
    return made


def _compilation(options: Options) -> dict[str, Any]:
    """vLLM's compile with graphs of decoding steps."""
    most = options.max_seqs
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most + 1, 32)]
    return {
        "mode": 3,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": sorted({s for s in sizes if s <= most} | {most}),
    }


def environment() -> None:
    """What vLLM reads when it is imported: in this process, and silent unless asked otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of vLLM and what it imports stay out of the run's output; its errors are raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def defaults_restored() -> Iterator[None]:
    """PyTorch's global settings and random state as they were: vLLM sets them for itself while it starts. (Its CPU
    build replaces `torch.set_num_threads`, too.)"""
    threads, precision, grad = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    dtype, set_num_threads = torch.get_default_dtype(), torch.set_num_threads
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)
