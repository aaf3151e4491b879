"""The attention implementations that `attention.py` is built on, each as a raw forward and backward.

    fa4     flash-attn-4 (flash_attn.cute), on Hopper and newer; its raw functions are private, so one version is tested
    fa2     torch's flash attention (`aten::_flash_attention_forward`), on any GPU from Ampere on
    sdpa    torch's scaled_dot_product_attention per sequence: CPUs, and anywhere fp32 and heads wider than 256 (in
            attention.py)
    plain   scores in memory, one sequence at a time: a softcap on a GPU without flash-attn-4 (in attention.py)
    math    the interface of fa2 in plain PyTorch, for tests of the two-call scheme without a GPU

All take q [Tq, Hq, D], k, v [Tk, Hk, D] and return out [Tq, Hq, D] and lse [Hq, Tq] fp32 over packed spans. In the
formulae: queries a to b over keys c to d, z scores, p their softmax.
"""

from __future__ import annotations

import functools
import os
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlft.environment import cache_folder

FA4_TESTED = "4.0.0b36"
FA4_HEADS = (64, 96, 128)
"""Head sizes with which flash-attn-4 was tested."""
FA2_HEAD = 256
"""Widest head of torch's flash attention."""


class Spans(NamedTuple):
    """Which queries attend to which keys: block s of the queries to block s of the keys."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    """Query i of n attends to keys up to i + (keys - n): aligned at the end."""
    window: int | None
    """Most keys that a query attends to, its own included; None: all."""


@functools.cache
def fa4_version() -> str | None:
    """Return the installed version of flash-attn-4; None if it is not installed."""
    try:
        return version("flash-attn-4")
    except PackageNotFoundError:
        return None


def set_fa4_cache() -> None:
    """Let flash-attn-4 keep its compiled kernels on disk, unless its environment variables are set.

    Each of its kernels compiles for about 12 seconds. They are machine code that a later process loads, so the folder
    is the user's alone (`cache_folder`). Where it cannot be, nothing is kept.
    """
    folder = cache_folder("flash-attn-4")
    if folder is not None:
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


@functools.cache
def _fa4() -> Any:
    """The module with the raw functions of flash-attn-4, which reads its settings when it is imported."""
    set_fa4_cache()
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]

    return interface


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None) -> str:
    """Choose the back end for tensors of this kind, as measured by benchmarks/attention.py.

    flash-attn-4 is used where it can run: it was faster than torch's at every length from 512 to 64k. Raises ValueError
    if a version of it other than the tested one is installed.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    installed = fa4_version()
    if hopper and head_dim in FA4_HEADS and installed is not None:
        if installed != FA4_TESTED:
            raise ValueError(
                f"flash-attn-4 {installed} is installed and {FA4_TESTED} is tested: pip install "
                f"flash-attn-4=={FA4_TESTED}, or uninstall it to use torch's flash attention"
            )
        return "fa4"
    if softcap is not None:
        return "plain"
    return "fa2" if head_dim <= FA2_HEAD else "sdpa"


