"""Sum counts, statistics and the flat gradient buffer over ranks; no-ops in a single process.

DistributedDataParallel is not used: it averages, and every loss is already divided by the counts of the whole update.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

from rlft.types import Counts


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


def gather_tensor(tensor: Tensor) -> Tensor:
    """Concatenate the one-dimensional tensors of all ranks."""
    if is_alone():
        return tensor
    sizes: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, len(tensor))
    whole = tensor.new_zeros(sum(sizes))
    start = sum(sizes[: torch.distributed.get_rank()])
    whole[start : start + len(tensor)] = tensor
    return sum_tensor(whole)


def sum_counts(counts: Counts) -> Counts:
    """Sum the counts of an update over all ranks."""
    return Counts(*(int(number) for number in sum_tensor(torch.tensor(counts, dtype=torch.int64))))
