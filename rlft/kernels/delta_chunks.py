"""The gated delta rule in chunks of 64 rows: the steps that the kernels follow, and where the chunks are.

Within a chunk of C rows, with S the state before it, k and q of length 1 if they are normalised, and G the running sum
of g from the chunk's first row to the row itself,

    E_ij = exp(G_i - G_j) for i >= j, else 0
    A_ij = beta_i (k_i . k_j) E_ij for i > j, else 0       P_ij = scale (q_i . k_j) E_ij
    M = (I + A)^-1
    r_i = beta_i (v_i - exp(G_i) S^T k_i)                  n = M r       (n_i: what row i writes to the state)
    o_i = scale exp(G_i) S^T q_i + sum_j P_ij n_j
    S' = exp(G_C) S + sum_i exp(G_C - G_i) k_i n_i^T

This is the WY form of "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv 2406.06484)
with the decay of "Gated Delta Networks" (arXiv 2412.06464). The papers apply M to beta v and to beta exp(G) k
beforehand; here it is applied to their difference r, once S is known: M, [C, C], is less to store than both products,
and its gradient is only -M^T dn n^T. Every exponent is at most 0, so that nothing overflows.

C is `CHUNK`, S sequences, T rows, N chunks, H heads, Hk heads of q and k, Hv of v, Dk and Dv their sizes. In the code E
is `decay`, M `inverse`, r `rest`, n `new`, G `sums`, b a chunk, p a prefix and x any input.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.upload import upload

CHUNK = 64
"""Rows of a chunk."""
NORM_EPS = 1e-6
"""Added to the squared length of q and k, as transformers and flash-linear-attention do."""


class Chunks(NamedTuple):
    """Where the chunks of every sequence are, and which sequences continue which; known on the host."""

    bounds: tuple[int, ...]
    """S + 1 row bounds."""
    prefix: tuple[int, ...]
    """For each sequence, the index of the sequence it continues; -1 for none. A prefix has no prefix itself."""
    first: tuple[int, ...]
    """S + 1 bounds of chunks: sequence s is chunks first[s] to first[s + 1]."""
    slots: tuple[int, ...]
    """For each sequence the place of the state that it starts from (continuations) or hands on (prefixes); -1 for
    neither. Places of prefixes count prefixes."""
    places: tuple[int, ...]
    """For each sequence, its place among the continuations, which are grouped by prefix; -1 if it is none."""
    rows: Tensor
    """[N, 2] int32: first row and end of each chunk, on the device of the rows."""
    roots: Tensor
    """[sequences without prefix, 8] int32, longest first: first row, end, first chunk, number of chunks, place of the
    state before (-1: zeros), place of the final state (-1: not needed), first and end of its continuations' places."""
    continued: Tensor
    """[continuations, 8] int32, likewise; its last two fields are its place and the next."""
    prefixes: int
    """Number of sequences that others continue."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, prefix: Tensor, device: torch.device | str | None = None) -> Chunks:
        """Build from [S + 1] and [S] integers, preferably on the CPU, since the host reads them.

        device: of the rows. Raises ValueError if a prefix has a prefix itself.
        """
        bounds, parents = tuple(cu_seqlens.tolist()), tuple(prefix.tolist())
        if any(p >= 0 and parents[p] >= 0 for p in parents):
            raise ValueError(f"Chunks.of: prefix = {parents}: a sequence that others continue must not have a prefix")
        lengths = [end - start for start, end in pairwise(bounds)]
        first = np.cumsum([0, *(-(-n // CHUNK) for n in lengths)]).tolist()
        heads = sorted({p for p in parents if p >= 0})
        slot = {p: i for i, p in enumerate(heads)}
        slots = [slot.get(i if p < 0 else p, -1) for i, p in enumerate(parents)]
        grouped = sorted((i for i, p in enumerate(parents) if p >= 0), key=lambda i: parents[i])
        places = np.full(len(parents), -1)
        places[grouped] = np.arange(len(grouped))
        tables: tuple[list[list[int]], list[list[int]]] = ([], [])
        for i in sorted(range(len(parents)), key=lambda i: -lengths[i]):
            span = [bounds[i], bounds[i + 1], first[i], first[i + 1] - first[i]]
            if parents[i] >= 0:
                tables[1].append([*span, slots[i], -1, int(places[i]), int(places[i]) + 1])
            else:
                behind = [place for place, child in enumerate(grouped) if parents[child] == i]
                tables[0].append([*span, -1, slots[i], behind[0] if behind else 0, behind[-1] + 1 if behind else 0])
        rows = [[start, min(start + CHUNK, end)] for s, end in pairwise(bounds) for start in range(s, end, CHUNK)]
        target = cu_seqlens.device if device is None else torch.device(device)
        uploaded = [
            upload(torch.tensor(table, dtype=torch.int32).reshape(-1, width), target)
            for table, width in ((rows, 2), (tables[0], 8), (tables[1], 8))
        ]
        rows_table, roots, continued = uploaded
        return cls(
            bounds,
            parents,
            tuple(first),
            tuple(slots),
            tuple(places.tolist()),
            rows_table,
            roots,
            continued,
            len(heads),
        )


class Pieces(NamedTuple):
    """Inputs cut in chunks, [N, Hv, C, ...] in the wide dtype; rows beyond the end of a sequence are 0."""

    q: Tensor
    """Normalised and multiplied by the scale."""
    k: Tensor
    v: Tensor
    beta: Tensor
    sums: Tensor
    """G: beyond the end as in the last row."""


def normalised(x: Tensor) -> Tensor:
    """Divide vectors [..., D] by their length."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + NORM_EPS)


