"""Rotary position embedding of queries and keys in one pass, with a per-head RMSNorm in families that have one.

Per head vector x [D], with rotation of its first R <= D entries, half = R / 2, i < half:

    n = norm(x)  (Qwen3, Gemma3: RMSNorm over D with a weight for q and one for k, as in rms_norm.py; else n = x)
    out_i        = n_i cos_i - n_(i+half) sin_i
    out_(i+half) = n_(i+half) cos_i + n_i sin_i          out_j = n_j for j >= R

    dn_i = dout_i cos_i + dout_(i+half) sin_i,   dn_(i+half) = dout_(i+half) cos_i - dout_i sin_i
    dx = rstd (g - x rstd mean(x rstd g)) with g = dn w  (without a norm dx = dn)

With `after` (HunYuan) the norm is of the rotated vector: out is the norm's result, n = x, and in the backward the
rotation that undoes the forward's is the last step.

This is transformers' half-split convention; interleaved (GLM, ERNIE), entries 2 i and 2 i + 1 take the places of i and
i + half. cos and sin repeat their first half, and only that half is read. Scaled tables (YaRN, Llama 3) need no special
case: the attention factor is included in cos and sin.

Numerics: the norm rounds as in transformers, but one behind the rotation reads it unrounded; the rotation is fp32
inside with one rounding, whereas transformers rounds both products and the sum. Measured against float64 in bf16 (8
heads of 128, positions to 32k, CPU): a relative error of 1.7e-3 against 2.3e-3, and 29% of the entries differ in the
last bit. vLLM computes this as well: its compiled native path fuses the rotation in fp32 (0.23, no
`emulate_precision_casts`), and so does its newer CUDA kernel.

Only q and k before the norm are saved (without a norm nothing): the backward has the whole head in registers and
computes rstd again. Bytes per token of a 2-byte dtype: 4 (Hq + Hk) D each way, backward with norm 6.

T or t tokens, d head size D, r rotated entries R, p or P lines of the tables, w a norm's weight.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.kernels.launch import KERNEL_DTYPES, check_args, kernel, launch, on_gpu, power_of_2, tl
from rlft.kernels.qk_rope_heads import backward_heads, forward_heads
from rlft.kernels.rms_norm import LLAMA, rms_norm_reference

MAX_D = 512
"""Widest head."""


def qk_rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    style: int = LLAMA,
    interleaved: bool = False,
    after: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the formula in plain PyTorch, differentiable by autograd. Arguments and results as `qk_rope`."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    outs = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        wide = torch.promote_types(x.dtype, torch.float32)
        n = (x if weight is None or after else rms_norm_reference(x, weight, eps, style)).to(wide)
        rotated, passed = n[..., : cos.shape[-1]], n[..., cos.shape[-1] :]
        half, dim = cos.shape[-1] // 2, -1 if interleaved else -2
        first, second = rotated.unflatten(-1, (half, 2) if interleaved else (2, half)).unbind(dim)
        cosines, sines = (table[:, None, :half].to(wide) for table in (cos, sin))
        pair = (first * cosines - second * sines, second * cosines + first * sines)
        rotated = torch.stack(pair, dim).flatten(-2)
        out = torch.cat([rotated, passed], dim=-1).to(x.dtype)
        outs.append(rms_norm_reference(out, weight, eps, style) if after and weight is not None else out)
    return outs[0], outs[1]


@kernel(varying=("T",))
def forward_kernel(
    q_ptr, k_ptr, qw_ptr, kw_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, pos_ptr,
    T, stride_q, stride_k, stride_q_out, stride_k_out, stride_table, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STYLE: tl.constexpr, PAIRS: tl.constexpr,
    AFTER: tl.constexpr,
):  # fmt: skip
    """Run the forward: the first cdiv(T HQ, ROWS) programs process queries, the others keys."""
    program = tl.program_id(0)
    of_q = tl.cdiv(T * HQ, ROWS)
    if program < of_q:
        forward_heads(program, q_ptr, qw_ptr, q_out_ptr, cos_ptr, sin_ptr, pos_ptr,
                      T, stride_q, stride_q_out, stride_table, eps, HEADS=HQ, D=D, R=R,
                      BLOCK=BLOCK, TAIL=TAIL, ROWS=ROWS, STYLE=STYLE, PAIRS=PAIRS, AFTER=AFTER)  # fmt: skip
    else:
        forward_heads(program - of_q, k_ptr, kw_ptr, k_out_ptr, cos_ptr, sin_ptr, pos_ptr,
                      T, stride_k, stride_k_out, stride_table, eps, HEADS=HK, D=D, R=R,
                      BLOCK=BLOCK, TAIL=TAIL, ROWS=ROWS, STYLE=STYLE, PAIRS=PAIRS, AFTER=AFTER)  # fmt: skip


@kernel(varying=("T",))
def backward_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, qw_ptr, kw_ptr, dq_ptr, dk_ptr, cos_ptr, sin_ptr, pos_ptr,
    T, stride_dq_out, stride_dk_out, stride_q, stride_k, stride_dq, stride_dk, stride_table, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STYLE: tl.constexpr, PAIRS: tl.constexpr,
    AFTER: tl.constexpr,
):  # fmt: skip
    """Run the backward, with programs as in `forward_kernel`."""
    program = tl.program_id(0)
    of_q = tl.cdiv(T * HQ, ROWS)
    if program < of_q:
        backward_heads(program, dq_out_ptr, q_ptr, qw_ptr, dq_ptr, cos_ptr, sin_ptr, pos_ptr,
                       T, stride_dq_out, stride_q, stride_dq, stride_table, eps, HEADS=HQ, D=D, R=R,
                       BLOCK=BLOCK, TAIL=TAIL, ROWS=ROWS, STYLE=STYLE, PAIRS=PAIRS, AFTER=AFTER)  # fmt: skip
    else:
        backward_heads(program - of_q, dk_out_ptr, k_ptr, kw_ptr, dk_ptr, cos_ptr, sin_ptr, pos_ptr,
                       T, stride_dk_out, stride_k, stride_dk, stride_table, eps, HEADS=HK, D=D, R=R,
                       BLOCK=BLOCK, TAIL=TAIL, ROWS=ROWS, STYLE=STYLE, PAIRS=PAIRS, AFTER=AFTER)  # fmt: skip


@cache
def launch_shape(d: int, r: int) -> tuple[int, int, int, int]:
    """Return (BLOCK, TAIL, rows per program, warps) for heads of d with r rotated entries.

    2,048 entries per program and 8 per thread were the fastest of a sweep on an H100.
    """
    block, tail = power_of_2(r // 2), power_of_2(max(1, d - r))
    rows = max(4, 2048 // power_of_2(d))
    # No more threads than entries of the smallest tile: otherwise another warp holds a copy of an entry and may read it
    # after it was overwritten in place.
    smallest = rows * (min(block, tail) if r < d else block)
    return block, tail, rows, max(1, min(8, smallest // 32))


class _Pair(NamedTuple):
    """Queries and keys that a kernel reads or writes: [T, Hq, D] and [T, Hk, D]."""

    q: Tensor
    k: Tensor

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from one row to the next."""
        return self.q.stride(0), self.k.stride(0)

    def launch(
        self, r: int, style: int, pairs: bool, after: bool, shape: tuple[int, int] | None
    ) -> tuple[int, dict[str, Any]]:
        """Return the number of programs, and the kernels' constants by name.

        shape: (rows per program, warps); None: those of `launch_shape`.
        """
        (t, hq, d), hk = self.q.shape, self.k.shape[1]
        block, tail, *chosen = launch_shape(d, r)
        rows, warps = shape or chosen
        constants = {"HQ": hq, "HK": hk, "D": d, "R": r, "BLOCK": block, "TAIL": tail, "ROWS": rows}
        constants |= {"STYLE": style, "PAIRS": pairs, "AFTER": after, "num_warps": warps}
        return -(-t * hq // rows) + -(-t * hk // rows), constants


def qk_rope_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    style: int = LLAMA,
    interleaved: bool = False,
    after: bool = False,
    *,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward. Returns q [T, Hq, D] and k [T, Hk, D], normalized and rotated.

    q, k: as `qk_rope`; heads adjacent, any row stride: both may be slices of one qkv buffer. q_out, k_out: where the
    results are written, with the same layout; a caller that owns q and k may pass them (but a backward with a norm
    reads q and k again). shape: (rows per program, warps), for benchmarks.
    """
    _check("qk_rope_forward", q, k, cos, sin, positions, q_weight, k_weight)
    check_args("qk_rope_forward", _like(q_out, q) and _like(k_out, k), "outputs as q and k, heads adjacent",
         q=q, k=k, q_out=q_out, k_out=k_out)  # fmt: skip
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if q_out is None else q_out
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device) if k_out is None else k_out
    x, out = _Pair(q, k), _Pair(q_out, k_out)
    programs, constants = x.launch(cos.shape[1], style, interleaved, after, shape)
    if programs:
        launch(
            forward_kernel, (programs,), *x, q_weight, k_weight, *out, cos, sin, positions,
            q.shape[0], *x.strides, *out.strides, cos.stride(0), eps, **constants,
        )  # fmt: skip
    return q_out, k_out


def qk_rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    style: int = LLAMA,
    interleaved: bool = False,
    after: bool = False,
    *,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the backward. Returns dq [T, Hq, D] and dk [T, Hk, D].

    dq_out, dk_out: gradients of the forward's results. q, k: what the forward read; None without a norm. dq, dk: where
    the gradients are written, e.g. slices of one dqkv buffer; a caller that owns dq_out and dk_out may pass them here.
    """
    _check("qk_rope_backward", dq_out, dk_out, cos, sin, positions, q_weight, k_weight)
    check_args(
        "qk_rope_backward",
        _like(dq, dq_out) and _like(dk, dk_out) and _like(q, dq_out) and _like(k, dk_out)
        and (q_weight is None or (q is not None and k is not None)),
        "dq, q as dq_out and dk, k as dk_out, heads adjacent; q and k where there is a norm",
        dq_out=dq_out, dk_out=dk_out, q=q, k=k, dq=dq, dk=dk,
    )  # fmt: skip
    # Without a norm the kernel does not read q and k; the gradients serve as placeholders with strides.
    dout = _Pair(dq_out, dk_out)
    x = dout if q is None or k is None else _Pair(q, k)
    dq = torch.empty(dq_out.shape, dtype=dq_out.dtype, device=dq_out.device) if dq is None else dq
    dk = torch.empty(dk_out.shape, dtype=dk_out.dtype, device=dk_out.device) if dk is None else dk
    dx = _Pair(dq, dk)
    programs, constants = dout.launch(cos.shape[1], style, interleaved, after, shape)
    if programs:
        launch(
            backward_kernel, (programs,), *dout, *x, q_weight, k_weight, *dx, cos, sin, positions,
            dq_out.shape[0], *dout.strides, *x.strides, *dx.strides, cos.stride(0), eps, **constants,
        )  # fmt: skip
    return dq, dk


def _adjacent(x: Tensor) -> bool:
    """Return whether the entries of a head, and the heads of a row, are adjacent."""
    return x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)


