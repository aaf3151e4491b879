"""The frozen weights and adapters of a decoder layer's linear modules, grouped by what they read.

A `Projection` is one to three linear modules of the same input (q, k, v; o; gate, up; down), as transformers and PEFT
hold them; `bind` looks up an adapter in them. A `Store` writes the frozen weights and that adapter into buffers of
`rlft.kernels.lora`'s layout: decoded from NF4, or copied.
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

Mode = Literal["layer", "group", "shadow"]
"""Where the layers' weights are brought to, see `Store`."""


ADAPTERS = 2
"""Adapters whose tables are kept for a layer: a policy's and its reference's come in turn."""


class Bound(NamedTuple):
    """The adapter of a projection as it is now."""

    group: LoraGroup
    A: tuple[Tensor, ...]
    """Per module [r, H]; an empty [0, H] where the module has no adapter."""
    B: tuple[Tensor, ...]


def adapter_tensors(bound: Sequence[Bound]) -> list[Tensor]:
    """Those of all modules that have an adapter, per projection A before B."""
    return [t for b in bound for ts in (b.A, b.B) for t in ts if t.numel()]


class Projection:
    """Linear modules that read the same input; their outputs lie side by side."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """modules: nn.Linear, bitsandbytes' Linear4bit, or PEFT's wrapper of one.

        Raises ValueError, saying why, for weights in a form that no kernel reads.
        """
        self.modules = tuple(modules)
        bases: list[Any] = [getattr(m, "base_layer", m) for m in modules]
        self.weights = tuple(_readable(m) for m in bases)
        self.out_features = tuple(int(w.shape[0]) for w in self.weights)
        self.in_features = int(self.weights[0].shape[1])
        self.out = sum(self.out_features)
        self.bias = _joined([m.bias for m in bases], self.out_features)
        self._none = [(torch.empty(0, self.in_features), torch.empty(n, 0)) for n in self.out_features]
        """A and B of a module without an adapter."""
        self._bound: tuple[tuple, Bound] | None = None

    def bind(self, adapter: str | None) -> Bound:
        """The adapter called `adapter` (None: no adapter) with its shapes and scales."""
        A, B, scales = [], [], []
        for module, (none_a, none_b) in zip(self.modules, self._none, strict=True):
            if adapter is not None and adapter in getattr(module, "lora_A", ()):
                A.append(module.lora_A[adapter].weight)  # type: ignore[index]
                B.append(module.lora_B[adapter].weight)  # type: ignore[index]
                scales.append(float(module.scaling[adapter]))  # type: ignore[index]
            else:
                A.append(none_a)
                B.append(none_b)
                scales.append(1.0)
        key = (*(id(t) for t in (*A, *B)), *scales)
        if self._bound is None or self._bound[0] != key:
            group = LoraGroup(self.in_features, self.out_features, tuple(a.shape[0] for a in A), tuple(scales))
            self._bound = (key, Bound(group, tuple(A), tuple(B)))
        return self._bound[1]


def _joined(biases: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor | None:
    """The biases one after the other, zeros where a module has none; None when none has one."""
    some = next((b for b in biases if b is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(n) if b is None else b.detach() for b, n in zip(biases, widths, strict=True)])


def _readable(module: Any) -> Tensor | Nf4Weight:
    """A linear module's weight as our kernels read it. Raises ValueError, saying why, where they cannot."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no weight")
    if getattr(weight, "quant_state", None) is not None:
        return Nf4Weight.from_bnb(weight)
    if not isinstance(module, nn.Linear) or not weight.is_floating_point():
        raise ValueError(f"{type(module).__name__} with a weight of {weight.dtype}")
    return weight.detach()


