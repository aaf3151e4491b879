"""short_conv: the reference is transformers' per sequence, the kernels obey the accuracy rule, prefixes, refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule, assert_survives_stream_and_graph
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn

from rlft.kernels.short_conv import (
    ConvRows,
    _ShortConv,
    short_conv,
    short_conv_backward,
    short_conv_forward,
    short_conv_reference,
)

pytestmark = QUIET

PACKED = [
    ([], []),  # nothing to do
    ([1], [-1]),  # one row
    ([5, 1, 0, 40, 2], [-1] * 5),  # short ones, an empty one, one over several programs
    ([9, 3, 5], [-1, 0, -1]),  # a prefix with one suffix, and one without
    ([2, 6, 4, 1, 0, 7, 3], [-1, -1, 0, 0, 0, 1, 0]),  # prefix shorter than the taps, suffixes out of order
    ([0, 1, 4, 3, 2], [-1, -1, 0, 1, 1]),  # an empty prefix, and one of a single row
]


def tables(lengths: list[int], prefix: list[int]) -> tuple[Tensor, Tensor]:
    """cu_seqlens and prefix."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return bounds.to(DEVICE), torch.tensor(prefix, dtype=torch.int32, device=DEVICE)


def draw(t: int, c: int, k: int, dtype: torch.dtype, bias: bool = True) -> list[Tensor | None]:
    """x (half of a wider buffer), weight, bias, dy."""
    torch.manual_seed(3)
    drawn = [torch.randn(t, 2 * c)[:, :c], torch.randn(c, k), torch.randn(c) if bias else None, torch.randn(t, c)]
    return [None if one is None else one.to(DEVICE, dtype) for one in drawn]


def by_autograd(inputs: list[Tensor | None], dtype: torch.dtype, *rest) -> list[Tensor]:
    """y and dx by autograd of the reference in a dtype."""
    x, weight, bias, dy = (None if one is None else one.detach().to(dtype) for one in inputs)
    assert x is not None and weight is not None and dy is not None
    x.requires_grad_()
    y = short_conv_reference(x, weight, bias, *rest)
    return [y.detach(), torch.autograd.grad(y, x, dy)[0] if x.numel() else torch.zeros_like(x)]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_transformers_for_each_sequence(bias: bool, activation: str | None) -> None:
    cu, prefix = (table.cpu() for table in tables([2, 6, 4, 7], [-1, -1, 0, 1]))
    x, weight, b, _ = (None if one is None else one.cpu() for one in draw(19, 8, 4, torch.float64, bias))
    assert x is not None and weight is not None
    found = short_conv_reference(x, weight, b, cu, prefix, activation).split([2, 6, 4, 7])
    first, second, third, fourth = x.split([2, 6, 4, 7])
    for rows, skipped, got in (
        (first, 0, found[0]),
        (second, 0, found[1]),
        (torch.cat([first, third]), 2, found[2]),
        (torch.cat([second, fourth]), 6, found[3]),
    ):
        alone = causal_conv1d_fn(rows.T[None], weight, b, activation=activation)[0].T[skipped:]
        torch.testing.assert_close(got, alone, atol=1e-12, rtol=1e-12)


def test_gradcheck_of_the_reference() -> None:
    cu, prefix = (table.cpu() for table in tables([2, 3, 1], [-1, 0, 0]))
    x, weight, bias, _ = (None if one is None else one.cpu() for one in draw(6, 2, 3, torch.float64))
    assert x is not None
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: short_conv_reference(x, weight, bias, cu, prefix, "silu"), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("c, k, bias", [(48, 4, True), (200, 3, False), (16, 2, True)])
@pytest.mark.parametrize("packed", PACKED, ids=lambda packed: "-".join(map(str, packed[0])) or "none")
def test_kernel_obeys_the_rule(packed, c: int, k: int, bias: bool, activation: str | None, dtype: torch.dtype) -> None:
    cu, prefix = tables(*packed)
    inputs = draw(sum(packed[0]), c, k, dtype, bias)
    plain, truth = (by_autograd(inputs, d, cu, prefix, activation) for d in (dtype, torch.float64))
    x, weight, b, dy = inputs
    assert x is not None and weight is not None and dy is not None
    rows = ConvRows.of(cu, prefix, x.shape[0])
    assert_rule("y", short_conv_forward(x, weight, b, rows, activation), plain[0], truth[0], 2)
    assert_rule("dx", short_conv_backward(dy, x, weight, b, rows, activation), plain[1], truth[1], 3)


