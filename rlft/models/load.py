"""Load a model by name as a PEFT model: `load`, and its two halves `load_base` and `attach_lora`.

transformers, bitsandbytes and PEFT provide the model, files, quantizer and adapter format. The result is an ordinary
PEFT model whose adapter is called "default"; `generate`, `save_pretrained` and `disable_adapter` work.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from rlft.config.run import Config, Lora
from rlft.config.section import refuse
from rlft.errors import ConfigError
from rlft.models import experts, gguf, targets
from rlft.models import quantization as quant
from rlft.models.continued import changed_dropout, continue_adapter, peft_wraps
from rlft.models.fused.fuse import fuse
from rlft.models.kind import attention_of, check_causal, class_of, seeing_of, sees
from rlft.models.locate import Location, explained, load_tokenizer, locate
from rlft.models.random_state import kept_random_state

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("auto", "none", "nf4", "int8")
ROWS = 64
"""Embedding and head are allocated with a multiple of this number of rows; parameters are views without the padding."""


@dataclass(frozen=True)
class Base:
    """The settings that determine how a base is loaded; `Config` has the same settings and documents them."""

    model: str
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in (("device", DEVICES), ("dtype", DTYPES), ("quantization", QUANTIZATIONS)):
            value = getattr(self, name)
            refuse(value not in choices, f"{name} = {value!r}: one of {', '.join(choices)}")


@dataclass(frozen=True)
class BaseInfo:
    """How a base will be loaded."""

    location: Location
    dtype: torch.dtype
    """Dtype of the weights that are not quantized, of activations and of products."""
    quantization: str
    """How the linear layers of the decoder are quantized: "none", "nf4", "fp4", "int8"; "mxfp4": its experts alone."""
    config: Any
    """transformers' config of the model; None for a .gguf file, whose header is read with the file."""
    quantized: bool
    """Whether the files are quantized already."""
    note: str | None = None
    """What is not loaded from the files, as a sentence."""


def load(
    model: str,
    lora: Lora = Lora(),  # noqa: B008 (it is frozen)
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto",
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 42,
) -> tuple[PeftModel, Any]:
    """Load a model with a LoRA adapter called "default", ready to train, and its tokenizer.

    model, quantization, dtype, device: as in `Config`. seed: for A of the new adapter. The result is an ordinary PEFT
    model in evaluation mode; only its adapter, in float32, requires gradients. Trainers of transformers and TRL run its
    fused layers too (`rlft.models.fused.decoder`). Raises ConfigError.

    >>> model, tokenizer = rlft.load("Qwen/Qwen3-8B", lora=rlft.Lora(rank=16))  # doctest: +SKIP
    """
    base = Base(model, quantization, dtype, device)
    tokenizer = load_tokenizer(model)
    peft_model = attach_lora(load_base(base, resolve_device(base)), lora, seed)
    if (message := changed_dropout(lora)) is not None:
        warnings.warn(f"rlft: {message}", stacklevel=2)
    fused = fuse(peft_model)
    if isinstance(fused, str):
        warnings.warn(f"rlft: transformers' own layers run here, not the fused ones: {fused}", stacklevel=2)
    return peft_model, tokenizer


def resolve_device(cfg: Config | Base) -> torch.device:
    """Return the device of the run. Raises ConfigError if a GPU is requested and there is none."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device = "cuda": this machine shows PyTorch no GPU; set device = "cpu" or see `rlft env`')
    gpu = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def resolve_dtype(cfg: Config | Base, device: torch.device) -> torch.dtype:
    """Return the dtype of frozen weights and activations. By default: bfloat16 on a GPU that supports it, float16 on
    older ones, float32 on a CPU."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def describe_base(cfg: Config | Base, device: torch.device) -> BaseInfo:
    """Return how the base will be loaded, from its config alone. Raises ConfigError for what is not supported."""
    location, dtype = locate(cfg.model), resolve_dtype(cfg, device)
    config = None if location.gguf else _read_config(cfg.model, location)
    if config is not None:
        check_causal(cfg.model, config)
    files = "none" if config is None else quant.stored(config)
    kind = quant.choose_kind(cfg.model, cfg.quantization, files, device)
    if kind in quant.BITSANDBYTES and dtype == torch.float64:
        raise ConfigError(
            f'dtype = "float64" with weights in {kind}: bitsandbytes has 16 and 32 bits; set dtype = "float32", or '
            f'quantization = "none" with a plain model'
        )
    note = None
    if config is not None and getattr(config, "vision_config", None) is not None and not sees(config):
        kind_of_model = config.model_type
        note = f"{cfg.model}: the vision tower is left out; images are not supported yet with a {kind_of_model}"
    return BaseInfo(location, dtype, kind, config, files != "none", note)


def _read_config(model: str, where: Location) -> Any:
    """Read the config of a model."""
    from transformers import AutoConfig

    with explained(model, where, "its config.json"):
        # False: code from the hub is not run, and transformers does not prompt for it.
        return AutoConfig.from_pretrained(where.path, trust_remote_code=False)


def _warn(text: str) -> None:
    warnings.warn(f"rlft: {text}", stacklevel=3)


