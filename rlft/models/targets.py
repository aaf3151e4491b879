"""Which weights of the text decoder get an adapter: `lora.targets` resolved by us, for PEFT to attach.

"all-linear" is every linear layer of the decoder but routers and the scalar gates of shared experts, and the experts
that a layer keeps in one tensor (`lora.experts`). The head, vision towers and projectors lie outside of the decoder.
PEFT's own "all-linear" means other layers for a mixture of experts: it rewrites the names of some
(`convert_peft_config_for_transformers`), so that shared experts and dense layers get nothing and the router does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlft.config.run import Lora
from rlft.errors import ConfigError
from rlft.models.structure import decoder_of

MAMBA = "its kernels read the weight past an adapter"
"""PEFT's reason against an adapter on a Mamba layer's out_proj."""


@dataclass
class LinearLayers:
    """Weights of a decoder that an adapter may be on, by their full names."""

    linear: list[str] = field(default_factory=list)
    """Modules."""
    experts: dict[str, int] = field(default_factory=dict)
    """Parameters [E, in, out] or [E, out, in] of fused experts -> E."""
    routers: list[str] = field(default_factory=list)
    mamba: list[str] = field(default_factory=list)
    """Output projections of Mamba layers."""


def find(base: Any) -> LinearLayers:
    """The weights of a causal language model without an adapter that one can be on."""
    decoder, found = decoder_of(base), LinearLayers()
    (prefix,) = (name for name, module in base.named_modules() if module is decoder)
    # Layers that read an image, and that text skips as a whole (Llama 3.2 Vision).
    idle = tuple(f"layers.{i}." for i in getattr(decoder.config, "cross_attention_layers", None) or ())
    for name, module in decoder.named_modules():
        if name.startswith(idle):
            continue
        full, leaf = f"{prefix}.{name}", name.rpartition(".")[2]
        parent = decoder.get_submodule(name.rpartition(".")[0]) if name else decoder
        if _router(module, leaf, parent):
            found.routers.append(full)
        elif leaf == "out_proj" and "mamba" in f"{name}{type(parent).__name__}".lower():
            found.mamba.append(full)
        elif isinstance(module, nn.Linear | Conv1D):
            if not (leaf.endswith("_gate") and module.weight.shape[0] == 1 and hasattr(parent, "experts")):
                found.linear.append(full)
        elif "expert" in type(module).__name__.lower():
            for parameter, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3:
                    found.experts[f"{full}.{parameter}"] = weight.shape[0]
    return found


def _router(module: nn.Module, leaf: str, parent: nn.Module) -> bool:
    if "router" in type(module).__name__.lower() or "TopkGate" in type(module).__name__:
        return True
    beside = hasattr(parent, "experts") or "gating" in type(parent).__name__.lower()
    return isinstance(module, nn.Linear) and (
        (beside and leaf in ("gate", "router")) or "router" in type(parent).__name__.lower()
    )


def resolve(base: Any, lora: Lora) -> LoraConfig:
    """PEFT's settings for a new adapter. Raises ConfigError for a target that matches nothing, a fused expert's half,
    and dropout on what PEFT adapts by its parameter."""
    found = find(base)
    modules, parameters = _chosen(found, lora)
    rewritten = _rewritten(base, found.linear)
    direct = [name for name in modules if name not in rewritten]
    # PEFT would move these names on to the experts; as parameters it leaves them alone.
    parameters = [*parameters, *(f"{name}.weight" for name in modules if name in rewritten)]
    if parameters and lora.dropout:
        raise ConfigError(
            f"lora.dropout = {lora.dropout}: PEFT has no dropout for an adapter on a parameter, {parameters[0]} for "
            f"one; set lora.dropout = 0, or name other lora.targets"
        )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=direct,
        target_parameters=parameters or None,  # type: ignore[arg-type]
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in direct),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _chosen(found: LinearLayers, lora: Lora) -> tuple[list[str], list[str]]:
    """Modules and parameters that `lora.targets` names."""
    if lora.targets == "all-linear":
        return found.linear, list(found.experts) if lora.experts else []
    everything = (*found.linear, *(found.experts if lora.experts else ()))
    for target in lora.targets:
        if not any(_ends(name, target) for name in everything):
            raise ConfigError(_nothing(target, found, lora))
    modules = [name for name in found.linear if any(_ends(name, t) for t in lora.targets)]
    parameters = [name for name in found.experts if lora.experts and any(_ends(name, t) for t in lora.targets)]
    return modules, parameters


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _nothing(target: str, found: LinearLayers, lora: Lora) -> str:
    """Why a target matches nothing."""
    head = f"lora.targets = {lora.targets!r}: "
    if any(_ends(name, target) for name in found.mamba):
        return f"{head}{target} is the output of a Mamba layer: {MAMBA}"
    if any(_ends(name, target) for name in found.routers):
        return f"{head}{target} is a router, which is not trained"
    names = found.linear if not lora.experts else [*found.linear, *found.experts]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return f"{head}{target} matches no linear layer of the text decoder; it has {', '.join(leaves)}"


def _rewritten(base: Any, modules: Iterable[str]) -> set[str]:
    """Those of the modules that PEFT would take for something else."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    # All of them, since it refuses one half of what it fuses.
    asked = set(modules)
    config = LoraConfig(target_modules=list(asked))
    convert_peft_config_for_transformers(config, model=base, conversions=None)
    return asked - set(config.target_modules or ())


