"""qk_rope: the reference against transformers, the kernels against the accuracy rule, layouts, refusals."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, assert_rule, assert_survives_stream_and_graph
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as apply_interleaved
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlft.kernels.qk_rope import MAX_D, _QkRope, qk_rope, qk_rope_backward, qk_rope_forward, qk_rope_reference
from rlft.kernels.rms_norm import GEMMA, LLAMA, OLMO

EPS = 1e-6
NAMES = ("q", "k", "dq", "dk")


class Case(NamedTuple):
    """Shapes: tokens, query heads, key heads, head width, rotated entries."""

    t: int
    hq: int
    hk: int
    d: int
    r: int


CASES = [
    Case(0, 4, 2, 32, 32),  # nothing to do
    Case(1, 4, 2, 64, 64),  # one token, less than a program
    Case(35, 2, 2, 64, 64),  # programs of 32 rows: the last is not full, no grouping
    Case(9, 7, 1, 80, 80),  # heads and width no powers of two (Qwen2.5-0.5B has 14 and 2, Phi-2 a width of 80)
    Case(5, 3, 1, 64, 32),  # half rotated, as in GLM-4
    Case(5, 3, 1, 96, 72),  # three quarters, as in Phi-4-mini
    Case(6, 2, 1, 6, 2),  # the narrowest
]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None


def draw(case: Case, dtype: torch.dtype, norm: bool = True, hard: bool = False) -> tuple[Inputs, list[Tensor]]:
    """Inputs with q and k sliced from one qkv buffer, and the gradients of both results.

    Positions are out of order and repeat; the tables carry an attention factor of 1.1. Hard: a head of zeros, one where
    eps decides, one with a single large entry.
    """
    torch.manual_seed(1)
    t, hq, hk, d, r = case
    qkv = torch.randn(t, (hq + 2 * hk) * d)
    if hard:
        qkv[0::3] *= 1e-3
        qkv[1::3, 0] = 1e3
        qkv[2::3, :d] = 0
    qkv = qkv.to(DEVICE, dtype)
    q, k = qkv[:, : hq * d].unflatten(1, (hq, d)), qkv[:, hq * d : (hq + hk) * d].unflatten(1, (hk, d))
    angles = torch.arange(40)[:, None] * 10_000.0 ** -(torch.arange(0, r, 2) / r)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = (1.1 * angles.cos()).to(DEVICE, dtype), (1.1 * angles.sin()).to(DEVICE, dtype)
    weights = [torch.randn(d).to(DEVICE, dtype) if norm else None for _ in range(2)]
    grads = [torch.randn(t, h, d).to(DEVICE, dtype) for h in (hq, hk)]
    return Inputs(q, k, cos, sin, torch.randint(0, 40, (t,), device=DEVICE), *weights), grads


def by_autograd(inputs: Inputs, grads: list[Tensor], dtype: torch.dtype, *how: Any) -> list[Tensor]:
    """q, k, dq, dk by autograd of the reference in a dtype."""
    q, k, *rest = (v if v is None or v.dtype == torch.int64 else v.detach().to(dtype) for v in inputs)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    outs = qk_rope_reference(q, k, *rest, EPS, *how)
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, [q, k], [g.to(dtype) for g in grads])]


def transformers_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Their function wants [batch, heads, T, D] and the tables gathered."""
    heads = [x.transpose(0, 1)[None] for x in (q, k)]
    return [x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*heads, cos[None], sin[None])]


@pytest.mark.parametrize("norm_class, gemma", [(Qwen3RMSNorm, False), (Gemma3RMSNorm, True)])
@pytest.mark.parametrize("r", [16, 8], ids=["whole", "half"])
def test_reference_in_fp32_is_transformers_bit_for_bit(r: int, norm_class: type[Qwen3RMSNorm], gemma: bool) -> None:
    inputs, _ = draw(Case(9, 4, 2, 16, r), torch.float32)
    q, k, cos, sin, positions, *weights = (v.cpu() for v in inputs if v is not None)
    norms = [norm_class(16, EPS) for _ in range(2)]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.data = weight
    theirs = transformers_rope(norms[0](q), norms[1](k), cos[positions], sin[positions])
    for a, b in zip(qk_rope_reference(q, k, cos, sin, positions, *weights, EPS, gemma), theirs, strict=True):
        assert torch.equal(a, b)


