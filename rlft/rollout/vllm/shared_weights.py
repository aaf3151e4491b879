"""Use the trainer's frozen weights in an engine that groups and names linear layers differently.

A parameter of the engine corresponds to one of the trainer's weights, or to several stacked by rows (qkv_proj to
q_proj, k_proj and v_proj). `partners` matches them by name. `SharedLinear` computes from the trainer's weights in
place; `WeightCopy` dequantizes them into memory of the engine, and merges an adapter in mode "merged"; `Slot` has the
adapter of a linear layer in the other modes.

Legend: x activations, w and W a weight, A [r, in] and B [out, r] the adapter's matrices, V vocabulary, H hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlft.errors import EngineError
from rlft.kernels.launch import power_of_2
from rlft.kernels.lora_add import MIN_RANK
from rlft.kernels.nf4 import DecodeTables, Nf4Weight
from rlft.models import experts

Weight = Tensor | Nf4Weight
PER_LAUNCH = 7
"""Matrices dequantized by one launch: those of a decoder layer."""


def frozen_weights(base: nn.Module) -> dict[str, Weight]:
    """Return transformers' name -> frozen weight, without adapters and PEFT's wrappers.

    Tied weights appear under each of their names. Raises EngineError for weights in a form that no engine can share
    (LLM.int8), and for stacks of experts.
    """
    weights: dict[str, Weight] = {}
    for name in experts.stacks(base):
        raise EngineError(
            f"{name.replace('.base_layer', '')} is a stack of experts: vLLM does not sample a mixture over the "
            f'weights of the trainer; set engine.name = "eager"'
        )
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        if getattr(parameter, "quant_state", None) is not None:
            weights[name] = Nf4Weight.from_bnb(parameter)
        elif parameter.is_floating_point():
            weights[name] = parameter.detach()
        else:
            raise EngineError(
                f"{name} is kept in {parameter.dtype}: the vLLM engine takes NF4 and plain weights; set "
                f'quantization = "nf4" or "none", or engine.name = "eager"'
            )
    return weights


def partners(
    names: Iterable[str], packed: Mapping[str, Sequence[str]], weights: Mapping[str, Weight]
) -> dict[str, list[str]]:
    """Return engine's parameter -> the trainer's weights it consists of, from top to bottom.

    names: of the engine's parameters. packed: module of the engine -> the modules it combines, as vLLM's
    `packed_modules_mapping`. Raises EngineError that names a weight without a partner, on either side.
    """
    matches: dict[str, list[str]] = {}
    for name in names:
        where, _, kind = name.rpartition(".")
        prefix, _, module = where.rpartition(".")
        parts = [f"{prefix}.{part}.{kind}" if prefix else f"{part}.{kind}" for part in packed.get(module, ())]
        if name in weights:
            matches[name] = [name]
        elif parts and all(part in weights for part in parts):
            matches[name] = parts
        else:
            alternatives = f", nor {', '.join(parts)}" if parts else ""
            raise EngineError(
                f"vLLM's model has a parameter {name}, and the trainer's has none of that name{alternatives}: this "
                f'architecture cannot share its weights; set engine.name = "eager"'
            )
    used = {id(weights[part]) for parts in matches.values() for part in parts}
    unmatched = [
        name for name, weight in weights.items() if id(weight) not in used and not _same(weight, used, weights)
    ]
    if unmatched:
        raise EngineError(
            f"the trainer's model has a weight {unmatched[0]} that vLLM's has no place for ({len(unmatched)} in all): "
            f'this architecture cannot share its weights; set engine.name = "eager"'
        )
    return matches


def _same(weight: Weight, used: set[int], weights: Mapping[str, Weight]) -> bool:
    """Return whether a weight shares the memory of a used one, as a tied head under its second name does."""
    return isinstance(weight, Tensor) and any(
        isinstance(other, Tensor) and id(other) in used and other.data_ptr() == weight.data_ptr()
        for other in weights.values()
    )


def padded_view(weight: Tensor, rows: int) -> Tensor | None:
    """Return the weight [V, H] as a view [rows, H] that includes the rows after it in memory; None if there are
    none."""
    if weight.shape[0] == rows:
        return weight
    room = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
    if weight.dim() != 2 or not weight.is_contiguous() or room < rows * weight.shape[1] or rows < weight.shape[0]:
        return None
    return weight.as_strided((rows, weight.shape[1]), weight.stride(), weight.storage_offset())


class Slot:
    """Storage for the adapter of an engine's linear layer, which combines one or several of the trainer's."""

    def __init__(self, modules: Sequence[str], sizes: Sequence[int], columns: int, rank: int, like: Tensor) -> None:
        """Allocate the slot.

        modules: the trainer's, from top to bottom, with `sizes` rows each. like: dtype and device.
        """
        self._modules, self.sizes = tuple(modules), list(sizes)
        self._rank = slot_rank(rank)
        self.a = like.new_zeros(len(modules) * self._rank, columns)
        self.b = like.new_zeros(sum(sizes), self._rank)

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (module, A [slot's rank, in], B [out, slot's rank]), views of the memory that the kernel reads."""
        return zip(self._modules, self.a.split(self._rank), self.b.split(self.sizes), strict=True)