class _LayerWeights:
    """Writes the frozen weights of projections into buffers; what the decoder needs is made once."""

    def __init__(self, projections: Sequence[Projection], bound: Sequence[Bound], buffers: Sequence[Tensor]) -> None:
        self.buffers = tuple(buffers)
        self._weights: dict[tuple[LoraGroup, ...], tuple[lora.Weight, ...]] = {}
        packed, places, self._plain = [], [], []
        for projection, b, buffer in zip(projections, bound, buffers, strict=True):
            for i, weight in enumerate(projection.weights):
                place = buffer[b.group.rows(i), : projection.in_features]
                if isinstance(weight, Nf4Weight):
                    packed.append(weight)
                    places.append(place)
                else:
                    self._plain.append((place, weight))
        self._frozen = [(p.out, p.in_features) for p in projections]
        self._plan = DecodeTables(packed, places) if packed else None
        self._fills: dict[tuple, AdapterWriteTables] = {}
        """What fills in an adapter, for the last ones that were used, the last one last."""

    def run(self) -> None:
        if self._plan is not None:
            self._plan.run()
        for place, weight in self._plain:
            place.copy_(weight)

    def weights(self, groups: tuple[LoraGroup, ...], dtype: torch.dtype) -> tuple[lora.Weight, ...] | None:
        """The buffers; without an adapter, parts of them: what a CUDA graph reads stays where it is when the adapter is
        off in between. None where they do not fit."""
        if self.buffers[0].dtype != dtype:
            return None
        made = self._weights.get(groups)
        if made is None:
            found = list(zip(groups, self.buffers, self._frozen, strict=True))
            if any(group.buffer not in (tuple(buffer.shape), own) for group, buffer, own in found):
                return None
            parts = ((group, buffer[: group.buffer[0], : group.buffer[1]]) for group, buffer, _ in found)
            made = self._weights[groups] = tuple(lora.Weight.of(*part) for part in parts)
            if len(self._weights) > ADAPTERS + 1:  # and none
                del self._weights[next(iter(self._weights))]
        return made

    @property
    def filled(self) -> AdapterWriteTables | None:
        """What filled in the last adapter."""
        return next(reversed(self._fills.values()), None)

    def fill(self, bound: Sequence[Bound], weights: Sequence[lora.Weight]) -> None:
        """Write the adapter, as it is now, behind the weights; nothing where it is off."""
        tensors = adapter_tensors(bound)
        if not tensors:
            return
        key = (*((t.data_ptr(), id(t), t.dtype) for t in tensors), *(b.group for b in bound))
        plan = self._fills.pop(key, None)
        if plan is None:
            pairs = zip(bound, weights, strict=True)
            plan = AdapterWriteTables([Part(*b, w.b, w.a) for b, w in pairs if b.group.tail])
        self._fills[key] = plan
        if len(self._fills) > ADAPTERS:
            del self._fills[next(iter(self._fills))]
        plan.run()


class Store:
    """Where the layers' weights are brought to.

    mode: "layer", one set of buffers that every layer's weights are brought to in turn, all at once; "group", one
    buffer for one projection at a time, the least memory; "shadow", buffers of its own for each layer, brought once.
    """

    def __init__(self, mode: Mode = "layer") -> None:
        self.mode = mode
        self.version = 0
        """Goes up when buffers move."""
        self._memory: Tensor | None = None
        self._brought: dict[tuple, _LayerWeights] = {}

    @property
    def bytes(self) -> int:
        """Memory that is held."""
        kept = [self._memory] if self.mode != "shadow" else [b for k in self._brought.values() for b in k.buffers]
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    @property
    def fills(self) -> list[AdapterWriteTables | None]:
        """What fills in the adapter of now: a CUDA graph that was captured reads their tables, and keeps them."""
        return [kept.filled for kept in self._brought.values()]

    def use(self, mode: Mode) -> None:
        """Change the mode; what was held for another one is given back."""
        if mode != self.mode:
            self.release()
            self.mode = mode

    def release(self) -> None:
        """Give all buffers back."""
        self.version += 1
        self._memory, self._brought = None, {}

    def weights(
        self, layer: int, projections: Sequence[Projection], bound: Sequence[Bound], like: Tensor
    ) -> Callable[[int], lora.Weight]:
        """Projection i, with weights and adapter in its buffer; in mode "group" until another one is asked for."""
        if self.mode != "group":
            return self._bring((layer,), slice(None), projections, bound, like).__getitem__
        held: dict[int, lora.Weight] = {}

        def one(i: int) -> lora.Weight:
            # A backward asks for the same one several times in a row.
            if i not in held:
                held.clear()
                held[i] = self._bring((layer, i), slice(i, i + 1), projections, bound, like)[0]
            return held[i]

        return one

    @property
    def scratch(self) -> Tensor | None:
        """Memory that nobody reads between two layers, for others to use until then; None where there is none."""
        return self._memory

    def _bring(
        self, key: tuple, part: slice, projections: Sequence[Projection], bound: Sequence[Bound], like: Tensor
    ) -> tuple[lora.Weight, ...]:
        """A part of a layer's projections."""
        groups = tuple(b.group for b in bound[part])
        kept = self._brought.get(key)
        weights = None if kept is None else kept.weights(groups, like.dtype)
        if kept is None or weights is None:
            self.version += kept is not None
            every = [math.prod(b.group.buffer) for b in bound]
            sizes = every[part]
            # What all share has room for what is brought after these.
            largest = max(every) if self.mode == "group" else sum(every)
            memory = like.new_empty(sum(sizes)) if self.mode == "shadow" else self._shared(largest, like)
            parts = memory[: sum(sizes)].split(sizes)
            buffers = [p.view(group.buffer) for p, group in zip(parts, groups, strict=True)]
            kept = self._brought[key] = _LayerWeights(projections[part], bound[part], buffers)
            weights = kept.weights(groups, like.dtype)
            assert weights is not None
            if self.mode == "shadow":
                kept.run()
        if self.mode != "shadow":
            kept.run()
        kept.fill(bound[part], weights)
        return weights

    def _shared(self, size: int, like: Tensor) -> Tensor:
        """The memory that all layers share, made larger where a layer needs it."""
        if self._memory is None or self._memory.numel() < size or self._memory.dtype != like.dtype:
            self.release()
            self._memory = like.new_empty(size)
        return self._memory
