"""The trainer's frozen weights in an engine that groups and names linear layers its own way: shared, dequantized,
merged.

An engine's parameter is made of one of the trainer's weights, or of several one below the other (qkv_proj of q_proj,
k_proj and v_proj). `partners` finds them by name. `SharedLinear` computes from the trainer's own bytes; `WeightCopy`
writes them, decoded, into memory of the engine, and adds an adapter to them where that is merged; `Slot` has the
adapter of a linear layer where it is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlft.errors import EngineError
from rlft.kernels.launch import power_of_2
from rlft.kernels.lora_add import LEAST_RANK
from rlft.kernels.nf4 import DecodeTables, Nf4Weight

Weight = Tensor | Nf4Weight
PER_LAUNCH = 7
"""Matrices that are decoded by one launch: those of a decoder layer."""


def frozen(base: nn.Module) -> dict[str, Weight]:
    """transformers' name -> frozen weight, without the adapters and PEFT's wrappers. Tied weights come under each name.

    Raises EngineError for weights in a form that no engine can share (LLM.int8).
    """
    found: dict[str, Weight] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        if getattr(parameter, "quant_state", None) is not None:
            found[name] = Nf4Weight.from_bnb(parameter)
        elif parameter.is_floating_point():
            found[name] = parameter.detach()
        else:
            raise EngineError(
                f"{name} is kept in {parameter.dtype}: the vLLM engine takes NF4 and plain weights; set "
                f'quantization = "nf4" or "none", or engine.name = "eager"'
            )
    return found


def partners(
    wanted: Iterable[str], packed: Mapping[str, Sequence[str]], weights: Mapping[str, Weight]
) -> dict[str, list[str]]:
    """Engine's parameter -> the trainer's weights that it is made of, from top to bottom.

    packed: module of the engine -> the modules it stands for, as vLLM's `packed_modules_mapping`. Raises EngineError
    that names a weight without a partner, on either side.
    """
    found: dict[str, list[str]] = {}
    for name in wanted:
        where, _, kind = name.rpartition(".")
        prefix, _, module = where.rpartition(".")
        parts = [f"{prefix}.{part}.{kind}" if prefix else f"{part}.{kind}" for part in packed.get(module, ())]
        if name in weights:
            found[name] = [name]
        elif parts and all(part in weights for part in parts):
            found[name] = parts
        else:
            looked = f", nor {', '.join(parts)}" if parts else ""
            raise EngineError(
                f"vLLM's model has a parameter {name}, and the trainer's has none of that name{looked}: this "
                f'architecture cannot share its weights; set engine.name = "eager"'
            )
    used = {id(weights[part]) for parts in found.values() for part in parts}
    left = [name for name, weight in weights.items() if id(weight) not in used and not _same(weight, used, weights)]
    if left:
        raise EngineError(
            f"the trainer's model has a weight {left[0]} that vLLM's has no place for ({len(left)} in all): this "
            f'architecture cannot share its weights; set engine.name = "eager"'
        )
    return found


def _same(weight: Weight, used: set[int], weights: Mapping[str, Weight]) -> bool:
    """Whether a weight lies where one that is used lies: a tied head under its second name."""
    return isinstance(weight, Tensor) and any(
        isinstance(other, Tensor) and id(other) in used and other.data_ptr() == weight.data_ptr()
        for other in weights.values()
    )


def padded(weight: Tensor, rows: int) -> Tensor | None:
    """The weight [V, H] as a view with the rows that lie behind it in memory, [rows, H]; None where there are not so
    many."""
    if weight.shape[0] == rows:
        return weight
    room = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
    if weight.dim() != 2 or not weight.is_contiguous() or room < rows * weight.shape[1] or rows < weight.shape[0]:
        return None
    return weight.as_strided((rows, weight.shape[1]), weight.stride(), weight.storage_offset())


class Slot:
    """Room for the adapter of an engine's linear layer, which stands for one or several of the trainer's."""

    def __init__(self, modules: Sequence[str], sizes: Sequence[int], columns: int, rank: int, like: Tensor) -> None:
        """modules: the trainer's, from top to bottom, with `sizes` rows each. like: of the dtype and device."""
        self._modules, self.sizes = tuple(modules), list(sizes)
        self._rank = slot_rank(rank)
        self.a = like.new_zeros(len(modules) * self._rank, columns)
        self.b = like.new_zeros(sum(sizes), self._rank)

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module, A [slot's rank, in], B [out, slot's rank]): views of what the kernel reads."""
        return zip(self._modules, self.a.split(self._rank), self.b.split(self.sizes), strict=True)


def put(slots: Sequence[Slot], adapter: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write an adapter into its slots, all of them in a few launches. adapter: module -> A [r, in], B [out, r], scaled;
    a module that is not in it gets none."""
    places, sources = [], []
    for module, place_a, place_b in itertools.chain(*slots):
        if module in adapter:
            a, b = adapter[module]
            places += [place_a[: len(a)], place_b[:, : len(a)]]
            sources += [a, b]
    torch._foreach_zero_([matrix for slot in slots for matrix in (slot.a, slot.b)])  # type: ignore[attr-defined]
    torch._foreach_copy_(places, sources)  # type: ignore[attr-defined]


