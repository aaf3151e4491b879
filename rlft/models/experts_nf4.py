"""Quantize stacks of experts to NF4 while a model is loaded, and save and load them in bitsandbytes' own keys.

transformers 5 keeps the experts of a layer in two parameters [E, out, in] (gpt-oss: [E, in, out]), and stacks them from
files that have a weight per expert. bitsandbytes quantizes nn.Linear only. `StackedQuantizer` is transformers' own for
it, and takes these parameters too, one layer at a time: the bytes are those of `quantize_4bit`, which for a stack equal
those of its matrices on top of each other.

A quantized stack is saved as bitsandbytes' `nn.parametrize` saves a parameter: `experts.gate_up_proj` with
`experts.gate_up_proj.absmax`, `.quant_map`, `.quant_state.bitsandbytes__nf4` and so on. `register` makes the quantizer
known to transformers by its public functions, under a name that only rlft's loading asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Params4bit  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from rlft.errors import ConfigError
from rlft.models import experts

METHOD = "rlft_stacked_4bit"
"""Name of the quantizer among those of transformers."""
SCALES = (
    *("absmax", "nested_absmax", "quant_map", "nested_quant_map"),
    *("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"),
)
"""Ends of the names of what is saved beside the bytes of a stack."""


class Stack4bit(Params4bit):
    """A parameter of 4-bit weights that is a stack when decoded."""

    @property
    def ds_shape(self) -> torch.Size:
        """The decoded shape, under the name by which PEFT asks a parameter that does not lie in memory as it is."""
        return torch.Size(self.quant_state.shape)  # type: ignore[union-attr]


class StackedConfig(BitsAndBytesConfig):
    """bitsandbytes' settings under the name of `StackedQuantizer`, as long as a model is being loaded."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "load_in_4bit": True})
        self.quant_method = METHOD  # type: ignore[assignment]


class StackedQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer for bitsandbytes' 4 bits, which takes stacks of experts too."""

    _stacks: dict[str, experts.Stack]
    """Names in the model being loaded."""

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Return whether a parameter is quantized while it is read."""
        return param_name in self._stacks or super().param_needs_quantization(model, param_name, **options)

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes one parameter."""
        return Quantize(self, self._stacks)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return the conversions from names and tensors in the files; those of quantized stacks come first.

        model: given by transformers 5.24, not by 5.19.
        """
        conversions = super().update_weight_conversions(weight_conversions, *model)
        names = self._stacks if self.pre_quantized else {}
        # Where transformers itself converts a stack in the files, by transposing it, quantized ones are not known.
        known = {experts.leaf_of(name) for name in names if not any(_converts(each, name) for each in conversions)}
        return [*map(_from_files, sorted(known)), *conversions]

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **options)
        self._stacks = experts.stacks(model)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        """Make the model one that bitsandbytes quantized, which is saved with the stacks as they are."""
        for name, stack in self._stacks.items():
            _check(name, stack, self.pre_quantized)
        for module in {id(stack.module): stack.module for stack in self._stacks.values()}.values():
            module.register_state_dict_post_hook(_save_scales)
        self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        leaves = {experts.leaf_of(name) for name in self._stacks}
        model._weight_conversions = [
            each
            for each in model._weight_conversions
            if not (
                isinstance(each, WeightConverter) and leaves & {_plain(pattern) for pattern in each.target_patterns}
            )
        ]
        self._stacks = {}
        return super()._process_model_after_weight_loading(model, **options)


class Quantize(ConversionOps):
    """Quantize a parameter: a stack here, the weight of a linear module as transformers does."""

    def __init__(self, hf_quantizer: Any, stacks: dict[str, experts.Stack]) -> None:
        self.hf_quantizer, self._stacks = hf_quantizer, stacks

    def convert(self, input_dict: dict[str, Any], model: Any = None, **options: Any) -> dict[str, Tensor]:
        """Return {name: quantized parameter} of {name: tensor or [tensor]}."""
        ((name, value),) = input_dict.items()
        if name not in self._stacks:
            return Bnb4bitQuantize(self.hf_quantizer).convert(input_dict, model=model, **options)
        return {name: quantized(value[0] if isinstance(value, list) else value, self.hf_quantizer.quantization_config)}


def quantized(weight: Tensor, settings: Any) -> Stack4bit:
    """Quantize a stack [E, out, in] on its device. settings: of bitsandbytes."""
    make: Any = Stack4bit
    return make(
        weight.contiguous(),
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
        quant_storage=settings.bnb_4bit_quant_storage,
    ).to(weight.device)


class Deserialize(ConversionOps):
    """Put a stack together from its bytes and scales; a stack that the files hold plain stays plain."""

    def __init__(self, leaf: str) -> None:
        self._leaf = leaf

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        """Return {leaf: parameter} of {source pattern: [tensor]}."""
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        weight = tensors.pop(f"{self._leaf}$")
        if tensors:
            weight = Stack4bit.from_prequantized(weight, tensors, device=weight.device)
        return {self._leaf: weight}


def _from_files(leaf: str) -> WeightConverter:
    """Return the conversion of a quantized stack in files. leaf: the last two components of its name."""
    return WeightConverter([*(f"{leaf}.{end}" for end in SCALES), f"{leaf}$"], leaf, [Deserialize(leaf)])


def _plain(pattern: str) -> str:
    """Return the last two components of a target pattern."""
    return ".".join(pattern.removesuffix("$").split(".")[-2:])


def _converts(conversion: Any, name: str) -> bool:
    """Return whether a conversion of transformers' takes a stack of this full name in the files."""
    return isinstance(conversion, WeightConverter) and conversion.rename_source_key(name)[1] is not None


def _check(name: str, stack: experts.Stack, pre_quantized: bool) -> None:
    """Raise ConfigError for a stack whose file transformers has read as something else."""
    weight: Any = stack.weight
    four_bits, plain = isinstance(weight, Stack4bit), pre_quantized and weight.is_floating_point()
    shape = experts.shape_of(weight)
    if shape != stack.shape or not (plain or four_bits):
        raise ConfigError(
            f"model: its files hold {name} as {weight.dtype} {list(shape)}, and it is a stack {list(stack.shape)} in 4 "
            f"bits or plain; files whose experts were quantised one by one cannot be stacked: give the plain model"
        )
    if four_bits and (weight.quant_state.quant_type != "nf4" or weight.dtype != torch.uint8):
        raise ConfigError(
            f"model: its files hold {name} in {weight.quant_state.quant_type} stored as {weight.dtype}, and experts "
            f"are computed in nf4 stored as bytes, or plain; give the plain model"
        )


def _save_scales(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Add the scales of a module's quantized stacks to its state, as bitsandbytes does for linear modules."""
    for name, weight in module.named_parameters(recurse=False):
        if isinstance(weight, Stack4bit):
            scales: dict[str, Tensor] = weight.quant_state.as_dict(packed=True)  # type: ignore[union-attr]
            state.update({f"{prefix}{name}.{end}": tensor for end, tensor in scales.items()})


def register() -> None:
    """Make the quantizer known to transformers."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(StackedQuantizer)
        register_quantization_config(METHOD)(StackedConfig)
