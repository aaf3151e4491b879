"""Packed attention in plain PyTorch, one sequence at a time: its formula, and scaled_dot_product_attention.

The formula is that of `rlft.kernels.attention`, and nothing here returns an lse. A sink of logit s_h for query head h
is one more term exp(s_h) of the softmax's denominator: a key that every query of the head attends to, whose value is 0.

Names: S sequences, s one of them, T rows, Hq query heads, Hk key heads, D head size, p the index of a sequence's prefix
(-1: none), q, k, v of attention, a and b the first row of a block and the row behind its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.kernels.attention_blocks import Blocks, Span

WIDE = 256
"""Heads wider than this have keys and values repeated for each query head: of PyTorch's attentions without scores in
memory, the one that takes them on a GPU does not share keys between heads."""
ROOM = 8
"""Columns that heads get for sinks, two of which are read. On a GPU, PyTorch's attention without scores in memory takes
widths that are multiples of 8, and keys as wide as values."""


def visible(queries: int, keys: int, window: int | None, device: torch.device, blocks: Sequence[Span] = ()) -> Tensor:
    """Return a [queries, keys] mask of the keys that each query attends to; the queries are the last positions.

    blocks: first and last query, exclusive, of those that attend to each other.
    """
    before = keys - queries
    ends = torch.arange(before, keys, device=device)[:, None]
    positions = torch.arange(keys, device=device)[None, :]
    mask = positions <= ends
    for a, b in blocks:
        mask[a:b, before + a : before + b] = True
    return mask if window is None else mask & (positions > ends - window)


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Compute the formula written out. Arguments and result as `varlen_attention`."""
    bounds, out = cu_seqlens.tolist(), torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for s, p in enumerate(prefix.tolist()):
        rows = list(range(bounds[s], bounds[s + 1]))
        visible_rows = (list(range(bounds[p], bounds[p + 1])) if p >= 0 else []) + rows
        if not rows:
            continue
        keys = k[visible_rows].repeat_interleave(groups, dim=1)
        values = v[visible_rows].repeat_interleave(groups, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q[rows], keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        own = [] if blocks is None else blocks.within(bounds[s], bounds[s + 1])
        seen = visible(len(rows), len(visible_rows), window, q.device, own)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            column = sinks.to(scores.dtype)[:, None, None].expand(-1, len(rows), 1)
            scores = torch.cat([scores, column], dim=-1)
        shares = scores.softmax(-1)[..., : len(visible_rows)]
        out = out.index_copy(0, torch.tensor(rows, device=q.device), torch.einsum("hij,jhd->ihd", shares, values))
    return out


def per_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    prefix: Sequence[int],
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Run scaled_dot_product_attention for one sequence after the other.

    bounds: S + 1 row bounds. prefix: S. blocks: None: all rows are causal. The others and the result as
    `varlen_attention`.
    """
    lengths = [end - start for start, end in pairwise(bounds)]
    # One split, so that backward concatenates once instead of adding S gradients of size [T, ...].
    queries, keys, values = q.split(lengths), k.split(lengths), v.split(lengths)
    outs = []
    for i, p in enumerate(prefix):
        qs, ks, vs = queries[i], keys[i], values[i]
        if lengths[i] == 0:
            outs.append(qs)
            continue
        if p >= 0:
            ks, vs = torch.cat([keys[p], ks]), torch.cat([values[p], vs])
        own = [] if blocks is None else blocks.within(bounds[i], bounds[i + 1])
        # is_causal aligns queries with the first keys; behind a prefix or with a window an explicit mask is needed.
        causal = p < 0 and (window is None or window >= lengths[i]) and not own
        mask = None if causal else visible(qs.shape[0], ks.shape[0], window, q.device, own)
        run = _attend if sinks is None else _attend_with_sinks
        outs.append(run(qs, ks, vs, mask, scale, *(() if sinks is None else (sinks,))))
    return torch.cat(outs) if outs else torch.zeros_like(q)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend within one sequence. mask: as `visible` returns it; None: causal."""
    if q.shape[2] > WIDE:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks: Tensor) -> Tensor:
    """Attend within one sequence whose first key is the sink, of value 0.

    Two more columns of q are 1, in which ordinary keys have 0 and the sink's key has its logit: rounded to the dtype,
    and what that left out. Keys are repeated for each query head, since sinks differ between heads of a group.
    """
    heads, dim = q.shape[1:]
    # No sink is a logit of -inf, which the backward would multiply by 0.
    logits = (sinks.double() / scale).clamp(min=torch.finfo(q.dtype).min / 4)
    rounded = logits.to(q.dtype)
    rest = (logits - rounded.double()).to(q.dtype)
    k, v = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (k, v))
    sink = F.pad(torch.stack([rounded, rest], dim=1), (dim, ROOM - 2))[None]
    keys, values = torch.cat([sink, F.pad(k, (0, ROOM))]), F.pad(v, (0, ROOM, 0, 0, 1, 0))
    queries = F.pad(F.pad(q, (0, 2), value=1.0), (0, ROOM - 2))
    if mask is not None:
        out = _attend(queries, keys, values, F.pad(mask, (1, 0), value=True), scale)
    else:
        # A row above the queries, which is dropped, keeps them aligned with the keys.
        out = _attend(F.pad(queries, (0, 0, 0, 0, 1, 0)), keys, values, None, scale)[1:]
    return out[..., :dim]
