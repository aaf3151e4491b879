"""Handle out-of-memory errors: retry once with a smaller plan, else name the settings to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from rlft.config.run import Config
from rlft.errors import TrainError

Result = TypeVar("Result")


def with_advice(run: Callable[[], Result], lower: Callable[[], str], note: Callable[[str], None]) -> Result:
    """Return the result of `run`, retried once after `lower` when the GPU runs out of memory.

    lower: frees memory and returns a description of what it did, for `note`. A second out-of-memory error is raised.
    """
    try:
        return run()
    except torch.OutOfMemoryError as error:
        text = str(error).strip().splitlines()[0]
    # Outside the handler, because its traceback keeps every tensor of the failed pass alive.
    note(f"out of memory ({text}): {lower()}")
    return run()


@contextlib.contextmanager
def what_to_lower(cfg: Config) -> Iterator[list[Any]]:
    """Turn an out-of-memory error into a TrainError (exit code 1) that names the settings to lower.

    Yields a list. The caller appends its session to it, so that the error can report the plan of the last pass.
    """
    sessions: list[Any] = []
    try:
        yield sessions
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError; PyTorch's CPU allocator has no class for it.
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
        if not is_memory:
            raise
        tokens, plan_text = cfg.packing.tokens_per_micro_batch, ""
        for session in sessions:
            policy = session.trainer.policy
            tokens, plan = session.trainer.plan.budget, policy.fused.last_plan if policy.fused else None
            plan_text = f" The plan of the last pass was {plan.peak / 2**30:.2f} GiB: {plan}." if plan else ""
        stop = TrainError(
            f"out of memory ({text}).{plan_text} Lower packing.tokens_per_micro_batch ({tokens} tokens) for training, "
            f"engine.batch_size ({cfg.engine.batch_size} sequences) for sampling, or sampling.max_tokens "
            f"({cfg.sampling.max_tokens}); where the model itself does not fit, take a smaller one, or another dtype"
        )
        stop.exit_code = 1
        for note in vars(error).get("__notes__", ()):  # how to go on
            stop.add_note(note)
        raise stop from error