def compared(model: PeftModel, wanted: LoraConfig) -> tuple[set[str], set[str]]:
    """Full names of the weights that were to have an adapter, and of those that have one. wanted: of `resolve`."""
    asked = {*(wanted.target_modules or ()), *(wanted.target_parameters or ())}
    return asked, {f"{name}.weight" if f"{name}.weight" in asked else name for name in adapted(model)}


def check_attached(model: PeftModel, wanted: LoraConfig) -> None:
    """Raise ConfigError unless exactly what was asked for has an adapter. wanted: of `resolve`, before PEFT had it."""
    asked, have = compared(model, wanted)
    if have != asked:
        raise ConfigError(
            f"lora.targets: PEFT left out {len(asked - have)} of the {len(asked)} weights to adapt and took "
            f"{len(have - asked)} others, {min(have ^ asked)} for one; name other lora.targets"
        )


def adapted(model: PeftModel) -> Iterator[str]:
    """Full names in the base of the modules, and of the parameters of fused experts, that have an adapter."""
    for name, module in model.get_base_model().named_modules():
        if "default" in getattr(module, "lora_A", ()):
            parameter = getattr(module, "parameter_name", "weight")
            name = name.replace(".base_layer", "")
            yield name if parameter == "weight" and getattr(module, "num_experts", 1) == 1 else f"{name}.{parameter}"


def describe(model: PeftModel) -> str:
    """What has an adapter, by kind and count, and what of the decoder has none, for the start of a run."""
    found, names = find(model.get_base_model()), list(adapted(model))
    experts = {name.replace(".base_layer", ""): count for name, count in found.experts.items()}
    plain = Counter(_kind(n) for n in names if n not in experts and ".shared_expert" not in n)
    counts = [(" ".join(kind for kind in plain if plain[kind] == n), str(n)) for n in dict.fromkeys(plain.values())]
    shared = len({n.rpartition(".")[0] for n in names if ".shared_expert" in n})
    fused = {n.rpartition(".")[0] for n in names if n in experts}
    counts += [("shared experts", str(shared))] if shared else []
    counts += [("experts", f"{len(fused)} x {max(experts[n] for n in names if n in experts)}")] if fused else []
    left = [
        "not the experts" if experts and not fused else "",
        "not the router" if set(found.routers) - set(names) else "",
        f"not Mamba's out_proj, since {MAMBA}" if set(found.mamba) - set(names) else "",
    ]
    return ", ".join([f"adapters: {', '.join(f'{kind} ({n})' for kind, n in counts)}", *filter(None, left)])


def _kind(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")
