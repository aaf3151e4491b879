"""Use the trainer's frozen weights in an engine that groups and names linear layers differently.

`rlft.rollout.vllm.names` matches the two. `SharedLinear` computes from the trainer's weights in place; `WeightCopy`
writes them into memory of the engine, dequantized where they are in 4 bits, and merges an adapter in mode "merged".
`rlft.rollout.vllm.slots` has the adapter in the other modes, `rlft.rollout.vllm.expert_layer` computes experts.

Legend: x activations, w and W a weight, A [r, in] and B [out, r] the adapter's matrices, a and b in
the code, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlft.errors import EngineError, UnsupportedModel
from rlft.kernels.mxfp4 import Mxfp4Weight, decode_mxfp4
from rlft.kernels.nf4 import DecodeTables, Nf4Weight
from rlft.models import experts
from rlft.models.adapter import without_wrappers
from rlft.models.kind import tower_of
from rlft.rollout.vllm.names import Weight
from rlft.rollout.vllm.slots import Pair

PER_LAUNCH = 7
"""Matrices dequantized by one launch: those of a decoder layer."""


def frozen_weights(base: nn.Module) -> dict[str, Weight]:
    """Return transformers' name -> frozen weight, without adapters and PEFT's wrappers, saved buffers included.

    Those of a vision tower are left out: vLLM gets its features (`rlft.rollout.vllm.images`). Stacks of experts are
    [E, out, in] in every architecture. Tied weights appear under each of their names. Raises EngineError for weights in
    a form that no engine can share (LLM.int8), and UnsupportedModel for stacks in NF4 whose rows are inputs.
    """
    stacks = {without_wrappers(name): stack for name, stack in experts.stacks(base).items()}
    weights: dict[str, Weight] = {}
    tower = tower_of(base.config)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if ".lora_" in name or name.startswith(tower):
            continue
        name = without_wrappers(name)
        if name in stacks:
            weights[name] = _stack(name, stacks[name])
        elif getattr(parameter, "quant_state", None) is not None:
            weights[name] = Nf4Weight.from_bnb(parameter)
        elif parameter.is_floating_point():
            weights[name] = parameter.detach()
        else:
            raise EngineError(
                f"{name} is kept in {parameter.dtype}: the vLLM engine takes NF4 and plain weights; set "
                f'quantization = "nf4" or "none", or engine.name = "eager"'
            )
    return weights | saved_buffers(base)


def _stack(name: str, stack: experts.Stack) -> Weight:
    """Return a stack of experts as [E, out, in]. Raises UnsupportedModel for one in NF4 that lies transposed."""
    weight = experts.packed(stack.module, stack.leaf)
    if isinstance(weight, Nf4Weight) and stack.module.is_transposed:
        raise UnsupportedModel(
            f"{name} is in NF4 by rows of inputs, and vLLM's experts are computed by rows of outputs: take the model "
            f'in MXFP4 as it was released, or quantization = "none"'
        )
    if not isinstance(weight, Tensor):
        return weight
    return (weight.transpose(1, 2) if stack.module.is_transposed else weight).detach()


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> floating-point buffer of those that are saved with a model, such as the scales of Gemma 4's
    layers."""
    return {
        without_wrappers(f"{name}.{leaf}".lstrip(".")): buffer
        for name, module in model.named_modules()
        for leaf, buffer in module.named_buffers(recurse=False)
        if leaf not in module._non_persistent_buffers_set and buffer.is_floating_point()
    }


def needs_copy(weights: Sequence[Weight], parameter: Tensor) -> bool:
    """Return whether the engine's parameter can only be a copy of these weights: of several, of a quantized one, or of
    one in a narrower dtype (vLLM has the decay of a gated DeltaNet in fp32)."""
    (weight,) = weights if len(weights) == 1 else (None,)
    if not isinstance(weight, Tensor):
        return True
    return weight.dtype != parameter.dtype and torch.promote_types(weight.dtype, parameter.dtype) == parameter.dtype


