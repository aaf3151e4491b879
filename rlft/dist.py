"""Sum counts, statistics and the flat gradient buffer over ranks; no-ops in a single process.

DistributedDataParallel is not used: it averages, and every loss is already divided by the counts of the whole update.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from rlft.types import Counts

Value = TypeVar("Value")


def is_alone() -> bool:
    """Return True without a process group, or in one of a single rank (vLLM creates one in this process)."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


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


def gather_objects(value: Value) -> list[Value]:
    """Return the value of every rank, in the order of ranks. The values are pickled."""
    if is_alone():
        return [value]
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_tensor(tensor: Tensor) -> Tensor:
    """Concatenate the one-dimensional tensors of all ranks."""
    if is_alone():
        return tensor
    sizes = gather_objects(len(tensor))
    whole = tensor.new_zeros(sum(sizes))
    start = sum(sizes[: torch.distributed.get_rank()])
    whole[start : start + len(tensor)] = tensor
    return sum_tensor(whole)


def sum_counts(counts: Counts) -> Counts:
    """Sum the counts of an update over all ranks."""
    return Counts(*(int(number) for number in sum_tensor(torch.tensor(counts, dtype=torch.int64))))
