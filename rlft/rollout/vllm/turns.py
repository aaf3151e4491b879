"""Processes of rlft on one GPU take turns to free and to allocate vLLM's memory.

vLLM compares the free memory of the whole card before and after its sleep, and refuses to sleep where another process
took more in between than it freed. Two runs on one card would end each other so.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator

import torch

from rlft.environment import cache_folder

LONGEST = 30.0
"""Seconds after which a process no longer waits: another one hangs, or was stopped, in its turn."""
PAUSE = 0.002
"""Seconds between two tries."""


def card(device: torch.device) -> str:
    """Return a GPU's UUID, which is the same in all processes, whatever number it has in them."""
    return str(torch.cuda.get_device_properties(device).uuid)


@contextlib.contextmanager
def turn(name: str) -> Iterator[None]:
    """Hold the card's lock file, which other processes of this user wait for, `LONGEST` at most.

    name: of the card, as `card` gives it. Without a folder to write to, nothing is locked.
    """
    folder = cache_folder("cards")
    if folder is None:
        yield
        return
    with (folder / f"{name}.lock").open("w") as file:
        end = time.monotonic() + LONGEST
        while not _locked(file.fileno()) and time.monotonic() < end:
            time.sleep(PAUSE)
        yield  # closing the file gives the lock back, as the end of the process does


def _locked(file: int) -> bool:
    """Try to lock an open file; returns whether this process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
