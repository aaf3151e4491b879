"""Packed attention against its formula, with and without shared prefixes, windows and grouped queries."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlft.kernels import attention_backends
from rlft.kernels.attention import Sequences, varlen_attention, varlen_attention_reference
from rlft.kernels.attention_backends import FA4_HEADS, Spans, choose_backend, set_fa4_cache
from rlft.kernels.attention_backends import forward as run_forward
from rlft.kernels.attention_blocks import Blocks
from rlft.kernels.lse_merge import add_sinks, add_sinks_reference, launch_merge, launch_sinks, merge, merge_reference

# flash-attn-4 and CUTLASS warn about themselves, at their first compilation.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]


def make(lengths: list[int], heads: tuple[int, int] = (4, 2), dim: int = 8, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q = torch.randn(total, heads[0], dim, generator=g, dtype=torch.float64, requires_grad=True)
    k = torch.randn(total, heads[1], dim, generator=g, dtype=torch.float64, requires_grad=True)
    v = torch.randn(total, heads[1], dim, generator=g, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, bounds


SINKS = torch.tensor([0.7, -3.0, 5.0, -math.inf], dtype=torch.float64)
"""A logit for each of the four query heads of `make`: among the scores, below, above, and no sink."""
CASES = {
    "one token": ([1], [-1]),
    "ragged, one empty": ([3, 0, 7, 1], [-1, -1, -1, -1]),
    "two prompts, three and one continuations": ([5, 2, 1, 4, 3, 6], [-1, 0, 0, 0, -1, 4]),
    "the same with the prompts first, and one alone": ([5, 3, 2, 1, 4, 6, 4], [-1, -1, 0, 0, 0, 1, -1]),
    "an empty continuation": ([4, 0, 2], [-1, 0, 0]),
}


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_formula(case: str, window: int | None, sinks: Tensor | None) -> None:
    lengths, prefix = CASES[case]
    q, k, v, bounds = make(lengths)
    got = varlen_attention(q, k, v, Sequences.of(bounds, torch.tensor(prefix)), 0.3, window, sinks=sinks)
    want = varlen_attention_reference(q, k, v, bounds, torch.tensor(prefix), 0.3, window, None, sinks)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    grads = [torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True) for out in (got, want)]
    assert torch.allclose(got, want, atol=1e-12)
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_formula_passes_gradcheck() -> None:
    q, k, v, bounds = make([3, 2, 2], heads=(2, 1), dim=3)
    prefix = torch.tensor([-1, 0, 0])
    assert torch.autograd.gradcheck(
        lambda q, k, v: varlen_attention_reference(q, k, v, bounds, prefix, 0.5, None, 2.0), (q, k, v)
    )


def test_a_sink_is_a_key_without_a_value_that_no_softcap_reaches() -> None:
    """One query and one key of score 2 cos: with a sink of log 3 the value's share is e^z / (e^z + 3)."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    bounds, alone, sink = torch.tensor([0, 1]), torch.tensor([-1]), torch.tensor([3.0]).double().log()
    for softcap, z in ((None, 2.0), (0.5, 0.5 * math.tanh(4.0))):
        wanted = 5 * math.exp(z) / (math.exp(z) + 3)
        for backend in ("plain", "sdpa"):
            args = (one, one, 5 * one, Sequences.of(bounds, alone), 2.0, None, softcap, backend, sink)
            assert float(varlen_attention(*args)) == pytest.approx(wanted, rel=1e-12)


def test_a_sink_in_bf16_is_as_exact_as_the_scores() -> None:
    """On a CPU it is a key, in two parts: one rounding of it would be of the size of bf16's."""
    q, k, v, bounds = make([40, 33])
    half = [x.detach().bfloat16() for x in (q, k, v)]
    sequences, alone = Sequences.of(bounds, torch.tensor([-1, -1])), torch.tensor([-1, -1])
    sinks = torch.tensor([20.125, 15.0, -1.0, 9.0625])
    want = varlen_attention_reference(*(x.double() for x in half), bounds, alone, 0.3, None, None, sinks)
    got = varlen_attention(*half, sequences, 0.3, sinks=sinks).double()
    assert ((got - want).norm(dim=(0, 2)) < 4e-3 * want.norm(dim=(0, 2))).all()