def _like(tensor: Tensor | None, other: Tensor) -> bool:
    """Return whether `tensor` is None or has the shape and dtype of `other`, with adjacent heads."""
    return tensor is None or (tensor.shape == other.shape and tensor.dtype == other.dtype and _adjacent(tensor))


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    kernel: bool = True,
) -> None:
    """Check the inputs of both directions and of the public function; `kernel` adds strides and limits."""
    got = {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions, "q_weight": q_weight, "k_weight": k_weight}
    norms = () if q_weight is None and k_weight is None else (q_weight, k_weight)
    ok = q.dim() == 3 and k.dim() == 3 and cos.dim() == 2 and cos.shape == sin.shape and q.dtype == k.dtype
    if ok:
        (t, _, d), (p, r) = q.shape, cos.shape
        ok = k.shape[0] == t and k.shape[2] == d and 0 < r <= d and r % 2 == 0
        ok = ok and (p == t if positions is None else positions.shape == (t,) and not positions.is_floating_point())
        for w in norms:
            ok = ok and w is not None and w.shape == (d,) and w.dtype == q.dtype
    check_args(
        op, ok,
        "q [T, Hq, D], k [T, Hk, D], cos and sin [P, R] with R even, at most D, and P = T without positions, "
        "positions [T] integer, both norm weights [D] or none", **got,
    )  # fmt: skip
    if kernel:
        ok = _adjacent(q) and _adjacent(k) and cos.stride() == sin.stride() and cos.stride(1) == 1
        ok = ok and q.dtype in KERNEL_DTYPES and q.shape[2] <= MAX_D
        ok = ok and q.shape[0] * max(q.shape[1], k.shape[1]) < 2**31
        for vector in (positions, *norms):
            ok = ok and (vector is None or vector.is_contiguous())
        check_args(
            op, ok,
            f"heads adjacent in q and k, tables with adjacent columns and equal strides, D at most {MAX_D}, "
            "float32, bfloat16 or float16, T times heads below 2^31", **got,
        )  # fmt: skip


