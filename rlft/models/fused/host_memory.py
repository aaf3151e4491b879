"""Host memory that the GPU copies from and to while it computes, and that other processes of the machine can map."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from typing import Any

import torch
from torch import Tensor

from rlft.errors import ConfigError, TrainError


def tensor_in(memory: Tensor, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the tensor that lies `offset` bytes into uint8 memory."""
    return memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def register(owner: object, memory: Tensor, purpose: str, remedy: str) -> weakref.finalize:
    """Register memory [bytes] with CUDA until `owner` is dropped; the result, called, ends it before.

    purpose: completes "could not be registered for". Raises TrainError, with the remedy, when the system refuses.
    """
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    # When the system reuses an address that is still registered, it could not be registered again.
    end = weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())
    if code != 0:
        raise TrainError(
            f"{memory.numel() / 2**30:.1f} GiB of host memory could not be registered for {purpose} (CUDA error "
            f"{code}): {remedy}"
        )
    return end


class HostMemory:
    """Zeroed memory that other processes of this machine can map while this object lives."""

    def __init__(self, size: int, file: int | None = None) -> None:
        """Allocate `size` bytes, or map those of an open file."""
        new = file is None
        self._file = os.memfd_create("rlft") if file is None else file
        if new:
            os.ftruncate(self._file, size)
        self.bytes = torch.frombuffer(mmap.mmap(self._file, size), dtype=torch.uint8)
        self._close = weakref.finalize(self, os.close, self._file)

    @property
    def path(self) -> str:
        """Where another process finds this memory."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @classmethod
    def opened(cls, path: str, size: int) -> HostMemory:
        """Map the memory of another process. Raises ConfigError when the system refuses."""
        try:
            file = os.open(path, os.O_RDWR)
        except OSError as error:
            raise ConfigError(
                f"base.place: the memory of another rank of this machine cannot be mapped ({error}); run all ranks of "
                f"a machine as one user in one container"
            ) from error
        return cls(size, file)

    def close_file(self) -> None:
        """Close the file, when no further process will map it; the memory stays."""
        self._close()