def put(slots: Sequence[Slot], adapter: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write an adapter into its slots, in a few launches.

    adapter: module -> (A [r, in], B [out, r]), scaled. The slots of other modules are set to 0.
    """
    places, sources = [], []
    for module, place_a, place_b in itertools.chain(*slots):
        if module in adapter:
            matrix_a, matrix_b = adapter[module]
            places += [place_a[: len(matrix_a)], place_b[:, : len(matrix_a)]]
            sources += [matrix_a, matrix_b]
    torch._foreach_zero_([matrix for slot in slots for matrix in (slot.a, slot.b)])  # type: ignore[attr-defined]
    torch._foreach_copy_(places, sources)  # type: ignore[attr-defined]


def module_of(name: str) -> str:
    """Return the base's module that a tensor of the adapter belongs to, from its PEFT name."""
    return name.split(".lora_")[0].removeprefix("base_model.model.")


def slot_rank(rank: int) -> int:
    """Return the rank of an adapter's slot: a power of two, as the kernel requires."""
    return max(MIN_RANK, power_of_2(rank))


class SharedLinear:
    """Compute x W^T from the trainer's weights in place; NF4 is dequantized into a buffer shared by all layers."""

    def __init__(self, weights: Sequence[Weight], scratch: Tensor | None) -> None:
        """Set up the layer.

        scratch: [at least out * in] of the activations' dtype; None where all weights are plain.
        """
        self._weights = tuple(weights)
        self._scratch = scratch
        self.out = sum(weight.shape[0] for weight in weights)
        self._decode: WeightCopy | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if any(isinstance(w, Nf4Weight) for w in self._weights):
            return functional.linear(x, self._dequantized())
        plain = [w for w in self._weights if isinstance(w, Tensor)]
        if len(plain) == 1:
            return functional.linear(x, plain[0])
        rows = x.reshape(-1, x.shape[-1])
        output = rows.new_empty(rows.shape[0], self.out)
        for place, weight in zip(output.split([w.shape[0] for w in plain], dim=1), plain, strict=True):
            torch.mm(rows, weight.T, out=place)
        return output.view(*x.shape[:-1], self.out)

    def _dequantized(self) -> Tensor:
        """Dequantize all weights into the buffer, stacked by rows."""
        assert self._scratch is not None
        columns = self._weights[0].shape[1]
        matrix = self._scratch[: self.out * columns].view(self.out, columns)
        if self._decode is None:
            places = matrix.split([w.shape[0] for w in self._weights])
            names = [str(i) for i in range(len(places))]
            self._decode = WeightCopy(
                dict(zip(names, places, strict=True)), dict(zip(names, self._weights, strict=True))
            )
        self._decode.run()
        return matrix


class WeightCopy:
    """Copy the trainer's weights to memory of the engine, at the start and after each wake."""

    def __init__(self, places: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> None:
        """Set up the copy. places: name of a weight -> its destination in the engine, of the weight's shape."""
        self._places, self._weights = dict(places), {name: weights[name] for name in places}
        self._plans: list[DecodeTables] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the destination."""
        return sum(place.numel() * place.element_size() for place in self._places.values())

    def run(self) -> None:
        """Write all weights."""
        if self._plans is None:
            # Created here, because the plans have tables on the device, and everything allocated while vLLM loads a
            # model is in memory that loses its content in sleep.
            self._plans = self._make_plans()
        for plan in self._plans:
            plan.run()
        for name, weight in self._weights.items():
            if isinstance(weight, Tensor):
                self._places[name].copy_(weight)

    def _make_plans(self) -> list[DecodeTables]:
        quantized = [
            (weight, self._places[name]) for name, weight in self._weights.items() if isinstance(weight, Nf4Weight)
        ]
        chunks = [quantized[i : i + PER_LAUNCH] for i in range(0, len(quantized), PER_LAUNCH)]
        return [DecodeTables([weight for weight, _ in chunk], [place for _, place in chunk]) for chunk in chunks]

    def merge(self, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add an adapter to freshly written weights. adapter: name of a weight -> (A [r, in], B [out, r]), scaled."""
        for name, (matrix_a, matrix_b) in adapter.items():
            self._places[name].addmm_(matrix_b, matrix_a)

    def differs(self, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> str | None:
        """Return the first weight that differs from what `run` and `merge` write; None if there is none."""
        flags = []
        for name, place in self._places.items():
            expected = torch.empty_like(place)
            WeightCopy({name: expected}, self._weights).run()
            if name in adapter:
                matrix_a, matrix_b = adapter[name]
                expected.addmm_(matrix_b, matrix_a)
            flags.append((expected != place).any())
        wrong = torch.stack(flags).nonzero().flatten().tolist() if flags else []
        return list(self._places)[wrong[0]] if wrong else None