class _QkRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, q_weight, k_weight, *how):  # type: ignore[override]
        q, k = (x if _adjacent(x) else x.contiguous() for x in (q, k))
        q_out, k_out = qk_rope_forward(q, k, cos, sin, positions, q_weight, k_weight, *how)
        saved = (None, None) if q_weight is None else (q, k)
        ctx.save_for_backward(*saved, cos, sin, positions, q_weight, k_weight)
        ctx.how = how
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):  # type: ignore[override]
        grads = (x if _adjacent(x) else x.contiguous() for x in (dq_out, dk_out))
        dq, dk = qk_rope_backward(*grads, *ctx.saved_tensors, *ctx.how)
        return dq, dk, *[None] * (5 + len(ctx.how))


def qk_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    style: int = LLAMA,
    interleaved: bool = False,
    after: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply norm (if weights are given) and rotary embedding to queries and keys, with gradients to both.

    q: [T, Hq, D], k: [T, Hk, D], float32, bfloat16 or float16; slices of a qkv buffer are not copied. cos, sin: [P, R]
    float, R even and at most D, the second half of the columns repeating the first, as transformers' rotary embeddings
    return them (attention factor included). positions: [T] integer below P, the line of the tables for each row (not
    checked on a GPU); None: row t of the tables belongs to row t of q, P = T. q_weight, k_weight: [D] in q's dtype,
    frozen, or None for families without that norm. eps, style: as in `rms_norm`. interleaved: the convention. after:
    whether the norm is of the rotated vectors.

    Returns q [T, Hq, D] and k [T, Hk, D]. Raises ValueError on shapes, dtypes or devices that do not fit, and on a
    weight that requires a gradient.
    """
    _check("qk_rope", q, k, cos, sin, positions, q_weight, k_weight, kernel=False)
    if q_weight is not None and k_weight is not None and (q_weight.requires_grad or k_weight.requires_grad):
        raise ValueError("qk_rope: a norm weight's requires_grad is True: it is frozen here")
    if on_gpu("qk_rope", q=q, k=k, cos=cos, sin=sin, positions=positions, q_weight=q_weight, k_weight=k_weight):
        return _QkRope.apply(q, k, cos, sin, positions, q_weight, k_weight, eps, style, interleaved, after)  # type: ignore[return-value]
    return qk_rope_reference(q, k, cos, sin, positions, q_weight, k_weight, eps, style, interleaved, after)
