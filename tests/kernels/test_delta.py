"""The gated delta rule: reference, form in chunks and transformers agree; the kernels obey the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_rule import DEVICE, DTYPES, QUIET, assert_rule, assert_survives_stream_and_graph
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from rlft.kernels.delta import _GatedDelta, delta_backward, delta_forward, gated_delta_reference, gated_delta_rule
from rlft.kernels.delta_chunks import Chunks, gated_delta_chunked

pytestmark = QUIET

NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")
PACKED = [
    ([1], [-1]),  # one row
    ([63, 64], [-1, -1]),  # a chunk less a row, a whole chunk
    ([65, 0, 130], [-1, -1, -1]),  # a row in the second chunk; empty; a chunk in the middle
    ([70, 3], [-1, 0]),  # a prefix with one suffix
    ([65, 5, 64, 1, 0, 66], [-1, -1, 0, 1, 0, 0]),  # three suffixes, out of order, one of them empty
]


def tables(lengths: list[int], prefix: list[int]) -> tuple[Tensor, Tensor]:
    """cu_seqlens and prefix on the CPU."""
    return torch.tensor([0, *lengths]).cumsum(0).int(), torch.tensor(prefix, dtype=torch.int32)


def chunks_of(lengths: list[int], prefix: list[int], device: str = DEVICE) -> Chunks:
    return Chunks.of(*tables(lengths, prefix), device)


def draw(
    t: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, kind: str = "usual", l2norm: bool = True
) -> list[Tensor]:
    """q, k, v (parts of one buffer), g, beta, do. Kind: of decay and beta."""
    torch.manual_seed(5)
    (hk, hv), (dk, dv) = heads, sizes
    buffer = torch.randn(t, 2 * hk * dk + hv * dv)
    if not l2norm:
        buffer[:, : 2 * hk * dk] *= dk**-0.5
    g, beta = -0.3 * torch.rand(t, hv), torch.rand(t, hv)
    if kind == "keep":  # nothing decays, the delta rule proper
        g, beta = -1e-5 * torch.rand(t, hv), torch.ones(t, hv)
    elif kind == "forget":  # from one row to the next almost nothing, or nothing at all, is left
        g = torch.where(torch.rand(t, hv) < 0.5, -100.0, -5.0)
    elif kind == "silent":  # nothing is written in half of the rows, one row in three is kept whole
        g, beta = g * (torch.rand(t, hv) < 0.7), (torch.rand(t, hv) < 0.5).float()
    elif kind == "same":  # the same key in every row: the inverse's worst case
        buffer[:, hk * dk : 2 * hk * dk] = buffer[:1, hk * dk : 2 * hk * dk]
        g, beta = -1e-5 * torch.rand(t, hv), torch.ones(t, hv)
    do = torch.randn(t, hv, dv)
    q, k, v = buffer.to(DEVICE, dtype).split([hk * dk, hk * dk, hv * dv], dim=1)
    rest = (g.to(DEVICE, torch.float32), beta.to(DEVICE, dtype), do.to(DEVICE, dtype))
    return [q.unflatten(1, (hk, dk)), k.unflatten(1, (hk, dk)), v.unflatten(1, (hv, dv)), *rest]


def by_autograd(inputs: list[Tensor], dtype: torch.dtype | None, f: Callable, *rest) -> list[Tensor]:
    """o and all gradients by autograd, in a dtype; None: as the inputs are."""
    leaves = [one.detach().to(one.dtype if dtype is None else dtype).requires_grad_() for one in inputs[:5]]
    out = f(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[5].to(out.dtype))]


def assert_obeys(
    found: list[Tensor], inputs: list[Tensor], chunks: Chunks, scale: float, l2norm: bool, kind: str = "usual"
) -> None:
    """Hold all results to the rule. Plain PyTorch is the form in chunks in fp32, and the formula itself in 16 bits.

    In 16 bits a result of the usual inputs may also have at most three times the error of rounding it, in the root mean
    square, though all operands of products are rounded too. With the same key in all rows and beta 1 each row replaces
    all that was written: dg is 0 but for roundings of terms near 1, which cancel.
    """
    dtype, rest = inputs[0].dtype, (chunks, scale, l2norm)
    truth = by_autograd(inputs, torch.float64, gated_delta_chunked, *rest)
    if dtype == torch.float32:
        plain = by_autograd(inputs, None, gated_delta_chunked, *rest)
    else:
        tables = (torch.tensor(chunks.bounds), torch.tensor(chunks.prefix))
        plain = by_autograd(inputs, None, gated_delta_reference, *tables, scale, l2norm, dtype)
    for name, got, one, exact in zip(NAMES, found, plain, truth, strict=True):
        if name == "dg" and kind == "same" and dtype == torch.float32:
            assert (got.double() - exact).abs().max() < 1e-5
            continue
        assert_rule(name, got, one, exact, 2 if name == "o" else 3)
        if dtype != torch.float32 and kind == "usual" and inputs[0].shape[0] > 60:
            rms, least = ((x.double() - exact).pow(2).mean().sqrt() for x in (got, exact.to(dtype)))
            assert rms <= 3 * least, f"{name}: rms error {rms}, of rounding {least}"


def by_kernels(inputs: list[Tensor], *rest) -> list[Tensor]:
    out, saved = delta_forward(*inputs[:5], *rest)
    return [out, *delta_backward(inputs[5], *inputs[:5], *rest, saved)]


@pytest.mark.parametrize("l2norm", [False, True])
def test_gradcheck_of_the_reference_and_of_the_chunks(l2norm: bool) -> None:
    cu, prefix = tables([3, 1, 2], [-1, 0, 0])
    chunks = Chunks.of(cu, prefix)
    leaves = [one.cpu().double().requires_grad_() for one in draw(6, (1, 2), (3, 2), torch.float32)[:5]]
    assert torch.autograd.gradcheck(lambda *x: gated_delta_reference(*x, cu, prefix, 0.7, l2norm), leaves)
    assert torch.autograd.gradcheck(lambda *x: gated_delta_chunked(*x, chunks, 0.7, l2norm), leaves)


@pytest.mark.parametrize("kind", ["usual", "keep", "forget", "silent", "same"])
@pytest.mark.parametrize("packed", PACKED, ids=lambda packed: "-".join(map(str, packed[0])))
def test_chunks_equal_the_reference_in_float64(packed, kind: str) -> None:
    inputs = [one.cpu().double() for one in draw(sum(packed[0]), (2, 4), (12, 20), torch.float32, kind)]
    expected = by_autograd(inputs, None, gated_delta_reference, *tables(*packed), 0.3, True)
    found = by_autograd(inputs, None, gated_delta_chunked, chunks_of(*packed, "cpu"), 0.3, True)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("function", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_transformers_gives_the_same_for_each_sequence(function: Callable) -> None:
    lengths = [65, 5, 64, 40, 0, 66]
    inputs = [one.cpu().requires_grad_() for one in draw(240, (2, 4), (16, 24), torch.float32)]
    out = gated_delta_chunked(*inputs[:5], chunks_of(lengths, [-1, 0, -1, 2, 0, 0], "cpu"), 16**-0.5)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    expected = torch.zeros_like(out)
    for i, before in ((0, []), (1, [0]), (2, []), (3, [2]), (5, [0])):
        rows = torch.cat([torch.arange(starts[j], starts[j + 1]) for j in (*before, i)])
        q, k, v, g, beta = (one[rows][None] for one in inputs[:5])
        q, k = q.repeat_interleave(2, dim=2), k.repeat_interleave(2, dim=2)
        alone = function(
            q, k, v, g=g, beta=beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True
        )[0][0, -lengths[i] :]
        expected = expected.index_put((rows[-lengths[i] :],), alone)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    do = inputs[5].detach()
    pairs = (torch.autograd.grad(one, inputs[:5], do) for one in (out, expected))
    for name, a, b in zip(NAMES[1:], *pairs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", PACKED, ids=lambda packed: "-".join(map(str, packed[0])))
def test_kernels_obey_the_rule_for_all_lengths_and_prefixes(packed, dtype: torch.dtype) -> None:
    inputs, chunks = draw(sum(packed[0]), (1, 1), (32, 16), dtype), chunks_of(*packed)
    assert_obeys(by_kernels(inputs, chunks, 0.2, True), inputs, chunks, 0.2, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["keep", "forget", "silent", "same"])
def test_kernels_obey_the_rule_for_all_decays_and_betas(kind: str, dtype: torch.dtype) -> None:
    inputs, chunks = draw(135, (1, 1), (32, 16), dtype, kind), chunks_of([70, 65], [-1, 0])
    assert_obeys(by_kernels(inputs, chunks, 0.2, True), inputs, chunks, 0.2, True, kind)


SIZES = [
    ((2, 2), (64, 64), True),  # no group
    ((1, 3), (96, 16), True),  # no power of two, a group of three
    ((1, 1), (128, 128), False),  # Qwen3-Next's heads; vectors as they are
    ((1, 1), (256, 80), True),  # the widest of q and k; several blocks of v, the last not full
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, sizes, l2norm", SIZES)
def test_kernels_obey_the_rule_for_all_heads(heads, sizes, l2norm: bool, dtype: torch.dtype) -> None:
    inputs, chunks = draw(69, heads, sizes, dtype, l2norm=l2norm), chunks_of([66, 3], [-1, 0])
    assert_obeys(by_kernels(inputs, chunks, 0.1, l2norm), inputs, chunks, 0.1, l2norm)


def test_nothing_to_do() -> None:
    inputs = draw(0, (1, 2), (16, 32), torch.float32)
    for lengths, prefix in (([], []), ([0, 0], [-1, 0])):
        chunks = chunks_of(lengths, prefix)
        for got, like in zip(by_kernels(inputs, chunks, 1.0, True), [inputs[5], *inputs[:5]], strict=True):
            assert got.shape == like.shape
        assert gated_delta_chunked(*inputs[:5], chunks, 1.0).shape == inputs[5].shape
        assert gated_delta_reference(*inputs[:5], *tables(lengths, prefix), 1.0).shape == inputs[5].shape


def test_sequences_do_not_see_each_other() -> None:
    inputs, chunks = draw(80, (1, 1), (16, 16), torch.float32), chunks_of([5, 70, 5], [-1, -1, 0])
    found = by_kernels(inputs, chunks, 1.0, True)
    spoiled = [one.clone() for one in inputs]
    for one in spoiled:
        one[5:75] = float("nan")
    rows = torch.cat([torch.arange(5), torch.arange(75, 80)])
    for name, got, expected in zip(NAMES, by_kernels(spoiled, chunks, 1.0, True), found, strict=True):
        assert torch.equal(got[rows], expected[rows]), name


def test_backward_without_what_the_forward_saved_is_the_same() -> None:
    inputs, rest = draw(20, (1, 2), (16, 16), torch.float32), (chunks_of([12, 8], [-1, 0]), 0.5, True)
    found = by_kernels(inputs, *rest)
    for name, a, b in zip(NAMES[1:], delta_backward(inputs[5], *inputs[:5], *rest), found[1:], strict=True):
        assert torch.equal(a, b), name


def test_function_takes_any_layout_and_backward_once() -> None:
    q, k, v, g, beta, do = draw(20, (1, 2), (16, 16), torch.float32)
    chunks = chunks_of([12, 8], [-1, 0])
    leaves = [
        one.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for one in (q, k, v, g, beta)
    ]
    expected = torch.autograd.grad(gated_delta_chunked(*leaves, chunks, 0.5), leaves, do)
    upstream = do.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = torch.autograd.grad(_GatedDelta.apply(*leaves, chunks, 0.5, True), leaves, upstream, create_graph=True)  # type: ignore[arg-type]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found[0].sum().backward()


def test_what_does_not_fit_is_refused_by_name() -> None:
    q, k, v, g, beta, do = draw(8, (1, 2), (16, 16), torch.float32)
    chunks = chunks_of([8], [-1])
    with pytest.raises(ValueError, match=r"Chunks.of: prefix = \(-1, 0, 1\): a sequence that others continue must not"):
        chunks_of([1, 1, 1], [-1, 0, 1])
    for bad in (v[:7], v.half(), v[:, :0], v[0]):
        with pytest.raises(ValueError, match=r"gated_delta_rule: want .*T = 8; got q \(8, 1, 16\) float32"):
            gated_delta_rule(q, k, bad, g, beta, chunks)
    with pytest.raises(ValueError, match=r"gated_delta_rule: want .*T = 7"):
        gated_delta_rule(q, k, v, g, beta, chunks_of([7], [-1]))
    with pytest.raises(ValueError, match=r"gated_delta_rule: .* one device, got q on .*, k on meta"):
        gated_delta_rule(q, k.to("meta"), v, g, beta, chunks)
    with pytest.raises(ValueError, match=r"delta_forward: want .*heads side by side"):
        delta_forward(q, k, v.transpose(1, 2).contiguous().transpose(1, 2), g, beta, chunks, 1.0)
    with pytest.raises(ValueError, match=r"delta_forward: want .*at most 256"):
        delta_forward(q, k, v.repeat(1, 1, 32), g, beta, chunks, 1.0)
    with pytest.raises(ValueError, match=r"delta_backward: want"):
        delta_backward(do[:7], q, k, v, g, beta, chunks, 1.0)


def test_public_function_on_the_cpu_is_the_form_in_chunks() -> None:
    inputs = [one.cpu() for one in draw(70, (1, 2), (16, 16), torch.float32)[:5]]
    chunks = chunks_of([66, 4], [-1, 0], "cpu")
    assert torch.equal(gated_delta_rule(*inputs, chunks), gated_delta_chunked(*inputs, chunks, 0.25))


@pytest.mark.gpu
@pytest.mark.parametrize("heads, sizes", [((16, 32), (128, 128)), ((8, 8), (96, 192)), ((2, 4), (256, 256))])
def test_gpu_rule_and_bits_in_bf16(heads, sizes) -> None:
    lengths, prefix = [300, 1, 700, 65, 0, 128], [-1, -1, 0, 0, 0, -1]
    inputs, chunks = draw(sum(lengths), heads, sizes, torch.bfloat16), chunks_of(lengths, prefix)
    rest = (chunks, sizes[0] ** -0.5, True)
    found = by_kernels(inputs, *rest)
    assert_obeys(found, inputs, *rest)
    assert_survives_stream_and_graph(lambda: [delta_forward(*inputs[:5], *rest)[0]])
    assert_survives_stream_and_graph(lambda: delta_backward(inputs[5], *inputs[:5], *rest))
    leaves = [one.detach().requires_grad_() for one in inputs[:5]]
    out = gated_delta_rule(*leaves, chunks)
    assert "GatedDelta" in type(out.grad_fn).__name__
    for a, b in zip([out.detach(), *torch.autograd.grad(out, leaves, inputs[5])], found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_many_chunks() -> None:
    """More than 65,535 programs a launch, and more than 2^31 elements of states."""
    inputs = draw(270_000, (1, 32), (128, 128), torch.bfloat16)
    rest = (chunks_of([90_000, 90_000, 90_000], [-1, 0, -1]), 0.1, True)
    found = by_kernels(inputs, *rest)
    part = [one[180_000:] for one in inputs]
    alone = by_kernels(part, chunks_of([90_000], [-1]), 0.1, True)
    for name, a, b in zip(NAMES, found, alone, strict=True):
        assert torch.equal(a[180_000:], b), name
