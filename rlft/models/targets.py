"""Resolve `lora.targets` to the weights of the text decoder that get an adapter, for PEFT to attach.

"all-linear" is every linear layer of the decoder except routers and the scalar gates of shared experts, plus experts
that a layer holds in one tensor (`lora.experts`), and those of the vision tower with its projector (`lora.vision`). The
head is outside the decoder. PEFT's own "all-linear" differs for a mixture of experts: it renames some targets
(`convert_peft_config_for_transformers`), so that shared experts and dense layers get no adapter and the router does.

In shapes, E is the number of experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlft.config.run import Lora
from rlft.errors import ConfigError
from rlft.models import experts
from rlft.models.kind import sees, tower_of
from rlft.models.structure import decoder_of

MAMBA = "its kernels read the weight past an adapter"
"""Why PEFT refuses an adapter on a Mamba layer's out_proj."""

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""Fields of configs with the number of experts that a token goes to."""


@dataclass
class LinearLayers:
    """Full names of the weights of a decoder that may have an adapter."""

    linear: list[str] = field(default_factory=list)
    """Names of modules."""
    experts: dict[str, int] = field(default_factory=dict)
    """Names of parameters [E, in, out] or [E, out, in] of fused experts -> E."""
    routers: list[str] = field(default_factory=list)
    mamba: list[str] = field(default_factory=list)
    """Output projections of Mamba layers."""
    tower: list[str] = field(default_factory=list)
    """Names of linear modules of the vision tower and its projector."""


def find(base: Any) -> LinearLayers:
    """Find the weights of a causal language model, without an adapter, that may have one."""
    decoder, layers = decoder_of(base), LinearLayers(tower=list(_of_tower(base)))
    (prefix,) = (name for name, module in base.named_modules() if module is decoder)
    # Layers that read an image; the text model alone (Llama 3.2 Vision) skips them as a whole.
    cross = () if sees(base.config) else getattr(decoder.config, "cross_attention_layers", None) or ()
    idle = tuple(f"layers.{i}." for i in cross)
    for name, module in decoder.named_modules():
        if name.startswith(idle):
            continue
        full, leaf = f"{prefix}.{name}", name.rpartition(".")[2]
        parent = decoder.get_submodule(name.rpartition(".")[0]) if name else decoder
        if _router(module, leaf, parent):
            layers.routers.append(full)
        elif leaf == "out_proj" and "mamba" in f"{name}{type(parent).__name__}".lower():
            layers.mamba.append(full)
        elif isinstance(module, nn.Linear | Conv1D):
            # The weight itself has another shape in 4 bits.
            width = getattr(module, "out_features", None)
            if not (leaf.endswith("_gate") and width == 1 and hasattr(parent, "experts")):
                layers.linear.append(full)
        elif "expert" in type(module).__name__.lower():
            for parameter, weight in module.named_parameters(recurse=False):
                shape = experts.shape_of(weight)
                if len(shape) == 3:
                    layers.experts[f"{full}.{parameter}"] = shape[0]
    return layers


def _of_tower(base: Any) -> Iterator[str]:
    """Yield the full names of the linear layers of a model's vision tower that may have an adapter."""
    tower = tower_of(base.config)
    inside = [(name, module) for name, module in base.named_modules() if f"{name}.".startswith(tower)]
    # PyTorch's attention reads a weight past an adapter; SigLIP has one in its head, which no image goes through.
    past = tuple(f"{name}." for name, module in inside if isinstance(module, nn.MultiheadAttention))
    for name, module in inside:
        if isinstance(module, nn.Linear) and not name.startswith(past) and ".head." not in name:
            yield name


def _router(module: nn.Module, leaf: str, parent: nn.Module) -> bool:
    """Return whether a module is a router of a mixture of experts."""
    if "router" in type(module).__name__.lower() or "TopkGate" in type(module).__name__:
        return True
    in_experts_block = hasattr(parent, "experts") or "gating" in type(parent).__name__.lower()
    return isinstance(module, nn.Linear) and (
        (in_experts_block and leaf in ("gate", "router")) or "router" in type(parent).__name__.lower()
    )