def test_the_interleaved_reference_is_transformers_bit_for_bit() -> None:
    inputs, _ = draw(Case(9, 4, 2, 16, 8), torch.float32, norm=False)
    q, k, cos, sin, positions = (v.cpu() for v in inputs if v is not None)
    heads = [x.transpose(0, 1)[None] for x in (q, k)]
    theirs = apply_interleaved(*heads, cos[positions][None], sin[positions][None])
    ours = qk_rope_reference(q, k, cos, sin, positions, interleaved=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b[0].transpose(0, 1))


def test_the_reference_with_a_norm_behind_is_transformers_bit_for_bit() -> None:
    inputs, _ = draw(Case(9, 4, 2, 16, 8), torch.float32)
    q, k, cos, sin, positions, *weights = (v.cpu() for v in inputs if v is not None)
    norms = [HunYuanDenseV1RMSNorm(16, EPS) for _ in range(2)]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.data = weight
    rotated = transformers_rope(q, k, cos[positions], sin[positions])
    ours = qk_rope_reference(q, k, cos, sin, positions, *weights, EPS, after=True)
    for a, b, norm in zip(ours, rotated, norms, strict=True):
        assert torch.equal(a, norm(b))


def test_reference_in_bf16_is_closer_to_the_truth_than_transformers() -> None:
    """The rotation rounds once where transformers rounds three times; the norm before it has the same bits."""
    inputs, _ = draw(Case(64, 4, 2, 64, 64), torch.bfloat16)
    q, k, cos, sin, positions, *weights = (v.cpu() for v in inputs if v is not None)
    cos, sin = cos[positions], sin[positions]
    truths = qk_rope_reference(*(v.double() for v in (q, k, cos, sin)))
    for a, b, truth in zip(qk_rope_reference(q, k, cos, sin), transformers_rope(q, k, cos, sin), truths, strict=True):
        assert (a.double() - truth).norm() < 0.85 * (b.double() - truth).norm()
    still = torch.ones_like(cos), torch.zeros_like(sin)
    norm = Qwen3RMSNorm(64, EPS)
    norm.weight.data = weights[0]
    assert torch.equal(qk_rope_reference(q, k, *still, None, *weights, EPS)[0], norm(q))


@pytest.mark.parametrize("how", [(LLAMA,), (GEMMA,), (LLAMA, True), (LLAMA, False, True)])
def test_gradcheck_of_the_reference(how: tuple) -> None:
    inputs, _ = draw(Case(3, 2, 1, 6, 4), torch.float32)
    q, k, *rest = (v.cpu() if v.dtype == torch.int64 else v.cpu().double() for v in inputs if v is not None)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: qk_rope_reference(a, b, *rest, EPS, *how), (q, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [False, True], ids=["randn", "hard"])
