"""The gated delta rule over packed sequences, optionally behind a prefix that several of them share.

For each head, with a state S [Dk, Dv] that is 0 before the first row of a sequence without prefix, and is the final
state of its prefix before the first row of a sequence that continues one,

    S  <- exp(g_t) S                                        g_t <= 0: the decay
    S  <- S + k_t (beta_t (v_t - S^T k_t))^T                beta_t in [0, 2]: how much of S^T k_t is replaced
    o_t = scale S^T q_t

with q_t and k_t divided by their lengths first if `l2norm`. This is the token mixer of "Gated Delta Networks"
(arXiv 2412.06464) in Qwen3-Next, Qwen3.5 and OLMo-hybrid; transformers' torch_recurrent_gated_delta_rule has the same
formula. `gated_delta_reference` is the formula written out. `delta_chunks` has its form in chunks of 64 rows, which a
CPU uses, `delta_forward` and `delta_backward` the kernels.

Saved for the backward are the inputs, and per head of v, for speed, what `Saved` lists. The rest is computed again. The
gradient of a prefix's final state is the sum over the sequences that continue it, in their order.

T or t rows, S sequences or the state, Hk heads of q and k, Hv of v, Dk and Dv their sizes, q, k, v, o, g as above, x
[T, H, D] any of q, k and v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.delta_backward import launch_backward
from rlft.kernels.delta_chunks import Chunks, gated_delta_chunked, normalised
from rlft.kernels.delta_forward import Prepared, outputs, prepare, walk
from rlft.kernels.launch import KERNEL_DTYPES, check_args, on_gpu

MAX_D = 256
"""Widest head."""
WANTED = (
    "q, k [T, Hk, Dk] and v [T, Hv, Dv] of one dtype (float32, bfloat16 or float16), g, beta [T, Hv], Hv a multiple of "
    f"Hk, Dk and Dv at most {MAX_D}"
)


class Saved(NamedTuple):
    """What a backward needs beside the inputs, or computes again if it is None."""

    prepared: Prepared
    """Per row and head of v 4 bytes, and 64 in the dtype of v; per row and head of k 8 bytes."""
    states: Tensor
    """[chunks, Hv, Dk, Dv]: the state before each chunk, rounded as an operand of the products that read it."""
    new: Tensor
    """[T, Hv, Dv]: what each row writes to the state."""


def gated_delta_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    prefix: Tensor,
    scale: float,
    l2norm: bool = True,
    inside: torch.dtype | None = None,
) -> Tensor:
    """Compute the formula of this file row by row, differentiable.

    cu_seqlens [S + 1], prefix [S]: as in `Batch`. inside: dtype of all steps; None: the wider of fp32 and v's. The rest
    and the result as `gated_delta_rule`.
    """
    dtype, groups, bounds = v.dtype, v.shape[1] // k.shape[1], cu_seqlens.tolist()
    inside = torch.promote_types(dtype, torch.float32) if inside is None else inside
    q, k, v, g, beta = (one.to(inside) for one in (q, k, v, g, beta))
    q, k = (normalised(q), normalised(k)) if l2norm else (q, k)
    q, k = (one.repeat_interleave(groups, dim=1) for one in (q, k))
    finals, outs = {}, {}
    parents = prefix.tolist()
    for i in sorted(range(len(parents)), key=lambda i: parents[i] >= 0):
        state = finals[parents[i]] if parents[i] >= 0 else v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        for t in range(bounds[i], bounds[i + 1]):
            state = state * g[t].exp()[:, None, None]
            change = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t][:, :, None] * change[:, None, :]
            outs[t] = scale * torch.einsum("hkv,hk->hv", state, q[t])
        finals[i] = state
    return torch.stack([outs[t] for t in range(bounds[-1])]).to(dtype) if outs else v.to(dtype)


def _as_heads(x: Tensor) -> Tensor:
    """Return [T, H, D] with the heads of a row side by side, at any row stride; copy only if its strides require it."""
    side_by_side = x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
    return x if side_by_side else x.contiguous()


def _fits(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> bool:
    """Check what WANTED describes, but for the dtype."""
    ok = q.dim() == v.dim() == 3 and q.shape == k.shape and q.shape[0] == v.shape[0]
    ok = ok and q.shape[1] > 0 and v.shape[1] % q.shape[1] == 0 and 0 < q.shape[2] <= MAX_D and 0 < v.shape[2] <= MAX_D
    return ok and q.dtype == k.dtype == v.dtype and g.shape == beta.shape == v.shape[:2]


def _check(
    op: str, chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, dout: Tensor | None = None
) -> None:
    """Raise ValueError on tensors that the kernels do not take."""
    ok = _fits(q, k, v, g, beta) and chunks.bounds[-1] == q.shape[0]
    heads = [q, k, v] if dout is None else [q, k, v, dout]
    ok = ok and all(one.dtype in KERNEL_DTYPES for one in (q, g, beta)) and all(_as_heads(one) is one for one in heads)
    ok = ok and g.stride(1) == beta.stride(1) == 1 and (dout is None or (dout.shape, dout.dtype) == (v.shape, v.dtype))
    wanted = f"{WANTED}, T = {chunks.bounds[-1]}, heads side by side"
    check_args(op, ok, wanted, q=q, k=k, v=v, g=g, beta=beta, dout=dout)


def delta_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: Chunks, scale: float, l2norm: bool = True
) -> tuple[Tensor, Saved]:
    """Launch the forward. Returns o [T, Hv, Dv] and what the backward may use; drop it to have that computed again.

    Arguments as `gated_delta_rule`; heads of a row side by side, any row stride, so that q, k and v may be parts of
    [T, 2 Hk Dk + Hv Dv].
    """
    _check("delta_forward", chunks, q, k, v, g, beta)
    saved = _walked(q, k, v, g, beta, chunks, scale, l2norm)
    return outputs(q, k, saved.states, saved.new, saved.prepared, chunks), saved


def _walked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: Chunks, scale: float, l2norm: bool
) -> Saved:
    """Launch the first two kernels of the forward."""
    prepared = prepare(q, k, g, beta, chunks, scale, l2norm)
    return Saved(prepared, *walk(k, v, beta, prepared, chunks))


def delta_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunks: Chunks,
    scale: float,
    l2norm: bool = True,
    saved: Saved | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward. Returns dq, dk, dv, dg, dbeta, contiguous, each in the dtype of its input.

    dout: [T, Hv, Dv] of v's dtype. saved: of the forward; None: computed again. The rest as `delta_forward`.
    """
    _check("delta_backward", chunks, q, k, v, g, beta, dout)
    saved = _walked(q, k, v, g, beta, chunks, scale, l2norm) if saved is None else saved
    inputs = (q, k, v, g, beta)
    dq, dk, dg, dbeta, dv = launch_backward(
        dout, inputs, saved.prepared, saved.states, saved.new, chunks, scale, l2norm
    )
    return dq, dk, dv, dg, dbeta


