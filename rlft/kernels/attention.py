"""Causal attention over packed sequences of unequal length, optionally behind a prefix that several of them share.

For a query at position i of sequence s, with scores z_j = scale * q_i . k_j over the keys j it may see,

    out_i = sum_j softmax(z)_j v_j        keys seen: all of prefix[s] (if any), and rows 0..i of s itself;
                                          with a window w only the last w of them
    lse_i = log sum_j exp(z_j)

    dv_j = sum_i p_ij dout_i,   dp_ij = dout_i . v_j,   dz_ij = p_ij (dp_ij - dout_i . out_i),
    dq_i = scale sum_j dz_ij k_j,   dk_j = scale sum_i dz_ij q_i.

A shared prefix is stored once; its keys collect the gradient of every sequence that continues it. Running the G
completions of a prompt of P tokens, R each, costs P + G R tokens instead of G (P + R) (DESIGN 10). On a GPU there are
two ways to do it with an attention for plain sequences:

    copies      every continuation gets a copy of its prefix's keys and values in front of its own, and one causal call
                does the rest; their gradients are added up. For prefixes that are short beside their continuations.
    two calls   each sequence over itself, causal, and all continuations of a prefix, side by side, over the prefix, not
                causal; merged by lse. A backward needs p_ij = exp(z_ij - lse_i) and dout_i . out_i only, so handing the
                *merged* out and lse to the backward of both calls makes its gradients exact. Nothing is copied, but a
                backward runs in parallel over the keys and has few of them when the prefix is short.

`varlen_attention_reference` writes the formula out and is the truth for the tests. On a CPU, and in fp32, PyTorch's
scaled_dot_product_attention runs per sequence: nothing is padded and no [T, T] mask exists. Bytes moved per sequence:
q, k, v and out once; on a CPU a copy of the prefix's k and v for each continuation.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlft.kernels import attention_backends as backends
from rlft.kernels.copies import Copies, copied, summed
from rlft.kernels.launch import check_args, on_gpu
from rlft.kernels.lse_merge import merge
from rlft.upload import upload

COPIED = 1.0
"""Copies of prefixes are made where they hold at most this many times the rows of the continuations: see
benchmarks/attention.py."""
PLAIN_LIMIT = 4 * 2**30
"""Bytes of fp32 scores that plain attention with a softcap may hold for one sequence: 8,192 tokens at 16 heads."""


class Shared(NamedTuple):
    """The second call of shared prefixes: rows `first` to `last` (all continuations) over rows 0 to `keys`."""

    first: int
    last: int
    keys: int
    cu_q: Tensor
    """[prefixes + 1] int32, from `first`: the continuations of each prefix are one block of queries."""
    cu_k: Tensor
    """[prefixes + 1] int32."""
    max_q: int
    max_k: int


class Sequences(NamedTuple):
    """Which rows attend to which, known on the host, so that no launch waits for the GPU."""

    bounds: tuple[int, ...]
    """S + 1 row bounds."""
    prefix: tuple[int, ...]
    """For each sequence, the one it continues; -1 for none. A prefix has no prefix itself."""
    cu_seqlens: Tensor
    """[S+1] int32 on the device of the rows: `bounds`."""
    max_seqlen: int
    shared: Shared | None
    """None without shared prefixes, and where the order of the rows does not allow the second call."""
    copies: bool
    """Copies of prefixes instead of a second call."""
    keys: dict[int | None, Keys | None]
    """Window -> the copies it takes: made at the first call and kept, for all layers and for a CUDA graph's capture."""

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, prefix: Tensor, device: torch.device | str | None = None, copies: bool | None = None
    ) -> Sequences:
        """From [S+1] and [S] int32 tensors, best on the CPU: they are read by the host.

        device: of the rows. copies: how shared prefixes are run on a GPU; None decides by their lengths.
        """
        bounds, before = tuple(cu_seqlens.tolist()), tuple(prefix.tolist())
        device = cu_seqlens.device if device is None else torch.device(device)
        lengths = [b - a for a, b in pairwise(bounds)]
        if copies is None:
            continued = [(lengths[p], lengths[i]) for i, p in enumerate(before) if p >= 0]
            copies = bool(continued) and sum(p for p, _ in continued) <= COPIED * sum(n for _, n in continued)
        shared = None if copies else _shared(bounds, before, device)
        return cls(bounds, before, upload(cu_seqlens, device), max(lengths, default=0), shared, copies, {})