def resolve(base: Any, lora: Lora) -> LoraConfig:
    """Return PEFT's settings for a new adapter.

    Raises ConfigError for a target that matches nothing, for one half of a fused expert, and for dropout on what PEFT
    adapts as a parameter.
    """
    layers = find(base)
    if lora.vision and not layers.tower:
        raise ConfigError(
            "lora.vision = true: the model takes text alone, or its tower has no linear layer; leave it out"
        )
    modules, parameters = _select(layers, lora)
    rewritten = _rewritten(base, layers.linear)
    plain_modules = [name for name in modules if name not in rewritten]
    # PEFT would redirect these names to the experts; as parameters it keeps them.
    parameters = [*parameters, *(f"{name}.weight" for name in modules if name in rewritten)]
    if parameters and lora.dropout:
        raise ConfigError(
            f"lora.dropout = {lora.dropout}: PEFT has no dropout for an adapter on a parameter, {parameters[0]} for "
            f"one; set lora.dropout = 0, or name other lora.targets"
        )
    stacks = [name for name in parameters if name in layers.experts]
    if lora.expert_rank is not None and not stacks:
        raise ConfigError(
            f"lora.expert_rank = {lora.expert_rank}: no experts get an adapter (the model has none in one tensor, or "
            f"lora.experts and lora.targets leave them out); leave it out"
        )
    rank = expert_rank(base, lora) if stacks else lora.rank
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=plain_modules,
        target_parameters=parameters or None,  # type: ignore[arg-type]
        rank_pattern={experts.leaf_of(name): rank for name in stacks if rank != lora.rank},
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in plain_modules),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def expert_rank(base: Any, lora: Lora) -> int:
    """Return the rank of the adapter of each expert.

    Raises ConfigError where the rank has to be divided and the config has no number of experts per token.
    """
    if lora.expert_rank is not None:
        return lora.expert_rank
    config = decoder_of(base).config
    found = next((getattr(config, name) for name in TOP_K if getattr(config, name, None)), None)
    if found is None:
        raise ConfigError(
            f"lora.expert_rank: the config of {type(base).__name__} does not say to how many experts a token goes, by "
            f"which lora.rank = {lora.rank} is divided; set lora.expert_rank, or lora.experts = false"
        )
    return max(1, lora.rank // (max(found) if isinstance(found, list | tuple) else found))


def _select(layers: LinearLayers, lora: Lora) -> tuple[list[str], list[str]]:
    """Return the modules and parameters that `lora.targets` names."""
    if not (layers.linear or layers.experts):
        raise ConfigError(
            "model: its text decoder has no linear layer to adapt; check num_hidden_layers in config.json"
        )
    linear = [*layers.linear, *(layers.tower if lora.vision else ())]
    if lora.targets == "all-linear":
        return linear, list(layers.experts) if lora.experts else []
    candidates = (*linear, *(layers.experts if lora.experts else ()))
    for target in lora.targets:
        if not any(_ends(name, target) for name in candidates):
            raise ConfigError(_no_match(target, layers, lora))
    modules = [name for name in linear if any(_ends(name, target) for target in lora.targets)]
    parameters = [
        name for name in layers.experts if lora.experts and any(_ends(name, target) for target in lora.targets)
    ]
    return modules, parameters


def _ends(name: str, target: str) -> bool:
    """Return whether `target` is `name` or its last components."""
    return name == target or name.endswith(f".{target}")


def _no_match(target: str, layers: LinearLayers, lora: Lora) -> str:
    """Return the message for a target that matches nothing."""
    head = f"lora.targets = {lora.targets!r}: "
    if any(_ends(name, target) for name in layers.mamba):
        return f"{head}{target} is the output of a Mamba layer: {MAMBA}"
    if any(_ends(name, target) for name in layers.routers):
        return f"{head}{target} is a router, which is not trained"
    names = layers.linear if not lora.experts else [*layers.linear, *layers.experts]
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return f"{head}{target} matches no linear layer of the text decoder; it has {', '.join(leaves)}"


def rank_of(config: LoraConfig, name: str) -> int:
    """Return the rank that PEFT's settings give the weight of a full name."""
    patterns: dict[str, int] = config.rank_pattern or {}
    return next((rank for key, rank in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config.r)


def _rewritten(base: Any, modules: Iterable[str]) -> set[str]:
    """Return those of the modules whose names PEFT would replace."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    # All at once, since PEFT refuses one half of what it fuses.
    requested = set(modules)
    config = LoraConfig(target_modules=list(requested))
    convert_peft_config_for_transformers(config, model=base, conversions=None)
    return requested - set(config.target_modules or ())


def requested_and_attached(model: PeftModel, wanted: LoraConfig) -> tuple[set[str], set[str]]:
    """Return the full names of the weights that should have an adapter, and of those that have one. wanted: from
    `resolve`."""
    requested = {*(wanted.target_modules or ()), *(wanted.target_parameters or ())}
    return requested, {f"{name}.weight" if f"{name}.weight" in requested else name for name in adapted(model)}


def check_attached(model: PeftModel, wanted: LoraConfig) -> None:
    """Raise ConfigError unless exactly the requested weights have an adapter.

    wanted: from `resolve`, copied before PEFT changes it.
    """
    requested, attached = requested_and_attached(model, wanted)
    if attached != requested:
        raise ConfigError(
            f"lora.targets: PEFT left out {len(requested - attached)} of the {len(requested)} weights to adapt and "
            f"took {len(attached - requested)} others, {min(attached ^ requested)} for one; name other lora.targets"
        )


def adapted(model: PeftModel) -> Iterator[str]:
    """Yield the full names, in the base, of modules and of parameters of fused experts that have an adapter."""
    return (name for name, _ in _adapted(model))


def _adapted(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yield what `adapted` does, each with PEFT's wrapper."""
    for name, module in model.get_base_model().named_modules():
        if "default" in getattr(module, "lora_A", ()):
            parameter = getattr(module, "parameter_name", "weight")
            name = name.replace(".base_layer", "")
            plain = parameter == "weight" and getattr(module, "num_experts", 1) == 1
            yield (name if plain else f"{name}.{parameter}"), module


def expert_ranks(model: PeftModel) -> set[int]:
    """Return the ranks that the adapters of fused experts have."""
    stacks = _stacks(model)
    return {module.r["default"] for name, module in _adapted(model) if name in stacks}


def expert_parameters(model: PeftModel) -> int:
    """Return the number of parameters that the adapters of fused experts have."""
    stacks = _stacks(model)
    pairs = ((each.lora_A, each.lora_B) for name, each in _adapted(model) if name in stacks)
    return sum(factor["default"].weight.numel() for pair in pairs for factor in pair)


def by_expert_rank(model: PeftModel) -> bool:
    """Return whether its settings' rank is that of every adapter but those of fused experts, which have one rank."""
    config: Any = model.peft_config["default"]
    stacks = _stacks(model)
    others = {module.r["default"] for name, module in _adapted(model) if name not in stacks}
    return others <= {config.r} and len(expert_ranks(model)) == 1


def _stacks(model: PeftModel) -> dict[str, int]:
    """Map the full names, in the base, of the parameters of fused experts -> E."""
    layers = find(model.get_base_model())
    return {name.replace(".base_layer", ""): count for name, count in layers.experts.items()}


def describe(model: PeftModel) -> str:
    """Describe by kind and count what has an adapter, and what of the decoder has none, for the log of a run."""
    layers, names, stacks = find(model.get_base_model()), list(adapted(model)), _stacks(model)
    plain = Counter(_kind(name) for name in names if name not in stacks and ".shared_expert" not in name)
    counts = [
        (" ".join(kind for kind in plain if plain[kind] == count), str(count))
        for count in dict.fromkeys(plain.values())
    ]
    shared = len({name.rpartition(".")[0] for name in names if ".shared_expert" in name})
    fused = {name.rpartition(".")[0] for name in names if name in stacks}
    counts += [("shared experts", str(shared))] if shared else []
    counts += [("experts", f"{len(fused)} x {max(stacks[name] for name in names if name in stacks)}")] if fused else []
    exceptions = [
        "not the experts" if stacks and not fused else "",
        "not the router" if set(layers.routers) - set(names) else "",
        f"not Mamba's out_proj, since {MAMBA}" if set(layers.mamba) - set(names) else "",
    ]
    return ", ".join(
        [f"adapters: {', '.join(f'{kind} ({count})' for kind, count in counts)}", *filter(None, exceptions)]
    )


def _kind(name: str) -> str:
    """Return the last component of a name, without "_proj"."""
    return name.rpartition(".")[2].removesuffix("_proj")