def test_function_takes_any_layout_and_agrees_bit_for_bit_with_itself() -> None:
    cu, prefix = tables([5, 6, 4, 9], [-1, 0, 0, 0])
    x, weight, bias, dy = draw(24, 40, 4, torch.float32)
    assert x is not None and weight is not None and dy is not None
    rows = ConvRows.of(cu, prefix, 24)
    apart = x.T.contiguous().T.requires_grad_()  # columns far apart
    expected = torch.autograd.grad(short_conv_reference(apart, weight, bias, cu, prefix, "silu"), apart, dy)[0]
    runs = []
    for _ in range(2):
        y = _ShortConv.apply(apart, weight, bias, rows, "silu")
        runs.append(torch.autograd.grad(y, apart, dy.T.contiguous().T)[0])  # type: ignore[arg-type]
    torch.testing.assert_close(runs[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(*runs)


def test_what_does_not_fit_is_refused_by_name() -> None:
    cu, prefix = tables([3, 2], [-1, 0])
    x, weight, bias, dy = draw(5, 16, 4, torch.float32)
    assert x is not None and weight is not None and dy is not None
    with pytest.raises(ValueError, match="short_conv: activation = 'relu': want one of None, 'silu'"):
        short_conv(x, weight, bias, cu, prefix, "relu")
    with pytest.raises(ValueError, match=r"short_conv: want .*; got x \(5, 16\) float32"):
        short_conv(x, weight[:8], bias, cu, prefix)
    with pytest.raises(ValueError, match=r"short_conv: want .*cu_seqlens"):
        short_conv(x, weight, bias, cu, prefix[:1])
    with pytest.raises(ValueError, match="short_conv: weight or bias requires a gradient"):
        short_conv(x, weight.detach().requires_grad_(), bias, cu, prefix)
    rows = ConvRows.of(cu, prefix, 5)
    with pytest.raises(ValueError, match=r"short_conv_forward: want .*2 <= K <= 4"):
        short_conv_forward(x, torch.ones(16, 5, device=DEVICE), bias, rows)
    with pytest.raises(ValueError, match="short_conv_backward: want"):
        short_conv_backward(dy[:4], x, weight, bias, rows)


def test_public_function_on_the_cpu_is_the_reference() -> None:
    cu, prefix = (table.cpu() for table in tables([3, 2], [-1, 0]))
    x, weight, bias, _ = (None if one is None else one.cpu() for one in draw(5, 16, 4, torch.float64))
    assert x is not None and weight is not None
    expected = short_conv_reference(x, weight, bias, cu, prefix, "silu")
    assert torch.equal(short_conv(x, weight, bias, cu, prefix, "silu"), expected)


@pytest.mark.gpu
def test_gpu_rule_and_bits_in_bf16_at_the_width_of_qwen3_next() -> None:
    cu, prefix = tables([300, 1, 700, 40, 90], [-1, -1, 0, 0, 0])
    inputs = draw(1131, 8192, 4, torch.bfloat16, bias=False)
    plain, truth = (by_autograd(inputs, d, cu, prefix, "silu") for d in (torch.bfloat16, torch.float64))
    x, weight, _, dy = inputs
    assert x is not None and weight is not None and dy is not None
    rows = ConvRows.of(cu, prefix, 1131)
    assert_rule("y", short_conv_forward(x, weight, None, rows, "silu"), plain[0], truth[0], 2)
    assert_rule("dx", short_conv_backward(dy, x, weight, None, rows, "silu"), plain[1], truth[1], 3)
    assert_survives_stream_and_graph(lambda: [short_conv_forward(x, weight, None, rows, "silu")])
    assert_survives_stream_and_graph(lambda: [short_conv_backward(dy, x, weight, None, rows, "silu")])
    leaf = x.detach().requires_grad_()
    y = short_conv(leaf, weight, None, cu, prefix, "silu")
    assert "ShortConv" in type(y.grad_fn).__name__
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], short_conv_backward(dy, x, weight, None, rows, "silu"))
