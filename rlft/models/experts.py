"""Layers of fused experts: find them, run them by rlft's function, and hand it PEFT's adapters.

transformers 5 calls the experts of a mixture through an interface of functions, which a model's config selects from by
name. `use` registers rlft's function there and selects it for one model; another model in the process keeps its own.
PEFT stores A [E * r, in] and B [out, r * E] of a stack in a `ParamWrapper` around the layer, whose own forward adds B A
to all weights of the layer; `adapt` replaces that forward, on these instances, by one that hands A and B on.

In shapes, E is the number of experts of a layer. In names, x is what comes into it, a and b are A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rlft.errors import ConfigError
from rlft.kernels.mxfp4 import BLOCK, Mxfp4Weight, decode_mxfp4
from rlft.kernels.nf4 import DTYPES, Nf4Weight, decode
from rlft.kernels.nf4_stack import decode_stack
from rlft.models.adapter import a_by_expert, b_by_expert, without_wrappers
from rlft.models.experts_function import Factors, Frozen, Layer
from rlft.models.experts_function import experts as compute

NAME = "rlft"
"""Name of the function among those of transformers."""


@dataclass(frozen=True)
class Stack:
    """A parameter of a layer of experts that holds a matrix of each."""

    module: Any
    leaf: str
    """Name of the parameter in its module."""
    shape: tuple[int, ...]
    """[E, out, in] or, in some architectures, [E, in, out]."""

    @property
    def weight(self) -> Tensor:
        """The parameter; its own shape is another one in 4 bits."""
        return getattr(self.module, self.leaf)

    @property
    def in_four_bits(self) -> bool:
        """Whether it is quantized."""
        return hasattr(self.weight, "ds_shape")


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of every layer of experts that transformers' interface calls."""
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts"):
            yield name, module


def leaves(module: Any) -> tuple[str, str]:
    """Return the names of the two stacks of a layer: into the experts, and out of them."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Map full name -> stack, in the order of the modules."""
    return {
        f"{name}.{leaf}": Stack(module, leaf, shape_of(getattr(module, leaf)))
        for name, module in layers(model)
        for leaf in leaves(module)
    }


def leaf_of(name: str) -> str:
    """Return the last two components of the name of a stack, by which files and PEFT's patterns recognise it."""
    return ".".join(name.split(".")[-2:])


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter as decoded."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def in_four_bits(module: Any) -> bool:
    """Return whether a layer of experts has quantized stacks."""
    return any(hasattr(getattr(module, leaf), "ds_shape") for leaf in leaves(module))


def form_of(module: Any) -> str | None:
    """Return what a layer of experts has its stacks in: "nf4" or "mxfp4"; None if they are plain."""
    if not in_four_bits(module):
        return None
    return "mxfp4" if hasattr(module, "down_proj_scales") else "nf4"


def gates(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Map layer of experts, without PEFT's wrappers -> its function between the two products, [M, 2 I] to [M, I]."""
    return {without_wrappers(name): _gate(module) for name, module in layers(model)}


def _gate(module: Any) -> Callable[[Tensor], Tensor]:
    return module._apply_gate if module.has_gate else module.act_fn


# ---- running a layer ---------------------------------------------------------------------------------------------


def use(model: Any) -> None:
    """Select rlft's function for the layers of experts of a model, where there are any."""
    found = [module for _, module in layers(model)]
    if found:
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
        model.set_experts_implementation(NAME)
        assert all(module.config._experts_implementation == NAME for module in found), type(model)


def describe(model: nn.Module, fused: bool = False) -> list[str]:
    """Describe in a line how the layers of experts of a model run, for the log of a run; no line where it has none.

    fused: fused layers train it.
    """
    found = [module for _, module in layers(model)]
    if not found:
        return []
    held = form_of(found[0]) or str(found[0].down_proj.dtype).removeprefix("torch.")
    by = "in fused layers" if fused else "by rlft's function"
    return [f"experts: {len(found)} layers of {found[0].num_experts} in {held}, {by}"]


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, adapters: Any = None
) -> Tensor:
    """Implement transformers' interface of experts, [T, H].

    hidden_states: [T, H]. top_k_index, top_k_weights: [T, k]. adapters: leaf of a stack -> its `Factors`.
    """
    up, down = leaves(self)
    layer = Layer(
        experts=self.num_experts,
        up=_frozen(self, up),
        down=_frozen(self, down),
        gate=_gate(self),
        dtype=_dtype(self, hidden_states),
    )
    adapters = adapters or {}
    return compute(hidden_states, top_k_index, top_k_weights, layer, adapters.get(up), adapters.get(down))