def _shared(bounds: tuple[int, ...], prefix: tuple[int, ...], device: torch.device) -> Shared | None:
    """The second call, where prefixes come first and their continuations follow in the same order, as in `pack`."""
    order = [p for p in prefix if p >= 0]
    heads = list(dict.fromkeys(order))
    count = len(heads)
    continued = list(prefix[count : count + len(order)])
    if not count or heads != list(range(count)) or continued != sorted(order):
        return None
    cu_k = list(bounds[: count + 1])
    ends = [bounds[count + 1 + max(i for i, p in enumerate(continued) if p == head)] for head in heads]
    cu_q = [0, *(end - bounds[count] for end in ends)]
    longest = [max(b - a for a, b in pairwise(cu)) for cu in (cu_q, cu_k)]
    tensors = [upload(torch.tensor(cu, dtype=torch.int32), device) for cu in (cu_q, cu_k)]
    return Shared(bounds[count], bounds[count] + cu_q[-1], cu_k[-1], tensors[0], tensors[1], longest[0], longest[1])


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: which keys each query sees, the queries being the last `queries` positions of the keys."""
    ends = torch.arange(keys - queries, keys, device=device)[:, None]
    positions = torch.arange(keys, device=device)[None, :]
    mask = positions <= ends
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
) -> Tensor:
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


# ---- on a GPU, in two calls --------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What the backward needs besides q, k, v and the upstream gradient."""

    out: Tensor
    """[T, Hq, D], merged."""
    lse: Tensor
    """[Hq, T] fp32, merged."""


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    scale: float,
    backend: str,
    window: int | None = None,
    softcap: float | None = None,
) -> Saved:
    """out and lse by a back end of `attention_backends`. Arguments as `varlen_attention`; no autograd."""
    s = sequences
    keys = Keys.of(s, window)
    cu_k, max_k = (s.cu_seqlens, s.max_seqlen) if keys is None else (keys.cu_k, keys.max_k)
    spans = backends.Spans(s.cu_seqlens, cu_k, s.max_seqlen, max_k, causal=True, window=window)
    k_seen, v_seen = (k, v) if keys is None else (copied(k, keys.copies), copied(v, keys.copies))
    out, lse = backends.forward(backend, q, k_seen, v_seen, spans, scale, softcap)
    if s.shared is not None and keys is None:
        a, b, c = s.shared.first, s.shared.last, s.shared.keys
        out_2, lse_2 = backends.forward(backend, q[a:b], k[:c], v[:c], _second(s.shared), scale, softcap)
        merge(out[a:b], lse[:, a:b], out_2, lse_2)
    return Saved(out, lse)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    sequences: Sequences,
    scale: float,
    backend: str,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attention_forward`."""
    s = sequences
    out, lse = saved
    keys = Keys.of(s, window)
    cu_k, max_k = (s.cu_seqlens, s.max_seqlen) if keys is None else (keys.cu_k, keys.max_k)
    spans = backends.Spans(s.cu_seqlens, cu_k, s.max_seqlen, max_k, causal=True, window=window)
    if keys is not None:
        k_seen, v_seen = copied(k, keys.copies), copied(v, keys.copies)
        dq, dk, dv = backends.backward(backend, dout, q, k_seen, v_seen, out, lse, spans, scale, softcap)
        return dq, summed(dk, keys.copies), summed(dv, keys.copies)
    dq, dk, dv = backends.backward(backend, dout, q, k, v, out, lse, spans, scale, softcap)
    if s.shared is not None:
        a, b, c = s.shared.first, s.shared.last, s.shared.keys
        dq_2, dk_2, dv_2 = backends.backward(
            backend,
            dout[a:b],
            q[a:b],
            k[:c],
            v[:c],
            out[a:b],
            lse[:, a:b].contiguous(),
            _second(s.shared),
            scale,
            softcap,
        )
        dq[a:b] += dq_2
        dk[:c] += dk_2
        dv[:c] += dv_2
    return dq, dk, dv


def _totals(s: Sequences) -> list[int]:
    """Keys that the last row of each sequence sees."""
    lengths = [b - a for a, b in pairwise(s.bounds)]
    return [lengths[i] + (lengths[p] if p >= 0 else 0) for i, p in enumerate(s.prefix)]


def _second(shared: Shared) -> backends.Spans:
    return backends.Spans(shared.cu_q, shared.cu_k, shared.max_q, shared.max_k, causal=False, window=None)


class Keys(NamedTuple):
    """Keys for each sequence: a copy of what it sees of its prefix, and its own. Also the only way where a window cuts
    a prefix, since each continuation then sees another part of it."""

    copies: Copies
    """Of rows of k and of v."""
    cu_k: Tensor
    """[S+1] int32: the keys of sequence s are copies cu_k[s] to cu_k[s+1]."""
    max_k: int

    @classmethod
    def of(cls, s: Sequences, window: int | None) -> Keys | None:
        """None where a second call does it."""
        if window not in s.keys:
            s.keys[window] = cls._wanted(s, window)
        return s.keys[window]

    @classmethod
    def _wanted(cls, s: Sequences, window: int | None) -> Keys | None:
        cut = window is not None and any(p >= 0 and n > window for p, n in zip(s.prefix, _totals(s), strict=True))
        return cls.made(*cls.seen(s, window), s.bounds[-1], s.cu_seqlens.device) if cut or s.copies else None

    @classmethod
    def seen(cls, s: Sequences, window: int | None) -> tuple[np.ndarray, list[int]]:
        """The rows that each sequence sees, one sequence after the other, and the sequences' bounds among them."""
        rows, bounds = [], [0]
        for i, p in enumerate(s.prefix):
            a, b = (s.bounds[p], s.bounds[p + 1]) if p >= 0 else (0, 0)
            a = a if window is None else min(b, max(a, b - window + 1))
            rows += [np.arange(a, b), np.arange(s.bounds[i], s.bounds[i + 1])]
            bounds.append(bounds[-1] + b - a + s.bounds[i + 1] - s.bounds[i])
        return np.concatenate(rows), bounds

    @classmethod
    def made(cls, index: np.ndarray, bounds: list[int], rows: int, device: torch.device) -> Keys:
        """From `seen`, of so many rows."""
        cu_k = upload(torch.tensor(bounds, dtype=torch.int32), device)
        return cls(Copies.of(index, rows, device), cu_k, max(b - a for a, b in pairwise(bounds)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sequences, scale, backend, window, softcap):  # type: ignore[override]
        saved = attention_forward(q, k, v, sequences, scale, backend, window, softcap)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.rest = (sequences, scale, backend, window, softcap)
        return saved.out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        grads = attention_backward(dout.contiguous(), q, k, v, Saved(out, lse), *ctx.rest)
        return *grads, None, None, None, None, None


# ---- by PyTorch, one sequence at a time --------------------------------------------------------------------------


def _per_sequence(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, window: int | None) -> Tensor:
    lengths = [b - a for a, b in pairwise(s.bounds)]
    # One split, so that backward concatenates once instead of adding S gradients of size [T, ...].
    queries, keys, values = q.split(lengths), k.split(lengths), v.split(lengths)
    outs = []
    for i, p in enumerate(s.prefix):
        qs, ks, vs = queries[i], keys[i], values[i]
        if lengths[i] == 0:
            outs.append(qs)
            continue
        if p >= 0:
            ks, vs = torch.cat([keys[p], ks]), torch.cat([values[p], vs])
        # is_causal aligns queries with the first keys; behind a prefix or in a window the mask must say it.
        causal = p < 0 and (window is None or window >= lengths[i])
        mask = None if causal else visible(qs.shape[0], ks.shape[0], window, q.device)
        out = F.scaled_dot_product_attention(
            qs.transpose(0, 1)[None],
            ks.transpose(0, 1)[None],
            vs.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs) if outs else torch.zeros_like(q)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of S packed sequences.

    q: [T, Hq, D] float. k, v: [T, Hk, D], same dtype, Hq a multiple of Hk (grouped queries share a key head).
    sequences: see `Sequences.of`. window: keys seen at most, the own one included. softcap: c of c tanh(z / c).
    backend: "fa4", "fa2", "sdpa" or "plain"; None lets `attention_backends.choose_backend` decide from device, dtype,
    head size and softcap. Returns [T, Hq, D]. Deterministic but for dQ of the flash attentions, which they add up by
    atomics. Raises ValueError on shapes, dtypes and devices that do not fit, for a back end that cannot do what is
    asked, and for shared prefixes on a GPU that do not lie first.
    """
    op = "varlen_attention"
    ok = q.dim() == 3 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[1] % k.shape[1] == 0
    ok = ok and q.dtype == k.dtype == v.dtype and q.shape[2] == k.shape[2] and sequences.bounds[-1] == q.shape[0]
    wanted = f"q [T, Hq, D] and k, v [T, Hk, D] of one dtype, T = {sequences.bounds[-1]}, Hq a multiple of Hk"
    check_args(op, ok, wanted, q=q, k=k, v=v)
    on_gpu(op, q=q, k=k, v=v)
    backend = backend or backends.choose_backend(q.device, q.dtype, q.shape[2], softcap)
    if backend == "plain" or (backend == "sdpa" and softcap is not None):
        most = max(_totals(sequences), default=0)
        if q.is_cuda and 4 * q.shape[1] * most**2 > PLAIN_LIMIT:
            raise ValueError(
                f"{op}: softcap = {softcap} without flash-attn-4 holds {4 * q.shape[1] * most**2 / 2**30:.1f} GiB of "
                f"scores for a sequence of {most} tokens (limit {PLAIN_LIMIT / 2**30:.0f}): pip install flash-attn-4"
            )
        cu, prefix = torch.tensor(sequences.bounds), torch.tensor(sequences.prefix)
        return varlen_attention_reference(q, k, v, cu, prefix, scale, window, softcap)
    if backend == "sdpa":
        return _per_sequence(q, k, v, sequences, scale, window)
    if sequences.shared is None and max(sequences.prefix, default=-1) >= 0 and Keys.of(sequences, window) is None:
        raise ValueError(f"{op}: on a GPU prefixes must come first and their continuations in the same order")
    return _Attention.apply(q, k, v, sequences, scale, backend, window, softcap)  # type: ignore[return-value]
