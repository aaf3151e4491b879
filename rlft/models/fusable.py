"""Check whether fused layers can run a decoder's modules and adapters as they are, and if not, why."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from rlft.kernels.qk_rope import MAX_D
from rlft.kernels.rms_norm import MAX_H
from rlft.kernels.swiglu import ACTIVATIONS
from rlft.models import experts
from rlft.models.families import Family
from rlft.models.fused.expert_weights import Stack
from rlft.models.fused.layer_modules import FusedLayer
from rlft.models.fused.ops import Norm
from rlft.models.fused.projection import Projection

Adapted = Projection | Stack
"""What an adapter may be on."""


def adapted(projections: Iterable[Adapted]) -> Iterator[Any]:
    """Yield the linear modules, and parameters of experts, that PEFT has wrapped."""
    return (module for projection in projections for module in projection.modules if hasattr(module, "lora_A"))


def adapter_problem(projections: Iterable[Adapted]) -> str | None:
    """Return what the fused layers do not support in the current adapters; None if they support all."""
    active_sets: set[tuple] = set()
    for module in adapted(projections):
        if module.merged_adapters:
            return "an adapter is merged into the base"
        if module._disable_adapters:
            active_sets.add(())
            continue
        active = module.active_adapters
        active_sets.add(tuple(active))
        if not active:
            continue
        if len(active) > 1:
            return f"{len(active)} adapters are active at once"
        if active[0] in module.lora_variant:
            return "the adapter is a variant of LoRA (DoRA or the like)"
        if module.lora_bias.get(active[0], False):
            return "the adapter has biases"
        if active[0] in module.lora_dropout and getattr(module.lora_dropout[active[0]], "p", 0) > 0:
            return f"lora dropout is {module.lora_dropout[active[0]].p}"
    return "different adapters are active in different layers" if len(active_sets) > 1 else None


def hook_problem(parts: Sequence[nn.Module]) -> str | None:
    """Return which module has a hook or a replaced `forward`, which fused layers would not call; None if none has."""
    for part in parts:
        name = type(part).__name__
        if "forward" in vars(part) and not experts.is_adapted(part):
            return f"the forward of a {name} was replaced"
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            # Hooks of transformers remain after the first call for hidden states and do nothing in other calls.
            if any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks.values()):
                return f"a {name} has a hook"
    return None


def parts_of(decoder: nn.Module, family: Family) -> Iterator[nn.Module]:
    """Yield the modules that fused layers replace: layers, blocks, projections, norms."""
    inputs = family.of_layer(decoder.config, 0).per_layer_input
    for name in () if inputs is None else (inputs.projection, inputs.projection_norm):
        yield decoder.get_submodule(name)
    for index, layer in enumerate(decoder.layers):  # type: ignore[arg-type]
        here = family.of_layer(decoder.config, index)
        norms = (here.input_norm, here.mlp_norm, here.attention_norm, here.down_norm, *(here.qk_norm or ()))
        down = here.down if here.gate_up else None
        others = (*here.qkv, here.out, *here.gate_up, down, here.activation_module, here.value_norm)
        mixer = () if here.mixer is None else here.mixer.modules
        own = here.per_layer_input
        per_layer = () if own is None else (own.gate, own.out, own.norm)
        mixture = () if here.experts is None else (here.experts.router, here.experts.stacks, here.experts.shared_gate)
        names = [path for path in (*others, *norms, *mixer, *per_layer, *mixture) if path is not None]
        blocks = sorted({path.rpartition(".")[0] for path in names} - {""})
        yield layer
        if here.experts is not None:
            yield from _inside(layer.get_submodule(here.experts.stacks))
        for name in (*blocks, *names):
            yield layer.get_submodule(name)
    yield decoder.get_submodule(family.final_norm)


def _inside(module: Any) -> Iterator[nn.Module]:
    """Yield the modules that PEFT's wrappers are nested around, from the outside."""
    while hasattr(module, "lora_A"):
        module = module.base_layer
        yield module


def state_of(part: nn.Module) -> Iterator[tuple]:
    """Yield address, dtype, version and `requires_grad` of a module's tensors."""
    module: Any = getattr(part, "base_layer", part)
    for parameter in (*module._parameters.values(), *module._buffers.values()):
        if parameter is not None:
            yield (
                parameter.data_ptr(),
                parameter.dtype,
                0 if parameter.is_inference() else parameter._version,
                parameter.requires_grad,
            )


def _norms(layer: FusedLayer) -> tuple[Norm | None, ...]:
    inner = (*layer.qk_norm, layer.value_norm) if layer.mixer is None else (layer.mixer.norm,)
    own = () if layer.per_layer is None else (layer.per_layer.norm,)
    return layer.input_norm, layer.mlp_norm, layer.attention_norm, layer.down_norm, *inner, *own


def config_problem(config: Any, family: Family) -> str | None:
    """Return the field of a config that the fused layers of its family do not read; None if they read all."""
    for name, value in family.unread(config):
        return f"{name} is {reprlib.repr(value)}, which no fused layer of {config.model_type} reads"
    return None


def layers_problem(layers: Sequence[FusedLayer]) -> str | None:
    """Return why the kernels cannot run these layers; None if they can."""
    first = layers[0]
    like = next(norm for norm in _norms(first) if norm is not None).weight
    dtype = like.dtype
    heads, longest = 0, first.projections[0].in_features
    for layer in layers:
        if layer.mixer is not None and layer.mixer.conv.weight.dtype != dtype:
            return f"a convolution of {layer.mixer.conv.weight.dtype} under norms of {dtype}"
        if layer.kv_from is not None and layer.q_heads < 2:
            return "one query head over the keys of another layer"  # the kernel rotates two groups of heads
        if layer.mixer is None:
            heads = max(heads, layer.head_dim)
            longest = max(longest, layer.q_heads * layer.head_dim if layer.qk_norm_whole else 0)
        problem = None if layer.experts is None else layer.experts.problem(dtype)
        if problem is not None:
            return problem
        name, curve = layer.activation
        if name not in ACTIVATIONS or (name == "xielu") != (curve is not None):
            return f'the activation "{name}"'
        for norm in _norms(layer):
            if norm is not None and norm.weight.dtype != dtype:
                return f"norms of {dtype} and of {norm.weight.dtype}"
            if norm is not None and norm.weight.device != like.device:
                return f"layers on {like.device} and on {norm.weight.device}"
        for projection in layer.projections:
            for weight in projection.weights:
                if isinstance(weight, Tensor) and weight.dtype != dtype:
                    return f"linear weights of {weight.dtype} under norms of {dtype}"
    if heads > MAX_D or longest > MAX_H:
        return f"heads of {heads}, rows of {longest}"
    return None