def test_sinks_are_frozen_and_one_per_query_head() -> None:
    q, k, v, bounds = make([3])
    sequences = Sequences.of(bounds, torch.tensor([-1]))
    with pytest.raises(ValueError, match="requires_grad of the sinks is True: they are frozen here"):
        varlen_attention(q, k, v, sequences, 1.0, sinks=torch.zeros(4, requires_grad=True))
    for wrong in (torch.zeros(2), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"want sinks \[Hq\], Hq = 4; got sinks"):
            varlen_attention(q, k, v, sequences, 1.0, sinks=wrong)


def test_a_shared_prefix_equals_repeating_it_in_every_sequence() -> None:
    """Prompt of 4, continuations of 2 and 3: packed as [4, 2, 3] behind a prefix, and as [6, 7] without."""
    q, k, v, bounds = make([4, 2, 3])
    shared = varlen_attention(q, k, v, Sequences.of(bounds, torch.tensor([-1, 0, 0])), 0.3)
    rows = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8]
    repeated = varlen_attention(
        q[rows], k[rows], v[rows], Sequences.of(torch.tensor([0, 6, 13]), torch.tensor([-1, -1])), 0.3
    )
    assert torch.allclose(shared[4:6], repeated[4:6], atol=1e-12)
    assert torch.allclose(shared[6:9], repeated[10:13], atol=1e-12)
    grads = [
        torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        for out in (shared[4:], repeated[[4, 5, 10, 11, 12]])
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_no_token_sees_another_sequence_or_the_future() -> None:
    """The gradient of one output row is zero on every key it may not see."""
    q, k, v, bounds = make([3, 2, 2, 4])
    out = varlen_attention(q, k, v, Sequences.of(bounds, torch.tensor([-1, 0, 0, -1])), 0.3)
    (grad,) = torch.autograd.grad(out[5].sum(), v)  # first token of sequence 2: sees 0, 1, 2 and itself
    assert grad.abs().sum((1, 2)).nonzero().flatten().tolist() == [0, 1, 2, 5]


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v, bounds = make([3])
    with pytest.raises(ValueError, match=r"Hq a multiple of Hk; got q \(3, 3, 8\)"):
        varlen_attention(q[:, :3], k, v, Sequences.of(bounds, torch.tensor([-1])), 1.0)


# ---- two calls and a merge, as on a GPU --------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("window", [None, 3, 7, 100])
@pytest.mark.parametrize(
    "case", [c for c in CASES if "continuations" not in c] + ["the same with the prompts first, and one alone"]
)
def test_two_calls_with_merged_out_and_lse_have_exact_gradients(
    case: str, window: int | None, copies: bool, sinks: Tensor | None
) -> None:
    """The GPU path's two ways over attentions written out in PyTorch, in float64."""
    lengths, prefix = CASES[case]
    q, k, v, bounds = make(lengths)
    sequences = Sequences.of(bounds, torch.tensor(prefix), copies=copies)
    assert (sequences.shared is not None) == (max(prefix) >= 0 and not copies)
    got = varlen_attention(q, k, v, sequences, 0.3, window, backend="math", sinks=sinks)
    want = varlen_attention_reference(q, k, v, bounds, torch.tensor(prefix), 0.3, window, None, sinks)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    grads = [torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True) for out in (got, want)]
    assert torch.allclose(got, want, atol=1e-12)
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_prefixes_that_do_not_lie_first_are_refused_where_two_calls_are_needed() -> None:
    lengths, prefix = CASES["two prompts, three and one continuations"]
    q, k, v, bounds = make(lengths)
    sequences = Sequences.of(bounds, torch.tensor(prefix), copies=False)
    assert sequences.shared is None
    with pytest.raises(ValueError, match="prefixes must come first"):
        varlen_attention(q, k, v, sequences, 0.3, backend="math")


