"""The head without logits, against the formula in float64. Each bug that is known of such heads and can
occur on one device has a test here. On a CPU the kernels run in Triton's interpreter, with `-m gpu` compiled."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from heads import OPTIONS, by_kernels, make
from torch import Tensor

from rlft.kernels.logprobs import CHUNK_BYTES, chunk_rows, launch_scale_rows, linear_logprobs, linear_logprobs_reference


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("peaked", [1.0, 40.0], ids=["flat", "p near 1"])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100], ids=["chunks of 1", "uneven chunks", "one chunk"])
def test_values_and_gradient_equal_the_formula(options: dict, peaked: float, rows_per_chunk: int) -> None:
    hidden, weight, targets = make(7, 12, 37, peaked=peaked)
    got, entropy = linear_logprobs(hidden, weight, targets, **options, chunk_bytes=16 * 37 * rows_per_chunk)
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


def test_results_may_be_written_to() -> None:
    h, w, t = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    logprobs, entropy = linear_logprobs(h.requires_grad_(), w, t, 1.0)
    entropy.clamp_(max=0.0)
    logprobs.mul_(2).sum().backward()
    twice = h.grad
    h.grad = None
    (2 * linear_logprobs(h, w, t, 1.0)[0]).sum().backward()
    assert twice is not None and h.grad is not None and torch.equal(twice, h.grad) and twice.any()


def test_no_grad_keeps_no_jacobian() -> None:
    hidden, weight, targets = make(4, 6, 9)
    with torch.no_grad():
        logprob, _ = linear_logprobs(hidden, weight, targets, 1.0)
    assert not logprob.requires_grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_entropy_can_carry_a_gradient(options: dict) -> None:
    """One certain row: p (log p + entropy) is 0 there, not 0 * -inf."""
    hidden, weight, targets = make(5, 12, 37, peaked=40.0)
    with torch.no_grad():
        hidden[0] *= 1e4
    both = linear_logprobs(hidden, weight, targets, **options, chunk_bytes=16 * 37 * 2, entropy_grad=True)
    want = linear_logprobs_reference(hidden, weight, targets, **options)
    upstream = [torch.linspace(-2, 3, 5, dtype=torch.float64), torch.linspace(1, -1, 5, dtype=torch.float64)]
    ours, theirs = (torch.autograd.grad(x, hidden, upstream)[0] for x in (both, want))
    assert torch.allclose(ours[1:], theirs[1:], atol=1e-12) and ours[0].isfinite().all()


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_a_trainable_head_gets_its_gradient(entropy_grad: bool) -> None:
    hidden, weight, targets = make(7, 6, 11)
    weight.requires_grad_()
    for inputs in ((weight,), (hidden, weight)):
        for leaf in (hidden, weight):
            leaf.requires_grad_(any(leaf is x for x in inputs))
        got = linear_logprobs(hidden, weight, targets, 0.7, 4.0, 0.5, 16 * 11 * 3, entropy_grad)
        want = linear_logprobs_reference(hidden, weight, targets, 0.7, 4.0, 0.5)
        upstream = torch.linspace(-2, 3, 7, dtype=torch.float64)
        loss = [(x[0] * upstream).sum() + (x[1].cos().sum() if entropy_grad else 0) for x in (got, want)]
        for ours, theirs in zip(*(torch.autograd.grad(x, inputs) for x in loss), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-12) and theirs.abs().max() > 1e-2


@pytest.mark.gpu
def test_a_second_backward_raises_where_the_first_was_in_place() -> None:
    hidden, weight, targets = (x.detach().cuda() for x in make(4, 6, 9, torch.float32))
    hidden.requires_grad_()
    total = linear_logprobs(hidden, weight, targets, 1.0)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran before"):
        total.backward()


def test_rows_of_a_chunk_follow_from_the_budget() -> None:
    assert chunk_rows(151_936, torch.bfloat16) == 512
    assert chunk_rows(151_936, torch.bfloat16, CHUNK_BYTES // 2) == 256
    assert chunk_rows(151_936, torch.bfloat16, 1) == 1


# ---- the kernels -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU the test below runs the kernels")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("peaked", [1.0, 60.0, -400.0], ids=["flat", "p near 1", "target far below the maximum"])
@pytest.mark.parametrize(("vocab", "block"), [(37, 64), (64, 16), (129, 32)], ids=["one split", "even", "odd"])
def test_kernels_through_the_interpreter(options: dict, peaked: float, vocab: int, block: int) -> None:
    """fp32, against the formula in fp64; the far target takes the second pass of the finishing kernel."""
    hidden, weight, targets = (x.detach() for x in make(5, 16, vocab, torch.float32, peaked))
    settings = {"temperature": 1.0, "softcap": None, "scale": 1.0} | options
    chunk, *jacobians = by_kernels(hidden, weight, targets, **settings, block=block, pad=3)
    truth_h = hidden.double().requires_grad_()
    truth, entropy = linear_logprobs_reference(truth_h, weight.double(), targets, **settings)
    gradients = [torch.autograd.grad(x.sum(), truth_h, retain_graph=True)[0] for x in (truth, entropy)]
    if peaked < 0 and settings["temperature"] < 1:
        assert truth.min() < -100  # or no row was done again
    assert torch.allclose(chunk.logprob.double(), truth, rtol=2e-5, atol=2e-5)
    assert torch.allclose(chunk.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    # fp32 logits of some hundreds are off by 1e-5, and so are the exponentials, relatively.
    for jacobian, gradient in zip(jacobians, gradients, strict=True):
        assert torch.allclose(jacobian.double(), gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item() + 1e-9)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the kernels on CPU tensors")
def test_a_certain_target_keeps_its_small_log_prob_and_jacobian() -> None:
    """1 - p_t = 1e-9: below what fp32 can tell from 1, and exact because the target is left out of the sums."""
    hidden, weight = torch.tensor([[20.7]]), torch.tensor([[1.0], [0.0], [0.0]])
    chunk, jacobian, by_entropy = by_kernels(hidden, weight, torch.tensor([0]), 1.0, None, 1.0, 4)
    miss = 2 * math.exp(-20.7)
    assert chunk.logprob.item() == pytest.approx(-miss, rel=1e-5) and jacobian.item() == pytest.approx(miss, rel=1e-5)
    assert chunk.own.item() == pytest.approx(-20.7 * miss, rel=1e-5)
    assert by_entropy.item() == pytest.approx(-20.7 * miss, rel=1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the kernels on CPU tensors")
def test_rows_are_scaled_in_place_and_zero_stays_zero() -> None:
    jacobian = torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 1.0, 1.0]])
    launch_scale_rows(jacobian, torch.tensor([0.5, 0.0]), jacobian)
    assert jacobian.tolist() == [[0.5, 1.0, 1.5], [0.0, 0.0, 0.0]]


def errors(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> dict[str, tuple[float, float]]:
    """(plain PyTorch's error, ours) against fp64, as norms: log-prob, entropy, gradient under a random upstream."""
    upstream = torch.randn(hidden.shape[0], device=hidden.device, generator=None)
    found: dict[str, list[Tensor]] = {}
    for name in ("truth", "plain", "ours"):
        h = hidden.detach().clone().requires_grad_()
        if name == "truth":
            h = hidden.detach().double().requires_grad_()
            lp, entropy = linear_logprobs_reference(h, weight.double(), targets, **options)
        elif name == "plain":
            log_p = ((h @ weight.T) / options["temperature"]).log_softmax(-1)
            lp = log_p.gather(1, targets[:, None]).squeeze(1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        else:
            lp, entropy = linear_logprobs(h, weight, targets, **options)
        (lp * upstream.to(lp.dtype)).sum().backward()
        assert h.grad is not None
        found[name] = [x.detach().double() for x in (lp, entropy, h.grad)]
    return {
        name: tuple(float((found[w][i] - found["truth"][i]).norm()) for w in ("plain", "ours"))
        for i, name in enumerate(("logprob", "entropy", "gradient"))
    }  # type: ignore[return-value]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("peaked", [1.0, 40.0, -40.0], ids=["flat", "p near 1", "far"])
@pytest.mark.parametrize(
    ("n", "h", "v"),
    [(1, 64, 17), (7, 128, 32000), (129, 256, 49152), (700, 512, 151_936), (515, 576, 151_673)],
    ids=["one row", "few rows", "SmolLM2's vocabulary", "two chunks", "odd vocabulary"],
)
def test_the_kernel_rule_on_the_gpu(dtype: torch.dtype, peaked: float, n: int, h: int, v: int) -> None:
    hidden, weight, targets = (x.detach().cuda() for x in make(n, h, v, dtype, peaked))
    hidden = hidden * (2 / h**0.5) if peaked == 1.0 else hidden * (1 / h**0.5)
    found = errors(hidden, weight, targets, temperature=0.9)
    slack = 1e-5 * n**0.5
    assert found["logprob"][1] <= 2 * found["logprob"][0] + slack, found
    assert found["entropy"][1] <= 2 * found["entropy"][0] + slack, found
    assert found["gradient"][1] <= 3 * found["gradient"][0] + slack, found
    if dtype == torch.bfloat16 and peaked == 1.0 and v > 1000:
        assert found["logprob"][1] < 0.1 * found["logprob"][0], found  # what fp32 logits are for


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits() -> None:
    """15,000 x 151,936 > 2^31: each row equals the row computed by itself."""
    hidden, weight, targets = (x.detach().cuda() for x in make(64, 128, 151_936, torch.bfloat16))
    many = hidden.repeat(235, 1).requires_grad_()
    lp, _ = linear_logprobs(many, weight, targets.repeat(235), 1.0)
    lp.sum().backward()
    one = hidden.clone().requires_grad_()
    lp_one, _ = linear_logprobs(one, weight, targets, 1.0)
    lp_one.sum().backward()
    assert many.numel() // 128 * 151_936 > 2**31
    assert torch.allclose(lp, lp_one.repeat(235), atol=1e-5)
    assert many.grad is not None and one.grad is not None
    assert torch.allclose(many.grad, one.grad.repeat(235, 1), rtol=0.02, atol=1e-3)


@pytest.mark.gpu
def test_memory_stays_within_the_budget_and_two_runs_are_bit_equal() -> None:
    hidden, weight, targets = (x.detach().cuda() for x in make(4096, 1024, 151_936, torch.bfloat16))
    results = []
    for _ in range(2):
        h = hidden.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        lp, entropy = linear_logprobs(h, weight, targets, 1.0)
        lp.sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
        results.append((lp, entropy, h.grad))
        jacobian = h.numel() * h.element_size()
        assert peak - jacobian < CHUNK_BYTES + 24 * 2**20, peak
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_a_side_stream_and_a_cuda_graph() -> None:
    hidden, weight, targets = (x.detach().cuda() for x in make(200, 256, 32000, torch.bfloat16))
    want = linear_logprobs(hidden, weight, targets, 1.0)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = linear_logprobs(hidden, weight, targets, 1.0)[0]
    side.synchronize()
    assert torch.equal(got, want)
    static = hidden.clone().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lp, _ = linear_logprobs(static, weight, targets, 1.0)
        (gradient,) = torch.autograd.grad(lp.sum(), static)
    with torch.no_grad():
        static.copy_(hidden.roll(1, 0))
    graph.replay()
    fresh = hidden.roll(1, 0).requires_grad_()
    lp_fresh, _ = linear_logprobs(fresh, weight, targets, 1.0)
    lp_fresh.sum().backward()
    assert torch.equal(lp, lp_fresh) and torch.equal(gradient, fresh.grad)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the kernels on CPU tensors")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_logit_that_is_not_a_number_stays_one() -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [float("nan")], [2.0]])
    chunk, *jacobians = by_kernels(hidden, weight, torch.tensor([0]), 1.0, None, 1.0, 4)
    assert chunk.logprob.isnan().all() and chunk.entropy.isnan().all() and all(j.isnan().all() for j in jacobians)


@pytest.mark.gpu
def test_a_target_outside_the_vocabulary_is_nan_on_the_gpu() -> None:
    hidden, weight, _ = (x.detach().cuda() for x in make(3, 64, 100, torch.bfloat16))
    lp, _ = linear_logprobs(hidden, weight, torch.tensor([0, 100, -100], device="cuda"), 1.0)
    assert lp.isnan().tolist() == [False, True, True]


def test_bad_arguments_say_what_they_got() -> None:
    hidden, weight, targets = make(4, 6, 9)
    with pytest.raises(
        ValueError, match=r"weight \[V, H\].*got hidden \(4, 6\) float64.*weight \(6, 9\).*targets \(4,\)"
    ):
        linear_logprobs(hidden, weight.T, targets, 1.0)
    with pytest.raises(ValueError, match=r"of one float dtype.*hidden \(4, 6\) float32.*weight \(9, 6\) float64"):
        linear_logprobs(hidden.float(), weight, targets, 1.0)
    with pytest.raises(ValueError, match=r"targets \[N\] int64; got .*targets \(4,\) int32"):
        linear_logprobs(hidden, weight, targets.int(), 1.0)
    with pytest.raises(ValueError, match="temperature = 0"):
        linear_logprobs(hidden, weight, targets, 0)
