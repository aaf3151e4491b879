"""Copies of rows and the sum of their gradients: the reference, the kernel's rule, order, layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_rule import DEVICE, DTYPES, assert_rule, assert_survives_stream_and_graph

from rlft.kernels.copies import Copies, gather_copies, launch_summed, sum_copies, summed_reference

INDICES = {
    "none": ([], 3),
    "one": ([0], 1),
    "a prefix of 3 before two of 2, and its own rows": ([0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6], 7),
    "rows without a copy, out of order": ([9, 2, 2, 9, 4, 2], 11),
    "more than a program's rows": ([*range(150), *range(40), *range(40)], 150),
}
WIDTHS = [(2, 8), (3, 5), (1, 1)]
"""Heads and their size: 16 elements, no power of two, the least."""


def made(case: str, device: str = DEVICE) -> tuple[Copies, int]:
    index, rows = INDICES[case]
    return Copies.of(np.array(index, np.int64), rows, torch.device(device)), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", INDICES)
def test_the_kernel_obeys_the_rule(case: str, width: tuple[int, int], dtype: torch.dtype) -> None:
    copies, _ = made(case)
    g = torch.Generator().manual_seed(0)
    d = torch.randn(copies.index.numel(), *width, generator=g).to(DEVICE, dtype)
    assert_rule("sum", launch_summed(d, copies), summed_reference(d, copies), summed_reference(d.double(), copies), 2)


def test_the_sum_is_the_gradient_of_the_copies() -> None:
    for case in INDICES:
        copies, rows = made(case, "cpu")
        x = torch.randn(rows, 2, 3, dtype=torch.float64, requires_grad=True)
        d = torch.randn(copies.index.numel(), 2, 3, dtype=torch.float64)
        (want,) = torch.autograd.grad(gather_copies(x, copies), x, d)
        assert torch.allclose(sum_copies(d, copies), want)


def test_copies_of_a_row_are_listed_in_order() -> None:
    copies, rows = made("rows without a copy, out of order", "cpu")
    lists = [copies.order[copies.starts[t] : copies.starts[t + 1]].tolist() for t in range(rows)]
    assert lists == [[], [], [1, 2, 5], [], [4], [], [], [], [], [0, 3], []]
    # Triton compiles a kernel again for an address that is no multiple of 16.
    assert (copies.order.data_ptr() - copies.starts.data_ptr()) % 16 == 0


@pytest.mark.gpu
def test_large_shapes_streams_and_graphs() -> None:
    """Keys of a Qwen3-8B layer as views of qkv, 64 completions behind 8 prompts; and offsets beyond 2^31."""
    lengths = [256] * 8 + [1000 + i for i in range(64)]
    bounds = np.cumsum([0, *lengths])
    index = [np.arange(bounds[i], bounds[i + 1]) for i in range(8)]
    for i in range(64):
        index += [np.arange(bounds[i // 8], bounds[i // 8 + 1]), np.arange(bounds[8 + i], bounds[9 + i])]
    copies = Copies.of(np.concatenate(index), int(bounds[-1]), torch.device("cuda"))
    qkv = torch.randn(int(bounds[-1]), 48, 128, device="cuda", dtype=torch.bfloat16)
    d = torch.randn(copies.index.numel(), 8, 128, device="cuda", dtype=torch.bfloat16)
    assert_rule("sum", sum_copies(d, copies), summed_reference(d, copies), summed_reference(d.double(), copies), 2)
    assert_survives_stream_and_graph(lambda: (gather_copies(qkv[:, 32:40], copies), sum_copies(d, copies)))
    wide = torch.zeros(2**20 + 1, 2, 1024, device="cuda", dtype=torch.bfloat16)
    wide[-1] = 1
    last = Copies.of(np.array([2**20, 2**20]), 2**20 + 1, torch.device("cuda"))
    assert gather_copies(wide, last).sum() == 4096 and sum_copies(gather_copies(wide, last), last)[-1].sum() == 4096
