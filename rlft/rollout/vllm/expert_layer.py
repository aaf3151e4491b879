"""Compute a layer of experts in the engine, from the trainer's weights or from memory that is filled with them.

vLLM's router has chosen the experts. Rows are sorted by expert, multiplied in groups, gated by the trainer's own
function, multiplied again and combined, the adapter as two thin products beside each product:

    u_m = W1_e x_m + b1_e + B1_e (A1_e x_m)      h_m = g(u_m)      y_m = W2_e h_m + b2_e + B2_e (A2_e h_m)
    out_t = sum of w_m y_m over the rows m of token t

Weights in NF4 and MXFP4 are decoded inside the products. Nothing waits for the device, so that CUDA graphs capture it,
and nothing adds by atomics, so that two runs are bitwise equal. There is no gradient.

In shapes: T tokens, k choices of each, M = T k rows, E experts, H hidden size. In names, x are rows
that come in, y those that go out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rlft.errors import UnsupportedModel
from rlft.kernels.gather import combine, gather
from rlft.kernels.grouped import grouped
from rlft.kernels.mxfp4 import Mxfp4Weight, mxfp4_grouped
from rlft.kernels.nf4 import Nf4Weight
from rlft.kernels.nf4_grouped import nf4_grouped
from rlft.kernels.route import sort_by_expert
from rlft.rollout.vllm.names import Weight
from rlft.rollout.vllm.slots import StackSlot

Gate = Callable[[Tensor], Tensor]
"""Maps [M, 2 I] (or [M, I] without a gate) to [M, I]; acts on each row alone."""
MOST_BLOCK = 128
"""Largest block of NF4 weights that are decoded inside a product."""


@dataclass(frozen=True)
class Product:
    """One of the two products of a layer."""

    weight: Weight
    """[E, out, in]; a tensor may lie by rows of inputs."""
    bias: Tensor | None
    """[E, out]."""
    slot: StackSlot | None
    """The adapter."""

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Compute [M, out] of sorted rows [M, in]. offsets: [E + 1] int32 of `sort_by_expert`."""
        weight = self.weight
        if isinstance(weight, Nf4Weight):
            y = nf4_grouped(x, weight, offsets, bias=self.bias)
        elif isinstance(weight, Mxfp4Weight):
            y = mxfp4_grouped(x, weight, offsets, bias=self.bias)
        else:
            y = grouped(x, weight, offsets, bias=self.bias)
        if self.slot is not None:
            y += grouped(grouped(x, self.slot.a, offsets), self.slot.b, offsets)
        return y


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of a layer."""

    up: Product
    down: Product
    gate: Gate
    """The trainer's."""

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Compute [T, H] of tokens [T, H].

        weights: [T, k] float32. chosen: [T, k] int32; -1, which vLLM gives rows that only fill up a CUDA graph, counts
        as 0.
        """
        count = self.up.weight.shape[0]
        order, inverse, offsets = sort_by_expert(chosen.clamp(min=0), count)
        hidden = self.gate(self.up(gather(x, order, chosen.shape[1]), offsets))
        return combine(self.down(hidden, offsets), inverse, weights.contiguous())


def check_in_place(name: str, weight: Weight, shape: Sequence[int]) -> None:
    """Raise UnsupportedModel unless products are computed from a stack of the trainer's as it lies.

    name, shape: of the engine's parameter, [E, out, in].
    """
    theirs = f"{name}: {tuple(weight.shape)} in the trainer"
    if tuple(weight.shape) != tuple(shape):
        raise UnsupportedModel(f"{theirs}, {tuple(shape)} in vLLM: this architecture cannot share its weights")
    if isinstance(weight, Nf4Weight) and (weight.shape[-1] % weight.blocksize or weight.blocksize > MOST_BLOCK):
        raise UnsupportedModel(
            f"{theirs} in NF4 blocks of {weight.blocksize}: experts are computed in place where rows are whole blocks "
            f'of at most {MOST_BLOCK}; set engine.mode = "dequantized" on a GPU'
        )