def forward(
    backend: str, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Compute out and lse. Raises ValueError for an unknown back end and for a softcap that it does not support."""
    if backend == "fa4":
        left, right = _fa4_window(spans)
        out, lse, *_ = _fa4()._flash_attn_fwd(
            q,
            k,
            v,
            cu_seqlens_q=spans.cu_q,
            cu_seqlens_k=spans.cu_k,
            max_seqlen_q=spans.max_q,
            max_seqlen_k=spans.max_k,
            softmax_scale=scale,
            causal=spans.causal and left is None,
            softcap=softcap,
            window_size_left=left,
            window_size_right=right,
            return_lse=True,
        )
        return out, lse
    if softcap is not None:
        raise ValueError(f'attention back end "{backend}" has no softcap ({softcap}): use "fa4" or "plain"')
    if backend == "fa2":
        left, right = _fa2_window(spans)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            spans.cu_q,
            spans.cu_k,
            spans.max_q,
            spans.max_k,
            0.0,
            spans.causal,
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, lse
    if backend == "math":
        return _math_forward(q, k, v, spans, scale)
    raise ValueError(f'attention back end "{backend}": want "fa4" or "fa2"')


def backward(
    backend: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Spans,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv from any out and lse that include the keys of `spans` (see attention.py)."""
    if backend == "fa4":
        left, right = _fa4_window(spans)
        dq, dk, dv, *_ = _fa4()._flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout,
            lse,
            softmax_scale=scale,
            causal=spans.causal and left is None,
            softcap=softcap or 0.0,
            window_size_left=left,
            window_size_right=right,
            cu_seqlens_q=spans.cu_q,
            cu_seqlens_k=spans.cu_k,
            max_seqlen_q=spans.max_q,
            max_seqlen_k=spans.max_k,
        )
        return dq, dk, dv
    if backend == "fa2":
        return _fa2_backward(dout, q, k, v, out, lse, spans, scale)
    assert backend == "math", backend
    return _math_backward(dout, q, k, v, out, lse, spans, scale)


def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _fa2_window(spans)
    # Without dropout the random state is not read.
    unused = torch.empty(2, dtype=torch.int64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        spans.cu_q,
        spans.cu_k,
        spans.max_q,
        spans.max_k,
        0.0,
        spans.causal,
        unused,
        unused,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    return dq, dk, dv


def _fa4_window(spans: Spans) -> tuple[int | None, int | None]:
    # Right: 0 ends at the query's place, None does not end.
    return (None, None) if spans.window is None else (spans.window - 1, 0 if spans.causal else None)


def _fa2_window(spans: Spans) -> tuple[int, int]:
    return (-1 if spans.window is None else spans.window - 1, 0 if spans.causal else -1)


def _scores(q: Tensor, k: Tensor, spans: Spans, scale: float, lse: Tensor | None = None):
    """Yield, per block: query rows, key rows, p [H, nq, nk] under `lse` (None: the lse of the block), and that lse."""
    bounds = list(zip(spans.cu_q.tolist(), spans.cu_k.tolist(), strict=True))
    for (a, c), (b, d) in pairwise(bounds):
        keys = k[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        z = torch.einsum("ihd,jhd->hij", q[a:b], keys) * scale
        ends = torch.arange(d - c - (b - a), d - c)[:, None]
        positions = torch.arange(d - c)[None, :]
        hidden = torch.zeros(b - a, d - c, dtype=torch.bool)
        if spans.causal:
            hidden |= positions > ends
        if spans.window is not None:
            hidden |= positions <= ends - spans.window
        z = z.masked_fill(hidden, float("-inf"))
        block_lse = z.logsumexp(-1) if lse is None else lse[:, a:b]
        yield slice(a, b), slice(c, d), torch.where(z == float("-inf"), 0, (z - block_lse[..., None]).exp()), block_lse


def _math_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), float("-inf"))
    for rows, keys, p, block_lse in _scores(q, k, spans, scale):
        values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        out[rows], lse[:, rows] = torch.einsum("hij,jhd->ihd", p, values), block_lse
    return out, lse


def _math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = q.shape[1] // k.shape[1]
    delta = (dout * out).sum(-1).T  # [H, Tq]
    for rows, keys, p, _ in _scores(q, k, spans, scale, lse):
        wide_k, wide_v = (tensor[keys].repeat_interleave(groups, dim=1) for tensor in (k, v))
        dp = torch.einsum("ihd,jhd->hij", dout[rows], wide_v)
        dz = p * (dp - delta[:, rows, None]) * scale
        dq[rows] += torch.einsum("hij,jhd->ihd", dz, wide_k)
        wide = torch.einsum("hij,ihd->jhd", dz, q[rows]), torch.einsum("hij,ihd->jhd", p, dout[rows])
        for total, part in zip((dk, dv), wide, strict=True):
            total[keys] += part.unflatten(1, (k.shape[1], groups)).sum(2)
    return dq, dk, dv