def load_base(
    cfg: Config | Base, device: torch.device, note: Callable[[str], None] = _warn, into: torch.device | None = None
) -> nn.Module:
    """Load the frozen model without an adapter, in evaluation mode.

    device: the one that computes. note: called with what is not loaded from the files. into: where the tensors lie;
    None: on `device`. Linear layers of the decoder are quantized while they are read.
    Embedding and head have a multiple of 64 rows in memory; the parameter is a view without the last ones (zeros).
    """
    plan = describe_base(cfg, device)
    if plan.note:
        note(plan.note)
    with explained(cfg.model, plan.location, "it"), _progress(), _quiet(plan.note is not None):
        model = _read(cfg.model, plan, into or device)
    if plan.quantization in quant.BITSANDBYTES:
        quant.configure_bitsandbytes(cfg.model, model, device)
    head = model.get_output_embeddings()
    if not head.weight.is_floating_point():
        raise ConfigError(
            f'model = "{cfg.model}": its files have a quantised head, and log-probs are computed with a plain one; '
            f'give files whose quantization_config skips "lm_head"'
        )
    if plan.quantization != "none" and not plan.quantized:
        quant.check_share(cfg.model, plan.quantization, model)
    pad_rows(model.get_input_embeddings().weight, head.weight)
    model.requires_grad_(False)
    experts.use(model)
    return model.eval()


def _read(model: str, plan: BaseInfo, device: torch.device) -> Any:
    """Read the files of a model."""
    file = plan.location.gguf_file
    if file is None:
        return _from_files(model, plan, device)
    folder = gguf.model_folder(file, plan.dtype)
    if folder is None:
        base = _from_gguf(file, plan, device)
    else:
        where = Location(str(folder))
        base = _from_files(model, replace(plan, location=where, config=_read_config(model, where)), device)
    # PEFT writes this into adapter_config.json as the base: the name works elsewhere, a local path would not.
    base.name_or_path = base.config.name_or_path = model
    return base


def _from_files(model: str, plan: BaseInfo, device: torch.device) -> Any:
    options: dict[str, Any] = {}
    if plan.quantized:
        quant.compute_in(plan.config, plan.dtype)
        quant.read_stacks(plan.config)
    elif plan.quantization != "none":
        seeing = seeing_of(plan.config)
        # Not the tower with its projector, and as in any model not the head.
        kept = () if seeing is None else (*seeing.tower, "lm_head")
        options["quantization_config"] = quant.quantization_config(plan.quantization, plan.dtype, kept)
    loaded: Any = class_of(plan.config).from_pretrained(
        plan.location.path,
        config=plan.config,
        dtype=plan.dtype,
        attn_implementation=attention_of(plan.config),
        device_map={"": device},
        output_loading_info=True,
        trust_remote_code=False,
        **options,
    )
    base, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f'model = "{model}": its files lack {len(missing)} weights of {type(base).__name__}, {missing[0]} for one; '
            f"give the folder of a whole model"
        )
    if plan.quantized:
        quant.cast_plain(base, plan.dtype)
    return base


def _from_gguf(file: Path, plan: BaseInfo, device: torch.device) -> Any:
    """Load a .gguf file dequantized by transformers, and quantize it again if the settings ask for it."""
    model = gguf.decode(file, plan.dtype, device if plan.quantization == "none" else torch.device("cpu"))
    if plan.quantization != "none":
        generation = model.generation_config
        model = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            dtype=plan.dtype,
            attn_implementation="sdpa",
            device_map={"": device},
            quantization_config=quant.quantization_config(plan.quantization, plan.dtype),
        )
        model.generation_config = generation
    return model


def pad_rows(*weights: nn.Parameter) -> None:
    """Move weights [V, H] into zeroed memory with a multiple of ROWS rows; tied weights remain tied."""
    for weight in {id(weight): weight for weight in weights}.values():
        rows, width = weight.shape
        if rows % ROWS and not _is_padded(weight):
            padded = weight.data.new_zeros(-(-rows // ROWS) * ROWS, width)
            padded[:rows] = weight.data
            weight.data = padded[:rows]


def _is_padded(weight: nn.Parameter) -> bool:
    """Return whether `pad_rows` has moved a weight [V, H] before."""
    (rows, width), storage = weight.shape, weight.untyped_storage()
    padded = -(-rows // ROWS) * ROWS
    if storage.nbytes() != padded * width * weight.element_size() or weight.storage_offset():
        return False
    return not weight.data.as_strided((padded, width), (width, 1))[rows:].any()


@contextlib.contextmanager
def _quiet(on: bool) -> Iterator[None]:
    """Suppress transformers' table of unused weights where they are left out on purpose."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if on:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Show transformers' progress bar if stderr is a terminal; otherwise a log would fill with it."""
    from transformers.utils.logging import set_tqdm_hook

    if sys.stderr.isatty():
        yield
        return
    before = set_tqdm_hook(lambda make, args, options: make(*args, **{**options, "disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(before)


def attach_lora(base: nn.Module, lora: Lora, seed: int) -> PeftModel:
    """Attach a LoRA adapter called "default": new (B = 0, A from `seed`) or continued from `lora.resume_from`.

    Raises ConfigError if a target matches no layer, and if a continued adapter does not fit the base.
    """
    experts.use(base)
    if lora.resume_from:
        return experts.adapt(continue_adapter(base, lora))
    config = targets.resolve(base, lora)
    wanted = copy.deepcopy(config)
    with kept_random_state(), peft_wraps():
        torch.manual_seed(seed)
        # eval: PEFT's new modules start in training mode, which would enable dropout during sampling.
        model = get_peft_model(base, config).eval()  # type: ignore[arg-type]
    targets.check_attached(model, wanted)
    return experts.adapt(model)


def fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return 16 hex digits that identify the base: hash of names, shapes and first 64 values of every frozen tensor.
    dtype: cast floating-point values to it first, as if the base were loaded in it."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(f"{name.replace('base_layer.', '')}{tuple(tensor.shape)}".encode())
            values = tensor.flatten()[:64].to("cpu", dtype if tensor.is_floating_point() else None)
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
