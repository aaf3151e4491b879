"""rms_norm: the reference is transformers', the kernels obey the accuracy rule, every layout, every refusal."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, assert_rule, assert_survives_stream_and_graph
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from rlft.kernels.rms_norm import (
    GEMMA,
    LLAMA,
    MAX_H,
    OLMO,
    _AddRmsNorm,
    _RmsNorm,
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)

EPS = 1e-5
SHAPES = [
    (0, 64),  # nothing to do
    (1, 64),  # one row in a program of 32
    (65, 64),  # three programs, the last with one row
    (7, 48),  # H no power of two
    (3, 250),  # H even and no multiple of 8: no 16-byte loads
    (5, 2),  # the shortest
]


def draw(t: int, h: int, dtype: torch.dtype, hard: bool = False, seed: int = 0) -> list[Tensor]:
    """x, delta, weight, dy, dres. Hard: rows where eps decides, a row of one outlier, a row of zeros."""
    torch.manual_seed(seed)
    x, delta, dy, dres = (torch.randn(t, h) for _ in range(4))
    weight = torch.randn(h)
    if hard:
        x[::4], delta[::4] = x[::4] * 1e-3, delta[::4] * 1e-3
        x[1::4, 0] = 3e3
        x[2::4], delta[2::4] = 0, 0
    return [v.to(DEVICE, dtype) for v in (x, delta, weight, dy, dres)]


def gradients(dtype: torch.dtype, inputs: list[Tensor], style: int, add: bool) -> list[Tensor]:
    """y, x', dx by autograd of the reference in a dtype."""
    x, delta, weight, dy, dres = (v.detach().to(dtype) for v in inputs)
    x = x.detach().requires_grad_()
    if not add:
        y = rms_norm_reference(x, weight, EPS, style)
        return [y.detach(), x.detach(), *torch.autograd.grad(y, x, dy)]
    y, total = add_rms_norm_reference(x, delta, weight, EPS, style)
    return [y.detach(), total.detach(), *torch.autograd.grad([y, total], x, [dy, dres])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    x, delta, weight, *_ = draw(9, 48, dtype)
    x, delta, weight = x.cpu(), delta.cpu(), weight.cpu()
    norms = (LlamaRMSNorm(48, EPS), Gemma3RMSNorm(48, EPS), Olmo2RMSNorm(48, EPS))
    for style, norm in enumerate(norms):
        norm.weight.data = weight
        assert torch.equal(rms_norm_reference(x, weight, EPS, style), norm(x))
        y, total = add_rms_norm_reference(x, delta, weight, EPS, style)
        assert torch.equal(total, x + delta) and torch.equal(y, norm(x + delta))


@pytest.mark.parametrize("style", [LLAMA, GEMMA, OLMO])
def test_gradcheck_of_the_reference(style: int) -> None:
    x, delta, weight, *_ = (v.cpu().double() for v in draw(3, 6, torch.float32))
    x.requires_grad_()
    delta.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: rms_norm_reference(a, weight, EPS, style), x)
    assert torch.autograd.gradcheck(lambda a, b: add_rms_norm_reference(a, b, weight, EPS, style), (x, delta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [False, True], ids=["randn", "hard"])
@pytest.mark.parametrize("add", [False, True], ids=["plain", "add"])
@pytest.mark.parametrize("style", [LLAMA, GEMMA, OLMO], ids=["llama", "gemma", "olmo"])
@pytest.mark.parametrize("t, h", SHAPES)
def test_kernel_obeys_the_rule(t: int, h: int, style: int, add: bool, hard: bool, dtype: torch.dtype) -> None:
    inputs = draw(t, h, dtype, hard)
    plain, truth = gradients(dtype, inputs, style, add), gradients(torch.float64, inputs, style, add)
    x, delta, weight, dy, dres = inputs
    y, rstd, total = rms_norm_forward(x, weight, EPS, style, delta=delta if add else None)
    dx = rms_norm_backward(dy, total, weight, rstd, style, dres=dres if add else None)
    assert torch.equal(total, plain[1])
    assert rstd.shape == (t,) and rstd.dtype == torch.float32
    assert_rule("y", y, plain[0], truth[0], 2)
    assert_rule("dx", dx, plain[2], truth[2], 3)


def test_strides_tails_and_buffers_that_the_caller_owns() -> None:
    x, delta, weight, dy, dres = draw(5, 32, torch.float32)
    y, rstd, total = rms_norm_forward(x, weight, EPS, delta=delta)
    dx = rms_norm_backward(dy, total, weight, rstd, dres=dres)

    # x is a slice of a wider buffer, y goes into rows with a tail for LoRA, x' over delta.
    wide = torch.full((5, 80), float("nan"), device=DEVICE)
    wide[:, 16:48] = x
    tailed = torch.full((5, 40), float("nan"), device=DEVICE)
    own = delta.clone()
    y2, _, total2 = rms_norm_forward(wide[:, 16:48], weight, EPS, delta=own, out=tailed[:, :32], total_out=own)
    assert torch.equal(y2, y) and y2.data_ptr() == tailed.data_ptr()
    assert torch.equal(own, total) and total2 is own
    assert tailed[:, 32:].isnan().all()

    # dx over dy, then over dres.
    for over in ("dy", "dres"):
        a, b = dy.clone(), dres.clone()
        out = {"dy": a, "dres": b}[over]
        assert rms_norm_backward(a, total, weight, rstd, dres=b, dx_out=out) is out
        assert torch.equal(out, dx)


def test_functions_take_any_layout_and_backward_once() -> None:
    x, delta, weight, dy, dres = (v[..., None, :] if v.dim() > 1 else v for v in draw(4, 16, torch.float32))
    x = x.transpose(0, 1).repeat(3, 1, 1).transpose(0, 1)  # [4, 3, 16], not contiguous
    delta, dy, dres = (v.repeat(1, 3, 1) for v in (delta, dy, dres))
    x, delta = x.detach().requires_grad_(), delta.detach().requires_grad_()

    y = _RmsNorm.apply(x, weight, EPS, False)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (truth,) = torch.autograd.grad(rms_norm_reference(x, weight, EPS), x, dy)
    torch.testing.assert_close(dx, truth, atol=1e-5, rtol=1e-5)
    # An expanded gradient, as .sum() sends it: all strides 0.
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x, retain_graph=True)[0],
        torch.autograd.grad(rms_norm_reference(x, weight, EPS).sum(), x)[0],
        atol=1e-5,
        rtol=1e-5,
    )
    (dx,) = torch.autograd.grad(y, x, dy.clone().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_add_function_passes_either_gradient_alone() -> None:
    x, delta, weight, dy, dres = draw(4, 16, torch.float32)
    x, delta = x.requires_grad_(), delta.requires_grad_()
    for a, b in ((dy, dres), (dy, None), (None, dres)):
        found = []
        for function in (_AddRmsNorm.apply, add_rms_norm_reference):
            outs = function(x, delta, weight, EPS, False)
            pairs = [(out, grad) for out, grad in zip(outs, (a, b), strict=True) if grad is not None]
            found.append(torch.autograd.grad([p[0] for p in pairs], [x, delta], [p[1] for p in pairs]))
        for ours, truth in zip(*found, strict=True):
            torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5)


