"""The frozen weights and adapters of a decoder layer's linear modules, grouped by their input.

A `Projection` is one to three linear modules with the same input (q, k, v; o; gate, up; down), as transformers and PEFT
hold them; `bind` looks up an adapter in them. A `Store` writes the frozen weights and that adapter into buffers with
the layout of `rlft.kernels.lora`: decoded from NF4, or copied.

A [r, H] and B [out, r] are the matrices of an adapter, r its rank, H the input size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlft.kernels import lora
from rlft.kernels.lora_group import AdapterWriteTables, LoraGroup, Part
from rlft.kernels.nf4 import DecodeTables, Nf4Weight
from rlft.models.fused.expert_weights import StackAdapter, StackStore
from rlft.models.fused.ring import Ring

Mode = Literal["layer", "group", "shadow"]
"""Where the weights of the layers are written, see `Store`."""


ADAPTERS = 2
"""Adapters whose tables are cached per layer: those of a policy and of its reference alternate."""


class Bound(NamedTuple):
    """The adapter of a projection."""

    group: LoraGroup
    A: tuple[Tensor, ...]
    """Per module [r, H]; an empty [0, H] if the module has no adapter."""
    B: tuple[Tensor, ...]


def adapter_tensors(bound: Sequence[Bound | StackAdapter]) -> list[Tensor]:
    """Return the tensors of all modules that have an adapter, per projection or stack of experts A before B."""
    return [
        tensor for projection in bound for side in (projection.A, projection.B) for tensor in side if tensor.numel()
    ]


class Projection:
    """Linear modules that read the same input; their outputs lie side by side."""

    def __init__(
        self, modules: Sequence[nn.Module], weight_of: Callable[[Any], Tensor | Nf4Weight] | None = None
    ) -> None:
        """Read the modules' weights and biases.

        modules: nn.Linear, bitsandbytes' Linear4bit, or PEFT's wrapper of one. weight_of: returns the weight of the
        first two kinds; None: `kernel_weight`. Raises ValueError, with the reason, for weights in a form that no kernel
        reads.
        """
        self.modules = tuple(modules)
        bases: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        self.weights = tuple((weight_of or kernel_weight)(module) for module in bases)
        self.out_features = tuple(int(weight.shape[0]) for weight in self.weights)
        self.in_features = int(self.weights[0].shape[1])
        self.out = sum(self.out_features)
        self.bias = _concatenate_biases([module.bias for module in bases], self.out_features)
        self._empty = [(torch.empty(0, self.in_features), torch.empty(width, 0)) for width in self.out_features]
        """Empty A and B, for a module without an adapter."""
        self._bound: tuple[tuple, Bound] | None = None

    def bind(self, adapter: str | None) -> Bound:
        """Return the adapter called `adapter` (None: no adapter) with its shapes and scales."""
        A, B, scales = [], [], []
        for module, (empty_a, empty_b) in zip(self.modules, self._empty, strict=True):
            if adapter is not None and adapter in getattr(module, "lora_A", ()):
                A.append(module.lora_A[adapter].weight)  # type: ignore[index]
                B.append(module.lora_B[adapter].weight)  # type: ignore[index]
                scales.append(float(module.scaling[adapter]))  # type: ignore[index]
            else:
                A.append(empty_a)
                B.append(empty_b)
                scales.append(1.0)
        key = (*(id(tensor) for tensor in (*A, *B)), *scales)
        if self._bound is None or self._bound[0] != key:
            group = LoraGroup(
                self.in_features, self.out_features, tuple(matrix.shape[0] for matrix in A), tuple(scales)
            )
            self._bound = (key, Bound(group, tuple(A), tuple(B)))
        return self._bound[1]


def _concatenate_biases(biases: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor | None:
    """Concatenate the biases, with zeros for modules without one; None if no module has one."""
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return torch.cat(
        [like.new_zeros(width) if bias is None else bias.detach() for bias, width in zip(biases, widths, strict=True)]
    )


def kernel_weight(module: Any) -> Tensor | Nf4Weight:
    """Return a linear module's weight in a form that the kernels read.

    Raises ValueError, with the reason, if there is none.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no weight")
    if getattr(weight, "quant_state", None) is not None:
        return Nf4Weight.from_bnb(weight)
    if not isinstance(module, nn.Linear) or not weight.is_floating_point():
        raise ValueError(f"{type(module).__name__} with a weight of {weight.dtype}")
    return weight.detach()


