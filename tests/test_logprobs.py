"""The head without logits, against the formula in float64. Each bug of reference/kernels.md 2.3 that a frozen head on
one device can have is a test here."""

from __future__ import annotations

import math

import pytest
import torch

from rlft.kernels.logprobs import linear_logprobs, linear_logprobs_reference


def make(n: int, h: int, v: int, dtype: torch.dtype = torch.float64, peaked: float = 1.0, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=g)
    # RL-like rows lean towards the row of their target, so that p is near 1.
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64) + (peaked - 1) * weight[targets] / h
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets


OPTIONS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot, softcap": {"temperature": 1.7, "softcap": 5.0},
    "scaled": {"temperature": 0.9, "scale": 0.25},
    "negative scale": {"temperature": 1.0, "scale": -0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("peaked", [1.0, 40.0], ids=["flat", "p near 1"])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100], ids=["chunks of 1", "uneven chunks", "one chunk"])
def test_values_and_gradient_equal_the_formula(options: dict, peaked: float, rows_per_chunk: int) -> None:
    hidden, weight, targets = make(7, 12, 37, peaked=peaked)
    got, entropy = linear_logprobs(hidden, weight, targets, **options, chunk_bytes=4 * 37 * rows_per_chunk)
    want, want_entropy = linear_logprobs_reference(hidden, weight, targets, **options)
    upstream = torch.linspace(-2, 3, 7, dtype=torch.float64)  # a different weight per token, one of them 0-ish
    assert torch.allclose(got, want, atol=1e-12) and torch.allclose(entropy, want_entropy, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, hidden, upstream, retain_graph=True)[0] for x in (got, want))
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_gradcheck_of_formula_and_op() -> None:
    hidden, weight, targets = make(3, 4, 6)
    for op in (linear_logprobs_reference, linear_logprobs):
        assert torch.autograd.gradcheck(lambda h, op=op: op(h, weight, targets, 0.8, 3.0)[0], (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peaked", [1.0, 40.0], ids=["flat", "p near 1"])
def test_error_against_fp64_is_within_the_kernel_rule(dtype: torch.dtype, peaked: float) -> None:
    """At most 2x plain PyTorch's error in the same dtype for values, 3x for gradients."""
    hidden, weight, targets = make(33, 64, 1000, dtype, peaked)
    truth_h = hidden.detach().double().requires_grad_()
    truth, truth_entropy = linear_logprobs_reference(truth_h, weight.double(), targets, 0.9)
    plain_h = hidden.detach().clone().requires_grad_()
    plain_logits = (plain_h @ weight.T) / 0.9
    plain = plain_logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    got, entropy = linear_logprobs(hidden, weight, targets, 0.9)
    for x, h in ((truth, truth_h), (plain, plain_h), (got, hidden)):
        x.sum().backward()
        assert h.grad is not None
    error = [(x.double() - truth).abs().max().item() for x in (plain, got)]
    grad_error = [(h.grad.double() - truth_h.grad).abs().max().item() for h in (plain_h, hidden)]
    assert error[1] <= 2 * error[0] + 1e-7, error
    assert grad_error[1] <= 3 * grad_error[0] + 1e-7, grad_error
    assert (entropy.double() - truth_entropy).abs().max() < 1e-4


def test_two_equal_logits_have_log_half_and_entropy_log_two() -> None:
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[3.0], [3.0]])
    logprob, entropy = linear_logprobs(hidden, weight, torch.tensor([0]), 1.0)
    assert logprob.item() == pytest.approx(math.log(0.5)) and entropy.item() == pytest.approx(math.log(2))


def test_shifting_all_logits_by_100_changes_nothing() -> None:
    hidden, weight, targets = make(4, 6, 9)
    ones = torch.ones(4, 1, dtype=torch.float64)
    shifted = torch.cat([hidden, ones], 1)
    base = linear_logprobs(shifted, torch.cat([weight, torch.zeros(9, 1, dtype=torch.float64)], 1), targets, 1.0)
    moved = linear_logprobs(
        shifted, torch.cat([weight, torch.full((9, 1), 100.0, dtype=torch.float64)], 1), targets, 1.0
    )
    assert torch.allclose(base[0], moved[0], atol=1e-10) and torch.allclose(base[1], moved[1], atol=1e-10)


def test_extreme_logits_stay_finite() -> None:
    """Probabilities underflow to 0 and to 1: entropy is 0, not 0 * -inf, and the gradient has no NaN."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    logprob, entropy = linear_logprobs(hidden, torch.tensor([[1e4], [0.0], [-1e4]]), torch.tensor([2]), 1e-2)
    logprob.sum().backward()
    assert logprob.item() == -2e6 and entropy.item() == 0
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_a_row_with_zero_upstream_gradient_stays_zero_even_when_it_is_not_finite() -> None:
    hidden = torch.tensor([[1.0], [float("inf")]], requires_grad=True)
    logprob, _ = linear_logprobs(hidden, torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0]), 1.0)
    torch.where(torch.tensor([True, False]), logprob, 0).sum().backward()
    assert hidden.grad is not None and hidden.grad[1].item() == 0 and hidden.grad[0].item() != 0


def test_no_rows_and_non_contiguous_rows() -> None:
    hidden, weight, targets = make(4, 6, 9)
    empty, _ = linear_logprobs(hidden[:0], weight, targets[:0], 1.0)
    assert empty.shape == (0,)
    wide = torch.randn(4, 12, dtype=torch.float64)
    strided = linear_logprobs(wide[:, ::2], weight, targets, 1.0)[0]
    assert torch.equal(strided, linear_logprobs(wide[:, ::2].contiguous(), weight, targets, 1.0)[0])


def test_no_grad_keeps_no_jacobian() -> None:
    hidden, weight, targets = make(4, 6, 9)
    with torch.no_grad():
        logprob, _ = linear_logprobs(hidden, weight, targets, 1.0)
    assert not logprob.requires_grad


def test_bad_arguments_say_what_they_got() -> None:
    hidden, weight, targets = make(4, 6, 9)
    with pytest.raises(ValueError, match=r"weight \[V, H\].*got \(4, 6\), \(6, 9\), \(4,\)"):
        linear_logprobs(hidden, weight.T, targets, 1.0)
    with pytest.raises(ValueError, match="temperature = 0"):
        linear_logprobs(hidden, weight, targets, 0)
    with pytest.raises(ValueError, match="the head is frozen"):
        linear_logprobs(hidden, weight.clone().requires_grad_(), targets, 1.0)
