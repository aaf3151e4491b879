"""What levels L4 and L5 keep in host memory: an arena per layer, copies on two streams beside the compute's.

A copy to the host has the time of the next layer's forward; its tensors are freed, in the order of the main stream,
once that has waited for it. A copy back is started two layers before its backward. All device memory is the main
stream's, so a plan can count it: `record_stream` frees a tensor when the host sees that the copy is done, after it has
launched many more layers.

Arenas are ordinary pages registered with CUDA (cudaHostRegister): PyTorch's pinned allocator rounds every block up to a
power of two. They are made at the first use and kept for later steps of at most their size. On a CPU nothing is moved;
the tensors are handed back as they were.
"""

from __future__ import annotations

import math
import mmap
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlft.errors import TrainError
from rlft.kernels.attention import Saved

AHEAD = 2
"""Layers whose copies back are on their way while one runs."""
BEHIND = 1
"""Layers whose copies to the host are on their way while the forward of one runs."""


class Arena:
    """Registered host memory that tensors are laid into one after the other; `close` unregisters it."""

    def __init__(self, size: int) -> None:
        """size: bytes. Raises TrainError when the system refuses to register them."""
        self.size = size
        self._map = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        # Pages are made by all threads here, and by one where they are registered: 1.7 instead of 2.5 s for 6 GiB.
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8).zero_()
        runtime: Any = torch.cuda.cudart()
        code = runtime.cudaHostRegister(self.bytes.data_ptr(), size, 0)
        # An address that is still registered could not be registered again when the system reuses it.
        self.close = weakref.finalize(self, runtime.cudaHostUnregister, self.bytes.data_ptr())
        if int(code) != 0:
            raise TrainError(
                f"{size / 2**30:.1f} GiB of host memory could not be registered for offloading (CUDA error "
                f"{int(code)}): lower packing.tokens_per_micro_batch, or give the machine more memory"
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
    """What is copied to the host, until that is done; then what was copied back."""
    ready: torch.cuda.Event | None = None
    """The copy back is done; None before it is started."""
    coming: list[torch.cuda.Event] = field(default_factory=list)
    """`ready` until somebody has waited for it."""


class Offload:
    """Keeps tensors of layers between forward and backward. Several passes may be under way: each has its records."""

    def __init__(self) -> None:
        self._free: dict[int, list[Arena]] = {}
        self._streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}
        self._leaving: list[Stored] = []
        """Those that are on their way to the host, oldest first."""
        self.bytes = 0
        """Host memory of all arenas."""

    def put(self, layer: int, x: Tensor, attention: Saved | None) -> Stored:
        """Start copying x and attention's out and lse to the host."""
        tensors = [x, *(attention or ())]
        if not x.is_cuda:
            return Stored([], None, None, tensors)
        self.settle(BEHIND - 1)
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
                offset += _padded(tensor)
            event = torch.cuda.Event()
            event.record(stream)
        stored = Stored(host, arena, event, tensors)
        self._leaving.append(stored)
        weakref.finalize(stored, _dropped, arena, self._free[layer], stored.coming, x.device)
        return stored

    def settle(self, most: int = 0) -> None:
        """Free what was copied to the host, but for the last `most` layers' tensors, as soon as it has arrived."""
        while len(self._leaving) > most:
            stored = self._leaving.pop(0)
            assert stored.device is not None and stored.written is not None
            # Whatever the memory is used for next runs on this stream, after the copy.
            torch.cuda.current_stream(stored.device[0].device).wait_event(stored.written)
            stored.device = None

    def ahead(self, records: dict[int, Stored], layer: int, device: torch.device) -> None:
        """Start the copies back of a layer and of those that run their backwards after it, whatever itself has kept.
        records: of the pass."""
        self.settle()
        for index in range(layer, layer - AHEAD - 1, -1):
            if index in records:
                self._fetch(records[index], device)

    def get(self, records: dict[int, Stored], layer: int) -> tuple[Tensor, Saved | None]:
        """x, and out and lse where they were put, on the device, after `ahead`; drops the layer's record."""
        stored = records.pop(layer)
        assert stored.device is not None
        if stored.ready is not None:
            torch.cuda.current_stream(stored.device[0].device).wait_event(stored.ready)
            stored.coming.clear()
        x, *rest = stored.device
        return x, Saved(*rest) if rest else None

    def _fetch(self, stored: Stored, device: torch.device) -> None:
        if stored.ready is not None or stored.written is None:
            return
        stored.device = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in stored.host]
        stream = self._stream("in", device)
        # The main stream may still read what the memory held before.
        stream.wait_stream(torch.cuda.current_stream(device))
        stream.wait_event(stored.written)
        with torch.cuda.stream(stream):
            for tensor, host in zip(stored.device, stored.host, strict=True):
                tensor.copy_(host, non_blocking=True)
            stored.ready = torch.cuda.Event()
            stored.ready.record(stream)
        stored.coming.append(stored.ready)

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
        if (name, device) not in self._streams:
            self._streams[name, device] = torch.cuda.Stream(device)
        return self._streams[name, device]


def _dropped(arena: Arena, free: list[Arena], coming: list[torch.cuda.Event], device: torch.device) -> None:
    """Make an arena free for another pass. A backward that failed has not waited for what was on its way back: its
    memory must not be used before that is there."""
    for event in coming:
        torch.cuda.current_stream(device).wait_event(event)
    free.append(arena)


def _padded(tensor: Tensor) -> int:
    """Bytes in an arena: every tensor starts at a page."""
    return math.ceil(tensor.numel() * tensor.element_size() / mmap.PAGESIZE) * mmap.PAGESIZE
