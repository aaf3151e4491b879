"""Ranks: processes that run one training run together, started by torchrun. Everything is a no-op in one process.

Every rank holds every rollout of a step. Sampling, scoring, forward and backward are divided; their results are
gathered or summed, so that what follows is computed from the same numbers on every rank. The lead, rank 0, alone writes
the run folder.

DistributedDataParallel is not used: it averages, and every loss is already divided by the counts of the whole update.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from rlft.errors import ConfigError, RlftError, TrainError

Value = TypeVar("Value")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in every process it starts."""


class ElsewhereError(RlftError):
    """An error of rlft on another rank, which that rank reports."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exit_code = exit_code


def is_alone() -> bool:
    """Return True without a process group, or in one of a single rank (vLLM creates one in this process)."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def world() -> int:
    """Return the number of ranks."""
    return 1 if is_alone() else torch.distributed.get_world_size()


def rank() -> int:
    """Return the number of this rank, from 0."""
    return 0 if is_alone() else torch.distributed.get_rank()


def lead() -> bool:
    """Return True on rank 0, which alone writes, prints and calls callbacks."""
    return rank() == 0


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this rank on its machine, which is the number of its GPU."""
    return 0 if is_alone() else int(environment.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def started(timeout: float, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Join the ranks that torchrun has started, and leave them when the block ends.

    timeout: seconds that a rank waits for the others. Does nothing without torchrun, and where a process group exists.
    Raises ConfigError when the environment has only a part of what torchrun sets.
    """
    present = [name for name in VARIABLES if name in environment]
    if torch.distributed.is_initialized() or int(environment.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if len(present) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in present)
        raise ConfigError(
            f"WORLD_SIZE = {environment['WORLD_SIZE']} without {missing}: start ranks with "
            f"torchrun --nproc-per-node N -m rlft train run.toml, or unset WORLD_SIZE"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    # Objects and sums on the host go through gloo, gradients through NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    try:
        yield
    finally:
        if torch.distributed.is_initialized():  # vLLM's shutdown destroys the default group
            torch.distributed.destroy_process_group()


def sum_tensor(tensor: Tensor) -> Tensor:
    """Sum `tensor` over ranks, in place."""
    if not is_alone():
        torch.distributed.all_reduce(tensor)
    return tensor


def max_tensor(tensor: Tensor) -> Tensor:
    """Take the elementwise maximum of `tensor` over ranks, in place."""
    if not is_alone():
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor


def gather(value: Value) -> list[Value]:
    """Return the value of every rank, in the order of ranks. The values are pickled."""
    if is_alone():
        return [value]
    values = [value] * world()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_tensor(tensor: Tensor) -> Tensor:
    """Concatenate the one-dimensional tensors of all ranks."""
    return torch.cat(gather(tensor)) if not is_alone() else tensor


def gather_results(function: Callable[[], Value]) -> list[Value]:
    """Call `function` on every rank and return all results. What it raises on one rank is raised on all.

    The rank where it was raised raises the exception itself, the others an `ElsewhereError` with its exit code.
    """
    if is_alone():
        return [function()]
    value, raised = None, None
    try:
        value = function()
    except Exception as error:
        raised = error
    results = gather((value, None if raised is None else (str(raised), getattr(raised, "exit_code", 1))))
    if raised is not None:
        raise raised
    for number, (_, fault) in enumerate(results):
        if fault is not None:
            raise ElsewhereError(number, *fault)
    return [result for result, _ in results]  # type: ignore[misc]


def from_lead(value: Value) -> Value:
    """Return the value that the lead has. The value is pickled."""
    if is_alone():
        return value
    box = [value if lead() else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def agree(flag: bool) -> bool:
    """Return True on every rank when `flag` is True on one."""
    return flag if is_alone() else any(gather(flag))


def share(count: int) -> slice:
    """Return which of `count` items this rank takes: contiguous ranges whose lengths differ by at most one."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def deal(costs: Sequence[float]) -> list[int]:
    """Return the indices of `costs` that this rank takes: the costliest first, each to the least loaded rank."""
    loads, taken = [0.0] * world(), []
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        if least == rank():
            taken.append(i)
    return sorted(taken)


def check_same(name: str, value: object, remedy: str) -> None:
    """Raise TrainError naming the ranks whose `value` is not the lead's. value: compared and shown."""
    if is_alone():
        return
    values = gather(value)
    if odd := [number for number, other in enumerate(values) if other != values[0]]:
        raise TrainError(f"{name} of rank {odd[0]} is {values[odd[0]]}, that of rank 0 is {values[0]}: {remedy}")
