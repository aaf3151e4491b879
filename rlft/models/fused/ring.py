"""Frozen weights of layers that do not lie on the device: a ring of three device slots, filled two layers ahead.

The base is frozen, so its bytes may lie anywhere between two uses: in host memory, one copy for the ranks of a machine
(`HostBytes`), or divided over the GPUs of the machine (`DividedBytes`). A copy engine moves the bytes of a layer as
they are, packed or plain, into the slot of its number modulo 3; the layer then decodes them from there as from any
other place. There is no gradient of the base, so nothing is ever written back.

A layer's modules keep tensors of the same shapes: in host memory, or on the meta device where no rank has the whole
layer. Whoever runs the modules themselves, and not the fused layers, gets PyTorch's error about devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlft.kernels.nf4 import Nf4Weight
from rlft.models.fused.host_memory import tensor_in

SLOTS = 3
"""Layers on the device at once: the one that runs, and the two that are copied while it does."""
ALIGN = 256
"""Every tensor starts at a multiple of this number of bytes, in a slot and where it is copied from."""


class LayerBytes(Protocol):
    """Where the bytes of the layers lie."""

    device_bytes: int
    """Bytes of them in the memory of this rank's device."""

    def pieces(self, layer: int) -> Sequence[Tensor]:
        """Return uint8 tensors that follow each other in the slot of the layer."""
        ...

    def put(self, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Take the frozen tensors of a layer; return what its modules keep. Called for all layers in order."""
        ...

    def open(self) -> None:
        """Make the bytes readable, once all layers are here."""
        ...


@dataclass(frozen=True)
class Layout:
    """How the frozen tensors of a layer lie one after the other in a slot."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]
    bytes: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """Return the layout of these tensors."""
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.numel() * tensor.element_size() // ALIGN) * ALIGN
        return cls(
            tuple(tensor.shape for tensor in tensors), tuple(tensor.dtype for tensor in tensors), tuple(offsets), end
        )

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return the tensors in uint8 memory."""
        return [tensor_in(memory, *entry) for entry in zip(self.offsets, self.shapes, self.dtypes, strict=True)]


def frozen_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors of a linear module that take memory: its weight, and the scales of a quantized one."""
    weight: Any = module.weight
    tensors = [weight.detach().as_subclass(Tensor)]
    state = getattr(weight, "quant_state", None)
    if state is not None:
        tensors.append(state.absmax)
        if state.nested:
            tensors.append(state.state2.absmax)
    return tensors


def keep(module: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Give a linear module other tensors in place of `frozen_tensors`, which are freed."""
    weight: Any = module.weight
    if tensors[0].is_meta and len(tensors) == 1:
        module.weight = nn.Parameter(tensors[0], requires_grad=False)
    elif tensors[0].is_meta:
        names = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
        settings = {name: getattr(weight, name) for name in names}
        module.weight = type(weight)(tensors[0], requires_grad=False, bnb_quantized=True, **settings)
    else:
        weight.data = tensors[0]
    if len(tensors) > 1:
        module.weight.quant_state.absmax = tensors[1]  # type: ignore[union-attr]
    if len(tensors) > 2:
        module.weight.quant_state.state2.absmax = tensors[2]  # type: ignore[union-attr]


def in_slot(weight: Tensor | Nf4Weight, tensors: Sequence[Tensor]) -> Tensor | Nf4Weight:
    """Return a module's weight for the kernels, read from the slot's tensors."""
    if not isinstance(weight, Nf4Weight):
        return tensors[0]
    packed = tensors[0].reshape(-1).view(torch.uint8)
    return replace(weight, packed=packed, absmax=tensors[1], nested_absmax=tensors[2] if len(tensors) > 2 else None)


class Ring:
    """Three slots on the device, and which layers are in them."""

    def __init__(self, layouts: Sequence[Layout], source: LayerBytes, device: torch.device) -> None:
        """Allocate the slots. layouts: of all layers."""
        self._layouts, self._source, self._device = layouts, source, device
        size = max(layout.bytes for layout in layouts)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(SLOTS, len(layouts)))]
        self._held = [-1] * len(self._slots)
        """Layer in each slot, or on its way there; -1: none."""
        self._ready: list[torch.cuda.Event | None] = [None] * len(self._slots)
        """Event after the copy into each slot, until the main stream has waited for it."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = -1

    @property
    def bytes(self) -> int:
        """Bytes of the slots."""
        return sum(slot.numel() for slot in self._slots)

    def views(self, layer: int) -> list[Tensor]:
        """Return the tensors of a layer in its slot, valid after `need` until another layer is needed."""
        return self._layouts[layer].views(self._slots[layer % len(self._slots)])

    def need(self, layer: int) -> None:
        """Make the current stream wait for the bytes of a layer, and start the copies of the two that follow.

        Which those are follows from the layer before: a pass goes through all layers, a backward through all back.
        """
        if layer != self._last:
            step = 1 if layer > self._last or layer == 0 else -1
            for index in range(layer, layer + step * len(self._slots), step):
                if 0 <= index < len(self._layouts):
                    self._fetch(index)
            self._last = layer
        slot = layer % len(self._slots)
        if (event := self._ready[slot]) is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
            self._ready[slot] = None

    def _fetch(self, layer: int) -> None:
        """Start the copy of a layer into its slot, unless it is there."""
        slot = layer % len(self._slots)
        if self._held[slot] == layer:
            return
        self._held[slot] = layer
        if self._stream is None:
            self._copy(layer, slot)
            return
        # The layer whose bytes are in the slot has been launched on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy(layer, slot)
            self._ready[slot] = torch.cuda.Event()
            self._ready[slot].record(self._stream)  # type: ignore[union-attr]

    def _copy(self, layer: int, slot: int) -> None:
        left = self._slots[slot][: self._layouts[layer].bytes]
        for piece in self._source.pieces(layer):
            size = min(len(piece), len(left))  # the last pieces of a divided layer may be longer than what is left
            left[:size].copy_(piece[:size], non_blocking=True)
            left = left[size:]
