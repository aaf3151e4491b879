"""Ranks: processes that run one training run together, started by torchrun. Everything is a no-op in one process.

Every rank holds every rollout of a step. Sampling, scoring, forward and backward are divided; their results are
gathered or summed, so that what follows is computed from the same numbers on every rank. The lead, rank 0, alone writes
the run folder.

DistributedDataParallel is not used: it averages, and every loss is already divided by the counts of the whole update.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from rlft.errors import ConfigError, ElsewhereError, TrainError

Value = TypeVar("Value")
_host: torch.distributed.ProcessGroup | None = None
"""Group of all ranks for objects and for meeting; None: the default group."""
_timeout = datetime.timedelta(minutes=30)
"""How long a rank waits for the others."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in every process it starts."""


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
        _take_gpu(int(environment["LOCAL_RANK"]))
    # Gradients go through NCCL; objects and sums on the host through gloo, which also names a rank that is missing.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    global _host, _timeout
    _timeout = datetime.timedelta(seconds=timeout)
    store, rank_, world_ = next(iter(rendezvous("env://", timeout=_timeout)))
    # torchrun has the same store in all attempts: without a prefix, ranks find the addresses of those that have died.
    attempt = f"attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0')} of {world_} ranks"
    store = PrefixStore(attempt, store)
    torch.distributed.init_process_group(backend, store=store, rank=rank_, world_size=world_, timeout=_timeout)
    _host = torch.distributed.new_group(backend="gloo", timeout=_timeout)  # type: ignore[assignment]
    try:
        yield
    finally:
        _host = None
        if torch.distributed.is_initialized():  # vLLM's shutdown destroys all groups
            torch.distributed.destroy_process_group()


def _take_gpu(local_rank: int) -> None:
    """Make the GPU of this rank the current one."""
    if not torch.distributed.is_nccl_available():
        raise ConfigError("this build of PyTorch has no NCCL, which ranks on GPUs need: install PyTorch's CUDA build")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"LOCAL_RANK = {local_rank} on a machine with {gpus} GPU{'s' * (gpus > 1)}: each rank takes one; start "
            f"torchrun with --nproc-per-node {gpus} or less"
        )
    torch.cuda.set_device(local_rank)


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Wait for all ranks, then run a collective operation. Raises TrainError when a rank is missing."""
    try:
        torch.distributed.monitored_barrier(_host, _timeout, wait_all_ranks=True)
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainError(
            f"rank {rank()} waited for the other ranks in vain ({reason}): look for the first error of the ranks that "
            f"are missing; if one of them is only slow, raise ranks.timeout; go on with --resume"
        ) from error


def sum_tensor(tensor: Tensor) -> Tensor:
    """Sum `tensor` over ranks, in place."""
    if not is_alone():
        with _meeting():
            torch.distributed.all_reduce(tensor)
    return tensor


def max_tensor(tensor: Tensor) -> Tensor:
    """Take the elementwise maximum of `tensor` over ranks, in place."""
    if not is_alone():
        with _meeting():
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor


def gather(value: Value) -> list[Value]:
    """Return the value of every rank, in the order of ranks. The values are pickled."""
    if is_alone():
        return [value]
    values = [value] * world()
    with _meeting():
        torch.distributed.all_gather_object(values, value, group=_host)
    return values


def gather_tensor(tensor: Tensor) -> Tensor:
    """Concatenate the one-dimensional tensors of all ranks."""
    return torch.cat(gather(tensor)) if not is_alone() else tensor


def gather_results(
    function: Callable[[], Value], waiting: contextlib.AbstractContextManager[object] | None = None
) -> list[Value]:
    """Call `function` on every rank and return all results. What it raises on one rank is raised on all.

    waiting: entered while the others are waited for.

    The rank where it was raised raises the exception itself, the others an `ElsewhereError` with its exit code.
    """
    if is_alone():
        return [function()]
    value, raised = None, None
    try:
        value = function()
    except Exception as error:
        raised = error
    with waiting or contextlib.nullcontext():
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
    with _meeting():
        torch.distributed.broadcast_object_list(box, src=0, group=_host)
    return box[0]  # type: ignore[return-value]


def agree(flag: bool) -> bool:
    """Return True on every rank when `flag` is True on one."""
    return flag if is_alone() else any(gather(flag))


def share(count: int) -> slice:
    """Return which of `count` items this rank takes: contiguous ranges whose lengths differ by at most one."""
    return shares(count, world())[rank()]


def shares(count: int, ranks: int) -> list[slice]:
    """Return which of `count` items each of `ranks` ranks takes."""
    return [slice(count * number // ranks, count * (number + 1) // ranks) for number in range(ranks)]


def deal(costs: Sequence[float]) -> list[int]:
    """Return the indices of `costs` that this rank takes: the costliest first, each to the least loaded rank."""
    taken = _dealt(costs, world())
    return [i for i, taker in enumerate(taken) if taker == rank()]


def loads(costs: Sequence[float], ranks: int) -> list[float]:
    """Return the sum of the costs that each of `ranks` ranks takes."""
    sums = [0.0] * ranks
    for cost, taker in zip(costs, _dealt(costs, ranks), strict=True):
        sums[taker] += cost
    return sums


def _dealt(costs: Sequence[float], ranks: int) -> list[int]:
    """Return the rank that takes each of `costs`."""
    heap, takers = [(0.0, number) for number in range(ranks)], [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, least = heap[0]
        heapq.heapreplace(heap, (load + costs[i], least))
        takers[i] = least
    return takers


def check_same(name: str, value: object, remedy: str) -> None:
    """Raise TrainError naming the ranks whose `value` is not the lead's. value: compared and shown."""
    if is_alone():
        return
    values = gather(value)
    if odd := [number for number, other in enumerate(values) if other != values[0]]:
        raise TrainError(f"{name} of rank {odd[0]} is {values[odd[0]]}, that of rank 0 is {values[0]}: {remedy}")
