"""How the frozen weights are kept: what the files have, what is asked for, whether the two go together, and what
bitsandbytes has to be told."""

from __future__ import annotations

import logging
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from rlft import environment
from rlft.errors import ConfigError

BITSANDBYTES = ("nf4", "fp4", "int8")
"""What bitsandbytes keeps weights in; of these we make nf4 and int8 ourselves."""


def stored(config: Any) -> str:
    """How a model's files keep its weights: "none", "nf4", "fp4", "int8", or the name of another quantiser. config: of
    transformers, as read from config.json."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return "none"
    told = found if isinstance(found, dict) else found.to_dict()
    if told.get("load_in_4bit"):
        return told.get("bnb_4bit_quant_type", "fp4")
    return "int8" if told.get("load_in_8bit") else str(told.get("quant_method"))


def choose_kind(model: str, wanted: str, files: str, device: torch.device) -> str:
    """How the weights are kept in memory: "none", "nf4", "fp4" or "int8".

    wanted: the setting `quantization`. files: `stored`. Files that are quantised are never dequantised or quantised
    again. Raises ConfigError where that is not what was wanted, and when bitsandbytes is needed and not there.
    """
    if files not in ("none", *BITSANDBYTES):
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
        kept = files
    elif wanted == "auto":
        kept = "nf4" if device.type == "cuda" else "none"
    else:
        kept = wanted
    if kept != "none":
        for problem in environment.version_problems(("bitsandbytes",)):
            if problem.startswith("bitsandbytes "):
                raise ConfigError(problem)
    return kept


def recipe(kept: str, dtype: torch.dtype) -> Any:
    """transformers' settings for quantising to "nf4" (scales in 8 bits too) or "int8". dtype: of the products."""
    from transformers import BitsAndBytesConfig

    if kept == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def compute_in(config: Any, dtype: torch.dtype) -> None:
    """Have a quantised checkpoint's products computed in the run's type: its config names the one it was made with,
    which a card may not have (bfloat16 on a T4), and which would round a float32 run."""
    name = str(dtype).removeprefix("torch.")
    if isinstance(config.quantization_config, dict):
        config.quantization_config["bnb_4bit_compute_dtype"] = name
    else:
        config.quantization_config.bnb_4bit_compute_dtype = dtype


def cast_plain(model: Any, dtype: torch.dtype) -> None:
    """Give the plain weights of a quantised checkpoint the run's dtype; transformers 5.24 leaves them in the files'.

    What transformers keeps in float32 beside 16 bits (`_keep_in_fp32_modules`) is float32 here too.
    """
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, tensor in (*model.named_parameters(), *buffers):
        # A quantised weight may lie in storage of a floating type; it is known by its state.
        if tensor.is_floating_point() and not hasattr(tensor, "quant_state") and not hasattr(tensor, "SCB"):
            in_fp32 = any(fnmatch(name, f"*{part}*") for part in kept)
            tensor.data = tensor.data.to(torch.float32 if in_fp32 else dtype)


def settle(name: str, model: nn.Module, device: torch.device) -> None:
    """Keep bitsandbytes from rewriting weights, and from repeating itself. name: the setting `model`. Raises
    ConfigError for layers whose products it gets wrong on a CPU."""
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportPrivateImportUsage]

    for layer, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            block = weight.quant_state.blocksize
            # Its CPU kernel takes the scales as if every row began a block, and reads beyond them (0.50.2).
            if device.type == "cpu" and module.in_features % block:
                raise ConfigError(
                    f'device = "cpu" with 4-bit weights of model = "{name}": {layer} has {module.in_features} inputs, '
                    f"and bitsandbytes computes on a CPU only with a multiple of {block}; use a GPU, or the plain "
                    f'model with quantization = "none"'
                )
            # On a CPU with AVX512-BF16 a forward in eval mode would lay the weight out anew, with scales rounded to
            # bf16, for good; the product over that layout is in bf16 and has no gradient, so the adapters of all
            # layers before it would stop learning without a word.
            module.support_avx512bf16_for_cpu = False
    # At every product it warns that it multiplies in fp16, which is what LLM.int8 is. Once is enough.
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(f, Once) for f in logger.filters):
        logger.addFilter(Once())


def check_share(name: str, kept: str, model: Any) -> None:
    """Raise ConfigError when most of a decoder that was to be quantised is not: bitsandbytes takes nn.Linear only, and
    neither experts in one tensor nor a model's own linear layers. name: the setting `model`."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # pyright: ignore[reportPrivateImportUsage]

    linear = [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    quantised = sum(m.in_features * m.out_features for m in linear)
    vocabulary = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    plain = sum(
        p.numel()
        for p in model.parameters()
        if p.is_floating_point() and p.ndim > 1 and all(p is not v for v in vocabulary)
    )
    share = quantised / (quantised + plain)
    if share < 0.5:
        raise ConfigError(
            f'quantization = "{kept}" with model = "{name}": bitsandbytes can take {share:.0%} of the '
            f'decoder, the rest are no plain linear layers; set quantization = "none"'
        )


def mixes_rows(model: nn.Module) -> bool:
    """Whether a row's log-probs depend on the rows it is packed with.

    LLM.int8 leaves a column out of its 8 bits, for all rows of a product, where one of them is above its threshold."""
    return any(getattr(getattr(m, "state", None), "threshold", 0.0) > 0 for m in model.modules())


class Once(logging.Filter):
    """Lets a message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """True for a message that has not been seen."""
        new = record.getMessage() not in self._said
        self._said.add(record.getMessage())
        return new
