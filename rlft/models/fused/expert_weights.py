"""The frozen stacks of a layer of experts and their adapters, in buffers that the grouped products read.

A `Stack` is one of the two weights that transformers holds for all experts of a layer; `bind` looks up an adapter in
PEFT's wrapper of it. A `StackStore` writes both into a buffer [E, out + tail, in + tail] of the layout of
`rlft.kernels.grouped`: W_e upper left, scale B_e upper right, A_e lower left.

E experts, r the rank of their adapters, M sorted rows, x rows into a product, dy gradients of what comes out of it, S
the columns x A^T behind x ("tail"), and dS those behind dy. a and b are A and B by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from rlft.kernels.grouped import grouped, grouped_transposed
from rlft.kernels.grouped_gradient import grouped_gradient
from rlft.kernels.mxfp4 import Mxfp4Weight, decode_mxfp4
from rlft.kernels.nf4 import Nf4Weight
from rlft.kernels.nf4_stack import decode_stack
from rlft.models.adapter import a_by_expert, b_by_expert
from rlft.models.experts import packed

ALIGN = 16
"""The tail is a multiple of this number of columns, so that rows of 16-bit elements start at multiples of 32 bytes."""


class StackAdapter(NamedTuple):
    """The adapter of a stack, as PEFT holds it."""

    A: tuple[Tensor, ...]
    """One parameter [E r, in], by expert, then rank; empty without an adapter."""
    B: tuple[Tensor, ...]
    """One parameter [out, r E], its columns by rank, then expert."""
    experts: int
    rank: int
    """r; 0 without an adapter."""
    scale: float

    @property
    def tail(self) -> int:
        """Columns behind x and dy."""
        return -(-self.rank // ALIGN) * ALIGN

    def a(self, matrix: Tensor) -> Tensor:
        """Return [E, r, in] of a matrix that lies as A does."""
        return a_by_expert(matrix, self.experts)

    def b(self, matrix: Tensor) -> Tensor:
        """Return [E, out, r] of a matrix that lies as B does."""
        return b_by_expert(matrix, self.experts)


class Stack:
    """One frozen weight of all experts of a layer."""

    def __init__(self, module: Any, leaf: str, wrapper: Any) -> None:
        """Read weight and bias of a module of experts.

        wrapper: PEFT's of this weight; None: it has no adapter. Raises ValueError for a weight that no kernel reads.
        """
        self.modules: tuple[Any, ...] = () if wrapper is None else (wrapper,)
        """What an adapter is looked up in."""
        self.weight = _stack_weight(module, leaf)
        self.experts, self.out, self.in_features = self.weight.shape
        self.bias: Tensor | None = getattr(module, f"{leaf}_bias").detach() if module.has_bias else None
        """[E, out]."""

    def bind(self, adapter: str | None) -> StackAdapter:
        """Return the adapter of this name (None: no adapter)."""
        for wrapper in self.modules:
            if adapter is not None and adapter in wrapper.lora_A:
                A, B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
                rank, scale = A.shape[0] // self.experts, float(wrapper.scaling[adapter])
                return StackAdapter((A,), (B,), self.experts, rank, scale)
        return StackAdapter((), (), self.experts, 0, 1.0)

    def shape(self, tail: int) -> tuple[int, int, int]:
        """Return the shape of a buffer for the stack and an adapter."""
        return self.experts, self.out + tail, self.in_features + tail

    def write(self, place: Tensor) -> None:
        """Decode or copy the weight to place [E, out, in]."""
        if isinstance(self.weight, Nf4Weight):
            decode_stack(self.weight, place)
        elif isinstance(self.weight, Mxfp4Weight):
            decode_mxfp4(self.weight, place)
        else:
            place.copy_(self.weight)


def _stack_weight(module: Any, leaf: str) -> Tensor | Nf4Weight | Mxfp4Weight:
    """Return a stack as [E, out, in] in a form that the kernels read. Raises ValueError if there is none."""
    weight = packed(module, leaf)
    if isinstance(weight, Mxfp4Weight):
        return weight
    if isinstance(weight, Nf4Weight):
        name, columns = f"{leaf} of {type(module).__name__}", weight.shape[-1]
        if module.is_transposed:
            raise ValueError(f"{name} lies transposed in NF4")
        if columns % weight.blocksize:
            raise ValueError(f"{name} in NF4 has rows of {columns}, not of whole blocks of {weight.blocksize}")
        return weight
    if not weight.is_floating_point():
        raise ValueError(f"{leaf} of {type(module).__name__} in {weight.dtype}")
    return weight.detach().transpose(1, 2) if module.is_transposed else weight.detach()


class StackWeight(NamedTuple):
    """A stack in its buffer, with the adapter written."""

    adapter: StackAdapter
    bias: Tensor | None
    extended: Tensor
    """[E, out, in + tail]: the factor of [x, S]."""
    stacked: Tensor
    """[E, out + tail, in]: the factor of [dy, dS]."""

    @classmethod
    def of(cls, stack: Stack, adapter: StackAdapter, buffer: Tensor) -> StackWeight:
        """Build the views; the buffer may have room for a wider adapter."""
        tail = adapter.tail
        extended = buffer[:, : stack.out, : stack.in_features + tail]
        return cls(adapter, stack.bias, extended, buffer[:, : stack.out + tail, : stack.in_features])

    @property
    def in_features(self) -> int:
        """Columns of x."""
        return self.stacked.shape[2]

    @property
    def out(self) -> int:
        """Columns of y."""
        return self.extended.shape[1]

    def fill(self) -> None:
        """Write the current values of the adapter behind the weights."""
        if not self.adapter.rank:
            return
        b, a, rank = self.extended[:, :, self.in_features :], self.stacked[:, self.out :], self.adapter.rank
        b[:, :, rank:].zero_()
        a[:, rank:].zero_()
        a[:, :rank].copy_(self.adapter.a(self.adapter.A[0].detach()))
        b[:, :, :rank].copy_(self.adapter.b(self.adapter.B[0].detach()) * self.adapter.scale)

    def with_s(self, x: Tensor, offsets: Tensor) -> None:
        """Write S into the tail of x [M, in + tail]."""
        if self.adapter.rank:
            a = self.stacked[:, self.out :]
            grouped(x[:, : self.in_features], a, offsets, out=x[:, self.in_features :])

    def forward(self, x: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
        """Return y [M, out] of x [M, in + tail], whose tail is overwritten with S. offsets: [E + 1], of the rows."""
        self.with_s(x, offsets)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return grouped(x, self.extended, offsets, out=out, bias=bias)

    def input_gradient(self, dy: Tensor, offsets: Tensor) -> Tensor:
        """Return dx [M, in] of dy [M, out + tail], whose tail is overwritten with dS."""
        if self.adapter.rank:
            b = self.extended[:, :, self.in_features :]
            grouped_transposed(dy[:, : self.out], b, offsets, out=dy[:, self.out :])
        return grouped_transposed(dy, self.stacked, offsets)

    def add_gradients(self, dy: Tensor, x: Tensor, offsets: Tensor, dA: Sequence[Tensor], dB: Sequence[Tensor]) -> None:
        """Add the gradients of A and B to dA and dB, which lie as the parameters do; both empty without an adapter.

        dy: [M, out + tail] and x: [M, in + tail], with dS and S in their tails.
        """
        if not self.adapter.rank:
            return
        rank = self.adapter.rank
        ds, s = dy[:, self.out :][:, :rank], x[:, self.in_features :][:, :rank]
        grouped_gradient(ds, x[:, : self.in_features], offsets, self.adapter.a(dA[0]), accumulate=True)
        out, scale = self.adapter.b(dB[0]), self.adapter.scale
        grouped_gradient(dy[:, : self.out], s, offsets, out, accumulate=True, scale=scale)


class StackStore:
    """Device buffers that hold stacks in the dtype of activations, with modes as of `projection.Store`."""

    def __init__(self, mode: Literal["layer", "group", "shadow"] = "layer") -> None:
        self.mode = mode
        self._memory: Tensor | None = None
        self._shadow: dict[tuple[int, int], Tensor] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        tensors = [self._memory, *self._shadow.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def release(self) -> None:
        """Free all buffers."""
        self._memory, self._shadow = None, {}

    def weights(
        self, layer: int, stacks: Sequence[Stack], adapters: Sequence[StackAdapter], like: Tensor
    ) -> Callable[[int], StackWeight]:
        """Return a function from i to stack i, with weights and adapter in its buffer.

        A stack is written when it is asked for first. In mode "group" a result is valid until another is asked for.
        """
        shapes = [stack.shape(adapter.tail) for stack, adapter in zip(stacks, adapters, strict=True)]
        sizes = [math.prod(shape) for shape in shapes]
        written: dict[int, StackWeight] = {}

        def weight(i: int) -> StackWeight:
            if i in written:
                return written[i]
            if self.mode == "group":
                written.clear()
            if self.mode == "shadow":
                buffer = self._kept((layer, i), stacks[i], shapes[i], like)
            else:
                start, total = (0, max(sizes)) if self.mode == "group" else (sum(sizes[:i]), sum(sizes))
                buffer = self._shared(total, like)[start : start + sizes[i]].view(shapes[i])
                stacks[i].write(buffer[:, : stacks[i].out, : stacks[i].in_features])
            written[i] = StackWeight.of(stacks[i], adapters[i], buffer)
            written[i].fill()
            return written[i]

        return weight

    def _kept(self, key: tuple[int, int], stack: Stack, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return a stack's own buffer, written once; it is replaced where the adapter needs more room."""
        buffer = self._shadow.get(key)
        if buffer is None or buffer.dtype != like.dtype or buffer.shape[1] < shape[1]:
            buffer = self._shadow[key] = like.new_empty(shape)
            stack.write(buffer[:, : stack.out, : stack.in_features])
        return buffer

    def _shared(self, size: int, like: Tensor) -> Tensor:
        """Return the memory that all layers share, enlarged if it is too small."""
        if self._memory is None or self._memory.numel() < size or self._memory.dtype != like.dtype:
            self._memory = None
            self._memory = like.new_empty(size)
        return self._memory
