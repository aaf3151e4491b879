"""Where the bytes of frozen layers lie when they are not on the device that computes: implementations of `LayerBytes`.

All ranks of a machine share one copy. They exchange the addresses of their parts once, at the start, and read them
without asking each other: ranks run different numbers of micro-batches, so a collective operation per layer would wait
for ranks that have none.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlft import dist
from rlft.errors import ConfigError
from rlft.models.allocator import segments
from rlft.models.fused.host_memory import HostMemory, register
from rlft.models.fused.ring import ALIGN, Layout


class HostBytes:
    """All layers in host memory, registered with CUDA; one copy for the ranks of a machine."""

    def __init__(self, layouts: Sequence[Layout], device: torch.device) -> None:
        """Share out who writes which layer, and map none yet. device: the one that computes."""
        self._layouts, self._cuda, self.device_bytes = layouts, device.type == "cuda", 0
        self._peers = peers()
        self._memory: list[HostMemory] = []

    def put(self, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy the frozen tensors of the next layer here; return them as they lie here.

        Called by every rank for every layer in order.
        """
        assert layer == len(self._memory)
        layout, writer = self._layouts[layer], layer % len(self._peers)
        writes = self._peers[writer] == dist.rank()
        memory = HostMemory(layout.bytes) if writes else None
        path = dist.gather(memory.path if memory is not None else "")[self._peers[writer]]
        memory = memory or HostMemory.opened(path, layout.bytes)
        views = layout.views(memory.bytes)
        if writes:
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor)
        dist.gather(None)  # all have mapped it
        memory.close_file()
        if self._cuda:
            register(memory, memory.bytes, 'base.place = "host"', "give the machine more memory")
        self._memory.append(memory)
        return views

    def open(self) -> None:
        """Do nothing: all layers are here."""

    def pieces(self, layer: int) -> list[Tensor]:
        """Return the bytes of a layer as one piece."""
        return [self._memory[layer].bytes]


class DividedBytes:
    """Every layer in as many equal pieces as the machine has ranks, each on the device of its rank."""

    def __init__(self, layouts: Sequence[Layout], device: torch.device) -> None:
        """Allocate this rank's pieces of all layers."""
        self._layouts, self._device, self._peers = layouts, device, peers()
        self._mine = self._peers.index(dist.rank())
        self._sizes = [-(-layout.bytes // len(self._peers) // ALIGN) * ALIGN for layout in layouts]
        self.device_bytes = total = sum(self._sizes)
        if device.type == "cuda":
            with segments(growing=False):  # growing segments cannot be opened by another process
                self._own = torch.empty(total, dtype=torch.uint8, device=device)
        else:
            self._host = HostMemory(total)
            self._own = self._host.bytes
        self._own_pieces = self._own.split(self._sizes)
        self._others: list[HostMemory] = []
        self._pieces: list[list[Tensor]] = []

    def put(self, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy this rank's piece of the next layer here; return tensors of the same shapes without memory."""
        layout, size = self._layouts[layer], self._sizes[layer]
        whole = torch.zeros(size * len(self._peers), dtype=torch.uint8, device=self._device)
        for view, tensor in zip(layout.views(whole), tensors, strict=True):
            view.copy_(tensor)
        self._own_pieces[layer].copy_(whole[self._mine * size :][:size])
        return [torch.empty_like(tensor, device="meta") for tensor in tensors]

    def open(self) -> None:
        """Open the pieces of the other ranks; called by every rank when all layers are here."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        handles = dist.gather(_handle(self._own) if self._device.type == "cuda" else self._host.path)
        shares = [self._own if peer == dist.rank() else self._opened(handles[peer], peer) for peer in self._peers]
        dist.gather(None)  # all have opened all
        self._pieces = [list(pieces) for pieces in zip(*(share.split(self._sizes) for share in shares), strict=True)]

    def _opened(self, handle: Any, peer: int) -> Tensor:
        if self._device.type != "cuda":
            other = HostMemory.opened(handle, len(self._own))
            self._others.append(other)
            return other.bytes
        rebuild, arguments = handle
        try:
            # Opened in the context of this rank's device, which reads the other's memory through the link between them.
            return rebuild(*arguments[:6], torch.cuda.current_device(), *arguments[7:])
        except RuntimeError as error:
            raise ConfigError(
                f'base.place = "sharded": rank {dist.rank()} cannot read the memory of the GPU of rank {peer} '
                f"({str(error).splitlines()[0]}); the GPUs need peer access, and all ranks of a machine must see all "
                f'its GPUs (CUDA_VISIBLE_DEVICES); or set base.place = "host"'
            ) from error

    def pieces(self, layer: int) -> list[Tensor]:
        """Return the pieces of a layer, in order."""
        return self._pieces[layer]


def peers() -> list[int]:
    """Return the ranks of this machine, in order."""
    here = socket.gethostname()
    return [rank for rank, name in enumerate(dist.gather(here)) if name == here]


def _handle(tensor: Tensor) -> Any:
    """Return a function and its arguments with which another process opens a tensor of this one's GPU."""
    from torch.multiprocessing.reductions import reduce_tensor

    return reduce_tensor(tensor)