# ---- blocks of rows that attend to each other ------------------------------------------------------------------------


BLOCKS = {
    "two in one sequence, one in another": ([9, 4, 6], [-1, -1, -1], [(1, 4), (5, 9), (14, 16)]),
    "in shared prompts, and in a sequence alone": (
        [6, 3, 2, 4, 1, 7],
        [-1, -1, 0, 0, 1, -1],
        [(0, 3), (6, 9), (17, 20)],
    ),
    "behind a prefix, as long as the sequence": ([3, 5], [-1, 0], [(3, 8)]),
}


def masked(q: Tensor, k: Tensor, v: Tensor, case: str, window: int | None) -> Tensor:
    """Softmax over the pairs of rows that see each other, each pair by its own."""
    lengths, prefix, blocks = BLOCKS[case]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    sequence = [s for s, length in enumerate(lengths) for _ in range(length)]
    place = [row - starts[s] + (lengths[prefix[s]] if prefix[s] >= 0 else 0) for row, s in enumerate(sequence)]
    block = [next((i for i, (a, b) in enumerate(blocks) if a <= row < b), -1) for row in range(len(sequence))]
    seen = torch.zeros(len(sequence), len(sequence), dtype=torch.bool)
    for i, s in enumerate(sequence):
        for j, other in enumerate(sequence):
            ahead = place[j] > place[i] and (block[i] < 0 or block[i] != block[j])
            far = window is not None and place[j] <= place[i] - window
            seen[i, j] = other in (s, prefix[s]) and not ahead and not far
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, wide_k) * 0.3
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), wide_v)


@pytest.mark.parametrize("backend", ["plain", "sdpa", "math", "math with copies"])
@pytest.mark.parametrize("window", [None, 2, 4, 100])
@pytest.mark.parametrize("case", BLOCKS)
def test_rows_of_a_block_attend_in_both_directions(case: str, window: int | None, backend: str) -> None:
    lengths, prefix, blocks = BLOCKS[case]
    q, k, v, bounds = make(lengths)
    backend, _, copies = backend.partition(" ")
    sequences = Sequences.of(bounds, torch.tensor(prefix), copies=bool(copies), blocks=blocks)
    got = varlen_attention(q, k, v, sequences, 0.3, window, backend=backend)
    want = masked(q, k, v, case, window)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    grads = [torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True) for out in (got, want)]
    assert torch.allclose(got, want, atol=1e-12)
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    causal = varlen_attention(q, k, v, Sequences.of(bounds, torch.tensor(prefix)), 0.3, window, backend="plain")
    assert (got - causal).abs().max() > 1e-2


def test_the_formula_with_blocks_passes_gradcheck() -> None:
    q, k, v, _ = make([3, 2], heads=(2, 1), dim=3)
    bounds, prefix, blocks = torch.tensor([0, 3, 5]), torch.tensor([-1, -1]), Blocks([(1, 3)])
    assert torch.autograd.gradcheck(
        lambda *qkv: varlen_attention_reference(*qkv, bounds, prefix, 0.5, 2, None, None, blocks), (q, k, v)
    )


# ---- kernels ---------------------------------------------------------------------------------------------------------