class _GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, chunks, scale, l2norm):  # type: ignore[override]
        q, k, v, g, beta = *map(_as_heads, (q, k, v)), g.contiguous(), beta.contiguous()
        ctx.save_for_backward(q, k, v, g, beta)
        ctx.rest = (chunks, scale, l2norm)
        return delta_forward(q, k, v, g, beta, chunks, scale, l2norm)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        return *delta_backward(_as_heads(dout), *ctx.saved_tensors, *ctx.rest), None, None, None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunks: Chunks,
    scale: float | None = None,
    l2norm: bool = True,
) -> Tensor:
    """Run the gated delta rule over packed sequences, with gradients to q, k, v, g and beta.

    q, k: [T, Hk, Dk] float32, bfloat16 or float16. v: [T, Hv, Dv], the same dtype, Hv a multiple of Hk: head h of v
    uses head h // (Hv / Hk) of q and k. g: [T, Hv] float, natural logarithm of the decay, at most 0. beta: [T, Hv]
    float. chunks: `Chunks.of(cu_seqlens, prefix)`, built once for all layers. scale: factor on o; None: Dk^-0.5.
    l2norm: divide q and k by their lengths (use_qk_l2norm_in_kernel of transformers). Returns [T, Hv, Dv] in v's dtype.
    Deterministic; states are fp32. On a GPU the backward computes the forward's states again. Raises ValueError on
    shapes, dtypes or devices that do not fit.
    """
    op = "gated_delta_rule"
    ok = _fits(q, k, v, g, beta) and chunks.bounds[-1] == q.shape[0]
    check_args(op, ok, f"{WANTED}, T = {chunks.bounds[-1]}", q=q, k=k, v=v, g=g, beta=beta)
    scale = float(q.shape[2] ** -0.5 if scale is None else scale)
    if on_gpu(op, q=q, k=k, v=v, g=g, beta=beta):
        return _GatedDelta.apply(q, k, v, g, beta, chunks, scale, l2norm)  # type: ignore[return-value]
    return gated_delta_chunked(q, k, v, g, beta, chunks, scale, l2norm)