def cut(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: Chunks, scale: float, l2norm: bool) -> Pieces:
    """Cut the inputs in chunks; q and k are repeated for the heads of v."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v, g, beta = (x.to(wide) for x in (q, k, v, g, beta))
    q, k = (normalised(q), normalised(k)) if l2norm else (q, k)
    groups = v.shape[1] // k.shape[1]
    starts, ends = chunks.rows.long().to(v.device).unbind(1)
    rows = starts[:, None] + torch.arange(CHUNK, device=v.device)
    live = rows < ends[:, None]
    # Rows beyond the end read an added row of zeros.
    rows = torch.where(live, rows, v.shape[0])

    def pieces(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[rows].transpose(1, 2)

    q, k = ((pieces(x)).repeat_interleave(groups, dim=1) for x in (q * scale, k))
    return Pieces(q, k, pieces(v), pieces(beta), pieces(g).cumsum(-1))


def inverses(pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Compute M and E, [N, Hv, C, C]."""
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=pieces.k.device).tril()
    decay = (pieces.sums[..., :, None] - pieces.sums[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    scores = pieces.beta[..., None] * (pieces.k @ pieces.k.mT) * decay
    unit = torch.eye(CHUNK, dtype=scores.dtype, device=scores.device).expand_as(scores)
    return torch.linalg.solve_triangular(scores.tril(-1) + unit, unit, upper=False), decay


def walk(pieces: Pieces, inverse: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Walk over the chunks of every sequence, prefixes first. Returns the state before each chunk and n."""
    count, heads, _, dk = pieces.k.shape
    dv = pieces.v.shape[-1]
    states: list[Tensor] = [pieces.v.new_empty(0)] * count
    new: list[Tensor] = [pieces.v.new_empty(0)] * count
    finals: dict[int, Tensor] = {}
    for i in sorted(range(len(chunks.prefix)), key=lambda i: chunks.prefix[i] >= 0):
        parent = chunks.prefix[i]
        state = finals[parent] if parent >= 0 else pieces.v.new_zeros(heads, dk, dv)
        for b in range(chunks.first[i], chunks.first[i + 1]):
            k, sums = pieces.k[b], pieces.sums[b, ..., None]
            last = sums[:, -1:]
            states[b] = state
            rest = pieces.beta[b, ..., None] * (pieces.v[b] - sums.exp() * (k @ state))
            new[b] = inverse[b] @ rest
            state = last.exp() * state + k.mT @ ((last - sums).exp() * new[b])
        finals[i] = state
    if not count:
        return pieces.v.new_zeros(0, heads, dk, dv), pieces.v
    return torch.stack(states), torch.stack(new)


def outputs(pieces: Pieces, decay: Tensor, states: Tensor, new: Tensor) -> Tensor:
    """Compute o [N, Hv, C, Dv]."""
    return pieces.sums[..., None].exp() * (pieces.q @ states) + (pieces.q @ pieces.k.mT * decay) @ new


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: Chunks, scale: float, l2norm: bool = True
) -> Tensor:
    """Compute the formula of this file in plain PyTorch, differentiable; arguments as `delta.gated_delta_rule`."""
    pieces = cut(q, k, v, g, beta, chunks, scale, l2norm)
    inverse, decay = inverses(pieces)
    states, new = walk(pieces, inverse, chunks)
    out = outputs(pieces, decay, states, new).transpose(1, 2)
    live = torch.arange(CHUNK, device=v.device) < (chunks.rows[:, 1:] - chunks.rows[:, :1]).to(v.device)
    return out[live].to(v.dtype)
