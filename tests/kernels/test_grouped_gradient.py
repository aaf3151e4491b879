"""Gradients of each expert's factors: the accuracy rule, shares of rows, strides of out, refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule, assert_survives_stream_and_graph
from test_grouped import ROWS, drawn, offsets_of
from torch import Tensor

from rlft.kernels.grouped import grouped_reference
from rlft.kernels.grouped_gradient import grouped_gradient, grouped_gradient_launch, grouped_gradient_reference

pytestmark = QUIET

SHAPES = [*((case, 40, 3) for case in ROWS), *(("the last without", *PQ) for PQ in ((2, 33), (70, 70), (260, 16)))]
"""Rows, P and Q: dB; dA; neither thin, several blocks of R; several tiles of columns."""


def compute(a: Tensor, b: Tensor, offsets: Tensor, start: Tensor, accumulate: bool, dtype: torch.dtype) -> Tensor:
    """By the reference in a dtype: products of that dtype, as plain PyTorch has them."""
    out = start.to(dtype)
    if dtype == torch.float64:
        grouped_gradient_reference(a.double(), b.double(), offsets, out, accumulate, 0.7)
        return out
    for e, (first, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        gradient = (a[first:end].T @ b[first:end]).to(dtype) * 0.7
        out[e] = out[e] + gradient if accumulate else gradient
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, P, Q", SHAPES)
def test_the_kernels_obey_the_rule(case: str, P: int, Q: int, dtype: torch.dtype) -> None:
    rows = ROWS[case][:8]
    a, b, *_ = drawn(rows, Q, P, dtype)
    offsets = offsets_of(rows)
    for accumulate, share in ((False, 16), (True, 16)) if P == 40 else ((True, None),):
        start = torch.randn(len(rows), P, Q, device=DEVICE)
        got = start.clone()
        grouped_gradient_launch(a, b, offsets, got, accumulate, 0.7, share=share)
        plain, truth = (compute(a, b, offsets, start, accumulate, d) for d in (torch.float32, torch.float64))
        assert_rule(f"out, {accumulate}, {share}", got, plain, truth, 2)


def test_it_is_the_gradient_of_the_weights() -> None:
    rows = [2, 0, 3]
    x, dy, w, _ = (t.requires_grad_() for t in drawn(rows, 4, 3, torch.float64, "cpu"))
    offsets = offsets_of(rows, "cpu")
    (want,) = torch.autograd.grad(grouped_reference(x, w, offsets), w, dy)
    out = torch.full_like(w, float("nan"), requires_grad=False)
    grouped_gradient(dy.detach(), x.detach(), offsets, out, accumulate=False)
    torch.testing.assert_close(out, want)
    grouped_gradient(dy.detach(), x.detach(), offsets, out, accumulate=True, scale=0.5)
    torch.testing.assert_close(out, 1.5 * want)


@pytest.mark.parametrize("share", [None, 16])
def test_out_may_be_a_view_of_pefts_parameter(share: int | None) -> None:
    """PEFT keeps B of all experts as [N, rank * experts], the column of rank r and expert e being r experts + e."""
    rows, rank, N = [5, 0, 40], 4, 20
    dy, s, *_ = drawn(rows, rank, N, torch.float32)
    offsets, grad = offsets_of(rows), torch.zeros(N, rank * 3, device=DEVICE)
    view = grad.view(N, rank, 3).permute(2, 0, 1)
    grouped_gradient_launch(dy, s, offsets, view, True, 2.0, share=share)
    for e, (first, end) in enumerate(((0, 5), (5, 5), (5, 45))):
        torch.testing.assert_close(grad[:, e::3], 2.0 * dy[first:end].T @ s[first:end])


def test_rows_may_have_strides() -> None:
    rows = [7, 30]
    a, b, *_ = drawn(rows, 5, 24, torch.float32)
    wide = torch.full((37, 40), float("nan"), device=DEVICE)
    wide[:, :24], wide[:, 24:29] = a, b
    want, got = (torch.empty(2, 24, 5, device=DEVICE) for _ in range(2))
    grouped_gradient_launch(a, b, offsets_of(rows), want, False)
    grouped_gradient_launch(wide[:, :24], wide[:, 24:29], offsets_of(rows), got, False)
    assert torch.equal(got, want)


def test_what_does_not_fit_is_refused() -> None:
    a, b, *_ = drawn([2, 3], 8, 16, torch.float32)
    offsets, out = offsets_of([2, 3]), torch.zeros(2, 16, 8, device=DEVICE)
    for call in (
        lambda: grouped_gradient(a, b[1:], offsets, out, True),
        lambda: grouped_gradient(b, a, offsets, out, True),
        lambda: grouped_gradient(a, b.half(), offsets, out, True),
        lambda: grouped_gradient(a, b, offsets[1:], out, True),
        lambda: grouped_gradient(a, b, offsets, out.half(), True),
    ):
        with pytest.raises(ValueError, match=r"grouped_gradient: want a \[M, P\]"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [[512] * 128, [0] * 127 + [65536], [1] * 128], ids=["even", "one", "few"])
@pytest.mark.parametrize("P, Q", [(1536, 16), (2, 2048), (64, 2048)])
def test_gpu(rows: list[int], P: int, Q: int) -> None:
    M, offsets = sum(rows), offsets_of(rows)
    a, b = (torch.randn(M, n, device="cuda", dtype=torch.bfloat16) for n in (P, Q))
    start = torch.randn(128, P, Q, device="cuda")
    plain, truth = (compute(a, b, offsets, start, True, dtype) for dtype in (torch.float32, torch.float64))

    def run() -> list[Tensor]:
        return [grouped_gradient(a, b, offsets, start.clone(), True, 0.7)]

    assert_rule("out", run()[0], plain, truth, 2)
    assert_survives_stream_and_graph(run)