class _LayerWeights:
    """Writes the frozen weights of projections into buffers; tables for the decoding kernel are built once."""

    def __init__(self, projections: Sequence[Projection], bound: Sequence[Bound], buffers: Sequence[Tensor]) -> None:
        self.buffers = tuple(buffers)
        self._weights: dict[tuple[LoraGroup, ...], tuple[lora.Weight, ...]] = {}
        packed, places, self._plain = [], [], []
        for projection, adapter, buffer in zip(projections, bound, buffers, strict=True):
            for i, weight in enumerate(projection.weights):
                place = buffer[adapter.group.rows(i), : projection.in_features]
                if isinstance(weight, Nf4Weight):
                    packed.append(weight)
                    places.append(place)
                else:
                    self._plain.append((place, weight))
        self._frozen = [(projection.out, projection.in_features) for projection in projections]
        self._plan = DecodeTables(packed, places) if packed else None
        self._adapter_writes: dict[tuple, AdapterWriteTables] = {}
        """Tables for writing an adapter, for the last adapters used, most recent last."""

    def run(self) -> None:
        """Decode or copy the frozen weights into the buffers."""
        if self._plan is not None:
            self._plan.run()
        for place, weight in self._plain:
            place.copy_(weight)

    def weights(self, groups: tuple[LoraGroup, ...], dtype: torch.dtype) -> tuple[lora.Weight, ...] | None:
        """Return the buffers as weights; None if they do not fit.

        With the adapter off these are slices of the same buffers, so that the addresses a CUDA graph reads stay valid.
        """
        if self.buffers[0].dtype != dtype:
            return None
        weights = self._weights.get(groups)
        if weights is None:
            layouts = list(zip(groups, self.buffers, self._frozen, strict=True))
            if any(group.buffer not in (tuple(buffer.shape), frozen) for group, buffer, frozen in layouts):
                return None
            parts = ((group, buffer[: group.buffer[0], : group.buffer[1]]) for group, buffer, _ in layouts)
            weights = self._weights[groups] = tuple(lora.Weight.of(*part) for part in parts)
            if len(self._weights) > ADAPTERS + 1:  # the one without an adapter
                del self._weights[next(iter(self._weights))]
        return weights

    @property
    def write_tables(self) -> AdapterWriteTables | None:
        """The tables of the last adapter that was written."""
        return next(reversed(self._adapter_writes.values()), None)

    def fill(self, bound: Sequence[Bound], weights: Sequence[lora.Weight]) -> None:
        """Write the current values of the adapter behind the weights; do nothing when it is off."""
        tensors = adapter_tensors(bound)
        if not tensors:
            return
        key = (
            *((tensor.data_ptr(), id(tensor), tensor.dtype) for tensor in tensors),
            *(adapter.group for adapter in bound),
        )
        plan = self._adapter_writes.pop(key, None)
        if plan is None:
            pairs = zip(bound, weights, strict=True)
            plan = AdapterWriteTables(
                [Part(*adapter, weight.b, weight.a) for adapter, weight in pairs if adapter.group.tail]
            )
        self._adapter_writes[key] = plan
        if len(self._adapter_writes) > ADAPTERS:
            del self._adapter_writes[next(iter(self._adapter_writes))]
        plan.run()


