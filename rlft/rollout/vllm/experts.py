"""vLLM's layers of experts and their routers on the trainer's weights.

vLLM routes tokens and calls the experts' method, which is rlft's: `ExpertsMethod` computes by rlft's kernels, and
`FilledExperts` is vLLM's own method in memory that rlft fills. The latter has no place for an adapter, because it
multiplies twice in one call, so it serves weights with the adapter merged in, and adapters that leave experts out.

Imported only when an engine starts, since it imports vLLM. In vLLM 0.23 a layer of experts is a FusedMoE, in later
versions a RoutedExperts inside of a MoERunner; 0.23 has the first under the name of the second.

Legend: T tokens, k experts of each, H hidden size, x what comes in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from rlft.errors import EngineError, UnsupportedModel
from rlft.rollout.vllm.expert_layer import Gate

STACKS = ("w13_weight", "w2_weight")
"""Parameters of a layer: into the experts, and out of them."""


class RouterMethod(UnquantizedLinearMethod):
    """A router that computes from the trainer's tensor."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing: on a CPU vLLM would make a packed copy."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute logits."""
        weight: Any = layer.weight
        return functional.linear(x, weight, bias)


class ExpertsMethod(FusedMoEMethodBase):
    """Experts that rlft's kernels compute, from the trainer's weights or from memory that rlft fills."""

    def __init__(self, moe: Any, shared: bool) -> None:
        """Set up the method. moe: vLLM's config of the layer. shared: the layer has no memory for weights."""
        super().__init__(moe)
        self.shared = shared

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register the weights, empty where they are shared, and the biases."""
        width = intermediate_size_per_partition
        rows = 2 * width if self.moe.is_act_and_mul else width
        shapes = {"w13": (num_experts, rows, hidden_size), "w2": (num_experts, hidden_size, width)}
        layer.rlft_shapes = {f"{name}_weight": shape for name, shape in shapes.items()}  # type: ignore[assignment]
        for name, shape in shapes.items():
            weight = torch.empty(0 if self.shared else shape, dtype=params_dtype)
            layer.register_parameter(f"{name}_weight", nn.Parameter(weight, requires_grad=False))
            if self.moe.has_bias:
                bias = torch.empty(shape[:2], dtype=params_dtype)
                layer.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=False))

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """Return None: vLLM's kernels are not used."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing: the weights stay as they are written."""

    def apply(
        self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **more: Any
    ) -> Any:  # type: ignore[override]
        """Compute the experts [T, k] of tokens [T, H]. vLLM runs shared experts itself."""
        report(layer, topk_ids)
        compute: Any = layer.rlft_experts
        return compute(x, topk_weights, topk_ids)


def report(layer: nn.Module, chosen: Tensor) -> None:
    """Write the experts [T, k] of a pass where the layer has a part of a log for them."""
    routes: Any = getattr(layer, "rlft_routes", None)
    if routes is not None:
        routes[: chosen.shape[0]].copy_(chosen)


class FilledExperts(UnquantizedFusedMoEMethod):
    """vLLM's own experts in memory that rlft fills, again after each wake."""

    shared = False

    def apply(
        self, layer: nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **more: Any
    ) -> Any:  # type: ignore[override]
        """Report the experts of each token, and compute them by vLLM's kernel."""
        report(layer, topk_ids)
        return super().apply(layer, x, topk_weights, topk_ids, *shared, **more)  # type: ignore[arg-type]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Choose vLLM's kernel. Raises EngineError for one that wants the weights in another layout."""
        before = _addresses(layer)
        super().process_weights_after_loading(layer)
        if _addresses(layer) != before:
            raise EngineError(
                f"vLLM's {self.unquantized_backend.value} kernel of experts has rearranged their weights, which rlft "
                f'writes as they are: unset VLLM_* variables that choose it, or set engine.mode = "shared"'
            )


def _addresses(layer: Any) -> list[int]:
    """Return where the stacks of a layer lie."""
    return [getattr(layer, name).data_ptr() for name in STACKS]


def is_gate(activation: str, gate: Gate) -> bool:
    """Return whether an activation of vLLM's, by its name, is the trainer's gate; compared on numbers.

    vLLM takes the activation of a type of model, and constants such as gpt-oss' limit, not that of the config.
    """
    # vLLM builds a model under its dtype as the default, in which two orders of the same products differ.
    rows = torch.linspace(-20, 20, 128, dtype=torch.float32).view(2, 64)
    if activation == "silu":
        left, right = rows.chunk(2, -1)
        expected = functional.silu(left) * right
    elif activation == "swigluoai":
        left, right = rows[:, ::2].clamp(max=7), rows[:, 1::2].clamp(-7, 7)
        expected = (right + 1) * left * torch.sigmoid(1.702 * left)
    else:
        return False
    return torch.allclose(gate(rows), expected, rtol=1e-4, atol=1e-4)


def method_of(layer: Any, shared: bool, adapted: bool, gate: Gate | None) -> ExpertsMethod | FilledExperts:
    """Return the method of a layer of experts.

    shared: experts have no memory of the engine's. adapted: experts have an adapter beside their weights. gate: the
    trainer's, if it has one. Raises UnsupportedModel for a layer whose routing weights multiply what comes in.
    """
    if layer.apply_router_weight_on_input:
        raise UnsupportedModel(
            f"vLLM weights the input of {layer.layer_name} by the router and not the output, which rlft's experts do "
            f"not have"
        )
    # vLLM's kernel on a CPU packs the weights.
    packs = current_platform.is_cpu()
    if shared or adapted or packs or gate is None or not is_gate(layer.activation.value, gate):
        return ExpertsMethod(layer.moe_config, shared)
    return FilledExperts(layer.moe_config)
