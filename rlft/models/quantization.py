"""Choose how the frozen weights are quantized, and configure bitsandbytes for it.

This covers how the files store them, what the settings ask for, and whether the two are compatible.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from rlft import environment
from rlft.errors import ConfigError
from rlft.models import experts
from rlft.models.structure import decoder_of

BITSANDBYTES = ("nf4", "fp4", "int8")
"""Quantizations of bitsandbytes; rlft itself quantizes to nf4 and int8 only."""
KNOWN = ("none", "mxfp4", *BITSANDBYTES)
"""What files may be stored in; mxfp4 is of gpt-oss' experts alone."""


def stored(config: Any) -> str:
    """Return how a model's files store its weights: one of KNOWN, or the name of another quantizer.

    config: of transformers, as read from config.json.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return "none"
    options = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if options.get("load_in_4bit"):
        return options.get("bnb_4bit_quant_type", "fp4")
    method = options.get("quant_method")
    return "int8" if options.get("load_in_8bit") else str(getattr(method, "value", method))


def choose_kind(model: str, wanted: str, files: str, device: torch.device) -> str:
    """Choose how the weights are held in memory: one of KNOWN.

    wanted: the setting `quantization`. files: from `stored`. Quantized files are never dequantized or quantized again.
    Raises ConfigError if that contradicts the setting, and if bitsandbytes is needed and not installed.
    """
    if files not in KNOWN:
        raise ConfigError(
            f'model = "{model}": its files are quantised by "{files}", and adapters are trained over bitsandbytes or '
            f"plain weights; give the plain model, or one that bitsandbytes quantised"
        )
    if files != "none" and wanted not in ("auto", files):
        raise ConfigError(
            f'quantization = "{wanted}" with model = "{model}": its files are quantised to {files}; set quantization '
            f'= "auto" to take them as they are, or give the plain model'
        )
    if files != "none":
        kind = files
    elif wanted == "auto":
        kind = "nf4" if device.type == "cuda" else "none"
    else:
        kind = wanted
    if kind in BITSANDBYTES:
        for problem in environment.version_problems(("bitsandbytes",)):
            if problem.startswith("bitsandbytes "):
                raise ConfigError(problem)
    return kind


def quantization_config(kept: str, dtype: torch.dtype, plain: Sequence[str] = ()) -> Any:
    """Return transformers' settings for quantizing to "nf4" (with 8-bit scales; experts too) or "int8".

    dtype: of the matrix products. plain: modules that are not quantized; none: those that transformers chooses.
    """
    from transformers import BitsAndBytesConfig

    skipped: dict[str, Any] = {"llm_int8_skip_modules": list(plain)} if plain else {}
    if kept == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **skipped)
    from rlft.models import experts_nf4

    experts_nf4.register()
    return experts_nf4.StackedConfig(
        bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype, **skipped
    )


def read_stacks(config: Any) -> None:
    """Let the files of a 4-bit checkpoint be read by the quantizers that know stacks of experts.

    config: of transformers, as read from config.json.
    """
    options: Any = config.quantization_config
    options = options if isinstance(options, dict) else options.to_dict()
    if options.get("load_in_4bit"):
        from rlft.models import experts_nf4

        experts_nf4.register()
        rest = {name: value for name, value in options.items() if name != "load_in_4bit"}
        config.quantization_config = {**rest, "quant_method": experts_nf4.METHOD}
    elif stored(config) == "mxfp4":
        from rlft.models import experts_mxfp4

        experts_mxfp4.register()
        config.quantization_config = {**options, "quant_method": experts_mxfp4.METHOD}


def compute_in(config: Any, dtype: torch.dtype) -> None:
    """Set the dtype of the matrix products of a quantized checkpoint to that of the run.

    The checkpoint's config names the dtype that it was quantized with, which a GPU may not support (bfloat16 on a T4)
    and which would round a float32 run. Other quantizers than bitsandbytes have none.
    """
    if stored(config) not in BITSANDBYTES:
        return
    name = str(dtype).removeprefix("torch.")
    if isinstance(config.quantization_config, dict):
        config.quantization_config["bnb_4bit_compute_dtype"] = name
    else:
        config.quantization_config.bnb_4bit_compute_dtype = dtype


def cast_plain(model: Any, dtype: torch.dtype) -> None:
    """Cast the plain weights of a quantized checkpoint to the run's dtype; transformers 5.24 leaves them in that of the
    files.

    What transformers keeps in float32 in a 16-bit model (`_keep_in_fp32_modules`) is float32 here too.
    """
    fp32_parts = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    fp32_parts |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, tensor in (*model.named_parameters(), *buffers):
        # A quantized weight may be stored in a floating dtype; its quantization state identifies it.
        if tensor.is_floating_point() and not hasattr(tensor, "quant_state") and not hasattr(tensor, "SCB"):
            in_fp32 = any(fnmatch(name, f"*{part}*") for part in fp32_parts)
            tensor.data = tensor.data.to(torch.float32 if in_fp32 else dtype)


def configure_bitsandbytes(name: str, model: nn.Module, device: torch.device) -> None:
    """Keep bitsandbytes from rewriting weights and from repeating a warning.

    name: the setting `model`. Raises ConfigError for layers whose products it computes wrongly on a CPU.
    """
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportPrivateImportUsage]

    for layer, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            block = weight.quant_state.blocksize
            # Its CPU kernel indexes the scales as if every row began a block, and reads out of bounds (0.50.2).
            if device.type == "cpu" and module.in_features % block:
                raise ConfigError(
                    f'device = "cpu" with 4-bit weights of model = "{name}": {layer} has {module.in_features} inputs, '
                    f"and bitsandbytes computes on a CPU only with a multiple of {block}; use a GPU, or the plain "
                    f'model with quantization = "none"'
                )
            # On a CPU with AVX512-BF16 a forward in eval mode would convert the weight permanently to a layout with
            # scales rounded to bf16. The product over that layout is in bf16 and has no gradient, so the adapters of
            # all earlier layers would silently stop learning.
            module.support_avx512bf16_for_cpu = False
    # It warns at every product that it multiplies in fp16, as LLM.int8 always does. Once is enough.
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(log_filter, OncePerMessage) for log_filter in logger.filters):
        logger.addFilter(OncePerMessage())


def check_share(name: str, kept: str, model: Any) -> None:
    """Raise ConfigError if less than half of a decoder that should be quantized is.

    Linear layers are quantized, and in 4 bits experts in one tensor, but no other classes of linear layers. name: the
    setting `model`.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # pyright: ignore[reportPrivateImportUsage]

    decoder = decoder_of(model)
    linear = [module for module in decoder.modules() if isinstance(module, Linear4bit | Linear8bitLt)]
    quantised = sum(module.in_features * module.out_features for module in linear)
    stacks = (experts.shape_of(stack.weight) for stack in experts.stacks(model).values() if stack.in_four_bits)
    quantised += sum(map(math.prod, stacks))
    vocabulary = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    plain = sum(
        parameter.numel()
        for parameter in decoder.parameters()
        if parameter.is_floating_point()
        and parameter.ndim > 1
        and all(parameter is not weight for weight in vocabulary)
    )
    share = quantised / (quantised + plain)
    if share < 0.5:
        raise ConfigError(
            f'quantization = "{kept}" with model = "{name}": bitsandbytes can take {share:.0%} of the '
            f"decoder, the rest are no plain linear layers{_experts_in_int8(kept, model)}; "
            f'set quantization = "none"'
        )


