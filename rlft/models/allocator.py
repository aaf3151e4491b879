"""Switch PyTorch's CUDA allocator to expandable segments, which avoid fragmentation.

A memory plan counts bytes. By default the allocator takes segments of fixed size from the driver, and a tensor that
fits in no free block of them needs a new segment: a 70B shape with 8,192 tokens had 9 GiB in such blocks and ran out of
memory. Expandable segments map free pages where they are needed. vLLM's memory for sleep mode cannot use them, so they
are off while vLLM allocates it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_by_user() -> bool:
    """Return whether the environment configures segments; the setting is not changed then."""
    return any("expandable_segments" in os.environ.get(name, "") for name in VARIABLES)


_expandable = False
"""Whether expandable segments are on in this process; PyTorch has no way to query it."""


def _apply(expandable: bool) -> None:
    """Configure the allocator, unless the user did."""
    if torch.cuda.is_available() and not set_by_user():
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{expandable}")


@contextlib.contextmanager
def segments(growing: bool) -> Iterator[None]:
    """Allocate with expandable segments (or of fixed size) in the block; restore the setting afterwards."""
    global _expandable
    before, _expandable = _expandable, growing
    _apply(growing)
    try:
        yield
    finally:
        _expandable = before
        _apply(before)