def check_shapes(name: str, weights: Sequence[Weight], shape: Sequence[int]) -> None:
    """Raise UnsupportedModel unless the weights, stacked by rows, have the shape of the engine's parameter."""
    shapes = [tuple(weight.shape) for weight in weights]
    rest = {tuple(shape[1:]) for shape in shapes}
    if not shape or rest != {tuple(shape[1:])} or sum(rows for rows, *_ in shapes) != shape[0]:
        theirs = ", ".join(map(str, shapes))
        raise UnsupportedModel(
            f"{name}: {theirs} in the trainer, {tuple(shape)} in vLLM: this architecture cannot share its weights"
        )


def places_of(name: str, parts: Sequence[str], weights: Sequence[Weight], parameter: Tensor) -> dict[str, Tensor]:
    """Return where each of the weights `parts` lies in the engine's parameter. Raises UnsupportedModel for other
    shapes."""
    check_shapes(name, weights, parameter.shape)
    return dict(zip(parts, parameter.split([int(weight.shape[0]) for weight in weights]), strict=True))


def shared_tensor(name: str, weight: Weight, parameter: Tensor, module: nn.Module) -> Tensor:
    """Return the trainer's tensor itself for an engine's parameter: an embedding, head, norm or convolution.

    module: of the parameter. Raises UnsupportedModel for another shape or dtype.
    """
    assert isinstance(weight, Tensor), "needs_copy"
    if weight.dtype != parameter.dtype:
        kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (weight, parameter)]
        raise UnsupportedModel(f"{name} is {kinds[0]} in the trainer and {kinds[1]} in vLLM, which would round it")
    rows = getattr(module, "rlft_rows", parameter.shape[0] if parameter.dim() else None)
    view = weight if rows is None else padded_view(weight, rows)
    if view is None or (view.shape != parameter.shape and parameter.numel()):
        raise UnsupportedModel(
            f"{name}: {tuple(weight.shape)} in the trainer, {tuple(parameter.shape) or rows} in vLLM: this "
            f"architecture cannot share its weights"
        )
    return view


def padded_view(weight: Tensor, rows: int) -> Tensor | None:
    """Return the weight [V, H] as a view [rows, H] that includes the rows after it in memory; None if there are
    none."""
    if weight.shape[0] == rows:
        return weight
    room = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
    if weight.dim() != 2 or not weight.is_contiguous() or room < rows * weight.shape[1] or rows < weight.shape[0]:
        return None
    return weight.as_strided((rows, weight.shape[1]), weight.stride(), weight.storage_offset())


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
            elif isinstance(weight, Mxfp4Weight):
                decode_mxfp4(weight, self._places[name])

    def _make_plans(self) -> list[DecodeTables]:
        quantized = [
            (_as_matrix(weight), self._places[name].flatten(0, -2))
            for name, weight in self._weights.items()
            if isinstance(weight, Nf4Weight)
        ]
        chunks = [quantized[i : i + PER_LAUNCH] for i in range(0, len(quantized), PER_LAUNCH)]
        return [DecodeTables([weight for weight, _ in chunk], [place for _, place in chunk]) for chunk in chunks]

    def merge(self, adapter: Mapping[str, Pair]) -> None:
        """Add an adapter to freshly written weights. adapter: name of a weight -> A and scaled B."""
        for name, pair in adapter.items():
            _add_product(self._places[name], pair)

    def differs(self, adapter: Mapping[str, Pair]) -> str | None:
        """Return the first weight that differs from what `run` and `merge` write; None if there is none."""
        flags = []
        for name, place in self._places.items():
            expected = torch.empty_like(place)
            WeightCopy({name: expected}, self._weights).run()
            if name in adapter:
                _add_product(expected, adapter[name])
            flags.append((expected != place).any())
        wrong = torch.stack(flags).nonzero().flatten().tolist() if flags else []
        return list(self._places)[wrong[0]] if wrong else None


def _as_matrix(weight: Nf4Weight) -> Nf4Weight:
    """Return a matrix as it is, and a stack as its matrices on top of each other."""
    return replace(weight, shape=(weight.numel // weight.shape[-1], weight.shape[-1]))


def _add_product(weight: Tensor, pair: Pair) -> None:
    """Add B A to a weight [out, in] or [E, out, in] in place, rounded once."""
    a, b = pair
    if weight.dim() == 2:
        weight.addmm_(b, a)
    else:
        weight.baddbmm_(b, a)
