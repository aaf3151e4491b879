"""What crosses ranks: counts, statistics, and one flat gradient buffer, all summed exactly. A no-op when alone.

No DistributedDataParallel: it averages, and every loss here is already divided by the counts of the whole update.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor

from rlft.types import Counts


def is_alone() -> bool:
    """True without a process group, or in one of a single rank (vLLM in this process makes one)."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def sum_tensor(tensor: Tensor) -> Tensor:
    """`tensor` summed over ranks, in place."""
    if not is_alone():
        torch.distributed.all_reduce(tensor)
    return tensor


def max_tensor(tensor: Tensor) -> Tensor:
    """The largest of `tensor` over ranks, elementwise, in place."""
    if not is_alone():
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor


def gather_tensor(tensor: Tensor) -> Tensor:
    """The one-dimensional tensors of all ranks, one behind the other."""
    if is_alone():
        return tensor
    sizes: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, len(tensor))
    whole = tensor.new_zeros(sum(sizes))
    start = sum(sizes[: torch.distributed.get_rank()])
    whole[start : start + len(tensor)] = tensor
    return sum_tensor(whole)


def sum_counts(counts: Counts) -> Counts:
    """The counts of the update over all ranks: what every weight is divided by."""
    return Counts(*(int(n) for n in sum_tensor(torch.tensor(counts, dtype=torch.int64))))
