"""swiglu: the reference is transformers' order, the kernels obey the accuracy rule, layouts, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule, assert_survives_stream_and_graph
from torch import Tensor
from transformers.activations import ACT2FN, XIELUActivation

from rlft.kernels.swiglu import ACTIVATIONS, _SwiGlu, swiglu, swiglu_backward, swiglu_forward, swiglu_reference

pytestmark = QUIET

SHAPES = [
    (0, 64),  # nothing to do
    (1, 64),  # one row in a program of 16
    (33, 64),  # three programs, the last with one row
    (7, 48),  # M no power of two
    (3, 1100),  # two programs a row, the second mostly empty
    (5, 2),  # the shortest
]


XIELU = torch.tensor([0.9, 0.7, 0.5, -1e-6])
"""alpha_p, alpha_n, beta and eps."""


def curve_of(activation: str, device: str = DEVICE) -> Tensor | None:
    return XIELU.to(device) if activation == "xielu" else None


def draw(t: int, m: int, dtype: torch.dtype, hard: bool = False) -> list[Tensor]:
    """gate and up as halves of one buffer, dh. Hard: gates where exp overflows or the slope changes sign."""
    torch.manual_seed(2)
    both, dh = torch.randn(t, 2 * m), torch.randn(t, m)
    if hard:
        both[:, :m] *= 20
        both[::3, :m] = torch.tensor([-120.0, -1.2784])[: min(2, m)].repeat(m // 2 + 1)[:m]
        both[1::3, :m] = torch.tensor([0.0, 90.0])[: min(2, m)].repeat(m // 2 + 1)[:m]
    both, dh = both.to(DEVICE, dtype), dh.to(DEVICE, dtype)
    return [both[:, :m], both[:, m:], dh]


def by_autograd(inputs: list[Tensor], dtype: torch.dtype, activation: str, gated: bool = True) -> list[Tensor]:
    """h, dgate, dup by autograd of the reference in a dtype."""
    gate, up, dh = (v.detach().to(dtype) for v in inputs)
    leaves = [x.detach().requires_grad_() for x in ((gate, up) if gated else (gate,))]
    h = swiglu_reference(leaves[0], leaves[1] if gated else None, activation, curve_of(activation, str(gate.device)))
    return [h.detach(), *torch.autograd.grad(h, leaves, dh)]


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "xielu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_transformers_bit_for_bit(activation: str, dtype: torch.dtype) -> None:
    gate, up, _ = (v.cpu() for v in draw(5, 32, dtype))
    assert torch.equal(swiglu_reference(gate, up, activation), ACT2FN[activation](gate) * up)
    assert torch.equal(swiglu_reference(gate, None, activation), ACT2FN[activation](gate))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xielu_is_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    module = XIELUActivation(1.3, 0.9, dtype=dtype)
    gate, *_ = (v.cpu() for v in draw(9, 64, dtype, hard=True))
    alphas = F.softplus(module.alpha_p)[0], module.beta + F.softplus(module.alpha_n)[0]
    curve = torch.stack([*alphas, module.beta, module.eps]).float()
    assert torch.equal(swiglu_reference(gate, None, "xielu", curve), module(gate))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation: str) -> None:
    gate, up, _ = (v.cpu().double().requires_grad_() for v in draw(3, 4, torch.float32))
    curve = curve_of(activation, "cpu")
    assert torch.autograd.gradcheck(lambda a, b: swiglu_reference(a, b, activation, curve), (gate, up))
    assert torch.autograd.gradcheck(lambda a: swiglu_reference(a, None, activation, curve), (gate,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [False, True], ids=["randn", "hard"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("t, m", SHAPES)
def test_kernel_obeys_the_rule(t: int, m: int, gated: bool, activation: str, hard: bool, dtype: torch.dtype) -> None:
    assert_obeys(draw(t, m, dtype, hard), activation, gated)


def assert_obeys(inputs: list[Tensor], activation: str, gated: bool) -> None:
    plain, truth = (by_autograd(inputs, d, activation, gated) for d in (inputs[0].dtype, torch.float64))
    gate, up, dh = inputs
    how = (gate, up if gated else None, activation, curve_of(activation))
    h = swiglu_forward(*how)
    again, *found = swiglu_backward(dh, *how)
    assert again is not None and torch.equal(again, h)
    assert (found[1] is not None) == gated
    assert_rule("h", h, plain[0], truth[0], 2)
    for name, got, a, b in zip(("dgate", "dup"), found, plain[1:], truth[1:]):  # noqa: B905
        assert got is not None
        assert_rule(name, got, a, b, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_xielu_near_zero_and_where_its_series_begins(dtype: torch.dtype) -> None:
    """Alone in a tensor, so that no large entry covers their error."""
    for values in ((-0.4999, -0.5, -0.5001), (-1e-3, -3e-5), (-2e-6, -5e-7, 0.0), (1e-3, 1e-6)):
        gate = torch.tensor([values * 8]).to(DEVICE, dtype)
        assert_obeys([gate, torch.ones_like(gate), torch.ones_like(gate)], "xielu", False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so(activation: str) -> None:
    gate = torch.full((1, 4), float("nan"), device=DEVICE)
    assert swiglu_forward(gate, None, activation, curve_of(activation)).isnan().all()


def test_strides_tails_and_buffers_that_the_caller_owns() -> None:
    gate, up, dh = draw(5, 32, torch.float32)
    h = swiglu_forward(gate, up)
    _, dgate, dup = swiglu_backward(dh, gate, up)
    # h into rows with a tail for LoRA; gradients into the halves of one buffer; no h asked.
    tailed = torch.full((5, 40), float("nan"), device=DEVICE)
    swiglu_forward(gate, up, out=tailed[:, :32])
    assert torch.equal(tailed[:, :32], h) and tailed[:, 32:].isnan().all()
    both = torch.empty(5, 64, device=DEVICE)
    none, *_ = swiglu_backward(dh, gate, up, keep_h=False, dgate=both[:, :32], dup=both[:, 32:])
    assert none is None and torch.equal(both, torch.cat([dgate, dup], dim=1))
    # Over dh, gate and up, as the fused layer does; forward over gate.
    own = [x.clone() for x in (dh, gate, up)]
    swiglu_backward(*own, h_out=own[0], dgate=own[1], dup=own[2])
    for a, b in zip(own, (h, dgate, dup), strict=True):
        assert torch.equal(a, b)
    own = gate.clone()
    assert swiglu_forward(own, up, out=own) is own and torch.equal(own, h)
    # The same without a gate.
    h = swiglu_forward(gate, None, "relu2")
    _, dgate, none = swiglu_backward(dh, gate, None, "relu2")
    own = [x.clone() for x in (dh, gate)]
    swiglu_backward(own[0], own[1], None, "relu2", h_out=own[0], dgate=own[1])
    assert none is None and torch.equal(own[0], h) and torch.equal(own[1], dgate)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_function_takes_any_layout_and_backward_once(activation: str) -> None:
    both = torch.randn(2, 3, 32, device=DEVICE)
    dh = torch.randn(16, 3, 2, device=DEVICE).permute(2, 1, 0).requires_grad_()  # [2, 3, 16], columns far apart
    gate, up = (x.requires_grad_() for x in both.chunk(2, dim=-1))
    curve = curve_of(activation)
    expected = torch.autograd.grad(swiglu_reference(gate, up, activation, curve), [gate, up], dh.detach())
    h = _SwiGlu.apply(gate, up, activation, curve)
    found = torch.autograd.grad(h, [gate, up], dh, create_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found[0].sum().backward()


def test_what_does_not_fit_is_refused_by_name() -> None:
    gate, up, dh = draw(5, 32, torch.float32)
    with pytest.raises(
        ValueError, match="swiglu: activation = 'relu': want one of silu, gelu, gelu_pytorch_tanh, relu2"
    ):
        swiglu(gate, up, "relu")
    for name, curve in (("xielu", None), ("silu", XIELU), ("xielu", XIELU[:3])):
        with pytest.raises(ValueError, match=f"want a curve .4. for xielu and none for others, activation = '{name}'"):
            swiglu(gate, None, name, curve)
    with pytest.raises(ValueError, match=r"swiglu: want .*; got gate \(5, 32\) float32 strides \(64, 1\)"):
        swiglu(gate, up[:4])
    with pytest.raises(ValueError, match=r"one device, got gate on .*, up on meta"):
        swiglu(gate, up.to("meta"))
    for bad in (up.double(), up.T, up[:, ::2], up[:4], up[None]):
        with pytest.raises(ValueError, match=r"swiglu_forward: want .*adjacent columns"):
            swiglu_forward(gate, bad)
    with pytest.raises(ValueError, match="swiglu_backward: want"):
        swiglu_backward(dh, gate, up, dup=dh[:4])
    with pytest.raises(ValueError, match="swiglu_backward: activation"):
        swiglu_backward(dh, gate, up, "tanh")


def test_public_function_on_the_cpu_is_the_reference() -> None:
    gate, up, _ = (v.cpu() for v in draw(5, 32, torch.float64))
    assert torch.equal(swiglu(gate, up, "gelu"), swiglu_reference(gate, up, "gelu"))
    assert torch.equal(swiglu(gate, None, "xielu", XIELU), swiglu_reference(gate, None, "xielu", XIELU))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [12288, 11008])  # Qwen3-8B; Llama-2-7B, where the last program of a row is part empty
def test_gpu_rule_and_bits_in_bf16(m: int, activation: str) -> None:
    inputs = draw(257, m, torch.bfloat16, hard=True)
    for gated in (False, True):
        assert_obeys(inputs, activation, gated)
    plain = by_autograd(inputs, torch.bfloat16, activation)
    gate, up, dh = inputs
    curve = curve_of(activation)
    h = swiglu_forward(gate, up, activation, curve)
    _, dgate, dup = swiglu_backward(dh, gate, up, activation, curve)
    if activation == "silu":
        # The same roundings as transformers: only another exp can move a bit, in rare entries. (PyTorch's GELU loses
        # the tail to 1 + tanh, so its bits are no goal.)
        assert (h != plain[0]).float().mean() < 5e-3
    how = (gate, up, activation, curve)
    assert_survives_stream_and_graph(lambda: [swiglu_forward(*how)])
    assert_survives_stream_and_graph(lambda: [x for x in swiglu_backward(dh, *how) if x is not None])
    own = [x.clone() for x in (dh, gate, up)]
    swiglu_backward(*own, activation, curve, h_out=own[0], dgate=own[1], dup=own[2])
    for a, b in zip(own, (h, dgate, dup), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("t, m", [(1_100_000, 64), (100_000, 24576)])  # > 65,535 programs; T M > 2^31
def test_gpu_many_rows(t: int, m: int) -> None:
    gate = torch.randn(1, m, device="cuda", dtype=torch.bfloat16).expand(t, m).contiguous()
    gate[-1] = torch.randn(m, device="cuda", dtype=torch.bfloat16)
    h = swiglu_forward(gate, gate)
    _, dgate, dup = swiglu_backward(gate, gate, gate, keep_h=False)
    for row in (0, t // 2, t - 1):
        one = gate[row : row + 1]
        assert torch.equal(h[row], swiglu_forward(one, one)[0])
        _, dgate_one, dup_one = swiglu_backward(one, one, one, keep_h=False)
        assert torch.equal(dgate[row], dgate_one[0]) and torch.equal(dup[row], dup_one[0])


@pytest.mark.gpu
def test_gpu_public_function_reaches_the_kernel() -> None:
    gate, up, dh = draw(6, 12288, torch.bfloat16)
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    h = swiglu(gate, up)
    assert "SwiGlu" in type(h.grad_fn).__name__
    found = torch.autograd.grad(h, [gate, up], dh)
    _, dgate, dup = swiglu_backward(dh, gate.detach(), up.detach())
    assert torch.equal(found[0], dgate) and torch.equal(found[1], dup)