def test_public_functions_on_the_cpu_are_the_reference() -> None:
    x, delta, weight, *_ = (v.cpu() for v in draw(3, 8, torch.float64))
    assert torch.equal(rms_norm(x, weight, EPS, style=GEMMA), rms_norm_reference(x, weight, EPS, GEMMA))
    assert torch.equal(add_rms_norm(x, delta, weight, EPS)[0], add_rms_norm_reference(x, delta, weight, EPS)[0])


def test_what_does_not_fit_is_refused_by_name() -> None:
    x, delta, weight, dy, _ = draw(3, 8, torch.float32)
    with pytest.raises(ValueError, match=r"rms_norm: want .* weight \[H\].*; got x \(3, 8\) float32"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="add_rms_norm: want"):
        add_rms_norm(x, delta[:2], weight, EPS)
    with pytest.raises(ValueError, match=r"weight.requires_grad is True: the norm's weight is frozen"):
        rms_norm(x, weight.clone().requires_grad_(), EPS)
    with pytest.raises(ValueError, match=r"one device, got x on .*, weight on meta"):
        rms_norm(x, weight.to("meta"), EPS)
    for bad in (x.double(), x.T, x[:, ::2], torch.zeros(1, MAX_H + 2, device=DEVICE), x[None]):
        with pytest.raises(ValueError, match=r"rms_norm_forward: want .*adjacent columns"):
            rms_norm_forward(bad, weight, EPS)
    with pytest.raises(ValueError, match="total_out only with delta"):
        rms_norm_forward(x, weight, EPS, total_out=x)
    _, rstd, _ = rms_norm_forward(x, weight, EPS)
    with pytest.raises(ValueError, match="rms_norm_backward: want"):
        rms_norm_backward(dy, x, weight, rstd[:2])
    with pytest.raises(ValueError, match="rms_norm_backward: want"):
        rms_norm_backward(dy.half(), x, weight, rstd)