def module_of(name: str) -> str:
    """The base's module that a tensor of the adapter belongs to, from its PEFT name."""
    return name.split(".lora_")[0].removeprefix("base_model.model.")


def slot_rank(rank: int) -> int:
    """Rank of the slot of an adapter: a power of two, as the kernel wants it."""
    return max(LEAST_RANK, power_of_2(rank))


class SharedLinear:
    """x W^T from the trainer's weights, which lie where they lie: NF4 is decoded into a buffer that all share."""

    def __init__(self, weights: Sequence[Weight], scratch: Tensor | None) -> None:
        """scratch: [at least out * in] of the activations' dtype; None where all weights are plain."""
        self._weights = tuple(weights)
        self._scratch = scratch
        self.out = sum(w.shape[0] for w in weights)
        self._decode: WeightCopy | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if any(isinstance(w, Nf4Weight) for w in self._weights):
            return functional.linear(x, self._decoded())
        plain = [w for w in self._weights if isinstance(w, Tensor)]
        if len(plain) == 1:
            return functional.linear(x, plain[0])
        rows = x.reshape(-1, x.shape[-1])
        made = rows.new_empty(rows.shape[0], self.out)
        for place, weight in zip(made.split([w.shape[0] for w in plain], dim=1), plain, strict=True):
            torch.mm(rows, weight.T, out=place)
        return made.view(*x.shape[:-1], self.out)

    def _decoded(self) -> Tensor:
        """All weights, one below the other, in the buffer."""
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
    """Memory of the engine that is written from the trainer's weights: once at the start, and after each wake."""

    def __init__(self, places: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> None:
        """places: name of a weight -> where in the engine it goes, of the weight's shape."""
        self._places, self._weights = dict(places), {name: weights[name] for name in places}
        self._plans: list[DecodeTables] | None = None

    @property
    def bytes(self) -> int:
        """Memory that is written."""
        return sum(p.numel() * p.element_size() for p in self._places.values())

    def run(self) -> None:
        """Write all weights."""
        if self._plans is None:
            # Only now: the plans have tables on the device, and while vLLM loads a model, whatever is made lies in
            # memory that loses its content in sleep.
            self._plans = self._planned()
        for plan in self._plans:
            plan.run()
        for name, weight in self._weights.items():
            if isinstance(weight, Tensor):
                self._places[name].copy_(weight)

    def _planned(self) -> list[DecodeTables]:
        packed = [(w, self._places[name]) for name, w in self._weights.items() if isinstance(w, Nf4Weight)]
        chunks = [packed[i : i + PER_LAUNCH] for i in range(0, len(packed), PER_LAUNCH)]
        return [DecodeTables([w for w, _ in chunk], [p for _, p in chunk]) for chunk in chunks]

    def merge(self, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add an adapter to freshly written weights. adapter: name of a weight -> A [r, in], B [out, r], scaled."""
        for name, (a, b) in adapter.items():
            self._places[name].addmm_(b, a)

    def differs(self, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> str | None:
        """The first weight that is not what `run` and `merge` write; None where all are."""
        found = []
        for name, place in self._places.items():
            want = torch.empty_like(place)
            WeightCopy({name: want}, self._weights).run()
            if name in adapter:
                a, b = adapter[name]
                want.addmm_(b, a)
            found.append((want != place).any())
        wrong = torch.stack(found).nonzero().flatten().tolist() if found else []
        return list(self._places)[wrong[0]] if wrong else None
