"""Sorting by expert: the kernel gives the indices of the plain version, which are those of a loop."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, assert_survives_stream_and_graph
from torch import Tensor

from rlft.kernels.route import INTEGERS, Sorted, sort_by_expert, sort_launch, sort_reference

# No token; one choice; one expert; experts without rows; more than are placed, then counted, at once; odd numbers.
CASES = [(0, 2, 8), (1, 1, 1), (9, 2, 1), (3, 2, 128), (130, 1, 5), (77, 8, 60), (1500, 3, 7)]


def chosen(T: int, k: int, experts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    g = torch.Generator().manual_seed(T)
    return torch.randint(experts, (T, k), generator=g).to(DEVICE, dtype)


def same(got: Sorted, want: Sorted) -> None:
    for name, ours, right in zip(Sorted._fields, got, want, strict=True):
        assert ours.dtype == torch.int32 and torch.equal(ours, right), name


def test_the_plain_version_is_a_loop() -> None:
    ids = chosen(40, 3, 6).cpu()
    rows = [i for e in range(6) for i, c in enumerate(ids.flatten().tolist()) if c == e]
    order, inverse, offsets = sort_by_expert(ids, 6)
    assert order.tolist() == rows and [rows[p] for p in inverse.tolist()] == list(range(120))
    assert offsets.tolist() == [int((ids < e).sum()) for e in range(7)]


@pytest.mark.parametrize("T, k, experts", CASES)
def test_the_kernel_sorts_as_the_plain_version(T: int, k: int, experts: int) -> None:
    ids = chosen(T, k, experts)
    same(sort_launch(ids, experts), sort_reference(ids, experts))
    # Several programs with several parts each.
    same(sort_launch(ids, experts, programs=2), sort_reference(ids, experts))


def test_all_rows_of_one_expert_stay_in_order() -> None:
    ids = torch.full((200, 1), 4, device=DEVICE)
    order, inverse, offsets = sort_launch(ids, 6, programs=2)
    assert order.tolist() == inverse.tolist() == list(range(200)) and offsets.tolist() == [0] * 5 + [200] * 2


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    ids = chosen(31, 2, 9, dtype)
    same(sort_launch(ids, 9), sort_reference(ids, 9))


def test_what_does_not_fit_is_refused() -> None:
    for ids, experts in ((torch.zeros(3), 2), (torch.zeros(3, 1), 2), (torch.zeros(3, 1, dtype=torch.int64), 1025)):
        with pytest.raises(ValueError, match=r"sort_by_expert: want chosen \[T, k\]"):
            sort_by_expert(ids, experts)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=r"want choices in \[0, 4\), got"):
            sort_by_expert(torch.tensor([[0, wrong]]), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("T, k, experts", [(1, 8, 128), (8192, 8, 128), (65537, 8, 512), (16384, 4, 32)])
def test_large_shapes_streams_and_graphs(T: int, k: int, experts: int) -> None:
    ids = chosen(T, k, experts, torch.int32)
    same(sort_by_expert(ids, experts), sort_reference(ids, experts))
    assert_survives_stream_and_graph(lambda: sort_by_expert(ids, experts))
