"""Start vLLM: its arguments, the model folder it reads, and restoring the global state of this process."""

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

from rlft import dist
from rlft.config.run import Engine as Options
from rlft.errors import EngineError, UnsupportedModel
from rlft.models.kind import sees
from rlft.models.random_state import kept_random_state
from rlft.rollout.vllm.memory import EngineMemory, EngineMode
from rlft.rollout.vllm.slots import slot_rank

COMPILED = 2 * 10**9
"""Bytes of a model's linear layers from which vLLM compiles it by itself: 1 billion parameters in 16 bits."""

OF_A_MODEL = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, AssertionError, ImportError)
"""What vLLM raises over a model that it does not have or cannot build; errors of the device and of files are others."""

_WRAPPED: dict[type, Any] = {}
"""Class of transformers -> its `__init__` as vLLM's compiler wrapped it."""


def version() -> str:
    """Return vLLM's version."""
    import vllm

    return vllm.__version__


def minor() -> str:
    """Return vLLM's minor version, such as "0.23" for 0.23.0."""
    return ".".join(version().split(".")[:2])


def not_started(name: str, stage: str, error: Exception) -> EngineError:
    """Return the error to raise where vLLM did not start: whether it is about the model, or about anything else.

    name: class of the model. stage: as of WeightProvider, when vLLM raised `error`.
    """
    vllm = f"vLLM {version()}"
    why = f"{type(error).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    of_model = isinstance(error, OF_A_MODEL)
    if of_model and stage == "configured" and not knows(name):
        return UnsupportedModel(f"{vllm} has no model {name} ({why})")
    if of_model and stage == "building":
        return UnsupportedModel(f"{vllm} cannot build {name} ({why})")
    return EngineError(
        f'{vllm} did not start ({why}); run with VLLM_LOGGING_LEVEL=DEBUG to see why, or set engine.name = "eager"'
    )


def knows(architecture: str) -> bool:
    """Return whether the installed vLLM has its own model for a class of transformers."""
    from vllm import ModelRegistry

    return architecture in ModelRegistry.get_supported_archs()


def seeing(architecture: str) -> str:
    """Return vLLM's name of a vision-language model that takes features for images (`rlft.rollout.vllm.images`)."""
    return f"Rlft{architecture}"


