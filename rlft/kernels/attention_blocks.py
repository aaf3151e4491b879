"""Blocks of rows that attend to each other in both directions: images in Gemma 3.

A row i of a block from row a to row b of its sequence attends to all keys that a causal row would, and to the rest of
its block:

    keys j of the sequence (its prefix included) with j < b, and with a window w only those with j > i - w

Such a row is computed again by one call over all blocks that is not causal, with copies of the keys of each block, and
its out and lse replace those of the causal call. In the backward the causal call gets an upstream gradient of 0 for
these rows, so that they add nothing there, and the second call gives their gradients. A window reaches to the left
alone, aligned at the end of the block, as the back ends count it. Bytes moved: q, out and their gradients of the rows
of blocks once more, and k and v from the start of the sequence or window to the end of each block.

Names: q, k, v of attention, x one of k and v, T rows, Hq query heads, D head size, w a window, n rows of all blocks
together, a and b the first row of a block and the row behind its last, s a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.kernels import attention_backends as backends
from rlft.kernels.copies import Copies, gather_copies, sum_copies
from rlft.upload import upload

Span = tuple[int, int]
"""First row of a block, and the row behind its last."""


class _Call(NamedTuple):
    """The call over all blocks for one window."""

    rows: Tensor
    """[n] int64: rows of the blocks."""
    keys: Copies
    """Copies of rows of k and of v."""
    spans: backends.Spans


class Blocks:
    """The blocks of packed sequences. Tables are built by the first call, and used by all layers."""

    def __init__(self, spans: Sequence[Span]) -> None:
        """spans: in the order of their rows; none crosses the bounds of a sequence."""
        self.spans = tuple(spans)
        self._calls: dict[int | None, _Call] = {}

    def within(self, first: int, last: int) -> list[Span]:
        """Return the blocks of the sequence of rows `first` to `last`, counted from its first row."""
        return [(a - first, b - first) for a, b in self.spans if first <= a < last]

    def count_keys(self, bounds: Sequence[int], prefix: Sequence[int]) -> int:
        """Return the number of keys that are copied without a window. bounds, prefix: as in `Sequences`."""
        return sum(len(keys) for keys in _keys(self.spans, bounds, prefix, None))

    def replace(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Rows, options: Options
    ) -> None:
        """Overwrite the rows of blocks in out [T, Hq, D] and lse [Hq, T] of the causal calls."""
        call = self._call(sequences, options.window, q.device)
        k_seen, v_seen = (gather_copies(x, call.keys) for x in (k, v))
        backend, scale, softcap = options.backend, options.scale, options.softcap
        own, own_lse = backends.forward(backend, q[call.rows], k_seen, v_seen, call.spans, scale, softcap)
        out[call.rows], lse[:, call.rows] = own, own_lse

    def without(self, dout: Tensor) -> Tensor:
        """Return an upstream gradient [T, Hq, D] with 0 in the rows of blocks."""
        kept = dout.clone()
        for a, b in self.spans:
            kept[a:b].zero_()
        return kept

    def add_gradients(
        self,
        dout: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        saved: tuple[Tensor, Tensor],
        totals: tuple[Tensor, Tensor, Tensor],
        sequences: Rows,
        options: Options,
    ) -> None:
        """Add the gradients of the rows of blocks. inputs: q, k, v. saved: out, lse. totals: dq, dk, dv."""
        (q, k, v), (out, lse), call = inputs, saved, self._call(sequences, options.window, dout.device)
        rows = call.rows
        k_seen, v_seen = (gather_copies(x, call.keys) for x in (k, v))
        parts = (dout[rows], q[rows], k_seen, v_seen, out[rows], lse[:, rows].contiguous())
        dq, dk, dv = backends.backward(options.backend, *parts, call.spans, options.scale, options.softcap)
        totals[0].index_add_(0, rows, dq)
        for total, own in zip(totals[1:], (dk, dv), strict=True):
            total += sum_copies(own, call.keys)

    def _call(self, sequences: Rows, window: int | None, device: torch.device) -> _Call:
        if window not in self._calls:
            bounds, prefix = sequences
            keys = _keys(self.spans, bounds, prefix, window)
            rows = np.concatenate([np.arange(a, b) for a, b in self.spans])
            cu_q, cu_k = (np.cumsum([0, *lengths]) for lengths in ([b - a for a, b in self.spans], map(len, keys)))
            most_q, most_k = (int(np.diff(cu).max()) for cu in (cu_q, cu_k))
            q, k = (upload(torch.from_numpy(cu.astype(np.int32)), device) for cu in (cu_q, cu_k))
            spans = backends.Spans(q, k, most_q, most_k, causal=False, window=window)
            copies = Copies.of(np.concatenate(keys), bounds[-1], device)
            self._calls[window] = _Call(upload(torch.from_numpy(rows), device), copies, spans)
        return self._calls[window]


class Rows(NamedTuple):
    """Which rows are which sequence, as in `rlft.kernels.attention.Sequences`."""

    bounds: Sequence[int]
    prefix: Sequence[int]


class Options(NamedTuple):
    """How an attention is computed, as in `rlft.kernels.attention.attention_forward`."""

    scale: float
    backend: str
    window: int | None
    softcap: float | None


def _keys(spans: Sequence[Span], bounds: Sequence[int], prefix: Sequence[int], window: int | None) -> list[np.ndarray]:
    """Return the rows that each block attends to."""
    sequences = list(pairwise(bounds))
    found = []
    for a, b in spans:
        (s,) = (i for i, (first, last) in enumerate(sequences) if first <= a and b <= last)
        before = np.arange(*sequences[prefix[s]]) if prefix[s] >= 0 else np.arange(0)
        keys = np.concatenate([before, np.arange(sequences[s][0], b)])
        # The first row of the block sees window - 1 keys before itself.
        found.append(keys if window is None else keys[max(0, len(keys) - (b - a) - window + 1) :])
    return found
