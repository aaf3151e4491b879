"""Routing and products of experts against loops over tokens, in float64, for every way that rows can fall."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlft.kernels.gather import combine, gather
from rlft.kernels.grouped import grouped, grouped_transposed
from rlft.kernels.grouped_gradient import grouped_gradient
from rlft.kernels.route import sort_by_expert

E, N, K = 5, 6, 7
CHOICES = {
    "spread": torch.tensor([[4, 0], [0, 2], [2, 4], [0, 4]]),
    "all in one": torch.full((4, 1), 3),
    "one token": torch.tensor([[1, 4, 0]]),
    "no token": torch.zeros(0, 2, dtype=torch.int64),
    "bytes": torch.tensor([[4, 0], [0, 2]], dtype=torch.uint8),
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_rows_are_sorted_stably_and_counted(chosen: Tensor) -> None:
    order, inverse, offsets = sort_by_expert(chosen, E)
    flat = chosen.reshape(-1).tolist()
    wanted = sorted(range(len(flat)), key=lambda i: flat[i])
    assert order.tolist() == wanted and [order[i].item() for i in inverse.tolist()] == list(range(len(flat)))
    assert offsets.tolist() == [sum(e < bound for e in flat) for bound in range(E + 1)]
    assert {order.dtype, inverse.dtype, offsets.dtype} == {torch.int32}


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_products_are_those_of_each_rows_expert(chosen: Tensor) -> None:
    (tokens, k), order, inverse, offsets = chosen.shape, *sort_by_expert(chosen, E)
    x, w, bias, weights = random(tokens, K), random(E, N, K), random(E, N), random(tokens, k)
    y = grouped(gather(x, order, k), w, offsets, bias=bias)
    out = combine(y, inverse, weights, k)
    assert y.shape == (tokens * k, N) and out.shape == (tokens, N)
    for t in range(tokens):
        experts = chosen[t].long()
        wanted = (weights[t, :, None] * (w[experts] @ x[t] + bias[experts])).sum(0)
        assert torch.allclose(out[t], wanted, atol=1e-12, rtol=0)
    of_rows = chosen.reshape(-1)[order.long()].long()
    back = grouped_transposed(y, w, offsets, torch.full((tokens * k, K), 9.0, dtype=torch.float64))
    assert torch.allclose(back, torch.einsum("mn,mnk->mk", y, w[of_rows]), atol=1e-12, rtol=0)
    start = random(E, N, K)
    gradient = grouped_gradient(y, gather(x, order, k), offsets, start.clone(), accumulate=True)
    outer = torch.einsum("mn,mk->mnk", y, gather(x, order, k))
    assert torch.allclose(gradient, start.index_add(0, of_rows, outer), atol=1e-12, rtol=0)
    alone = grouped_gradient(y, gather(x, order, k), offsets, torch.full_like(start, 9.0))
    assert torch.allclose(alone, gradient - start, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_combine_is_the_transpose_of_gather(chosen: Tensor) -> None:
    (tokens, k), order, inverse, _ = chosen.shape, *sort_by_expert(chosen, E)
    x, y = random(tokens, N), random(tokens * k, N)
    assert (gather(x, order, k) * y).sum() == pytest.approx(float((x * combine(y, inverse, None, k)).sum()), abs=1e-12)


def test_sums_of_16_bit_rows_are_in_fp32() -> None:
    """256 + 1 + 1 is 256 in bfloat16."""
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    order, inverse, _ = sort_by_expert(torch.tensor([[0, 1, 2]]), E)
    assert combine(y[order.long()], inverse, None, 3).item() == 258
    rows = torch.ones(3, 1, dtype=torch.bfloat16)
    out = grouped_gradient(y, rows, torch.tensor([0, 3, 3], dtype=torch.int32), torch.empty(2, 1, 1))
    assert out.flatten().tolist() == [258, 0]
