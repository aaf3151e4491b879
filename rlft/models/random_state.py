"""Keep the random state of the process while something draws from it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def kept_random_state() -> AbstractContextManager[None]:
    """Restore PyTorch's random state of the CPU and of the current GPU when the block ends.

    `torch.random.fork_rng` without devices would initialise every GPU of the machine, and warn.
    """
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])
