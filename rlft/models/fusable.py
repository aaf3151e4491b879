"""Whether fused layers can run a decoder's modules and adapters as they are, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from rlft.kernels.qk_rope import MAX_D
from rlft.kernels.rms_norm import MAX_H
from rlft.kernels.swiglu import ACTIVATIONS
from rlft.models.families import Family
from rlft.models.fused.layer_modules import FusedLayer


def adapted(layers: Sequence[FusedLayer]) -> Iterator[Any]:
    """The linear modules that PEFT has wrapped."""
    return (m for layer in layers for p in layer.projections for m in p.modules if hasattr(m, "lora_A"))


def adapter_problem(layers: Sequence[FusedLayer]) -> str | None:
    """What about the adapters of now the fused layers cannot do, in words."""
    seen: set[tuple] = set()
    for m in adapted(layers):
        if m.merged_adapters:
            return "an adapter is merged into the base"
        if m._disable_adapters:
            seen.add(())
            continue
        active = m.active_adapters
        seen.add(tuple(active))
        if not active:
            continue
        if len(active) > 1:
            return f"{len(active)} adapters are active at once"
        if active[0] in m.lora_variant:
            return "the adapter is a variant of LoRA (DoRA or the like)"
        if m.lora_bias.get(active[0], False):
            return "the adapter has biases"
        if active[0] in m.lora_dropout and getattr(m.lora_dropout[active[0]], "p", 0) > 0:
            return f"lora dropout is {m.lora_dropout[active[0]].p}"
    return "different adapters are active in different layers" if len(seen) > 1 else None


def hooked(parts: Sequence[nn.Module]) -> str | None:
    """Which module has a hook or a `forward` of somebody's, which fused layers would not call, in words."""
    for part in parts:
        name = type(part).__name__
        if "forward" in vars(part):
            return f"the forward of a {name} was replaced"
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            # transformers' own stay after the first call that asked for hidden states, and do nothing in other calls.
            if any(getattr(h, "__module__", "") != "transformers.utils.output_capturing" for h in hooks.values()):
                return f"a {name} has a hook"
    return None


def parts_of(decoder: nn.Module, family: Family) -> Iterator[nn.Module]:
    """The modules that fused layers run in place of: layers, blocks, projections, norms."""
    f = family
    norms = (f.input_norm, f.mlp_norm, f.attention_norm, f.down_norm, *(f.qk_norm or ()))
    names = [n for n in (*f.qkv, f.out, *f.gate_up, f.down, *norms) if n is not None]
    blocks = sorted({n.rpartition(".")[0] for n in names} - {""})
    for layer in decoder.layers:  # type: ignore[union-attr]
        yield layer
        for name in (*blocks, *names):
            yield layer.get_submodule(name)
    yield decoder.norm  # type: ignore[misc]


def state_of(part: nn.Module) -> Iterator[tuple]:
    """Place, type and version of a frozen module's tensors, and whether they are trained."""
    for p in getattr(part, "base_layer", part)._parameters.values():  # type: ignore[union-attr]
        if p is not None:
            yield p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version, p.requires_grad


def unfit(layers: Sequence[FusedLayer], config: Any, family: Family) -> str | None:
    """Why these layers cannot be run by the kernels, in words."""
    for name in family.dropouts:
        if getattr(config, name, 0):
            return f"{name} is {getattr(config, name)}"
    first = layers[0]
    dtype = first.input_norm.weight.dtype
    for layer in layers:
        if layer.activation not in ACTIVATIONS:
            return f'the activation "{layer.activation}"'
        norms = (layer.input_norm, layer.mlp_norm, layer.attention_norm, layer.down_norm, *layer.qk_norm)
        for norm in norms:
            if norm is not None and norm.weight.dtype != dtype:
                return f"norms of {dtype} and of {norm.weight.dtype}"
            if norm is not None and norm.weight.device != first.input_norm.weight.device:
                return f"layers on {first.input_norm.weight.device} and on {norm.weight.device}"
        for projection in layer.projections:
            for weight in projection.weights:
                if isinstance(weight, Tensor) and weight.dtype != dtype:
                    return f"linear weights of {weight.dtype} under norms of {dtype}"
    if first.head_dim > MAX_D or first.projections[0].in_features > MAX_H:
        return f"heads of {first.head_dim}, rows of {first.projections[0].in_features}"
    return None
