"""What levels L4 and L5 keep in host memory: an arena per layer, copies on a stream of their own, prefetch two ahead.

Arenas are ordinary pages registered with CUDA (cudaHostRegister): PyTorch's pinned allocator rounds every block up to a
power of two. They are made at the first use and kept for later steps of at most their size. On a CPU nothing is moved;
the tensors are handed back as they were.
"""

from __future__ import annotations

import math
import mmap
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlft.errors import TrainError
from rlft.kernels.attention import Saved

AHEAD = 2
"""Layers whose copies back are on their way while one runs."""


class Arena:
    """Registered host memory that tensors are laid into one after the other; `close` unregisters it."""

    def __init__(self, size: int) -> None:
        """size: bytes. Raises TrainError when the system refuses to register them."""
        self.size = size
        self._map = mmap.mmap(-1, size)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()
        code = runtime.cudaHostRegister(self.bytes.data_ptr(), size, 0)
        # An address that is still registered could not be registered again when the system reuses it.
        self.close = weakref.finalize(self, runtime.cudaHostUnregister, self.bytes.data_ptr())
        if int(code) != 0:
            raise TrainError(
                f"{size / 2**30:.1f} GiB of host memory could not be registered for offloading (CUDA error "
                f"{int(code)}): lower packing.budget, or give the machine more memory"
            )

    def view(self, offset: int, like: Tensor) -> Tensor:
        """A tensor of like's shape and dtype at `offset` bytes."""
        count = like.numel() * like.element_size()
        return self.bytes[offset : offset + count].view(like.dtype).view(like.shape)


@dataclass
class _Stored:
    """A layer's tensors in host memory, and on the device while they are needed."""

    host: list[Tensor]
    stored: torch.cuda.Event
    device: list[Tensor] | None = None
    ready: torch.cuda.Event | None = None


class Offload:
    """Keeps tensors of layers between forward and backward."""

    def __init__(self) -> None:
        self._arenas: dict[int, Arena] = {}
        self._stored: dict[int, _Stored] = {}
        self._here: dict[int, tuple[Tensor, Saved | None]] = {}
        self._streams: dict[str, torch.cuda.Stream] = {}

    @property
    def bytes(self) -> int:
        """Host memory of all arenas."""
        return sum(arena.size for arena in self._arenas.values())

    def close(self) -> None:
        """Give the host memory back."""
        torch.cuda.synchronize()
        self._stored.clear()
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()

    def put(self, layer: int, x: Tensor, attention: Saved | None) -> None:
        """Start copying x and attention's out and lse to the host."""
        if not x.is_cuda:
            self._here[layer] = (x, attention)
            return
        tensors = [x, *(attention or ())]
        arena = self._arena(layer, sum(_padded(t) for t in tensors))
        stream = self._stream("out", x)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        host, offset = [], 0
        with torch.cuda.stream(stream):
            for tensor in tensors:
                host.append(arena.view(offset, tensor))
                host[-1].copy_(tensor, non_blocking=True)
                # The allocator may not hand the memory on before this copy is done.
                tensor.record_stream(stream)
                offset += _padded(tensor)
            event = torch.cuda.Event()
            event.record(stream)
        self._stored[layer] = _Stored(host, event)

    def get(self, layer: int) -> tuple[Tensor, Saved | None]:
        """x, and out and lse where they were put, on the device; starts the copies of the layers before."""
        if layer in self._here:
            return self._here.pop(layer)
        device = torch.device("cuda", torch.cuda.current_device())
        for ahead in range(layer, layer - AHEAD - 1, -1):
            if ahead in self._stored:
                self._fetch(self._stored[ahead], device)
        stored = self._stored.pop(layer)
        assert stored.device is not None and stored.ready is not None
        current = torch.cuda.current_stream(device)
        current.wait_event(stored.ready)
        for tensor in stored.device:
            tensor.record_stream(current)
        x, *rest = stored.device
        return x, Saved(*rest) if rest else None

    def _fetch(self, stored: _Stored, device: torch.device) -> None:
        if stored.device is not None:
            return
        stream = self._stream("in", device)
        stream.wait_event(stored.stored)
        with torch.cuda.stream(stream):
            # Allocated on the copying stream: memory that the main stream still reads is not reused for it.
            stored.device = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in stored.host]
            for tensor, host in zip(stored.device, stored.host, strict=True):
                tensor.copy_(host, non_blocking=True)
            stored.ready = torch.cuda.Event()
            stored.ready.record(stream)

    def _arena(self, layer: int, size: int) -> Arena:
        arena = self._arenas.get(layer)
        if arena is None or arena.size < size:
            if arena is not None:
                torch.cuda.synchronize()
                arena.close()
            arena = self._arenas[layer] = Arena(size)
        return arena

    def _stream(self, name: str, on: Tensor | torch.device) -> torch.cuda.Stream:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(on.device if isinstance(on, Tensor) else on)
        return self._streams[name]


def _padded(tensor: Tensor) -> int:
    """Bytes in an arena: every tensor starts at a page."""
    return math.ceil(tensor.numel() * tensor.element_size() / mmap.PAGESIZE) * mmap.PAGESIZE
