"""A model that is given as an object: what rlft trains of it, what it says of its settings, and how it gets it back.

A plain model of transformers gets an adapter for the time of the run. Of a PEFT model, the one LoRA adapter it has is
trained.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers import PreTrainedModel

from rlft.config.data import Data
from rlft.config.run import Config, Lora
from rlft.data.image_readers import ImageReader
from rlft.errors import ConfigError
from rlft.models import experts, targets
from rlft.models import quantization as quant
from rlft.models.continued import STARTS, not_plain
from rlft.models.kind import check_causal, sees
from rlft.models.load import attach_lora, pad_rows, resolve_device, resolve_dtype
from rlft.models.restored import restored
from rlft.models.vision import image_reader

ADAPTER = "default"
"""Name of the adapter that is trained, PEFT's own name for the first one."""


class GivenModel:
    """A model object that was checked: `settled` says its settings, `borrowed` makes it ready to train."""

    def __init__(self, model: Any) -> None:
        """Raises ConfigError, with the reason, for an object that cannot be trained."""
        if not isinstance(model, PreTrainedModel | PeftModel):
            raise ConfigError(
                f"model: {type(model).__name__} is not a model that can be trained; give a PreTrainedModel of "
                f"transformers, a PeftModel with one LoRA adapter, or a name"
            )
        self.model = model
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.name = str(getattr(self.base.config, "_name_or_path", None) or "")
        """What the object was loaded from; "" where it does not say."""
        _check_base(self.base, self.name or type(self.base).__name__)
        if isinstance(model, PeftModel):
            _check_adapter(model)
        elif any(hasattr(module, "lora_A") for module in model.modules()):
            raise ConfigError(
                f"model: the {type(model).__name__} given has adapters inside (add_adapter); give a PeftModel, or the "
                f"model without them"
            )

    @property
    def device(self) -> torch.device:
        """The device of all its weights."""
        return self.base.get_input_embeddings().weight.device

    def reader(self, data: Data | None = None) -> ImageReader | None:
        """Return what reads images for the model; None for one that takes text alone.

        data: for the limits of an image's pixels. Raises ConfigError for a model that does not say what it was loaded
        from, where its image processor is.
        """
        if sees(self.base.config) and not self.name:
            raise ConfigError(
                f"model: the {type(self.base).__name__} given does not say where its image processor is "
                f"(config._name_or_path is empty); save it and its processor with save_pretrained, and load it from "
                f"there"
            )
        return image_reader(self.name, self.base.config, data)

    def settled(self, cfg: Config) -> tuple[Config, list[str]]:
        """Return the config with what the object decides, and notes about it.

        What is left at its default is taken over. Raises ConfigError where the config asks for something else.
        """
        self._check_name(cfg.model)
        device, dtype = self.device, self.base.get_input_embeddings().weight.dtype
        _agree("device", cfg.device, device.type, "move it with .to()")
        _agree("dtype", cfg.dtype, str(dtype).removeprefix("torch."), "cast it with .to()")
        if resolve_device(cfg).type != device.type:
            cfg = replace(cfg, device=device.type)
        if resolve_dtype(cfg, device) != dtype:
            cfg = replace(cfg, dtype=str(dtype).removeprefix("torch."))
        stored = quant.stored(self.base.config)
        kind = quant.choose_kind(cfg.model, "auto", stored, device) if stored != "none" else "none"
        if kind == "mxfp4" and quant.held_in(self.base) != kind:
            raise ConfigError(
                f"model: transformers' own MXFP4 layers of the {type(self.base).__name__} given have no gradient; give "
                f"what it was loaded from by name, or load it with Mxfp4Config(dequantize=True)"
            )
        _agree("quantization", cfg.quantization, kind, "load it with what you want")
        if kind in ("nf4", "int8") or (device.type == "cuda" and kind == "none"):
            cfg = replace(cfg, quantization=kind)
        if isinstance(self.model, PeftModel):
            return _with_adapter(cfg, self.model)
        return cfg, ["the model given is frozen for the run, and an adapter of [lora] is trained over it"]

    def _check_name(self, model: str) -> None:
        """Raise ConfigError if the config names another model than the object was loaded from."""
        same = not self.name or model == self.name
        if not (same or Path(model).expanduser().resolve() == Path(self.name).expanduser().resolve()):
            raise ConfigError(
                f'model = "{model}": the model given was loaded from "{self.name}" (config._name_or_path); set model = '
                f'"{self.name}", or give the model that the config names'
            )

    @contextlib.contextmanager
    def borrowed(self, cfg: Config) -> Iterator[PeftModel]:
        """Yield the PEFT model to train, and put the object back as it was.

        A PEFT model keeps the trained values of its adapter; nothing else of the object stays changed.
        """
        base, adapters = self.base, getattr(self.model, "peft_config", None)
        configs = [base.config, base.config.get_text_config(), base.generation_config]
        configs += list(adapters.values()) if isinstance(adapters, dict) else []
        with restored(self.model, configs):
            base.requires_grad_(False)
            self.model.eval()
            if quant.stored(base.config) in quant.BITSANDBYTES:
                quant.configure_bitsandbytes(cfg.model, base, self.device)
                _compute_in(base, base.get_input_embeddings().weight.dtype)
            if _is_fused(base):  # for callers of transformers; the run makes another
                del base.get_decoder().forward
            pad_rows(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
            if isinstance(self.model, PeftModel):
                _set_dropout(self.model, cfg.lora.dropout)
                self.model.set_adapter(ADAPTER)
                experts.use(base)
                yield experts.adapt(self.model)
            else:
                yield attach_lora(base, cfg.lora, cfg.seed)


def _is_fused(base: Any) -> bool:
    """Return whether rlft's fused layers run the decoder already, as in a model of `rlft.load`."""
    from rlft.models.fused.decoder import FusedDecoder

    return isinstance(getattr(vars(base.get_decoder()).get("forward"), "__self__", None), FusedDecoder)


def _agree(field: str, wanted: str, actual: str, remedy: str) -> None:
    """Raise ConfigError if a setting that is not "auto" differs from what the object has."""
    if wanted not in ("auto", actual):
        raise ConfigError(
            f'{field} = "{wanted}": the model given has "{actual}"; set {field} = "auto", or {remedy} first'
        )


def _check_base(base: Any, name: str) -> None:
    """Raise ConfigError for a base that is not a whole causal language model in one place."""
    check_causal(name, base.config)
    head = base.get_output_embeddings()
    if head is None or base.get_input_embeddings() is None or not base.can_generate():
        raise ConfigError(
            f"model: {type(base).__name__} has no head that continues text; give a causal language model "
            f"(transformers' AutoModelForCausalLM)"
        )
    if not head.weight.is_floating_point():
        raise ConfigError(
            f"model: the head of the {type(base).__name__} given is quantised, and log-probs are computed with a plain "
            f'one; load it with llm_int8_skip_modules=["lm_head"]'
        )
    places = sorted({str(parameter.device) for parameter in base.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ConfigError(
            f"model: the weights of the {type(base).__name__} given are on {' and '.join(places)}; load it on one "
            f"device (device_map={{'': 0}}), without offloading"
        )
    if places[0].startswith("cuda") and torch.device(places[0]).index != torch.cuda.current_device():
        raise ConfigError(f"model: it is on {places[0]}, and PyTorch's current device is another; move it there")
    _check_dtype(base)


def _check_dtype(base: Any) -> None:
    """Raise ConfigError if weights differ in dtype, apart from those that transformers keeps in fp32."""
    dtype, kept = base.get_input_embeddings().weight.dtype, set()
    for patterns in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        kept |= set(getattr(base, patterns, None) or ())
    for name, weight in base.named_parameters():
        packed = getattr(weight, "quant_state", None) is not None  # 4-bit weights may be stored as floats
        differs = weight.is_floating_point() and not packed and weight.dtype != dtype and "lora_" not in name
        if differs and not any(pattern in name for pattern in kept):
            plain = quant.stored(base.config) == "none"
            raise ConfigError(
                f"model: {name} of the {type(base).__name__} given is {weight.dtype}, and its embeddings are {dtype}; "
                + (f"cast the model with .to({dtype})" if plain else f"load it with dtype = {dtype}")
            )


def _check_adapter(model: PeftModel) -> None:
    """Raise ConfigError unless the model has one plain LoRA adapter and nothing else to train."""
    names = list(model.peft_config)
    if names != [ADAPTER]:
        remedy = "delete_adapter removes the others" if len(names) > 1 else "load it without adapter_name"
        raise ConfigError(
            f'model: its adapters are {", ".join(names)}, and one called "{ADAPTER}" is trained; {remedy}'
        )
    config: Any = model.peft_config[ADAPTER]
    if config.peft_type != PeftType.LORA:
        raise ConfigError(f"model: its adapter is of the kind {config.peft_type.value}; give one of LoRA")
    if others := not_plain(config):
        values = ", ".join(f"{name} = {getattr(config, name)!r}" for name in others)
        raise ConfigError(f"model: its adapter has {values}; give plain LoRA (no DoRA, bias or modules_to_save)")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name) and (name == "alpha_pattern" or not targets.by_expert_rank(model)):
            raise ConfigError(
                f"model: its adapter has {name} = {getattr(config, name)!r}, which [lora] cannot say; save the adapter "
                f"with save_pretrained, and give the plain model with lora.resume_from = its folder"
            )
    if config.init_lora_weights not in STARTS:
        raise ConfigError(
            f'model: init_lora_weights = "{config.init_lora_weights}" of its adapter took a part out of the base; '
            f"convert it to plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for module in model.modules():
        if getattr(module, "merged_adapters", None):
            raise ConfigError("model: its adapter is merged into the base; call model.unmerge_adapter() first")
        if getattr(module, "_disable_adapters", False) is True:
            raise ConfigError("model: its adapter is switched off; call model.base_model.enable_adapter_layers() first")
    trained = [name for name, each in model.named_parameters() if each.requires_grad and ".lora_" not in name]
    if trained:
        raise ConfigError(
            f"model: {len(trained)} weights of its base require a gradient, {trained[0]} for one, and the adapter "
            f"alone is trained; set requires_grad = False on them"
        )


def _with_adapter(cfg: Config, model: PeftModel) -> tuple[Config, list[str]]:
    """Return the config with the [lora] of a model's adapter, and a note about it."""
    config: Any = model.peft_config[ADAPTER]
    if cfg.lora.resume_from:
        raise ConfigError(
            f'lora.resume_from = "{cfg.lora.resume_from}": the model given has an adapter already; leave one of them '
            f"out (model.unload() returns the plain model)"
        )
    rank, alpha = int(config.r), float(config.lora_alpha)
    found = replace(cfg.lora, rank=rank, alpha=alpha, rslora=bool(config.use_rslora))
    if ranks := targets.expert_ranks(model):
        found = replace(found, expert_rank=min(ranks))
    found = _targets_of(model, found, cfg.lora)
    default = Lora()
    for field in (field.name for field in fields(Lora)):
        ours, theirs = getattr(cfg.lora, field), getattr(found, field)
        if ours != theirs and ours != getattr(default, field):
            raise ConfigError(
                f"lora.{field} = {ours!r}: the adapter of the model given has {theirs!r}; set it to that, or leave it "
                f"out"
            )
    targets_text = found.targets if isinstance(found.targets, str) else ", ".join(found.targets[:8])
    scale = f"alpha {alpha:g}{' (rslora)' if found.rslora else ''}"
    notes = [f"lora: the adapter of the model given is trained: rank {rank}, {scale}, on {targets_text}"]
    if config.lora_dropout != found.dropout:
        notes.append(f"lora.dropout = {found.dropout:g} in this run; the adapter given has {config.lora_dropout:g}")
    return replace(cfg, lora=found), notes


def _targets_of(model: PeftModel, found: Lora, wanted: Lora) -> Lora:
    """Return the [lora] that would put an adapter on exactly the weights that have one."""
    base: Any = model.get_base_model()
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    attached = set(targets.adapted(model))
    names = sorted(name.removesuffix(".weight") for name in attached)
    leaves = tuple(sorted({name.rpartition(".")[2] for name in names}))
    choices = [(choice, both) for choice in ("all-linear", leaves) for both in (True, False)]
    for choice, with_experts in [(wanted.targets, wanted.experts), *choices, (tuple(names), True)]:
        try:
            lora = replace(found, targets=choice, experts=with_experts)
            requested, here = targets.requested_and_attached(model, targets.resolve(plain, replace(lora, dropout=0)))
        except ConfigError:  # no layer that may have one
            continue
        if requested == here:
            return lora
    first = _outside(model, plain, names)
    raise ConfigError(
        f"model: its adapter is on {first}, which is not a linear layer of the text decoder that rlft trains; give "
        f"one without it"
    )


def _outside(model: PeftModel, plain: nn.Module, names: list[str]) -> str:
    """Return the first adapted weight that no target can name."""
    layers = targets.find(plain)
    known = {*layers.linear, *layers.experts}
    return next((name for name in names if name not in known), names[0])


def _set_dropout(model: PeftModel, dropout: float) -> None:
    """Set the dropout of the adapter, which training alone applies."""
    config: Any = model.peft_config[ADAPTER]
    if config.lora_dropout == dropout:
        return
    config.lora_dropout = dropout
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict) and ADAPTER in dropouts:
            dropouts[ADAPTER] = nn.Dropout(dropout).eval() if dropout else nn.Identity()


def _compute_in(base: nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype of the products of 4-bit layers, as a model loaded by name has it."""
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportPrivateImportUsage]

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
