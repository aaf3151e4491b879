"""Give the trainer's weights and adapter to one engine: what its model gets in place of files.

Imported only when an engine starts, since it imports vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config

from rlft.errors import UnsupportedModel
from rlft.rollout.vllm import expert_layer, shared_weights
from rlft.rollout.vllm.experts import STACKS, ExpertsMethod, FilledExperts
from rlft.rollout.vllm.linear import SHARED, SHARED_NUMBERS, DequantizedMethod, SharedMethod
from rlft.rollout.vllm.names import Naming, Weight, partners
from rlft.rollout.vllm.routes import RouteLog
from rlft.rollout.vllm.shared_weights import WeightCopy
from rlft.rollout.vllm.slots import Pair, Slot, StackSlot, put

Parts = Mapping[str, list[str]]
"""Parameter of the engine -> the trainer's weights it consists of."""


class WeightProvider:
    """Give the trainer's weights and adapter to one engine."""

    waiting: ClassVar[dict[int, WeightProvider]] = {}
    """Number in the load config -> provider of an engine that is starting: vLLM makes the loader, and a config cannot
    hold tensors."""

    def __init__(
        self,
        weights: Mapping[str, Weight],
        ranks: Mapping[str, int],
        merged: bool,
        gates: Mapping[str, expert_layer.Gate] | None = None,
        reports: bool = False,
    ) -> None:
        """Hold the weights.

        ranks: of the adapter, by the names of weights. merged: merge it, so that no slots exist. gates: name of a layer
        of experts -> the trainer's function between its two products. reports: log the experts of each token.
        """
        self._reports = reports
        self.log: RouteLog | None = None
        """The experts of each token; set once vLLM has loaded the model, where they are asked for."""
        self.weights, self._merged, self._gates = weights, merged, gates or {}
        self._ranks = dict(ranks)
        self._slots: dict[str, Slot | StackSlot] = {}
        """By the engine's parameter."""
        self.stage: Literal["configured", "building", "built"] = "configured"
        """How far vLLM is with its model."""
        self.weight_copy: WeightCopy | None = None
        """Copy of weights to the engine's own memory; set once vLLM has loaded the model, and run after that."""
        self.zeros: list[Tensor] = []
        """What is 0 between vLLM's passes and loses its content in sleep: features behind Qwen3-VL's first layers."""

    @property
    def gate(self) -> expert_layer.Gate | None:
        """The trainer's gate of experts, which all layers have; None where the trainer has no such layers."""
        return next(iter(self._gates.values()), None)

    @property
    def adapts_experts(self) -> bool:
        """Whether experts have an adapter beside their weights."""
        return not self._merged and any(name.rpartition(".")[0] in self._gates for name in self._ranks)

    def give(self, model: nn.Module) -> None:
        """Put the weights into vLLM's empty model. Raises UnsupportedModel for a weight without a counterpart."""
        modules = dict(model.named_modules())
        naming = Naming.of(model)
        ours = {naming.rename(name) for name in self.weights}
        # vLLM has buffers besides that the trainer has not, such as the scales of a quantized cache.
        buffers = {name: buffer for name, buffer in shared_weights.saved_buffers(model).items() if name in ours}
        parameters = dict(model.named_parameters()) | buffers
        matches = partners(parameters, naming, self.weights)
        _refuse_absorbed(parameters)
        self._give_slots(modules, parameters, matches)
        places: dict[str, Tensor] = {}
        scratch = self._scratch(modules, matches)
        for name, parameter in parameters.items():
            where, _, leaf = name.rpartition(".")
            module, parts = modules[where], matches[name]
            weights = [self.weights[part] for part in parts]
            method = getattr(module, "quant_method", None)
            is_linear = isinstance(method, SharedMethod | DequantizedMethod)
            if isinstance(method, SharedMethod) and leaf == "weight":
                shared_weights.check_shapes(name, weights, module.rlft_shape)  # type: ignore[arg-type]
                self._share(module, shared_weights.SharedLinear(weights, scratch))
            elif isinstance(method, ExpertsMethod) and method.shared and leaf in STACKS:
                expert_layer.check_in_place(name, weights[0], module.rlft_shapes[leaf])  # type: ignore[index]
            elif is_linear or _is_stack(method, leaf) or shared_weights.needs_copy(weights, parameter):
                places |= shared_weights.places_of(name, parts, weights, parameter.data)
            else:
                parameter.data = shared_weights.shared_tensor(name, weights[0], parameter, module)
        self._give_experts(modules, matches)
        if self._reports:
            self._give_log(modules, matches)
        self.weight_copy = WeightCopy(places, self.weights)
        self.zeros = list(getattr(model, "deepstack_input_embeds", ()))  # type: ignore[arg-type]
        if not any(parameter.is_cuda for parameter in parameters.values()):
            # vLLM's CPU build packs layers that have its own method, such as the gate of shared experts, after this.
            self.weight_copy.run()

    def _share(self, module: nn.Module, linear: shared_weights.SharedLinear) -> None:
        number = next(SHARED_NUMBERS)
        SHARED[number] = module.rlft_shared = linear  # type: ignore[assignment]
        module.register_buffer("rlft_number", torch.tensor(number, device="cpu"), persistent=False)

    def _give_slots(self, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], matches: Parts) -> None:
        """Allocate the adapter's slots, in memory that is freed during sleep. Raises UnsupportedModel for an adapter
        on something else than a linear layer or experts."""
        unplaced = set(self._ranks)
        for name, parameter in parameters.items():
            where, _, leaf = name.rpartition(".")
            method = getattr(modules[where], "quant_method", None)
            is_linear = isinstance(method, SharedMethod | DequantizedMethod) and leaf == "weight"
            if is_linear or _is_stack(method, leaf):
                unplaced -= set(matches[name])
                ranks = [self._ranks[part] for part in matches[name] if part in self._ranks]
                if ranks and not self._merged:
                    self._slots[name] = self._slot(modules[where], matches[name], max(ranks), parameter)
        if unplaced:
            raise UnsupportedModel(
                f"the adapter has a part at {min(unplaced).removesuffix('.weight')}, which is no linear layer of "
                f"vLLM's ({len(unplaced)} in all): leave it out of lora.targets for vLLM"
            )

    def _slot(self, module: nn.Module, names: list[str], rank: int, like: Tensor) -> Slot | StackSlot:
        shapes = [self.weights[name].shape for name in names]
        if len(shapes[0]) == 3:
            return StackSlot(names[0], shapes[0], rank, like)
        slot = Slot(names, [shape[0] for shape in shapes], shapes[0][1], rank, like)
        module.rlft_a = nn.Parameter(slot.a, requires_grad=False)
        module.rlft_b = nn.Parameter(slot.b, requires_grad=False)
        module.rlft_sizes = slot.sizes  # type: ignore[assignment]
        return slot

    def _give_experts(self, modules: Mapping[str, nn.Module], matches: Parts) -> None:
        """Set what computes the layers of experts, once their biases have been given."""
        for where, module in modules.items():
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, ExpertsMethod):
                up, down = (self._product(f"{where}.{leaf}", module, method.shared, matches) for leaf in STACKS)
                gate = self._gates[_trainers_layer(where, matches)]
                module.rlft_experts = expert_layer.ExpertLayer(up, down, gate)  # type: ignore[assignment]

    def _give_log(self, modules: Mapping[str, nn.Module], matches: Parts) -> None:
        """Make a log of experts, and give each layer its part, in the order of the trainer's layers."""
        layers = {where: module for where, module in modules.items() if _has_experts(module)}
        moe: Any = next(iter(layers.values())).quant_method.moe  # type: ignore[union-attr]
        rows = get_current_vllm_config().scheduler_config.max_num_batched_tokens
        device = next(modules[""].parameters()).device
        self.log = RouteLog(rows, len(self._gates), moe.experts_per_token, moe.num_experts, device)
        order = list(self._gates)
        for where, module in layers.items():
            place = order.index(_trainers_layer(where, matches))
            module.rlft_routes = self.log.buffer[:, place]  # type: ignore[assignment]

    def _product(self, name: str, module: nn.Module, shared: bool, matches: Parts) -> expert_layer.Product:
        """Return one product of a layer of experts. name: of the engine's stack."""
        leaf = name.rpartition(".")[2]
        weight: Any = self.weights[matches[name][0]] if shared else getattr(module, leaf).data
        bias: Any = getattr(module, leaf.replace("_weight", "_bias"), None)
        slot: Any = self._slots.get(name)
        return expert_layer.Product(weight, None if bias is None else bias.data, slot)

    def forget(self) -> None:
        """Drop all references to the engine's memory."""
        if self.log is not None:
            self.log.drop()
        self.weight_copy, self._slots, self.zeros, self.log = None, {}, [], None

    def put(self, adapter: Mapping[str, Pair]) -> None:
        """Write the adapter into its slots. adapter: name of a weight -> A and scaled B, in the engine's dtype."""
        put(list(self._slots.values()), adapter)

    def slots(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name of a weight, A, B) as the kernels read them, including unused ranks."""
        for slot in self._slots.values():
            yield from slot

    def _scratch(self, modules: Mapping[str, nn.Module], matches: Parts) -> Tensor | None:
        """Allocate a buffer for the largest shared linear layer, in memory that is freed during sleep."""
        size = 0
        for name, parts in matches.items():
            module, weights = modules[name.rpartition(".")[0]], [self.weights[part] for part in parts]
            is_shared = isinstance(getattr(module, "quant_method", None), SharedMethod) and name.endswith(".weight")
            if is_shared and not all(isinstance(weight, Tensor) for weight in weights):
                size = max(size, sum(weight.shape[0] * weight.shape[1] for weight in weights))
        like = next(iter(modules[""].parameters()))
        return torch.empty(size, dtype=like.dtype, device=like.device) if size else None


def _refuse_absorbed(names: Iterable[str]) -> None:
    """Raise UnsupportedModel for latent attention (MLA). names: of the engine's parameters."""
    absorbed = next((name for name in names if ".kv_b_proj." in name), None)
    if absorbed is not None:
        raise UnsupportedModel(
            f"vLLM multiplies {absorbed} into the weights beside it when it loads a model: it does not read the "
            f"trainer's, nor an adapter on it"
        )


def _trainers_layer(where: str, matches: Parts) -> str:
    """Return the name of the trainer's layer of experts that is vLLM's at `where`."""
    return matches[f"{where}.{STACKS[0]}"][0].rpartition(".")[0]


def _is_stack(method: object, leaf: str) -> bool:
    """Return whether a parameter of vLLM's is a stack of experts that rlft fills or shares."""
    return isinstance(method, ExpertsMethod | FilledExperts) and leaf in STACKS


def _has_experts(module: nn.Module) -> bool:
    """Return whether a module of vLLM's is a layer of experts."""
    return isinstance(getattr(module, "quant_method", None), ExpertsMethod | FilledExperts)
