"""PyTorch's allocator with segments that grow, so that what is planned fits although it comes in pieces.

A plan counts bytes. PyTorch's allocator takes segments of fixed size from the driver, and a tensor that fits in no free
piece of them needs another one: a 70B shape of 8,192 tokens had 9 GiB in such pieces and ran out of memory. Segments
that grow map free pages to where they are needed. vLLM's memory that sleeps cannot be made of them, so they are off
while vLLM allocates it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_by_user() -> bool:
    """Whether the environment says how segments are made; it is left as it is then."""
    return any("expandable_segments" in os.environ.get(name, "") for name in VARIABLES)


_growing = False
"""What this process is set to now; PyTorch does not tell."""


def _apply(growing: bool) -> None:
    if torch.cuda.is_available() and not set_by_user():
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{growing}")


@contextlib.contextmanager
def segments(growing: bool) -> Iterator[None]:
    """Segments that grow, or of fixed size, for what is allocated in the block; as it was before after it."""
    global _growing
    before, _growing = _growing, growing
    _apply(growing)
    try:
        yield
    finally:
        _growing = before
        _apply(before)