def _dtype(module: Any, x: Tensor) -> torch.dtype:
    """Return the dtype of a layer's products: that of autocast, else of plain weights, else of what comes in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    weight = module.down_proj
    return weight.dtype if weight.is_floating_point() else x.dtype


def _frozen(module: Any, leaf: str) -> Frozen:
    """Return the frozen side of one product. Raises ConfigError for weights that are to be trained themselves."""
    weight = getattr(module, leaf)
    bias = getattr(module, f"{leaf}_bias") if module.has_bias else None
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ConfigError(
            f"{type(module).__name__}.{leaf} requires a gradient, and rlft's function of experts trains adapters "
            f'alone; freeze it, or call model.set_experts_implementation("eager")'
        )
    return Frozen(lambda dtype, offsets: decoded(module, leaf, dtype, offsets), bias)


def packed(module: Any, leaf: str) -> Tensor | Nf4Weight | Mxfp4Weight:
    """Return a stack of a layer as it lies in memory: [E, out, in], or [E, in, out] of a transposed layer.

    MXFP4 always has rows of outputs.
    """
    weight = getattr(module, leaf)
    scales = getattr(module, f"{leaf}_scales", None)
    if scales is not None:
        count, rows, blocks, _ = weight.shape
        return Mxfp4Weight(weight.data, scales, (count, rows, blocks * BLOCK))
    return Nf4Weight.from_bnb(weight) if getattr(weight, "quant_state", None) is not None else weight


def decoded(module: Any, leaf: str, dtype: torch.dtype, offsets: Tensor | None = None) -> Tensor:
    """Return a stack of a layer as [E, out, in] in a dtype.

    offsets: of sorted rows, [E + 1] int32; experts without rows are then not decoded, and their weights are undefined.
    """
    stack = packed(module, leaf)
    if isinstance(stack, Tensor):
        return (stack.transpose(1, 2) if module.is_transposed else stack).to(dtype)
    weight = torch.empty(stack.shape, dtype=dtype if dtype in DTYPES else torch.float32, device=stack.packed.device)
    if isinstance(stack, Mxfp4Weight):
        decode_mxfp4(stack, weight, offsets)
        return weight.to(dtype)
    if stack.shape[2] % stack.blocksize:
        matrix = weight.view(-1, stack.shape[2])
        decode([replace(stack, shape=tuple(matrix.shape))], [matrix])
    else:
        decode_stack(stack, weight, offsets)
    return (weight.transpose(1, 2) if module.is_transposed else weight).to(dtype)


# ---- adapters ----------------------------------------------------------------------------------------------------


def adapt(model: PeftModel) -> PeftModel:
    """Let PEFT's wrappers of experts hand their adapters to rlft's function, on these instances. Returns the model."""
    found = {id(module) for _, module in layers(model)}
    for module in model.modules():
        if isinstance(module, ParamWrapper) and id(module.get_base_layer()) in found:
            module.forward = MethodType(_wrapped_forward, module)
            if in_four_bits(module.get_base_layer()):
                module.merge = MethodType(_refuse_merge, module)
    return model


def is_adapted(module: nn.Module) -> bool:
    """Return whether the forward of a module was replaced by `adapt`."""
    return getattr(vars(module).get("forward"), "__func__", None) is _wrapped_forward


def _wrapped_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run the layer inside a wrapper with the active adapters of all its wrappers."""
    layer = self.get_base_layer()
    if layer.config._experts_implementation != NAME:
        if in_four_bits(layer):
            raise ConfigError(
                f'{type(layer).__name__} is in 4 bits, which only experts_implementation = "{NAME}" reads, not '
                f'"{layer.config._experts_implementation}"'
            )
        return type(self).forward(self, x, *args, **kwargs)
    self._check_forward_args(x, *args, **kwargs)
    kwargs.pop("adapter_names", None)
    return layer(x, *args, adapters=_factors(self), **kwargs)


def _factors(wrapper: Any) -> dict[str, Factors]:
    """Return leaf of a stack -> the factors of its active adapters, side by side where there are several."""
    found = {}
    while isinstance(wrapper, ParamWrapper):
        if wrapper.disable_adapters and wrapper.merged:
            wrapper.unmerge()
        active = [] if wrapper.disable_adapters or wrapper.merged else wrapper.active_adapters
        pairs = [_pair(wrapper, name) for name in active if name in wrapper.lora_A]
        if pairs:
            a, b = zip(*pairs, strict=True)
            found[wrapper.parameter_name] = Factors(torch.cat(a, 1), torch.cat(b, 2))
        wrapper = wrapper.base_layer
    return found


def _pair(wrapper: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return A [E, r, in] and scaled B [E, out, r] of an adapter."""
    a, b, count = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    return a_by_expert(a, count), b_by_expert(b, count) * wrapper.scaling[name]


def _refuse_merge(self: Any, *args: Any, **kwargs: Any) -> None:
    """Raise ConfigError in place of adding B A to 4-bit weights."""
    raise ConfigError(
        f"{self.parameter_name} of {type(self.get_base_layer()).__name__} is in 4 bits, and merging into it would "
        f"round twice; merge into the plain model (`rlft merge`)"
    )