@pytest.mark.parametrize("norm", ["none", "llama", "gemma"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_obeys_the_rule(case: Case, norm: str, hard: bool, dtype: torch.dtype) -> None:
    assert_obeys(case, norm, hard, dtype, interleaved=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "llama", "olmo"])
@pytest.mark.parametrize("case", [Case(9, 4, 2, 32, 32), Case(70, 3, 1, 64, 24)], ids=str)
def test_the_interleaved_kernel_obeys_the_rule(case: Case, norm: str, dtype: torch.dtype) -> None:
    assert_obeys(case, norm, False, dtype, interleaved=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [False, True], ids=["randn", "hard"])
@pytest.mark.parametrize("norm, interleaved", [("llama", False), ("gemma", False), ("llama", True)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_with_a_norm_behind_obeys_the_rule(
    case: Case, norm: str, interleaved: bool, hard: bool, dtype: torch.dtype
) -> None:
    assert_obeys(case, norm, hard, dtype, interleaved, after=True)


def assert_obeys(case: Case, norm: str, hard: bool, dtype: torch.dtype, interleaved: bool, after: bool = False) -> None:
    inputs, grads = draw(case, dtype, norm != "none", hard)
    how = {"gemma": GEMMA, "olmo": OLMO}.get(norm, LLAMA), interleaved, after
    plain, truth = (by_autograd(inputs, grads, d, *how) for d in (dtype, torch.float64))
    outs = qk_rope_forward(*inputs, EPS, *how)
    kept = (None, None) if norm == "none" else inputs[:2]
    found = qk_rope_backward(*grads, *kept, *inputs[2:], EPS, *how)
    for name, got, a, b, times in zip(NAMES, (*outs, *found), plain, truth, (2, 2, 3, 3), strict=True):
        assert_rule(name, got, a, b, times)


def test_the_backward_undoes_the_rotation() -> None:
    """Without a norm and with an attention factor of 1 the gradient of the result is turned back into the input."""
    inputs, _ = draw(Case(9, 4, 2, 32, 16), torch.float32, norm=False)
    inputs = inputs._replace(cos=inputs.cos / 1.1, sin=inputs.sin / 1.1)
    outs = qk_rope_forward(*inputs)
    for back, x in zip(qk_rope_backward(*outs, None, None, *inputs[2:]), inputs[:2], strict=True):
        torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)


def test_without_positions_a_row_has_its_own_line_of_the_tables() -> None:
    inputs, grads = draw(Case(9, 4, 2, 32, 32), torch.float32)
    at = inputs.positions
    gathered = inputs._replace(cos=inputs.cos[at], sin=inputs.sin[at], positions=None)
    for a, b in zip(qk_rope_forward(*inputs), qk_rope_forward(*gathered), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(qk_rope_backward(*grads, *inputs), qk_rope_backward(*grads, *gathered), strict=True):
        assert torch.equal(a, b)
    # int32 positions, and tables that are columns of a wider tensor.
    both = torch.cat([inputs.cos, inputs.sin], dim=1)
    other = inputs._replace(cos=both[:, :32], sin=both[:, 32:], positions=at.int())
    assert torch.equal(qk_rope_forward(*other)[0], qk_rope_forward(*inputs)[0])


@pytest.mark.parametrize("r", [32, 24], ids=["whole", "partial"])
def test_results_go_where_the_caller_says(r: int) -> None:
    case = Case(9, 4, 2, 32, r)
    inputs, grads = draw(case, torch.float32)
    q, k = qk_rope_forward(*inputs)
    dq, dk = qk_rope_backward(*grads, *inputs)

    # Gradients into slices of one dqkv buffer: v's part stays as it was.
    dqkv = torch.full((9, 256), float("nan"), device=DEVICE)
    parts = dqkv[:, :128].unflatten(1, (4, 32)), dqkv[:, 128:192].unflatten(1, (2, 32))
    qk_rope_backward(*grads, *inputs, dq=parts[0], dk=parts[1])
    assert torch.equal(parts[0], dq) and torch.equal(parts[1], dk) and dqkv[:, 192:].isnan().all()
    # Over the gradients, then over q and k.
    for after in (True, False):
        dq, dk = qk_rope_backward(*grads, *inputs, after=after)
        own = [g.clone() for g in grads]
        qk_rope_backward(*own, *inputs, after=after, dq=own[0], dk=own[1])
        assert torch.equal(own[0], dq) and torch.equal(own[1], dk)
    assert qk_rope_forward(*inputs, q_out=inputs.q, k_out=inputs.k)[0] is inputs.q
    assert torch.equal(inputs.q, q) and torch.equal(inputs.k, k)


@pytest.mark.parametrize("norm", [False, True])
def test_function_takes_any_layout_and_backward_once(norm: bool) -> None:
    inputs, grads = draw(Case(5, 4, 2, 16, 16), torch.float32, norm)
    expected = by_autograd(inputs, grads, torch.float32, False)
    # [heads, T, D] in memory, as attention code often has it.
    q, k = (x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs[:2])
    grads = [g.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for g in grads]
    outs = _QkRope.apply(q, k, *inputs[2:], EPS, LLAMA, False, False)
    found = torch.autograd.grad(outs, [q, k], grads, create_graph=True)
    for a, b in zip((*outs, *found), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found[0].sum().backward()


def test_what_does_not_fit_is_refused_by_name() -> None:
    inputs, grads = draw(Case(5, 4, 2, 16, 16), torch.float32)
    q, k, cos, sin, positions, *_ = inputs
    for bad in (
        inputs._replace(k=k[:4]),
        inputs._replace(k=k.double()),
        inputs._replace(sin=sin[:, :8]),
        inputs._replace(cos=cos[:, :15], sin=sin[:, :15]),
        inputs._replace(positions=None),
        inputs._replace(positions=positions[:3]),
        inputs._replace(k_weight=None),
        inputs._replace(q_weight=cos[0, :8]),
    ):
        with pytest.raises(ValueError, match=r"qk_rope: want q \[T, Hq, D\].*; got q \(5, 4, 16\) float32"):
            qk_rope(*bad)
    with pytest.raises(ValueError, match="requires_grad is True"):
        qk_rope(*inputs._replace(q_weight=cos[0].clone().requires_grad_()))
    with pytest.raises(ValueError, match=r"one device, got .*cos on meta"):
        qk_rope(*inputs._replace(cos=cos.to("meta"), sin=sin.to("meta")))
    wide = torch.zeros(1, 1, MAX_D + 2, device=DEVICE)
    for bad in (
        inputs._replace(q=q.transpose(0, 1).contiguous().transpose(0, 1)),
        inputs._replace(sin=torch.cat([sin, sin], 1)[:, :16]),
        Inputs(wide, wide, cos, sin, positions[:1], None, None),
    ):
        with pytest.raises(ValueError, match="qk_rope_forward: want heads adjacent"):
            qk_rope_forward(*bad)
    with pytest.raises(ValueError, match="outputs as q and k"):
        qk_rope_forward(*inputs, q_out=q[:4])
    with pytest.raises(ValueError, match="q and k where there is a norm"):
        qk_rope_backward(*grads, None, None, *inputs[2:])


def test_public_function_on_the_cpu_is_the_reference() -> None:
    inputs, _ = draw(Case(5, 4, 2, 16, 16), torch.float32)
    inputs = Inputs(*(v.cpu() for v in inputs if v is not None))
    for a, b in zip(qk_rope(*inputs), qk_rope_reference(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("norm, after", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("d, r", [(128, 128), (128, 64), (256, 256), (96, 72)])  # Qwen3, partial, Gemma3, odd partial
def test_gpu_rule_in_bf16_and_over_gradients(d: int, r: int, norm: bool, after: bool) -> None:
    inputs, grads = draw(Case(4097, 32, 8, d, r), torch.bfloat16, norm, hard=True)
    how = (LLAMA, False, after)
    plain, truth = (by_autograd(inputs, grads, dtype, *how) for dtype in (torch.bfloat16, torch.float64))
    outs = qk_rope_forward(*inputs, EPS, *how)
    kept = inputs[:2] if norm else (None, None)
    found = qk_rope_backward(*grads, *kept, *inputs[2:], EPS, *how)
    for name, got, a, b, times in zip(NAMES, (*outs, *found), plain, truth, (2, 2, 3, 3), strict=True):
        assert_rule(name, got, a, b, times)
    assert_survives_stream_and_graph(lambda: qk_rope_forward(*inputs, EPS, *how))
    assert_survives_stream_and_graph(lambda: qk_rope_backward(*grads, *kept, *inputs[2:], EPS, *how))
    qk_rope_backward(*grads, *kept, *inputs[2:], EPS, *how, dq=grads[0], dk=grads[1])
    assert torch.equal(grads[0], found[0]) and torch.equal(grads[1], found[1])


@pytest.mark.gpu
def test_gpu_many_tokens() -> None:
    """More than 65,535 programs, and offsets past 2^31: 120,000 tokens of 40,960 columns are 4.9e9."""
    t = 120_000
    qkv = torch.zeros(t, 40_960, dtype=torch.bfloat16, device="cuda")
    qkv[:, :1280] = torch.randn(1, 1280, device="cuda", dtype=torch.bfloat16)
    q, k = qkv[:, :1024].unflatten(1, (8, 128)), qkv[:, 1024:1280].unflatten(1, (2, 128))
    inputs, _ = draw(Case(1, 8, 2, 128, 128), torch.bfloat16)
    rest = inputs[2:4], inputs[5:]
    positions = torch.arange(t, device="cuda") % 40
    q_out, k_out = qk_rope_forward(q, k, *rest[0], positions, *rest[1])
    assert torch.equal(q_out[t - 40 :], q_out[:40]) and torch.equal(k_out[t - 40 :], k_out[:40])
    dq, _ = qk_rope_backward(q_out, k_out, q, k, *rest[0], positions, *rest[1])
    assert torch.equal(dq[t - 40 :], dq[:40])


@pytest.mark.gpu
def test_gpu_public_function_reaches_the_kernel() -> None:
    inputs, grads = draw(Case(33, 32, 8, 128, 128), torch.bfloat16)
    q, k = (x.detach().requires_grad_() for x in inputs[:2])
    outs = qk_rope(q, k, *inputs[2:])
    assert "QkRope" in type(outs[0].grad_fn).__name__
    found = torch.autograd.grad(outs, [q, k], grads)
    for a, b in zip((*outs, *found), (*qk_rope_forward(*inputs), *qk_rope_backward(*grads, *inputs)), strict=True):
        assert torch.equal(a, b)
