"""Rows between tokens and experts: the accuracy rule, each operation the gradient of another, strides, refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, assert_rule, assert_survives_stream_and_graph
from torch import Tensor

from rlft.kernels.gather import (
    combine,
    combine_launch,
    combine_reference,
    gather,
    gather_launch,
    gather_reference,
    row_dots,
    row_dots_launch,
    row_dots_reference,
)
from rlft.kernels.route import Sorted, sort_reference

# No token; one; columns that no tile divides; several blocks of columns; more rows than a program has.
SHAPES = [(0, 2, 8), (1, 1, 1), (5, 3, 33), (3, 2, 1100), (70, 8, 24)]


def drawn(T: int, k: int, H: int, dtype: torch.dtype, device: str = DEVICE) -> tuple[Sorted, Tensor, Tensor, Tensor]:
    """Sorted choices of 6 experts, tokens x [T, H], sorted rows y [T k, H], weights [T, k] in fp32 or wider."""
    g = torch.Generator().manual_seed(T + H)
    where = sort_reference(torch.randint(6, (T, k), generator=g).to(device), 6)
    x, y = torch.randn(T, H, generator=g), torch.randn(T * k, H, generator=g)
    weights = torch.rand(T, k, generator=g)
    wide = torch.promote_types(dtype, torch.float32)
    return where, x.to(device, dtype), y.to(device, dtype), weights.to(device, wide)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, k, H", SHAPES)
def test_kernels_obey_the_rule(T: int, k: int, H: int, dtype: torch.dtype, weighted: bool) -> None:
    where, x, y, weights = drawn(T, k, H, dtype)
    w, wd = (weights, weights.double()) if weighted else (None, None)
    out = torch.full((T * k, H + 3), 7.0, device=DEVICE, dtype=dtype)
    gather_launch(x, where.order, k, w, out[:, :H])
    want = gather_reference(x, where.order, k, w)
    assert_rule("gather", out[:, :H], want, gather_reference(x.double(), where.order, k, wd), 2)
    assert (out[:, H:] == 7).all() and (weighted or torch.equal(out[:, :H], want))
    for residual in (None, x):
        total = combine_launch(y, where.inverse, w, k, residual, torch.empty_like(x))
        plain = combine_reference(y, where.inverse, w, k, residual)
        true = combine_reference(y.double(), where.inverse, wd, k, None if residual is None else x.double())
        assert_rule("combine", total, plain, true, 2)
    a = y.flip(0)
    assert_rule("dots", row_dots_launch(a, y), row_dots_reference(a, y), row_dots_reference(a.double(), y.double()), 2)


def test_plain_versions_are_a_loop_and_each_is_the_gradient_of_another() -> None:
    (order, inverse, _), x, y, weights = drawn(5, 3, 4, torch.float64, "cpu")
    rows = gather(x, order, 3)
    assert torch.equal(rows, torch.stack([x[i // 3] for i in order.tolist()]))
    places = inverse.view(5, 3).tolist()
    want = torch.stack([sum(weights[t, j] * y[p] for j, p in enumerate(ps)) for t, ps in enumerate(places)])
    torch.testing.assert_close(combine(y, inverse, weights), want)
    for t in (x, y, weights):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_reference(x, order, 3), x)
    assert torch.autograd.gradcheck(lambda y, w: combine_reference(y, inverse, w, 3), (y, weights))
    dout, drows = torch.randn(5, 4, dtype=torch.float64), torch.randn(15, 4, dtype=torch.float64)
    (dx,) = torch.autograd.grad(gather_reference(x, order, 3), x, drows)
    torch.testing.assert_close(combine(drows, inverse, None, k=3), dx)
    torch.testing.assert_close(combine(drows, inverse.view(5, 3), None), dx)
    dy, dw = torch.autograd.grad(combine_reference(y, inverse, weights, 3), (y, weights), dout)
    torch.testing.assert_close(gather(dout, order, 3, weights), dy)
    dots = row_dots(gather(dout, order, 3), y)
    torch.testing.assert_close(dots[inverse.long()].view(5, 3), dw)


def test_rows_with_strides_and_results_in_place() -> None:
    (order, inverse, _), x, y, weights = drawn(6, 2, 20, torch.float32)
    wide_x, wide_y = (torch.full((n, 27), float("nan"), device=DEVICE) for n in (6, 12))
    wide_x[:, :20], wide_y[:, :20] = x, y
    rows = gather_launch(wide_x[:, :20], order, 2, None, torch.empty_like(y))
    assert torch.equal(rows, gather_reference(x, order, 2))
    want = combine_launch(y, inverse, weights, 2, x, torch.empty_like(x))
    combine_launch(wide_y[:, :20], inverse, weights, 2, wide_x[:, :20], wide_x[:, :20])
    assert torch.equal(wide_x[:, :20], want) and wide_x[:, 20:].isnan().all()
    assert torch.equal(row_dots_launch(wide_y[:, :20], y), row_dots_launch(y, y))
    out = torch.empty_like(x)
    assert combine(y, inverse, weights, residual=x, out=out) is out


def test_what_does_not_fit_is_refused() -> None:
    (order, inverse, _), x, y, weights = drawn(4, 2, 8, torch.float32)
    for call in (
        lambda: gather(x, order[1:], 2),
        lambda: gather(x, order.long(), 2),
        lambda: gather(x, order, 2, weights[:3]),
        lambda: gather(x, order, 2, out=y.half()),
        lambda: gather(x.T.contiguous().T, order, 2),
    ):
        with pytest.raises(ValueError, match="gather: want x"):
            call()
    for call in (
        lambda: combine(y, inverse, None),
        lambda: combine(y, inverse, None, k=3),
        lambda: combine(y, inverse, weights, k=1),
        lambda: combine(y, inverse, weights.T.contiguous().T),
        lambda: combine(y, inverse, weights, residual=y),
    ):
        with pytest.raises(ValueError, match="combine: want y"):
            call()
    with pytest.raises(ValueError, match="row_dots: want a and b"):
        row_dots(x, y)


@pytest.mark.gpu
def test_large_shapes_streams_and_graphs() -> None:
    """A Qwen3-30B-A3B layer at 8,192 tokens; and rows beyond 2^31 elements."""
    where, x, y, weights = drawn(8192, 8, 2048, torch.bfloat16, "cuda")
    got, plain = combine(y, where.inverse, weights), combine_reference(y, where.inverse, weights, 8)
    assert_rule("combine", got, plain, combine_reference(y.double(), where.inverse, weights.double(), 8), 2)
    assert torch.equal(gather(x, where.order, 8), x[where.order.long() // 8])
    assert_survives_stream_and_graph(
        lambda: (gather(x, where.order, 8, weights), combine(y, where.inverse, weights), row_dots(y, y))
    )
    wide = torch.zeros(2**20 + 2, 2048, device="cuda", dtype=torch.bfloat16)
    wide[-1] = 1
    last = torch.arange(2**20 + 2, device="cuda", dtype=torch.int32)
    assert gather(wide, last, 1)[-1].sum() == 2048 and combine(wide, last, None, k=1)[-1].sum() == 2048
    assert row_dots(wide, wide)[-1] == 2048
