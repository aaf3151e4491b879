"""Hold what layers at the levels L4 and L5 keep in host memory: one arena per layer, copies on two side streams.

A copy to the host overlaps the next layer's forward; its tensors are freed in the order of the main stream, once that
stream has waited for the copy. A copy back starts two layers before its backward. All device memory belongs to the main
stream, so that a plan can count it: `record_stream` would free a tensor only when the host notices that the copy is
complete, after it has launched many more layers.

Arenas are ordinary pages registered with CUDA (cudaHostRegister), since PyTorch's pinned allocator rounds every block
up to a power of two. They are allocated at the first use and reused by later steps of at most their size. On a CPU
nothing is copied; the same tensors are returned. x: the input of a layer, [T, H].
"""

from __future__ import annotations

import math
import mmap
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlft.kernels.attention import Saved
from rlft.models.fused.host_memory import register, tensor_in

AHEAD = 2
"""Number of further layers whose copies back are in flight while one layer runs."""
BEHIND = 1
"""Number of layers whose copies to the host are in flight while the forward of one layer runs."""


class Arena:
    """Registered host memory in which tensors lie one after the other; `close` unregisters it."""

    def __init__(self, size: int) -> None:
        """Allocate and register `size` bytes.

        Raises TrainError when the system refuses to register them.
        """
        self.size = size
        self._map = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        # Writing zeros populates the pages with all threads, registering with one: 1.7 instead of 2.5 s for 6 GiB.
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8).zero_()
        remedy = "lower packing.tokens_per_micro_batch, or give the machine more memory"
        self.close = register(self, self.bytes, "offloading", remedy)

    def view(self, offset: int, like: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `like` at `offset` bytes."""
        return tensor_in(self.bytes, offset, like.shape, like.dtype)


@dataclass
class Stored:
    """The tensors of one layer in one pass: in an arena, and on the device while they are needed."""

    host: list[Tensor]
    arena: Arena | None
    written: torch.cuda.Event | None
    device: list[Tensor] | None = None
    """What is being copied to the host, until that is complete; later what was copied back."""
    ready: torch.cuda.Event | None = None
    """Event after the copy back; None before it is started."""
    coming: list[torch.cuda.Event] = field(default_factory=list)
    """Contains `ready` until a stream has waited for it."""


class Offload:
    """Holds tensors of layers in host memory between forward and backward. Several passes may be in progress, each with
    its records."""

    def __init__(self) -> None:
        self._free: dict[int, list[Arena]] = {}
        self._streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}
        self._leaving: list[Stored] = []
        """Records whose copies to the host are in flight, oldest first."""
        self.bytes = 0
        """Host memory of all arenas."""

    def put(self, layer: int, x: Tensor, attention: Saved | None) -> Stored:
        """Start copying x and attention's out and lse to the host."""
        tensors = [x, *(attention or ())]
        if not x.is_cuda:
            return Stored([], None, None, tensors)
        self.settle(BEHIND - 1)
        arena = self._arena(layer, sum(_padded(tensor) for tensor in tensors))
        stream = self._stream("out", x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        # A copy back may still read from a reused arena.
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
        weakref.finalize(stored, _free_arena, arena, self._free[layer], stored.coming, x.device)
        return stored

    def settle(self, most: int = 0) -> None:
        """Free the device tensors that were copied to the host, except those of the last `most` layers.

        The main stream waits for the copies.
        """
        while len(self._leaving) > most:
            stored = self._leaving.pop(0)
            assert stored.device is not None and stored.written is not None
            # The next use of the memory is on this stream, hence after the copy.
            torch.cuda.current_stream(stored.device[0].device).wait_event(stored.written)
            stored.device = None

    def ahead(self, records: dict[int, Stored], layer: int, device: torch.device) -> None:
        """Start the copies back of a layer and of the `AHEAD` layers whose backwards follow.

        records: of the pass; layers without a record are skipped.
        """
        self.settle()
        for index in range(layer, layer - AHEAD - 1, -1):
            if index in records:
                self._fetch(records[index], device)

    def get(self, records: dict[int, Stored], layer: int) -> tuple[Tensor, Saved | None]:
        """Return x, and attention's out and lse if they were stored, on the device; remove the layer's record.

        Call `ahead` before.
        """
        stored = records.pop(layer)
        assert stored.device is not None
        if stored.ready is not None:
            torch.cuda.current_stream(stored.device[0].device).wait_event(stored.ready)
            stored.coming.clear()
        x, *rest = stored.device
        return x, Saved(*rest) if rest else None

    def _fetch(self, stored: Stored, device: torch.device) -> None:
        """Start the copy back of a record, unless it was started before."""
        if stored.ready is not None or stored.written is None:
            return
        stored.device = [torch.empty(saved.shape, dtype=saved.dtype, device=device) for saved in stored.host]
        stream = self._stream("in", device)
        # The main stream may still read the previous contents of the memory.
        stream.wait_stream(torch.cuda.current_stream(device))
        stream.wait_event(stored.written)
        with torch.cuda.stream(stream):
            for tensor, host in zip(stored.device, stored.host, strict=True):
                tensor.copy_(host, non_blocking=True)
            stored.ready = torch.cuda.Event()
            stored.ready.record(stream)
        stored.coming.append(stored.ready)

    def _arena(self, layer: int, size: int) -> Arena:
        """Return an arena of the layer that no pass uses, or a new one; release those that are too small."""
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


def _free_arena(arena: Arena, free: list[Arena], coming: list[torch.cuda.Event], device: torch.device) -> None:
    """Make an arena available to another pass.

    A backward that failed has not waited for its copies back; their device memory must not be reused before they are
    complete.
    """
    for event in coming:
        torch.cuda.current_stream(device).wait_event(event)
    free.append(arena)


def _padded(tensor: Tensor) -> int:
    """Return the bytes of a tensor in an arena, where every tensor starts at a page."""
    return math.ceil(tensor.numel() * tensor.element_size() / mmap.PAGESIZE) * mmap.PAGESIZE