def _experts_in_int8(kept: str, model: Any) -> str:
    """Return what to add to a refusal if a mixture of experts was to be quantized to 8 bits."""
    return ' (experts are quantised in "nf4" alone)' if kept == "int8" and experts.stacks(model) else ""


def held_in(model: nn.Module) -> str:
    """Return how the weights of a loaded model are held: one of KNOWN."""
    layers = [module for _, module in experts.layers(model)]
    if layers and experts.form_of(layers[0]) == "mxfp4":
        return "mxfp4"
    states = (getattr(weight, "quant_state", None) for weight in model.parameters())
    kind = next((state.quant_type for state in states if state is not None), None)
    eight_bits = any(type(weight).__name__ == "Int8Params" for weight in model.parameters())
    return kind or ("int8" if eight_bits else "none")


def mixes_rows(model: nn.Module) -> bool:
    """Return whether a row's log-probs depend on the rows it is packed with.

    LLM.int8 multiplies a column in fp16, for all rows of a product, if one of them exceeds its threshold.
    """
    return any(getattr(getattr(module, "state", None), "threshold", 0.0) > 0 for module in model.modules())


class OncePerMessage(logging.Filter):
    """A logging filter that passes each message only once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for a message that was not seen before."""
        new = record.getMessage() not in self._seen
        self._seen.add(record.getMessage())
        return new
