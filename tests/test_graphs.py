"""What a CUDA graph's bucket has room for. On a GPU test_fused_gpu.py tests that graphs give what launches give."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from rlft.kernels.attention import Keys, Sequences, varlen_attention, varlen_attention_reference
from rlft.kernels.copies import Copies
from rlft.models import graphs


def drawn(draw: random.Random) -> Sequences:
    """Some prompts of 1 to 300 tokens, with 1 to 6 completions of 0 to 300 each, or rows without a prefix."""
    groups = [(draw.randint(1, 300), draw.randint(1, 6)) for _ in range(draw.randint(1, 5))]
    shared = draw.random() < 0.8
    lengths, prefix = ([p for p, _ in groups], [-1] * len(groups)) if shared else ([], [])
    for i, (_, count) in enumerate(groups):
        lengths += [draw.randint(0, 300) for _ in range(count)]
        prefix += [i if shared else -1] * count
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Sequences.of(bounds, torch.tensor(prefix))


def filled(s: Sequences) -> Sequences:
    return s._replace(bounds=(*s.bounds, graphs.padded(s.bounds[-1])), prefix=(*s.prefix, -1))


@pytest.mark.parametrize("seed", range(40))
def test_a_bucket_has_room_for_its_pass_and_for_the_sequence_that_fills_it(seed: int) -> None:
    s = drawn(random.Random(seed))
    T, rows, shared = s.bounds[-1], graphs.padded(s.bounds[-1]), max(s.prefix) >= 0
    seen = {window: Keys.seen(filled(s), window) for window in ((None, 100) if shared else ())}
    size = graphs._bucket(filled(s), rows, seen)
    lengths = [b - a for a, b in itertools.pairwise((*s.bounds, rows))]
    assert size.rows == rows >= T and size.sequences > len(s.prefix)
    assert size.longest >= max(lengths) or size.longest == rows
    assert tuple(k[0] for k in size.keys) == tuple(seen)
    for window, place, most in size.keys:
        index, bounds = seen[window]
        want, before = Keys.seen(s, window)
        assert place >= index.size and most >= max(b - a for a, b in itertools.pairwise(bounds))
        # The pass's own keys as without a bucket, and behind them the rest, which sees itself.
        assert (index[: want.size] == want).all() and index[want.size :].tolist() == list(range(T, rows))
        assert bounds == [*before, want.size + rows - T]
        assert graphs.room(graphs.copied_keys(s, rows), rows) >= place, "what the memory plan counts"


def test_what_an_earlier_pass_left_in_the_buffers_changes_nothing() -> None:
    """Two layouts one after the other through one bucket's buffers, full of garbage at first; attention in float64."""
    device, draw = torch.device("cpu"), random.Random(7)
    layouts = [s for s in (drawn(draw) for _ in range(200)) if max(s.prefix) >= 0 and 1024 < s.bounds[-1] <= 1280][:6]
    assert len(layouts) == 6
    rows, room = 1280, 5 * 1280
    graph = graphs._Graph.__new__(graphs._Graph)
    graph.x, graph.dout, graph.tables = torch.full((rows, 3), math.nan), torch.full((rows, 3), math.nan), {}
    graph.cu_seqlens = torch.full((65,), 7, dtype=torch.int32)
    graph.cu_seqlens[0] = 0
    index, starts, order, cu_k = (torch.full((n,), 3, dtype=torch.int32) for n in (room, rows + 1, room, 65))
    cu_k[0] = 0
    graph.keys = {None: Keys(Copies(index, starts, order), cu_k, 2048)}
    static = Sequences((0, rows), (-1,), graph.cu_seqlens, 2048, None, False, dict(graph.keys))
    for seed, s in enumerate(layouts):
        T, g = s.bounds[-1], torch.Generator().manual_seed(seed)
        seen = Keys.seen(filled(s), None)
        graph.fill(torch.zeros(T, 3), {}, s, {None: Keys.made(*seen, rows, device)})
        # Rows of the bucket beyond the pass's hold what they like.
        q, k, v = (torch.randn(rows, h, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
        out = varlen_attention(q, k, v, static, 0.5, backend="math")
        cu, prefix = torch.tensor(s.bounds), torch.tensor(s.prefix)
        want = varlen_attention_reference(q[:T], k[:T], v[:T], cu, prefix, 0.5)
        upstream = torch.randn(want.shape, generator=g, dtype=torch.float64)
        grads = [torch.autograd.grad((o * upstream).sum(), (q, k, v), retain_graph=True) for o in (out[:T], want)]
        assert torch.allclose(out[:T], want, atol=1e-12) and graph.x[:T].isfinite().all()
        assert not graph.dout[T:].any() and not graph.dout[T:].isnan().any()
        for ours, theirs in zip(*grads, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-12)


def test_rows_are_padded_by_a_quarter_at_most_where_they_are_many() -> None:
    for rows in (*range(1, 3000, 7), 32_767, 32_769):
        padded = graphs.padded(rows)
        assert rows <= padded < rows + max(graphs.ROWS, rows / 4 + 1)
    assert len({graphs.padded(rows) for rows in range(16_384, 32_768)}) <= 5