@pytest.mark.gpu
@pytest.mark.parametrize("style", [LLAMA, GEMMA, OLMO], ids=["llama", "gemma", "olmo"])
@pytest.mark.parametrize("h", [128, 4096, 5120, 16384])  # many rows a program; a power of two; not one; the longest
def test_gpu_rule_and_bits_in_bf16(h: int, style: int) -> None:
    inputs = draw(257, h, torch.bfloat16, hard=True)
    plain, truth = gradients(torch.bfloat16, inputs, style, True), gradients(torch.float64, inputs, style, True)
    x, delta, weight, dy, dres = inputs
    y, rstd, total = rms_norm_forward(x, weight, EPS, style, delta=delta)
    assert_rule("y", y, plain[0], truth[0], 2)
    assert_rule("dx", rms_norm_backward(dy, total, weight, rstd, style, dres=dres), plain[2], truth[2], 3)
    # The same roundings as transformers: only another order of the sum can move a bit, in rare entries.
    assert (y != plain[0]).float().mean() < 2e-3
    assert_survives_stream_and_graph(lambda: rms_norm_forward(x, weight, EPS, style, delta=delta))
    assert_survives_stream_and_graph(lambda: [rms_norm_backward(dy, total, weight, rstd, style, dres=dres)])


@pytest.mark.gpu
@pytest.mark.parametrize("t, h", [(70_001, 32), (131_100, 16384)])  # > 65,535 rows; T H > 2^31
def test_gpu_many_rows(t: int, h: int) -> None:
    x = torch.randn(1, h, device="cuda", dtype=torch.bfloat16).expand(t, h).contiguous()
    x[-1] = torch.randn(h, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(h, device="cuda", dtype=torch.bfloat16)
    y, rstd, _ = rms_norm_forward(x, weight, EPS)
    dx = rms_norm_backward(x, x, weight, rstd)
    for row in (0, t // 2, t - 1):
        alone, rstd_alone, _ = rms_norm_forward(x[row : row + 1], weight, EPS)
        assert torch.equal(y[row], alone[0]) and rstd[row] == rstd_alone[0]
        assert torch.equal(dx[row], rms_norm_backward(x[row : row + 1], x[row : row + 1], weight, rstd_alone)[0])


@pytest.mark.gpu
def test_gpu_public_function_reaches_the_kernel() -> None:
    x, delta, weight, dy, dres = draw(6, 4096, torch.bfloat16)
    x.requires_grad_()
    y, total = add_rms_norm(x, delta, weight, EPS)
    assert "AddRmsNorm" in type(y.grad_fn).__name__
    torch.autograd.backward([y, total], [dy, dres])
    expected, rstd, total = rms_norm_forward(x.detach(), weight, EPS, delta=delta)
    assert x.grad is not None and torch.equal(y, expected)
    assert torch.equal(x.grad, rms_norm_backward(dy, total, weight, rstd, dres=dres))
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_forward(x.detach(), weight, EPS)[0])