class Store:
    """Device buffers that hold the layers' weights in the dtype of activations.

    mode: "layer", one set of buffers into which every layer's weights are written in turn, all at once; "group", one
    buffer for one projection at a time, the least memory; "shadow", separate buffers for each layer, written once.
    ring: copies the frozen weights to the device, if they do not lie there.
    """

    def __init__(self, mode: Mode = "layer", ring: Ring | None = None) -> None:
        self.mode, self.ring = mode, ring
        self.stacks = StackStore(mode)
        """The buffers of experts, in the same mode."""
        self.version = 0
        """Increases when buffers move."""
        self._memory: Tensor | None = None
        self._layer_weights: dict[tuple, _LayerWeights] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        tensors = (
            [self._memory]
            if self.mode != "shadow"
            else [buffer for weights in self._layer_weights.values() for buffer in weights.buffers]
        )
        return self.stacks.bytes + sum(
            tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None
        )

    @property
    def write_tables(self) -> list[AdapterWriteTables | None]:
        """Tables for writing the current adapter. A captured CUDA graph reads them and must hold references to them."""
        return [weights.write_tables for weights in self._layer_weights.values()]

    def use(self, mode: Mode) -> None:
        """Change the mode; buffers of another mode are freed."""
        if mode != self.mode:
            self.release()
            self.mode = self.stacks.mode = mode

    def release(self) -> None:
        """Free all buffers."""
        self.version += 1
        self._memory, self._layer_weights = None, {}
        self.stacks.release()

    def weights(
        self, layer: int, projections: Sequence[Projection], bound: Sequence[Bound], like: Tensor
    ) -> Callable[[int], lora.Weight]:
        """Return a function from i to projection i, with weights and adapter in its buffer.

        In mode "group" a result is valid until the next projection is requested.
        """
        if self.ring is not None:
            self.ring.need(layer)
        if self.mode != "group":
            return self._load((layer,), slice(None), projections, bound, like).__getitem__
        cached: dict[int, lora.Weight] = {}

        def weight(i: int) -> lora.Weight:
            # A backward requests the same projection several times in a row.
            if i not in cached:
                cached.clear()
                cached[i] = self._load((layer, i), slice(i, i + 1), projections, bound, like)[0]
            return cached[i]

        return weight

    @property
    def scratch(self) -> Tensor | None:
        """Memory that is unused between two layers and may be borrowed there; None if there is none."""
        return self._memory

    def _load(
        self, key: tuple, part: slice, projections: Sequence[Projection], bound: Sequence[Bound], like: Tensor
    ) -> tuple[lora.Weight, ...]:
        """Write a part of a layer's projections into buffers and return them."""
        groups = tuple(adapter.group for adapter in bound[part])
        written = self._layer_weights.get(key)
        weights = None if written is None else written.weights(groups, like.dtype)
        if written is None or weights is None:
            self.version += written is not None
            every = [math.prod(adapter.group.buffer) for adapter in bound]
            sizes = every[part]
            # Shared memory needs room for the projections that are written later.
            largest = max(every) if self.mode == "group" else sum(every)
            memory = like.new_empty(sum(sizes)) if self.mode == "shadow" else self._shared(largest, like)
            parts = memory[: sum(sizes)].split(sizes)
            buffers = [memory_part.view(group.buffer) for memory_part, group in zip(parts, groups, strict=True)]
            written = self._layer_weights[key] = _LayerWeights(projections[part], bound[part], buffers)
            weights = written.weights(groups, like.dtype)
            assert weights is not None
            if self.mode == "shadow":
                written.run()
        if self.mode != "shadow":
            written.run()
        written.fill(bound[part], weights)
        return weights

    def _shared(self, size: int, like: Tensor) -> Tensor:
        """Return the memory that all layers share, enlarged if it is too small."""
        if self._memory is None or self._memory.numel() < size or self._memory.dtype != like.dtype:
            self.release()
            self._memory = like.new_empty(size)
        return self._memory
