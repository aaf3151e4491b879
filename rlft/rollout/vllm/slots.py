"""The adapter in an engine that combines linear layers: what each of PEFT's tensors belongs to, and memory for it.

A slot has A and B as the kernels read them: A [r, in] and B [out, r] of a matrix, A [E, r, in] and B [E, out, r] of a
stack of E experts, B scaled; in the code a and b. Slots are written in place, and read back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlft.kernels.launch import power_of_2
from rlft.kernels.lora_add import MIN_RANK
from rlft.models.adapter import a_by_expert, b_by_expert, without_wrappers

Pair = tuple[Tensor, Tensor]
"""A and scaled B of a weight."""


@dataclass(frozen=True)
class Adapted:
    """A weight of the base with an adapter."""

    weight: str
    """Name of the weight in the trainer's model, without PEFT's wrappers."""
    experts: int
    """E of a stack of experts; 0 of a matrix."""

    def rank(self, a: Tensor) -> int:
        """Return the rank of an adapter, of each expert in a stack. a: PEFT's A."""
        return len(a) // (self.experts or 1)

    def pair(self, a: Tensor, b: Tensor) -> Pair:
        """Return A and B as a slot has them. a, b: PEFT's, which are [E r, in] and [out, r E] of a stack."""
        if not self.experts:
            return a, b
        return a_by_expert(a, self.experts), b_by_expert(b, self.experts).contiguous()


def adapted(model: PeftModel) -> dict[str, Adapted]:
    """Map the PEFT name of every module with an adapter -> the weight that it adapts."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # PEFT adapts a parameter by a wrapper around its module.
            leaf = getattr(module, "parameter_name", "weight")
            count = getattr(module, "num_experts", 1)
            where = without_wrappers(name.removeprefix("base_model.model."))
            found[name] = Adapted(f"{where}.{leaf}", count if count > 1 or leaf != "weight" else 0)
    return found


def module_of(name: str) -> str:
    """Return the PEFT name of the module that a tensor of an adapter belongs to."""
    return name.split(".lora_")[0]


def ranks_of(model: PeftModel, adapter: Mapping[str, Tensor]) -> dict[str, int]:
    """Map the weights with an adapter -> its rank, of each expert in a stack. adapter: by PEFT's names."""
    places = adapted(model)
    matrices = {places[module_of(name)]: matrix for name, matrix in adapter.items() if ".lora_A." in name}
    return {place.weight: place.rank(matrix) for place, matrix in matrices.items()}


def slot_rank(rank: int) -> int:
    """Return the rank of the slot of a matrix: a power of two, as the kernel requires."""
    return max(MIN_RANK, power_of_2(rank))


class Slot:
    """Storage for the adapter of an engine's linear layer, which combines one or several of the trainer's."""

    def __init__(self, weights: Sequence[str], sizes: Sequence[int], columns: int, rank: int, like: Tensor) -> None:
        """Allocate the slot.

        weights: the trainer's, from top to bottom, with `sizes` rows each. like: dtype and device.
        """
        self._weights, self.sizes = tuple(weights), list(sizes)
        self._rank = slot_rank(rank)
        self.a = like.new_zeros(len(weights) * self._rank, columns)
        self.b = like.new_zeros(sum(sizes), self._rank)

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (weight, A [slot's rank, in], B [out, slot's rank]), views of the memory that the kernel reads."""
        return zip(self._weights, self.a.split(self._rank), self.b.split(self.sizes), strict=True)


class StackSlot:
    """Storage for the adapter of a stack of experts: A [E, r, in] and B [E, out, r]."""

    def __init__(self, weight: str, shape: Sequence[int], rank: int, like: Tensor) -> None:
        """Allocate the slot. weight: the trainer's, of shape [E, out, in]. like: dtype and device."""
        self._weight, (experts, rows, columns) = weight, shape
        self.a = like.new_zeros(experts, rank, columns)
        self.b = like.new_zeros(experts, rows, rank)

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (weight, A, B)."""
        yield self._weight, self.a, self.b


def put(slots: Sequence[Slot | StackSlot], adapter: Mapping[str, Pair]) -> None:
    """Write an adapter into its slots, in a few launches.

    adapter: name of a weight -> A and scaled B. The slots of other weights are set to 0.
    """
    places, sources = [], []
    for weight, place_a, place_b in itertools.chain(*slots):
        if weight in adapter:
            matrix_a, matrix_b = adapter[weight]
            rank = matrix_a.shape[-2]
            places += [place_a[..., :rank, :], place_b[..., :rank]]
            sources += [matrix_a, matrix_b]
    torch._foreach_zero_([matrix for slot in slots for matrix in (slot.a, slot.b)])  # type: ignore[attr-defined]
    torch._foreach_copy_(places, sources)  # type: ignore[attr-defined]
