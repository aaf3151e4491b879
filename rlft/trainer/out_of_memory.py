"""Out of memory: answered once by planning with less, and else an error that says which settings to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from rlft.config.run import Config
from rlft.errors import TrainError

T = TypeVar("T")


def with_advice(run: Callable[[], T], lower: Callable[[], str], note: Callable[[str], None]) -> T:
    """The result of `run`; when the GPU's memory is exhausted, of a second try after `lower`.

    lower: gives memory back and returns what was done, for `note`. A second out-of-memory error is raised.
    """
    try:
        return run()
    except torch.OutOfMemoryError as error:
        text = str(error).strip().splitlines()[0]
    # Outside of the handler, whose traceback holds every tensor of the failed pass.
    note(f"out of memory ({text}): {lower()}")
    return run()


@contextlib.contextmanager
def what_to_lower(cfg: Config) -> Iterator[list[Any]]:
    """Out of memory becomes a TrainError (exit code 1) that says which settings decide how much is needed.

    The caller appends the session to the list it gets, as soon as there is one, for what was planned.
    """
    sessions: list[Any] = []
    try:
        yield sessions
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError; PyTorch's CPU allocator has no class for it.
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
        if not known:
            raise
        tokens, planned = cfg.packing.tokens_per_micro_batch, ""
        for s in sessions:
            tokens, ran = s.plan.budget, s.policy.fused.ran if s.policy.fused else None
            planned = f" The plan of the last pass was {ran.peak / 2**30:.2f} GiB: {ran}." if ran else ""
        stop = TrainError(
            f"out of memory ({text}).{planned} Lower packing.tokens_per_micro_batch ({tokens} tokens) for training, "
            f"engine.batch_size ({cfg.engine.batch_size} sequences) for sampling, or sampling.max_tokens "
            f"({cfg.sampling.max_tokens}); where the model itself does not fit, take a smaller one, or another dtype"
        )
        stop.exit_code = 1
        raise stop from error
