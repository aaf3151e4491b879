"""Sizes of gated DeltaNets and short convolutions, from which the memory plan is computed."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from rlft.kernels.attention import Sequences
from rlft.kernels.delta_chunks import CHUNK


class Recurrent(NamedTuple):
    """What the memory of a gated DeltaNet depends on beside the rows of a pass."""

    rows: int
    """Rows of all chunks, with every sequence rounded up to whole chunks."""
    prefixes: int = 0
    """Sequences whose final states are kept for others."""
    continued: int = 0
    """Sequences that continue one."""

    @classmethod
    def of(cls, sequences: Sequences) -> Recurrent:
        """Count in the sequences of a pass, rounded up, so that plans are reused."""
        lengths = [end - start for start, end in pairwise(sequences.bounds)]
        rows = sum(-(-length // CHUNK) for length in lengths) * CHUNK
        step = max(CHUNK, 1 << max(0, rows.bit_length() - 6))
        continued = [parent for parent in sequences.prefix if parent >= 0]
        sizes = ((rows, step), (len(set(continued)), 8), (len(continued), 8))
        return cls(*(-(-size // multiple) * multiple for size, multiple in sizes))


class MixerShape(NamedTuple):
    """Sizes of what mixes the tokens of a layer in place of attention."""

    columns: int
    """Columns of the buffer of the projections, without tail."""
    forward: int
    """Bytes per row that a forward takes beyond that buffer and its output."""
    backward: int
    """Bytes per row that a backward takes beyond that buffer, its output, and the gradient of what is projected next.
    """
    forward_chunks: int = 0
    """Of `forward`, bytes per row of a chunk, for `Recurrent.rows`."""
    backward_chunks: int = 0
    state: int = 0
    """Bytes of a state in fp32: one for every prefix and every sequence that continues one."""
    finishes: bool = False
    """The buffer is read again for what the output projection reads, as by a gate."""

    def work(self, rows: int, recurrent: Recurrent | None, backward: bool) -> int:
        """Return the bytes that a forward or a backward takes."""
        recurrent = recurrent or Recurrent(rows)
        each, chunk = (self.backward, self.backward_chunks) if backward else (self.forward, self.forward_chunks)
        states = max(recurrent.prefixes, recurrent.continued) if backward else recurrent.prefixes
        return rows * each + recurrent.rows * chunk + states * self.state
