"""Free vLLM's memory and allocate it again, in turns with other processes of rlft on the same GPU.

vLLM compares the free memory of the whole card before and after its sleep, and refuses to sleep where another process
took more in between than it freed. Two runs on one card would end each other so.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlft.environment import cache_folder
from rlft.errors import EngineError

LONGEST = 30.0
"""Seconds that a process waits at most: another one may hang, or have been stopped, in its turn."""
PAUSE = 0.002
"""Seconds between two tries."""
ROUNDING = 64 * 2**20
"""Bytes that vLLM allocates at most beyond what it freed, for its block sizes."""


def sleep(llm: Any, device: torch.device) -> int:
    """Put vLLM's LLM to sleep; returns the bytes that it freed on the device. Raises EngineError."""
    with turn(card(device)):
        before = torch.cuda.mem_get_info(device)[0]
        # Level 2 discards everything, since all is written again. Shared weights are not in vLLM's memory.
        try:
            llm.sleep(level=2)
        except AssertionError as error:
            # vLLM compares the free memory of the whole card before and after.
            if "increased" not in str(error):
                raise
            raise EngineError(
                f"vLLM did not go to sleep ({error}): another program took memory of this card at that moment; "
                f"give the run a card by itself and go on with --resume"
            ) from error
        return torch.cuda.mem_get_info(device)[0] - before


def wake(llm: Any, device: torch.device, freed: int, kv_bytes: int, release: Callable[[], None]) -> None:
    """Allocate the memory of a sleeping LLM again.

    freed: bytes that its sleep freed. kv_bytes: size of its cache, for the message. release: frees what the trainer's
    passes leave allocated; called if it is needed. Raises EngineError where memory is not there.
    """
    with turn(card(device)):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] < freed + ROUNDING:
            release()
        free = torch.cuda.mem_get_info(device)[0]
        if free >= freed:
            try:
                llm.wake_up()
                return
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
        raise EngineError(
            f"the engine wants {freed / 2**30:.2f} GiB back to wake and {free / 2**30:.2f} GiB are free: something "
            f"took memory while it slept; lower engine.kv_gib ({kv_bytes / 2**30:.2f})"
        )


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
