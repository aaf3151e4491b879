"""Causal attention over packed sequences of unequal length, optionally behind a prefix that several of them share.

For a query at position i of sequence s, with scores z_j = scale * q_i . k_j over the keys j it may see,

    out_i = sum_j softmax(z)_j v_j        keys seen: all of prefix[s] (if any), and rows 0..i of s itself;
                                          with a window w only the last w of them

    dv_j = sum_i p_ij dout_i,   dp_ij = dout_i . v_j,   dz_ij = p_ij (dp_ij - dout_i . out_i),
    dq_i = scale sum_j dz_ij k_j,   dk_j = scale sum_i dz_ij q_i.

A shared prefix is stored once; its keys collect the gradient of every sequence that continues it. Running the G
completions of a prompt of P tokens, R each, costs P + G R tokens instead of G (P + R) (DESIGN 10).

`varlen_attention_reference` writes the formula out and is the truth for the tests. `varlen_attention` runs PyTorch's
scaled_dot_product_attention per sequence: nothing is padded and no [T, T] mask exists. Bytes moved per sequence: q, k,
v and out once, plus a copy of the prefix's k and v for each continuation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: which keys each query sees, the queries being the last `queries` positions of the keys."""
    ends = torch.arange(keys - queries, keys, device=device)[:, None]
    positions = torch.arange(keys, device=device)[None, :]
    mask = positions <= ends
    return mask if window is None else mask & (positions > ends - window)


def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The formula of this file, one sequence at a time. Arguments and result as `varlen_attention`."""
    bounds, out = cu_seqlens.tolist(), torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for s, p in enumerate(prefix.tolist()):
        rows = list(range(bounds[s], bounds[s + 1]))
        seen = (list(range(bounds[p], bounds[p + 1])) if p >= 0 else []) + rows
        if not rows:
            continue
        keys = k[seen].repeat_interleave(groups, dim=1)
        values = v[seen].repeat_interleave(groups, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q[rows], keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible(len(rows), len(seen), window, q.device), float("-inf"))
        out = out.index_copy(
            0, torch.tensor(rows, device=q.device), torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
        )
    return out


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prefix: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of S packed sequences.

    q: [T, Hq, D] float. k, v: [T, Hk, D], same dtype, Hq a multiple of Hk (grouped queries share a key head).
    cu_seqlens: [S+1] int32 row bounds. prefix: [S] int32, the sequence seen whole before the own tokens, -1 for none;
    a prefix has no prefix itself. window: keys seen at most, the own one included. Returns [T, Hq, D].
    Raises ValueError on shapes that do not fit, and for a softcap, which PyTorch's attention cannot do.
    """
    if q.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"varlen_attention: want q [T, Hq, D] and k, v [T, Hk, D], Hq a multiple of Hk; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if softcap is not None:
        return varlen_attention_reference(q, k, v, cu_seqlens, prefix, scale, window, softcap)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    # One split, so that backward concatenates once instead of adding S gradients of size [T, ...].
    queries, keys, values = q.split(lengths), k.split(lengths), v.split(lengths)
    outs = []
    for s, p in enumerate(prefix.tolist()):
        qs, ks, vs = queries[s], keys[s], values[s]
        if lengths[s] == 0:
            outs.append(qs)
            continue
        if p >= 0:
            ks, vs = torch.cat([keys[p], ks]), torch.cat([values[p], vs])
        # is_causal aligns queries with the first keys; behind a prefix or in a window the mask must say it.
        causal = p < 0 and (window is None or window >= lengths[s])
        mask = None if causal else visible(qs.shape[0], ks.shape[0], window, q.device)
        out = F.scaled_dot_product_attention(
            qs.transpose(0, 1)[None], ks.transpose(0, 1)[None], vs.transpose(0, 1)[None],
            attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs) if outs else torch.zeros_like(q)
