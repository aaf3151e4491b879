"""What a CUDA graph's bucket has room for. On a GPU test_fused_gpu.py tests that graphs give what launches give."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from rlft.kernels.attention import Keys, Sequences
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


@pytest.mark.parametrize("seed", range(40))
def test_a_bucket_has_room_for_its_pass_and_for_the_sequence_that_fills_it(seed: int) -> None:
    s = drawn(random.Random(seed))
    T, windows = s.bounds[-1], (None, 100)
    rows = graphs._rounded(T)
    keys = graphs._copied(s, rows, windows)
    size = graphs._bucket(rows, rows - T, s, keys)
    lengths = [b - a for a, b in itertools.pairwise((*s.bounds, rows))]
    assert size.rows == rows >= T and size.sequences > len(s.prefix)
    assert size.longest >= max(lengths) or size.longest == rows
    assert tuple(k[0] for k in size.keys) == (windows if max(s.prefix) >= 0 else ())
    for window, room, most in size.keys:
        got, want = keys[window], Keys.of(s._replace(shared=None, copies=True, keys={}), window)
        assert want is not None and room >= got.copies.index.numel() and most >= got.max_k
        # The pass's own keys as without a bucket, and behind them the rest, which sees itself.
        count = want.copies.index.numel()
        assert torch.equal(got.copies.index[:count], want.copies.index)
        assert got.copies.index[count:].tolist() == list(range(T, rows))
        assert got.cu_k.tolist() == [*want.cu_k.tolist(), count + rows - T]
        assert got.copies.starts.numel() == rows + 1


def test_rows_are_padded_by_a_quarter_at_most_where_they_are_many() -> None:
    for rows in (*range(1, 3000, 7), 32_767, 32_769):
        padded = graphs._rounded(rows)
        assert rows <= padded < rows + max(graphs.ROWS, rows / 4 + 1)
    assert len({graphs._rounded(rows) for rows in range(16_384, 32_768)}) <= 5