def model_folder(base: Any, tokenizer: Any) -> str:
    """Return a folder with the model's config and tokenizer, since vLLM takes a folder or a hub name.

    The folder is kept and is named by a digest of its contents, because the name is part of the key of vLLM's compile
    cache.
    """
    from vllm import envs

    config = type(base.config).from_dict(base.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    name = type(base).__name__
    config.architectures = [seeing(name) if sees(config) else name]
    for name, value in ONLY.get(config.model_type, {}).items():
        if getattr(config, name, value) != value:
            raise UnsupportedModel(
                f"vLLM computes {config.model_type} as if {name} were {value}, and it is {getattr(config, name)}"
            )
    for name, value in _more_fields(config).items():
        setattr(config, name, value)
    root = Path(envs.VLLM_CACHE_ROOT) / "rlft"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        digest = hashlib.sha256()
        for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
            digest.update(str(file.relative_to(temporary)).encode() + b"\0" + file.read_bytes())
        folder = root / digest.hexdigest()[:16]
        if not folder.exists():
            shutil.copytree(temporary, folder, dirs_exist_ok=True)
    return str(folder)


ONLY: dict[str, dict[str, Any]] = {name: {"norm_topk_prob": False, "clip_qkv": None} for name in ("olmoe", "flex_olmo")}
"""Type of a model -> fields that vLLM does not read, with the values that it computes for."""


def _more_fields(config: Any) -> dict[str, Any]:
    """Return the fields that vLLM reads for a type of model and transformers has elsewhere or not at all."""
    text = config.get_text_config()
    fields = _text_fields(text)
    if text is config:
        return fields
    for name, value in fields.items():
        setattr(text, name, value)
    # vLLM gets no images of Gemma 3, and without blocks of them all its attention backends will do.
    blocks = {"is_mm_prefix_lm": False} if config.model_type == "gemma3" else {}
    return {"text_config": text, **blocks}


def _text_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a model of text, alone or inside of one with images."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "lfm2":
        return {"conv_dim": config.hidden_size, "block_dim": config.hidden_size}
    if config.model_type == "ministral3" and rope.get("llama_4_scaling_beta"):
        original = rope["original_max_position_embeddings"]
        scale = {"beta": rope["llama_4_scaling_beta"], "original_max_position_embeddings": original}
        return {"llama_4_scaling": scale}
    if config.model_type == "qwen3_vl_text":
        # transformers always interleaves the axes of positions; vLLM where the config says so.
        return {"rope_parameters": {**rope, "mrope_interleaved": True}}
    return {}


def arguments(
    options: Options,
    choice: EngineMode,
    sizes: EngineMemory,
    ranks: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    provider: int,
) -> dict[str, Any]:
    """Return the arguments of vLLM's LLM. ranks: of the adapter, by weight. provider: number of the WeightProvider."""
    gpu = device.type == "cuda"
    slots = sorted((weight, slot_rank(rank)) for weight, rank in ranks.items() if choice.mode != "merged")
    most = min(options.max_seqs, sizes.most_sequences(choice.kv_bytes)) if sizes.caches.states else options.max_seqs
    values: dict[str, Any] = {
        "load_format": "rlft",
        "model_loader_extra_config": {"provider": provider},
        "quantization": "rlft-shared" if choice.mode == "shared" else "rlft-dequantized",
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": sizes.longest,
        "max_num_seqs": most,
        "worker_cls": "rlft.rollout.vllm.worker.Worker",
        "kv_cache_memory_bytes": choice.kv_bytes,
        "max_num_batched_tokens": max(sizes.batched, most),
        "enforce_eager": not (gpu and options.graphs),
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        # A state is kept of every few hundred tokens only, which most prompts do not have in common.
        "enable_prefix_caching": not sizes.caches.states,
        "seed": 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": sys.stderr.isatty(),
        # Part of the key of vLLM's compile cache, since compiled code contains our operators with the shapes of the
        # slots.
        "additional_config": {"rlft": hashlib.sha256(str(slots).encode()).hexdigest()},
    }
    if sizes.features is not None:
        # No images to encode, so that vLLM has no tower: all come as features, if any do.
        values |= {"limit_mm_per_prompt": {"image": 0, "video": 0}, "enable_mm_embeds": sizes.features > 0}
        values |= {"mm_processor_cache_gb": 0, "skip_mm_profiling": True}
    if sizes.caches.states:
        # As in the trainer: in 16 bits, rounding would add up along the sequence.
        values |= {"mamba_ssm_cache_dtype": "float32"}
    if not dist.is_alone():
        # An engine per rank, which takes the process group that is there.
        values |= {"distributed_executor_backend": "external_launcher"}
    if gpu:
        free, total = torch.cuda.mem_get_info(device)
        # Unused, because the cache size is explicit, but vLLM compares it with the memory that is free at its start,
        # of which another process may have taken some.
        values |= {"gpu_memory_utilization": 0.1 * free / total, "enable_sleep_mode": True}
        # Of vLLM's kernels of experts, the one that reads weights as they are in files.
        values |= {"moe_backend": "triton"} if sizes.stack else {}
        values |= {"compilation_config": _compilation(options, most, sizes.linear)} if options.graphs else {}
    return values


def compiles(options: Options, linear: int) -> bool:
    """Return True where vLLM is to compile the model. linear: bytes of its linear layers in 16 bits."""
    return options.graphs and (linear >= COMPILED if options.compile == "auto" else options.compile)


def _compilation(options: Options, most: int, linear: int) -> dict[str, Any]:
    """Return vLLM's compilation config, with CUDA graphs of decoding steps. most: sequences at a time."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most + 1, 32)]
    return {
        "mode": 3 if compiles(options, linear) else 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": sorted({size for size in sizes if size <= most} | {most}),
    }


def environment() -> None:
    """Set the environment that vLLM reads at import: run in this process, and log errors only unless set otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of vLLM and its imports; errors are still raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def defaults_restored() -> Iterator[None]:
    """Restore PyTorch's global settings and random state, which vLLM changes while it starts.

    Its CPU build also replaces `torch.set_num_threads`.
    """
    threads, precision, grad = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    dtype, set_num_threads = torch.get_default_dtype(), torch.set_num_threads
    with kept_random_state():
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)


@contextlib.contextmanager
def class_restored(decoder: Any) -> Iterator[None]:
    """Let vLLM change a class of transformers only while it builds its model. decoder: the class of the trainer's.

    For architectures that vLLM runs on transformers' own classes, its compiler wraps `__init__`, which then wants a
    config of vLLM's for every instance, and `__call__`, which reads `do_not_compile` of it.
    """
    own = decoder.__init__
    decoder.__init__ = _WRAPPED.get(decoder, own)
    try:
        yield
    finally:
        if decoder.__init__ is not own:
            _WRAPPED[decoder], decoder.__init__ = decoder.__init__, own
            # Of the trainer's instances; vLLM sets it on those that it makes.
            decoder.do_not_compile = True
