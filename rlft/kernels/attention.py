"""Causal attention over packed sequences of unequal length, optionally behind a prefix that several of them share.

For a query at position i of sequence s, with scores z_j = scale * q_i . k_j over the keys j that it attends to,

    out_i = sum_j softmax(z)_j v_j        keys j: all of prefix[s] (if any), and rows 0..i of s itself;
                                          with a window w only the last w of them
    lse_i = log sum_j exp(z_j)

    dv_j = sum_i p_ij dout_i,   dp_ij = dout_i . v_j,   dz_ij = p_ij (dp_ij - dout_i . out_i),
    dq_i = scale sum_j dz_ij k_j,   dk_j = scale sum_i dz_ij q_i.

A shared prefix is stored once; its keys accumulate the gradient of every sequence that continues it. Running the G
completions of a prompt of P tokens, R each, costs P + G R tokens instead of G (P + R). On a GPU it is built in one of
two ways from an attention for plain sequences:

    copies      Every continuation gets a copy of its prefix's keys and values in front of its keys, and one causal call
                does the rest; the gradients of the copies are summed. For prefixes that are short compared with their
                continuations.
    two calls   One causal call runs each sequence over itself, and a second, non-causal one runs all continuations of a
                prefix, side by side, over the prefix; the results are merged by lse. A backward needs only
                p_ij = exp(z_ij - lse_i) and dout_i . out_i, so passing the *merged* out and lse to the backward of both
                calls makes its gradients exact. Nothing is copied, but a backward is parallel over the keys and has few
                of them if the prefix is short.

Attention sinks (gpt-oss, Granite with windows) are a learned logit s_h per query head h: one more term exp(s_h) of the
softmax's denominator, without a value. They are one more merge, after all others, with an attention over nothing whose
lse is s_h, and the backward is exact for the same reason. They are frozen and get no gradient.

Rows of a block (an image in Gemma 3) attend to each other in both directions (`rlft.kernels.attention_blocks`).

`varlen_attention_reference` is the formula written out, the reference for tests. On a CPU, and in fp32, PyTorch's
scaled_dot_product_attention runs per sequence (`rlft.kernels.attention_plain`): nothing is padded and no [T, T] mask
exists. Bytes moved per sequence: q, k, v and out once; on a CPU also a copy of the prefix's k and v for each
continuation; with sinks out twice more.

Names: S sequences, s one of them or the `Sequences`, T rows, Hq query heads, Hk key heads, D head size, p the index of
a sequence's prefix (-1: none), n a number of keys, a, b, c bounds of rows or keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.kernels import attention_backends as backends
from rlft.kernels.attention_blocks import Blocks, Options, Rows, Span
from rlft.kernels.attention_plain import per_sequence, varlen_attention_reference
from rlft.kernels.copies import Copies, gather_copies, sum_copies
from rlft.kernels.launch import check_args, on_gpu
from rlft.kernels.lse_merge import add_sinks, merge
from rlft.upload import upload

COPIED = 1.0
"""Prefixes are copied if the copies have at most this many times the rows of the continuations. Measured by
benchmarks/attention.py."""
PLAIN_LIMIT = 4 * 2**30
"""Most bytes of fp32 scores of one sequence in plain attention with a softcap: 8,192 tokens with 16 heads."""


class Shared(NamedTuple):
    """The second call for shared prefixes: rows `first` to `last` (all continuations) over rows 0 to `keys`."""

    first: int
    last: int
    keys: int
    cu_q: Tensor
    """[prefixes + 1] int32, counted from `first`: the continuations of each prefix are one block of queries."""
    cu_k: Tensor
    """[prefixes + 1] int32."""
    max_q: int
    max_k: int


class Sequences(NamedTuple):
    """Which rows attend to which; known on the host, so that no launch waits for the GPU."""

    bounds: tuple[int, ...]
    """S + 1 row bounds."""
    prefix: tuple[int, ...]
    """For each sequence, the index of the sequence it continues; -1 for none. A prefix has no prefix itself."""
    cu_seqlens: Tensor
    """`bounds` as [S+1] int32, on the device of the rows."""
    max_seqlen: int
    shared: Shared | None
    """None without shared prefixes, and if the order of the rows does not allow the second call."""
    copies: bool
    """Whether prefixes are copied, instead of a second call."""
    keys: dict[int | None, Keys | None]
    """Window -> copies of keys; built by the first call and reused by all layers and by a captured CUDA graph."""
    blocks: Blocks | None = None
    """Rows that attend to each other in both directions; None: all are causal. No CUDA graph runs them."""

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        prefix: Tensor,
        device: torch.device | str | None = None,
        copies: bool | None = None,
        blocks: Sequence[Span] = (),
    ) -> Sequences:
        """Build from [S+1] and [S] int32 tensors, preferably on the CPU, since the host reads them.

        device: of the rows. copies: whether prefixes are copied on a GPU; None: decided by their lengths. blocks: first
        and last row, exclusive, of each block.
        """
        bounds, parents = tuple(cu_seqlens.tolist()), tuple(prefix.tolist())
        device = cu_seqlens.device if device is None else torch.device(device)
        lengths = [b - a for a, b in pairwise(bounds)]
        if copies is None:
            continued = [(lengths[p], lengths[i]) for i, p in enumerate(parents) if p >= 0]
            copies = bool(continued) and sum(p for p, _ in continued) <= COPIED * sum(n for _, n in continued)
        shared = None if copies else _shared(bounds, parents, device)
        several = Blocks(blocks) if blocks else None
        return cls(bounds, parents, upload(cu_seqlens, device), max(lengths, default=0), shared, copies, {}, several)

    @property
    def rows(self) -> Rows:
        """Bounds and prefixes alone."""
        return Rows(self.bounds, self.prefix)


def _shared(bounds: tuple[int, ...], prefix: tuple[int, ...], device: torch.device) -> Shared | None:
    """Build the second call if all prefixes come first and their continuations follow in the same order, as `pack`
    does."""
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
    sinks: Tensor | None = None,
) -> Saved:
    """Compute out and lse, sinks included, by a back end of `attention_backends`. Arguments as `varlen_attention`; no
    autograd."""
    s = sequences
    keys = Keys.of(s, window)
    cu_k, max_k = (s.cu_seqlens, s.max_seqlen) if keys is None else (keys.cu_k, keys.max_k)
    spans = backends.Spans(s.cu_seqlens, cu_k, s.max_seqlen, max_k, causal=True, window=window)
    k_seen, v_seen = (k, v) if keys is None else (gather_copies(k, keys.copies), gather_copies(v, keys.copies))
    out, lse = backends.forward(backend, q, k_seen, v_seen, spans, scale, softcap)
    if s.shared is not None and keys is None:
        a, b, c = s.shared.first, s.shared.last, s.shared.keys
        out_2, lse_2 = backends.forward(backend, q[a:b], k[:c], v[:c], _second(s.shared), scale, softcap)
        merge(out[a:b], lse[:, a:b], out_2, lse_2)
    if s.blocks is not None:
        s.blocks.replace(q, k, v, out, lse, s.rows, Options(scale, backend, window, softcap))
    if sinks is not None:
        add_sinks(out, lse, sinks)
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
    """Compute dq, dk, dv of `attention_forward`, whose sinks are in `saved`."""
    inputs, blocks, options = (q, k, v), sequences.blocks, Options(scale, backend, window, softcap)
    if blocks is None:
        return _causal_backward(dout, inputs, saved, sequences, options)
    totals = _causal_backward(blocks.without(dout), inputs, saved, sequences, options)
    blocks.add_gradients(dout, inputs, saved, totals, sequences.rows, options)
    return totals


def _causal_backward(
    dout: Tensor, inputs: tuple[Tensor, Tensor, Tensor], saved: Saved, s: Sequences, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv of the causal calls. inputs: q, k, v."""
    (q, k, v), (out, lse) = inputs, saved
    scale, backend, window, softcap = options
    keys = Keys.of(s, window)
    cu_k, max_k = (s.cu_seqlens, s.max_seqlen) if keys is None else (keys.cu_k, keys.max_k)
    spans = backends.Spans(s.cu_seqlens, cu_k, s.max_seqlen, max_k, causal=True, window=window)
    if keys is not None:
        k_seen, v_seen = gather_copies(k, keys.copies), gather_copies(v, keys.copies)
        dq, dk, dv = backends.backward(backend, dout, q, k_seen, v_seen, out, lse, spans, scale, softcap)
        return dq, sum_copies(dk, keys.copies), sum_copies(dv, keys.copies)
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
    """Return the number of keys that the last row of each sequence attends to."""
    lengths = [b - a for a, b in pairwise(s.bounds)]
    return [lengths[i] + (lengths[p] if p >= 0 else 0) for i, p in enumerate(s.prefix)]


