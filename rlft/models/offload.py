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
class Stored:
    """One layer's tensors of one pass: in an arena, and on the device while they are needed."""

    host: list[Tensor]
    arena: Arena | None
    written: torch.cuda.Event | None
    device: list[Tensor] | None = None
    ready: torch.cuda.Event | None = None


class Offload:
    """Keeps tensors of layers between forward and backward. Several passes may be under way: each has its records."""

    def __init__(self) -> None:
        self._free: dict[int, list[Arena]] = {}
        self._streams: dict[str, torch.cuda.Stream] = {}
        self.bytes = 0
        """Host memory of all arenas."""

    def put(self, layer: int, x: Tensor, attention: Saved | None) -> Stored:
        """Start copying x and attention's out and lse to the host."""
        tensors = [x, *(attention or ())]
        if not x.is_cuda:
            return Stored([], None, None, tensors)
        arena = self._arena(layer, sum(_padded(t) for t in tensors))
        stream = self._stream("out", x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        # An arena that is used again may still be read from.
        stream.wait_stream(self._stream("in", x.device))
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
        stored = Stored(host, arena, event)
        weakref.finalize(stored, self._free[layer].append, arena)
        return stored

    def ahead(self, records: dict[int, Stored], layer: int) -> None:
        """Start the copies back of a layer and of those that run their backwards after it, whatever itself has kept.
        records: of the pass."""
        for index in range(layer, layer - AHEAD - 1, -1):
            if index in records:
                self._fetch(records[index])

    def get(self, records: dict[int, Stored], layer: int) -> tuple[Tensor, Saved | None]:
        """x, and out and lse where they were put, on the device, after `ahead`; drops the layer's record."""
        stored = records.pop(layer)
        assert stored.device is not None
        if stored.ready is not None:
            current = torch.cuda.current_stream(stored.device[0].device)
            current.wait_event(stored.ready)
            for tensor in stored.device:
                tensor.record_stream(current)
        x, *rest = stored.device
        return x, Saved(*rest) if rest else None

    def _fetch(self, stored: Stored) -> None:
        if stored.device is not None:
            return
        assert stored.written is not None
        device = torch.device("cuda", torch.cuda.current_device())
        stream = self._stream("in", device)
        stream.wait_event(stored.written)
        with torch.cuda.stream(stream):
            # Allocated on the copying stream: memory that the main stream still reads is not reused for it.
            stored.device = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in stored.host]
            for tensor, host in zip(stored.device, stored.host, strict=True):
                tensor.copy_(host, non_blocking=True)
            stored.ready = torch.cuda.Event()
            stored.ready.record(stream)

    def _arena(self, layer: int, size: int) -> Arena:
        """One of the layer's that no pass is using, or a new one; one that is too small is given back."""
        free = self._free.setdefault(layer, [])
        while free:
            arena = free.pop()
            if arena.size >= size:
                return arena
            torch.cuda.synchronize()
            self.bytes -= arena.size
            arena.close()
        self.bytes += size
        return Arena(size)

    def _stream(self, name: str, device: torch.device) -> torch.cuda.Stream:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(device)
        return self._streams[name]


def _padded(tensor: Tensor) -> int:
    """Bytes in an arena: every tensor starts at a page."""
    return math.ceil(tensor.numel() * tensor.element_size() / mmap.PAGESIZE) * mmap.PAGESIZE
