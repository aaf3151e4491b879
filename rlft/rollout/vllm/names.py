"""Match the parameters of vLLM's model with the trainer's weights by name.

A parameter of the engine corresponds to one of the trainer's weights, or to several stacked by rows (qkv_proj to
q_proj, k_proj and v_proj, in_proj_qkvz to in_proj_qkv and in_proj_z). vLLM's classes say which in
`packed_modules_mapping`, and what they call otherwise in `hf_to_vllm_mapper` (`.conv.` is `.short_conv.` in LFM2).
Stacks of experts have names of vLLM's in all models (`experts.w13_weight` is `experts.gate_up_proj`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from rlft.errors import UnsupportedModel
from rlft.kernels.mxfp4 import Mxfp4Weight
from rlft.kernels.nf4 import Nf4Weight

Weight = Tensor | Nf4Weight | Mxfp4Weight

INSIDE = {".experts.routed_experts.": ".experts.", ".experts.gate.": ".gate."}
"""Module of vLLM inside of its experts -> where the trainer has it; vLLM 0.23 has no routed_experts."""
STACKS: dict[str, tuple[str, ...]] = {
    "w13_weight": ("gate_up_proj", "up_proj"),
    "w13_bias": ("gate_up_proj_bias", "up_proj_bias"),
    "w2_weight": ("down_proj",),
    "w2_bias": ("down_proj_bias",),
}
"""Leaf of a parameter of experts in vLLM -> the trainer's, with a gate and without."""
BLOCKS = {"block_sparse_moe": "mlp"}
"""Module of vLLM, named as in a family's files -> the name that transformers gives it when it reads them."""


@dataclass(frozen=True)
class Naming:
    """How a model of vLLM names what it has of the trainer's."""

    stacked: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Module of the engine -> the trainer's modules that it combines, from top to bottom."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Module's name in the trainer, between dots -> the engine's."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """How names of the trainer begin, up to a dot -> how the engine's do; one after the other."""

    @classmethod
    def of(cls, model: nn.Module) -> Naming:
        """Read all from the classes of vLLM's model and of the modules inside."""
        renamed: dict[str, str] = {}
        prefixes: dict[str, str] = {}
        for owner in (model, getattr(model, "model", None)):
            mapper = getattr(owner, "hf_to_vllm_mapper", None)
            # Names of modules alone: a parameter of another name has other values (A is -exp(A_log)).
            for old, new in getattr(mapper, "orig_to_new_substr", {}).items():
                if new is not None and all(part.startswith(".") and part.endswith(".") for part in (old, new)):
                    renamed[old] = new
            for old, new in getattr(mapper, "orig_to_new_suffix", {}).items():
                if new is not None and all(part.startswith(".") and part.endswith(".weight") for part in (old, new)):
                    renamed[old] = new
            for old, new in getattr(mapper, "orig_to_new_prefix", {}).items():
                if new is not None and all(part.endswith(".") for part in (old, new)):
                    prefixes[old] = new
        # A vision-language model may leave this to its language model.
        stacked: dict[str, Sequence[str]] = {}
        for module in reversed(list(model.modules())):
            stacked |= getattr(module, "packed_modules_mapping", {})
        return cls(stacked, renamed, prefixes)

    def rename(self, name: str) -> str:
        """Return the engine's name of one of the trainer's weights."""
        for old, new in self.renamed.items():
            name = name.replace(old, new, 1)
        for old, new in self.prefixes.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        return name


def partners(names: Iterable[str], naming: Naming, weights: Mapping[str, Weight]) -> dict[str, list[str]]:
    """Return engine's parameter -> the trainer's weights it consists of, from top to bottom.

    names: of the engine's parameters. Raises UnsupportedModel that names a weight without a partner, on either side.
    """
    known = {naming.rename(name): name for name in weights} | {name: name for name in weights}
    matches: dict[str, list[str]] = {}
    for name in names:
        where, _, kind = name.rpartition(".")
        prefix, _, module = where.rpartition(".")
        parts = [f"{prefix}.{part}.{kind}" if prefix else f"{part}.{kind}" for part in naming.stacked.get(module, ())]
        if name in known:
            matches[name] = [known[name]]
        elif parts and all(part in known for part in parts):
            matches[name] = [known[part] for part in parts]
        elif (stack := next((other for other in _of_experts(name) if other in known), None)) is not None:
            matches[name] = [known[stack]]
        else:
            alternatives = f", nor {', '.join(parts)}" if parts else ""
            raise UnsupportedModel(
                f"vLLM's model has a parameter {name}, and the trainer's has none of that name{alternatives}: this "
                f"architecture cannot share its weights"
            )
    used = {id(weights[part]) for parts in matches.values() for part in parts}
    unmatched = [
        name for name, weight in weights.items() if id(weight) not in used and not _same(weight, used, weights)
    ]
    if unmatched:
        raise UnsupportedModel(
            f"the trainer's model has a weight {unmatched[0]} that vLLM's has no place for ({len(unmatched)} in all): "
            f"this architecture cannot share its weights"
        )
    return matches


def _of_experts(name: str) -> list[str]:
    """Return the names that the trainer may have for a parameter in vLLM's block of experts, their router included."""
    for block, ours in BLOCKS.items():
        name = name.replace(f".{block}.", f".{ours}.")
    for inside, ours in INSIDE.items():
        name = name.replace(inside, ours)
    where, _, leaf = name.rpartition(".")
    return [f"{where}.{ours}" for ours in STACKS.get(leaf, (leaf,))]


def _same(weight: Weight, used: set[int], weights: Mapping[str, Weight]) -> bool:
    """Return whether a weight shares the memory of a used one, as a tied head under its second name does."""
    return isinstance(weight, Tensor) and any(
        isinstance(other, Tensor)
        and id(other) in used
        and other.data_ptr() == weight.data_ptr() != 0
        and other.shape == weight.shape
        for other in weights.values()
    )
