"""Starting vLLM: what it is made with, the folder it reads, and leaving this process as it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rlft.config import Engine as Options
from rlft.errors import EngineError
from rlft.rollout.vllm_memory import Choice, Sizes

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM's slots have, besides 1."""


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
    made = Path(tempfile.mkdtemp(dir=root))
    config.save_pretrained(made)
    tokenizer.save_pretrained(made)
    digest = hashlib.sha256()
    for file in sorted(made.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = root / digest.hexdigest()[:16]
    try:
        made.rename(folder)
    except OSError:  # it is there already
        shutil.rmtree(made)
    return str(folder)


def arguments(
    options: Options, choice: Choice, sizes: Sizes, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype,
    device: torch.device, lender: int,
) -> dict[str, Any]:  # fmt: skip
    """What vLLM's LLM is made with. shapes: of the adapter, by PEFT name. lender: its number."""
    gpu = device.type == "cuda"
    made: dict[str, Any] = {
        "load_format": "rlft", "model_loader_extra_config": {"lender": lender},
        "quantization": "rlft-lent" if choice.mode == "lent" else "rlft-refilled",
        "dtype": str(dtype).removeprefix("torch."), "max_model_len": sizes.longest, "max_num_seqs": options.max_seqs,
        "worker_extension_cls": "rlft.rollout.vllm_hooks.WorkerExtension", "kv_cache_memory_bytes": choice.kv_bytes,
        "max_num_batched_tokens": max(sizes.batched, options.max_seqs), "enforce_eager": not (gpu and options.graphs),
        "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "enable_prefix_caching": True, "seed": 0,
        "disable_log_stats": True, "use_tqdm_on_load": sys.stderr.isatty(),
    }  # fmt: skip
    if gpu:
        free, total = torch.cuda.mem_get_info(device)
        # Not used, since the cache has a size of its own, but compared with what is free.
        made |= {"gpu_memory_utilization": 0.5 * free / total, "enable_sleep_mode": True}
        made |= {"compilation_config": _compilation(options)} if options.graphs else {}
    if choice.mode != "merged":
        rank = max(shape[0] for name, shape in shapes.items() if ".lora_A." in name)
        modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in shapes})
        made |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _slot_rank(rank)}
        made |= {"lora_target_modules": modules}
    return made


def _slot_rank(rank: int) -> int:
    """The smallest rank that vLLM's kernels have, at least `rank`."""
    fits = [r for r in RANKS if r >= rank]
    if not fits:
        raise EngineError(f'lora.rank = {rank}: vLLM has at most {RANKS[-1]}; lower it, or set engine.name = "eager"')
    return fits[0]


def _compilation(options: Options) -> dict[str, Any]:
    """vLLM's compile with graphs of decoding steps; every request has the adapter, so there is no second set."""
    most = options.max_seqs
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most + 1, 32)]
    return {
        "mode": 3, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_specialize_lora": False,
        "cudagraph_capture_sizes": sorted({s for s in sizes if s <= most} | {most}),
    }  # fmt: skip


def environment(options: Options, device: torch.device) -> None:
    """What vLLM reads when it is imported and started: in this process, and silent unless asked otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device.type == "cuda":
        from vllm import envs

        folder = Path(envs.VLLM_CACHE_ROOT) / "rlft" / "lora"
        if options.reproducible and "VLLM_TUNED_CONFIG_FOLDER" not in os.environ:
            _write_lora_settings(folder)
            os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(folder)
        elif not options.reproducible and os.environ.get("VLLM_TUNED_CONFIG_FOLDER") == str(folder):
            del os.environ["VLLM_TUNED_CONFIG_FOLDER"]


def _write_lora_settings(folder: Path) -> None:
    """Settings of vLLM's kernel for x A^T, in the files that it reads (lora/ops/triton_ops/README_TUNING.md of vLLM):
    adapters, products in one launch, rows, columns, rank, of which it takes the nearest.

    By itself it splits the sum over the columns into up to 64 parts, which are added in the order in which they are
    done. Two parts give the same sum in either order.
    """
    few = _lora_setting(16, 256, 2)
    wide = _lora_setting(16, 1024, 2)
    many = _lora_setting(32, 128, 4)
    rows = {"16": {"4096": {"16": few}, "12288": {"16": wide}}, "2032": {"4096": {"16": many}}}
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")
    (folder / f"{name}_SHRINK.json").write_text(json.dumps({"1": {str(n): rows for n in (1, 2, 3, 4)}}))


def _lora_setting(rows: int, columns: int, stages: int) -> dict[str, Any]:
    return {
        "block_m": rows, "block_n": 16, "block_k": columns, "split_k": 2, "num_warps": 4, "num_ctas": 1,
        "group_size_m": 8, "num_stages": stages, "max_nreg": None,
    }  # fmt: skip


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
