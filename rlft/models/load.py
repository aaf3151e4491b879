"""A model by name: hub id, folder, .gguf file, or an installed package that holds one .gguf, as a PEFT model.

transformers, bitsandbytes and PEFT hold the model: names, files, quantiser, adapter format. What comes back is an
ordinary PEFT model whose adapter is called "default"; `generate`, `save_pretrained` and `disable_adapter` work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from rlft.config import Config, Lora
from rlft.errors import ConfigError
from rlft.models.adapter import lora_parameters


@dataclass(frozen=True)
class Location:
    """Where `from_pretrained` finds a model."""

    path: str
    """Hub id or folder."""
    gguf: str | None = None
    """Name of the .gguf file in the folder."""


def locate(model: str) -> Location:
    """The place a model string stands for. Raises ConfigError for a missing file and an ambiguous package."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f'model = "{model}": no such file')
        return Location(str(path.parent), path.name)
    if path.is_file():
        raise ConfigError(f'model = "{model}": a file; give the folder of a saved model, or a .gguf file')
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f'model = "{model}": the folder has no config.json; give the folder of a saved model')
        return Location(str(path))
    if model.isidentifier():
        spec = importlib.util.find_spec(model)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            files = sorted(Path(folder).glob("*.gguf"))
            if len(files) == 1:
                return Location(folder, files[0].name)
            if files:
                raise ConfigError(
                    f'model = "{model}": the package holds {len(files)} .gguf files; give one by its path'
                )
        if spec is not None:
            raise ConfigError(f'model = "{model}": the installed package holds no .gguf file')
    return Location(model)


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer. Raises ConfigError when the model cannot be found."""
    from transformers import AutoTokenizer

    where = locate(model)
    try:
        return AutoTokenizer.from_pretrained(where.path, **({"gguf_file": where.gguf} if where.gguf else {}))
    except OSError as error:
        raise _not_found(model, error) from error


def _not_found(model: str, error: Exception) -> ConfigError:
    first = str(error).strip().splitlines()[0]
    return ConfigError(
        f'model = "{model}": not a folder, a .gguf file or an installed package, and the hub did not have it or could '
        f"not be reached ({first}). Check the name and the network, or give a local folder."
    )


def resolve_device(cfg: Config) -> torch.device:
    """The device of the run. Raises ConfigError when a GPU is asked for and there is none."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device = "cuda": this machine shows PyTorch no GPU; set device = "cpu" or see `rlft env`')
    gpu = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if gpu else "cpu")


def resolve_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Type of frozen weights and activations: bfloat16 on a GPU and float32 on a CPU unless the run says otherwise."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, cfg.dtype)


def load_base(cfg: Config, device: torch.device) -> nn.Module:
    """The frozen model without an adapter, in evaluation mode on `device`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig

    where, dtype = locate(cfg.model), resolve_dtype(cfg, device)
    nf4 = cfg.quantization == "nf4" or (cfg.quantization == "auto" and device.type == "cuda" and where.gguf is None)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if where.gguf:
        if nf4:
            why = "a .gguf model is dequantised when it is loaded"
            raise ConfigError(f'quantization = "nf4" with model = "{cfg.model}": {why}; set quantization = "none"')
        options |= {"gguf_file": where.gguf, "quantization_config": GgufConfig(dequantize=True, gguf_file=where.gguf)}
    elif nf4:
        options |= {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
            "device_map": {"": device},
        }
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where.path, **options)
    except OSError as error:
        raise _not_found(cfg.model, error) from error
    if where.gguf and hasattr(model.config, "quantization_config"):
        # Dequantised: what is left of the file's own quantisation would make PEFT and save_pretrained mistake it.
        delattr(model.config, "quantization_config")
    if where.gguf:
        # PEFT writes this into adapter_config.json as the base: a name that rlft finds again, not this machine's path.
        model.name_or_path = cfg.model
    if not nf4:
        model.to(device)
    model.requires_grad_(False)
    return model.eval()


def attach_lora(base: nn.Module, lora: Lora, seed: int) -> PeftModel:
    """The base with a LoRA adapter called "default": new (B = 0, A from `seed`) or continued from `lora.resume_from`.

    Raises ConfigError when no layer matches `lora.targets` and when a continued adapter does not fit the base.
    """
    if lora.resume_from:
        return _continue_adapter(base, lora)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=lora.dropout,  # type: ignore[arg-type]
        use_rslora=lora.rslora, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # eval: PEFT's new modules start in training mode, which would leave dropout on while sampling.
            return get_peft_model(base, config).eval()  # type: ignore[arg-type]
    except ValueError as error:
        linear = sorted(
            {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
        )
        raise ConfigError(
            f"lora.targets = {lora.targets!r}: matches no linear layer of the model; it has {', '.join(linear)}"
        ) from error


def _continue_adapter(base: nn.Module, lora: Lora) -> PeftModel:
    folder = str(lora.resume_from)
    try:
        saved = PeftConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ConfigError(f'lora.resume_from = "{folder}": no PEFT adapter there ({error})') from error
    if not isinstance(saved, LoraConfig) or saved.use_dora or saved.bias != "none" or saved.modules_to_save:
        raise ConfigError(
            f'lora.resume_from = "{folder}": want a plain LoRA adapter (no DoRA, bias or modules_to_save)'
        )
    for field, ours, theirs in (("rank", lora.rank, saved.r), ("alpha", lora.alpha, saved.lora_alpha),
                                ("rslora", lora.rslora, saved.use_rslora)):  # fmt: skip
        if ours != theirs:
            raise ConfigError(
                f"lora.{field} = {ours}, but the adapter in {folder} has {theirs}: set lora.{field} = {theirs}"
            )
    try:
        with warnings.catch_warnings():
            # PEFT only warns of tensors that find no place or are not in the file; both are errors below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(f'lora.resume_from = "{folder}": the adapter does not fit this base ({detail})') from error
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        wanted, there = set(file.keys()), set(lora_parameters(model, "default"))
    if wanted != there:
        raise ConfigError(
            f'lora.resume_from = "{folder}": the adapter does not fit this base: {len(wanted - there)} of its tensors '
            f"have no place in it and {len(there - wanted)} of the base's are missing, {min(wanted ^ there)} for one"
        )
    return model


def fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """16 hex digits that change with the base: names, shapes and the first 64 values of every frozen tensor.

    dtype: take the floating ones as if the base had been loaded in it.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            digest.update(f"{name.replace('base_layer.', '')}{tuple(tensor.shape)}".encode())
            values = tensor.flatten()[:64].to("cpu", dtype if tensor.is_floating_point() else None)
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