def _second(shared: Shared) -> backends.Spans:
    """Return the spans of the second call."""
    return backends.Spans(shared.cu_q, shared.cu_k, shared.max_q, shared.max_k, causal=False, window=None)


class Keys(NamedTuple):
    """Keys of each sequence as copies: the visible part of its prefix, then its rows.

    This is the only way if a window cuts a prefix, since each continuation then attends to another part of it.
    """

    copies: Copies
    """Copies of rows of k and of v."""
    cu_k: Tensor
    """[S+1] int32: the keys of sequence s are copies cu_k[s] to cu_k[s+1]."""
    max_k: int

    @classmethod
    def of(cls, s: Sequences, window: int | None) -> Keys | None:
        """Return the keys for a window, cached in `s`; None if a second call is used instead."""
        if window not in s.keys:
            s.keys[window] = cls._wanted(s, window)
        return s.keys[window]

    @classmethod
    def _wanted(cls, s: Sequences, window: int | None) -> Keys | None:
        """Build the keys if copies are used or the window cuts a prefix; else None."""
        cut = window is not None and any(p >= 0 and n > window for p, n in zip(s.prefix, _totals(s), strict=True))
        return cls.made(*cls.seen(s, window), s.bounds[-1], s.cu_seqlens.device) if cut or s.copies else None

    @classmethod
    def seen(cls, s: Sequences, window: int | None) -> tuple[np.ndarray, list[int]]:
        """Return the rows that each sequence attends to, concatenated, and the bounds of the sequences among them."""
        rows, bounds = [], [0]
        for i, p in enumerate(s.prefix):
            a, b = (s.bounds[p], s.bounds[p + 1]) if p >= 0 else (0, 0)
            a = a if window is None else min(b, max(a, b - window + 1))
            rows += [np.arange(a, b), np.arange(s.bounds[i], s.bounds[i + 1])]
            bounds.append(bounds[-1] + b - a + s.bounds[i + 1] - s.bounds[i])
        return np.concatenate(rows), bounds

    @classmethod
    def made(cls, index: np.ndarray, bounds: list[int], rows: int, device: torch.device) -> Keys:
        """Build from the result of `seen`. rows: number of rows that are copied from."""
        cu_k = upload(torch.tensor(bounds, dtype=torch.int32), device)
        return cls(Copies.of(index, rows, device), cu_k, max(b - a for a, b in pairwise(bounds)))


