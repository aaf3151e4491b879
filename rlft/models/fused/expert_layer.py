"""Describe the mixture of experts of a decoder layer to the kernels: its router, its stacks and their gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from rlft.kernels.expert_choice import Scoring, choose_experts
from rlft.kernels.nf4 import Nf4Weight, decode_reference
from rlft.models.experts import leaves
from rlft.models.families import Experts
from rlft.models.fused import ops
from rlft.models.fused.expert_weights import Stack, StackAdapter

UP, DOWN = 0, 1
"""Indices of a layer's stacks."""


class Mixture:
    """The mixture of experts of a layer, as views of its modules' tensors."""

    def __init__(self, layer: nn.Module, experts: Experts, activation: ops.Activation, config: Any) -> None:
        """Read constants and weights. activation: of the MLP. Raises ValueError for what no kernel computes."""
        router: Any = layer.get_submodule(experts.router)
        gate: Any = None if experts.shared_gate is None else layer.get_submodule(experts.shared_gate)
        for name, module in ((experts.router, router), (experts.shared_gate, gate)):
            if hasattr(module, "lora_A"):
                raise ValueError(f"an adapter on {name}")
        self.router, self.wide_router = router.weight.detach(), experts.wide_router
        bias: Tensor | None = getattr(router, "bias", None)
        self.router_bias = None if bias is None else bias.detach()
        correction: Tensor | None = getattr(router, "e_score_correction_bias", None)
        wide = torch.promote_types(self.router.dtype, torch.float32)
        self.correction = None if correction is None else correction.to(wide)
        """[E], added to scores for ranking, in their dtype."""
        self.k = int(router.top_k)
        """Experts of a token."""
        self.scoring = describe_scoring(experts, config)
        self.shared_gate = None if gate is None else _plain(gate.weight, self.router.dtype)
        """[1, H]. Decoded: it is one row."""
        module: Any = layer.get_submodule(experts.stacks)
        wrappers: dict[str, Any] = {}
        while isinstance(module, ParamWrapper):
            wrappers[module.parameter_name] = module
            module = module.base_layer
        up, down = leaves(module)
        self.stacks = Stack(module, up, wrappers.get(up)), Stack(module, down, wrappers.get(down))
        self.experts = self.stacks[UP].experts
        choose_experts(torch.empty(0, self.experts), self.k, self.scoring)  # raises for numbers that do not fit
        self.width = self.stacks[DOWN].in_features
        """Columns of h."""
        self.activation = activation
        self.own_gate: Callable[[Tensor], Tensor] | None = module._apply_gate if experts.own_gate else None
        """From [M, 2 I] to [M, I], differentiable; None: `activation` of the first half times the second."""

    def bind(self, adapter: str | None) -> tuple[StackAdapter, ...]:
        """Look up the adapter of each stack."""
        return tuple(stack.bind(adapter) for stack in self.stacks)

    def problem(self, dtype: torch.dtype) -> str | None:
        """Return why the kernels cannot run these weights with activations of a dtype; None if they can."""
        for stack in self.stacks:
            if isinstance(stack.weight, Tensor) and stack.weight.dtype != dtype:
                return f"experts of {stack.weight.dtype} under norms of {dtype}"
        for name, weight in (("router", self.router), ("gate of the shared expert", self.shared_gate)):
            if weight is not None and weight.dtype != dtype:
                return f"a {name} of {weight.dtype} under norms of {dtype}"
        return None


def _plain(weight: Any, dtype: torch.dtype) -> Tensor:
    """Return a weight as it is, or decoded into a dtype."""
    return decode_reference(Nf4Weight.from_bnb(weight), dtype) if hasattr(weight, "quant_state") else weight.detach()


def describe_scoring(experts: Experts, config: Any) -> Scoring:
    """Return how a router scores. Raises ValueError for numbers that no kernel computes."""
    groups, kept = (getattr(config, name) for name in experts.groups) if experts.groups is not None else (1, 1)
    renormalised = experts.renormalised
    if isinstance(renormalised, str):
        renormalised = bool(getattr(config, renormalised))
    scale = float(getattr(config, experts.scale)) if experts.scale is not None else 1.0
    return Scoring(experts.scoring, renormalised, scale, groups, kept)