def merge_inputs(tokens: int = 5, heads: int = 3, dim: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Two attentions as views into wider buffers; some have no keys on one side, one on neither."""
    g = torch.Generator().manual_seed(0)
    outs = [torch.randn(tokens, heads + i, dim, generator=g).to(dtype)[:, :heads] for i in (0, 1)]
    lses = [torch.randn(heads, tokens + i, generator=g)[:, i:] * 30 for i in (0, 2)]
    for i, lse in enumerate(lses):
        lse[0, i] = lse[1, 3] = -math.inf
        outs[i][i, 0] = outs[i][3, 1] = 0
    return outs[0], lses[0], outs[1], lses[1]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU the tests below run the kernel")
@pytest.mark.parametrize("dim", [6, 8])
def test_the_merge_kernel_through_the_interpreter(dim: int) -> None:
    out_1, lse_1, out_2, lse_2 = merge_inputs(dim=dim)
    out, lse = merge_reference(out_1, lse_1, out_2, lse_2)
    launch_merge(out_1, lse_1, out_2, lse_2)
    assert torch.allclose(out_1, out, atol=1e-6) and torch.allclose(lse_1, lse, atol=1e-5)
    assert lse_1[1, 3] == -math.inf and out_1[3, 1].abs().sum() == 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU the tests below run the kernel")
@pytest.mark.parametrize(("tokens", "dim"), [(5, 6), (90, 8), (1, 64), (0, 8)])
def test_the_sinks_kernel_through_the_interpreter(tokens: int, dim: int) -> None:
    """In place, on views into wider buffers; heads without a sink, rows without a key, and neither."""
    out, lse, *_ = merge_inputs(max(tokens, 5), dim=dim)
    out, lse = out[:tokens], lse[:, :tokens]
    sinks = torch.tensor([1.5, -math.inf, -40.0])
    wanted, total = add_sinks_reference(out.double(), lse.double(), sinks)
    untouched = out.clone()
    launch_sinks(out, lse, sinks)
    assert torch.allclose(out.double(), wanted, atol=1e-6) and torch.allclose(lse.double(), total, atol=1e-5)
    assert torch.equal(out[:, 1], untouched[:, 1]), "no sink changes no bit"
    if tokens > 3:
        assert lse[1, 3] == -math.inf and float(lse[0, 0]) == 1.5 and out[0, 0].abs().sum() == 0


def test_a_back_end_that_cannot_do_it_says_so() -> None:
    q, k, v, bounds = make([3])
    spans = Spans(bounds, bounds, 3, 3, True, None)
    with pytest.raises(ValueError, match=r'"fa2" has no softcap \(5.0\): use "fa4" or "plain"'):
        run_forward("fa2", q, k, v, spans, 1.0, 5.0)
    with pytest.raises(ValueError, match='"fa3": want "fa4" or "fa2"'):
        run_forward("fa3", q, k, v, spans, 1.0, None)
    assert choose_backend(torch.device("cpu"), torch.bfloat16, 128, None) == "sdpa"


def test_compiled_kernels_are_kept_in_a_folder_of_the_user_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled, where = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
    folder = tmp_path / "rlft" / "flash-attn-4"

    def settings(**given: str) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path), **given})
        set_fa4_cache()
        return {name: value for name, value in os.environ.items() if name in (enabled, where)}

    assert settings() == {enabled: "1", where: str(folder)}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert settings(**{enabled: "0"})[enabled] == "0" and settings(**{where: "elsewhere"})[where] == "elsewhere"
    folder.chmod(0o777)
    assert settings() == {}, "others could put machine code there"
    folder.rmdir()
    folder.touch()
    assert settings() == {}


def gpu_backends() -> list[str]:
    from rlft.kernels.attention_backends import fa4_version

    return ["fa2", *(["fa4"] if fa4_version() else [])]


GPU_CASES = {
    "one long": ([4097], [-1]),
    "ragged": ([1, 130, 7, 1024, 300], [-1] * 5),
    "prefixes": ([700, 64, 300, 1, 513, 128, 90, 200], [-1, -1, 0, 0, 0, 1, 1, -1]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("window", "copies"), [(None, False), (None, True), (256, False)])
@pytest.mark.parametrize("case", GPU_CASES)
def test_back_ends_on_the_gpu_against_fp64(
    case: str, window: int | None, copies: bool, dim: int, with_sinks: bool
) -> None:
    """Error at most 2x (outputs) and 3x (gradients) of PyTorch's attention per sequence in the same dtype."""
    lengths, prefix = GPU_CASES[case]
    q, k, v, bounds = make(lengths, heads=(8, 2), dim=dim)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype).cuda()
    sequences = Sequences.of(bounds, torch.tensor(prefix), "cuda", copies)
    sinks = torch.linspace(-2, 4, 8, device="cuda").bfloat16() if with_sinks else None

    def run(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        leaves = [x.detach().to(torch.bfloat16).to(dtype).cuda().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*leaves, sequences, dim**-0.5, window, backend=backend, sinks=sinks)
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, upstream.to(dtype)))]

    truth, plain = run(torch.float64, "sdpa"), run(torch.bfloat16, "sdpa")
    for backend in gpu_backends():
        for i, (want, base, got) in enumerate(zip(truth, plain, run(torch.bfloat16, backend), strict=True)):
            allowed = (2 if i == 0 else 3) * (base - want).norm() + 1e-3 * want.norm()
            assert (got - want).norm() <= allowed, (backend, i, float((got - want).norm()), float(allowed))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_heads_that_flash_attention_does_not_take_on_the_gpu(case: str) -> None:
    """By the back end that is chosen for them, beside the formula in the same dtype; without scores in memory."""
    lengths, prefix = GPU_CASES[case]
    q, k, v, bounds = make(lengths, heads=(8, 2), dim=512)
    parents, upstream = torch.tensor(prefix), torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).cuda()
    sequences = Sequences.of(bounds, parents, "cuda")

    def run(dtype: torch.dtype, reference: bool) -> list[Tensor]:
        leaves = [x.detach().bfloat16().to(dtype).cuda().requires_grad_() for x in (q, k, v)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if reference:
            out = varlen_attention_reference(*leaves, bounds, parents, 0.05)
        else:
            out = varlen_attention(*leaves, sequences, 0.05)
        found = [x.double() for x in (out, *torch.autograd.grad(out, leaves, upstream.to(dtype)))]
        assert reference or torch.cuda.max_memory_allocated() - before < 40 * leaves[0].numel() * 2
        return found

    truth, plain = run(torch.float64, True), run(torch.bfloat16, True)
    for i, (want, base, got) in enumerate(zip(truth, plain, run(torch.bfloat16, False), strict=True)):
        assert (got - want).norm() <= (2 if i == 0 else 3) * (base - want).norm() + 1e-3 * want.norm(), i


@pytest.mark.gpu
def test_the_merge_kernel_on_the_gpu() -> None:
    inputs = [x.cuda() for x in merge_inputs(700, 8, 128, torch.bfloat16)]
    out, lse = merge_reference(inputs[0].double(), inputs[1].double(), inputs[2].double(), inputs[3].double())
    merge(*inputs)
    assert torch.allclose(inputs[0].double(), out, rtol=0.01, atol=0.01)
    assert torch.allclose(inputs[1].double(), lse, atol=1e-4)


@pytest.mark.gpu
def test_the_sinks_kernel_on_the_gpu() -> None:
    out, lse, *_ = (x.cuda() for x in merge_inputs(700, 8, 128, torch.bfloat16))
    sinks = torch.linspace(-2, 4, 8, device="cuda").bfloat16()
    wanted, total = add_sinks_reference(out.double(), lse.double(), sinks)
    add_sinks(out, lse, sinks)
    assert torch.allclose(out.double(), wanted, rtol=0.01, atol=0.01)
    assert torch.allclose(lse.double(), total, atol=1e-4)


@pytest.mark.gpu
def test_a_softcap_on_the_gpu() -> None:
    q, k, v, bounds = make([130, 40], heads=(4, 2), dim=128)
    sequences = Sequences.of(bounds, torch.tensor([-1, -1]), "cuda")
    want = varlen_attention_reference(q, k, v, bounds, torch.tensor([-1, -1]), 0.1, None, 5.0)
    leaves = [x.detach().bfloat16().cuda() for x in (q, k, v)]
    for backend in ("plain", *(b for b in gpu_backends() if b == "fa4")):
        got = varlen_attention(*leaves, sequences, 0.1, None, 5.0, backend)
        assert (got.double().cpu() - want).norm() < 0.02 * want.norm(), backend
    many = Sequences.of(torch.tensor([0, 40_000]), torch.tensor([-1]), "cuda")
    wide = torch.zeros(40_000, 4, 128, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"holds 23.8 GiB of scores for a sequence of 40000 tokens"):
        varlen_attention(wide, wide[:, :2], wide[:, :2], many, 0.1, None, 5.0, "plain")


@pytest.mark.gpu
@pytest.mark.parametrize("copies", [False, True])
def test_a_side_stream_and_a_cuda_graph(copies: bool) -> None:
    lengths, prefix = GPU_CASES["prefixes"]
    q, k, v, bounds = make(lengths, heads=(8, 2), dim=128)
    sequences = Sequences.of(bounds, torch.tensor(prefix), "cuda", copies)
    for backend in gpu_backends():
        leaves = [x.detach().bfloat16().cuda().requires_grad_() for x in (q, k, v)]

        def run(leaves: list[Tensor] = leaves, backend: str = backend) -> list[Tensor]:
            out = varlen_attention(*leaves, sequences, 0.1, backend=backend)
            # Detached: a graph that is alive ties the leaves to the stream they were first used on.
            return [x.detach() for x in (out, *torch.autograd.grad(out.sum(), leaves))]

        want = run()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = run()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        for others in (got, captured):
            assert torch.equal(others[0], want[0]), backend
            # dQ is added up by atomics.
            assert all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(others, want, strict=True)), backend


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize(("window", "copies"), [(None, False), (None, True), (512, False), (128, False)])
def test_blocks_on_the_gpu_against_fp64(window: int | None, copies: bool, dim: int) -> None:
    """Images of 256 rows in shared prompts and alone, held against PyTorch's attention per sequence."""
    lengths, prefix = [700, 300, 64, 300, 513, 90, 700], [-1, -1, 0, 0, 0, 1, -1]
    blocks = [(5, 261), (300, 556), (720, 976), (1977, 2233)]
    q, k, v, bounds = make(lengths, heads=(8, 2), dim=dim)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype).cuda()
    sequences = Sequences.of(bounds, torch.tensor(prefix), "cuda", copies, blocks)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.detach().to(torch.bfloat16).to(dtype).cuda().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*leaves, sequences, dim**-0.5, window, backend=backend)
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, upstream.to(dtype)))]

    truth, plain = run(torch.float64, "sdpa"), run(torch.bfloat16, "sdpa")
    for backend in [name for name in gpu_backends() if name == "fa2" or dim in FA4_HEADS]:
        for i, (want, base, got) in enumerate(zip(truth, plain, run(torch.bfloat16, backend), strict=True)):
            allowed = (2 if i == 0 else 3) * (base - want).norm() + 1e-3 * want.norm()
            assert (got - want).norm() <= allowed, (backend, i, float((got - want).norm()), float(allowed))


def test_a_window_ends_at_the_query_where_attention_is_causal_alone() -> None:
    """FlashAttention 4 takes a right side of 0 for causal, whatever else it is told."""
    some = torch.tensor([0, 4])
    windows = {
        (causal, window): [
            of(Spans(some, some, 4, 4, causal, window))
            for of in (attention_backends._fa4_window, attention_backends._fa2_window)
        ]
        for causal in (True, False)
        for window in (None, 3)
    }
    assert windows == {
        (True, None): [(None, None), (-1, 0)],
        (True, 3): [(2, 0), (2, 0)],
        (False, None): [(None, None), (-1, -1)],
        (False, 3): [(2, None), (2, -1)],
    }