class _Attention(torch.autograd.Function):
    """Autograd for the flash attentions."""

    @staticmethod
    def forward(ctx, q, k, v, sequences, scale, backend, window, softcap, sinks):  # type: ignore[override]
        saved = attention_forward(q, k, v, sequences, scale, backend, window, softcap, sinks)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.rest = (sequences, scale, backend, window, softcap)
        return saved.out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        grads = attention_backward(dout.contiguous(), q, k, v, Saved(out, lse), *ctx.rest)
        return *grads, None, None, None, None, None, None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute causal attention of S packed sequences.

    q: [T, Hq, D] float. k, v: [T, Hk, D], same dtype, Hq a multiple of Hk (grouped-query attention). sequences: see
    `Sequences.of`. window: most keys that a query attends to, its own included. softcap: c of c tanh(z / c). backend:
    "fa4", "fa2", "sdpa" or "plain"; None: `attention_backends.choose_backend` chooses by device, dtype, head size and
    softcap. sinks: [Hq] float, a logit per query head, frozen; None: no sinks. Returns [T, Hq, D]. Deterministic except
    for dQ of the flash attentions, which use atomic additions. Raises ValueError on shapes, dtypes and devices that do
    not fit, for a back end that does not support the arguments, for sinks that require a gradient, and on a GPU for
    shared prefixes that do not come first.
    """
    op = "varlen_attention"
    ok = q.dim() == 3 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[1] % k.shape[1] == 0
    ok = ok and q.dtype == k.dtype == v.dtype and q.shape[2] == k.shape[2] and sequences.bounds[-1] == q.shape[0]
    wanted = f"q [T, Hq, D] and k, v [T, Hk, D] of one dtype, T = {sequences.bounds[-1]}, Hq a multiple of Hk"
    check_args(op, ok, wanted, q=q, k=k, v=v)
    if sinks is not None:
        wanted = f"sinks [Hq], Hq = {q.shape[1]}"
        check_args(op, sinks.shape == (q.shape[1],) and sinks.is_floating_point(), wanted, sinks=sinks)
        if sinks.requires_grad:
            raise ValueError(f"{op}: requires_grad of the sinks is True: they are frozen here")
    on_gpu(op, q=q, k=k, v=v, sinks=sinks)
    backend = backend or backends.choose_backend(q.device, q.dtype, q.shape[2], softcap)
    if backend == "plain" or (backend == "sdpa" and softcap is not None):
        tokens = max(_totals(sequences), default=0)
        if q.is_cuda and 4 * q.shape[1] * tokens**2 > PLAIN_LIMIT:
            raise ValueError(
                f"{op}: softcap = {softcap} without flash-attn-4 holds {4 * q.shape[1] * tokens**2 / 2**30:.1f} GiB of "
                f"scores for a sequence of {tokens} tokens (limit {PLAIN_LIMIT / 2**30:.0f}): pip install flash-attn-4"
            )
        cu, prefix = torch.tensor(sequences.bounds), torch.tensor(sequences.prefix)
        return varlen_attention_reference(q, k, v, cu, prefix, scale, window, softcap, sinks, sequences.blocks)
    if backend == "sdpa":
        rows = (sequences.bounds, sequences.prefix)
        return per_sequence(q, k, v, *rows, scale, window, sinks, sequences.blocks)
    if sequences.shared is None and max(sequences.prefix, default=-1) >= 0 and Keys.of(sequences, window) is None:
        raise ValueError(f"{op}: on a GPU prefixes must come first and their continuations in the same order")
    return _Attention.apply(q, k, v, sequences, scale, backend, window, softcap, sinks)  # type: ignore[return-value]
