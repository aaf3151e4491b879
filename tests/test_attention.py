"""Packed attention against its formula, with and without shared prefixes, windows and grouped queries."""

from __future__ import annotations

import pytest
import torch

from rlft.kernels.attention import varlen_attention, varlen_attention_reference


def make(lengths: list[int], heads: tuple[int, int] = (4, 2), dim: int = 8, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q = torch.randn(total, heads[0], dim, generator=g, dtype=torch.float64, requires_grad=True)
    k = torch.randn(total, heads[1], dim, generator=g, dtype=torch.float64, requires_grad=True)
    v = torch.randn(total, heads[1], dim, generator=g, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, bounds


CASES = {
    "one token": ([1], [-1]),
    "ragged, one empty": ([3, 0, 7, 1], [-1, -1, -1, -1]),
    "two prompts, three and one continuations": ([5, 2, 1, 4, 3, 6], [-1, 0, 0, 0, -1, 4]),
    "an empty continuation": ([4, 0, 2], [-1, 0, 0]),
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_formula(case: str, window: int | None) -> None:
    lengths, prefix = CASES[case]
    q, k, v, bounds = make(lengths)
    got = varlen_attention(q, k, v, bounds, torch.tensor(prefix), 0.3, window)
    want = varlen_attention_reference(q, k, v, bounds, torch.tensor(prefix), 0.3, window)
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


def test_a_shared_prefix_equals_repeating_it_in_every_sequence() -> None:
    """Prompt of 4, continuations of 2 and 3: packed as [4, 2, 3] behind a prefix, and as [6, 7] without."""
    q, k, v, bounds = make([4, 2, 3])
    shared = varlen_attention(q, k, v, bounds, torch.tensor([-1, 0, 0]), 0.3)
    rows = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8]
    repeated = varlen_attention(
        q[rows], k[rows], v[rows], torch.tensor([0, 6, 13], dtype=torch.int32), torch.tensor([-1, -1]), 0.3
    )
    assert torch.allclose(shared[4:6], repeated[4:6], atol=1e-12)
    assert torch.allclose(shared[6:9], repeated[10:13], atol=1e-12)
    grads = [torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
             for out in (shared[4:], repeated[[4, 5, 10, 11, 12]])]  # fmt: skip
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_no_token_sees_another_sequence_or_the_future() -> None:
    """The gradient of one output row is zero on every key it may not see."""
    q, k, v, bounds = make([3, 2, 2, 4])
    out = varlen_attention(q, k, v, bounds, torch.tensor([-1, 0, 0, -1]), 0.3)
    (grad,) = torch.autograd.grad(out[5].sum(), v)  # first token of sequence 2: sees 0, 1, 2 and itself
    assert grad.abs().sum((1, 2)).nonzero().flatten().tolist() == [0, 1, 2, 5]


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v, bounds = make([3])
    with pytest.raises(ValueError, match=r"Hq a multiple of Hk; got q \(3, 3, 8\)"):
        varlen_attention(q[:, :3], k, v, bounds, torch.tensor([-1]), 1.0)
