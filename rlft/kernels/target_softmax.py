"""Rows of logits -> log-prob of each row's target, entropy, and the weights of the second product of the head.

With z the logits (softcap c: z <- c tanh(z / c)), y = scale z / temperature, p = softmax(y), t the target,
f = 1 (softcap: 1 - (z / c)^2), d_v = y_v - y_t and e_v = exp(d_v):

    s = sum_{v != t} e_v         logprob = -log1p(s)          1 - p_t = s / (1 + s)          p_v = e_v / (1 + s)
    entropy = log1p(s) - sum_{v != t} e_v d_v / (1 + s)

The target is left out of every sum, so nothing cancels for p_t near 1, the common case in RL: subtracting a bf16 p_t
from the one-hot would round 1 - p_t to 0.

One kernel reads the logits once and writes e f in the dtype of the head: bf16 has the exponent of fp32, so e needs no
maximum first. Only where a logit lies more than 60 (fp16: 10) above the target's is the row done again with its
maximum, by the kernel that adds up the row's parts. Bytes per logit: 4 read, 2 written; nothing written without grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlft.kernels.launch import jit, launch, power_of_2, tl

BLOCK = 4096
"""Columns that one program of the row kernel takes."""
FAR, FAR_FP16 = 60.0, 10.0
"""exp(60) = 1e26 leaves room for a sum over any vocabulary in fp32 and bf16; exp(10) = 22,026 fits fp16."""


class Rows(NamedTuple):
    """What rows of logits come to: everything that results and gradients need."""

    logprob: Tensor
    """[rows]."""
    entropy: Tensor
    """[rows]."""
    own: Tensor
    """[rows]: (1 - p_t) f_t."""
    others: Tensor
    """[rows]: factor that makes p_v f_v of `weights`."""
    weights: Tensor | None
    """[rows, V] in the dtype of the head: e_v f_v, 0 at the target; None where no gradient is wanted."""


# ---- in PyTorch --------------------------------------------------------------------------------------------------


def target_softmax_reference(
    z: Tensor, targets: Tensor, temperature: float, softcap: float | None, scale: float, store: bool
) -> Rows:
    """The arithmetic of the kernels. z: [rows, V], h W^T, overwritten."""
    rows = targets[:, None]
    y = z.mul_(scale)
    slope = None
    if softcap is not None:
        y = y.div_(softcap).tanh_()
        slope = 1 - y * y
        y = y.mul_(softcap)
    y.mul_(1 / temperature)
    y_t = y.gather(1, rows)
    d = y.sub_(y_t).scatter_(1, rows, float("-inf"))
    top = d.amax(1).clamp(min=0)  # of all, the target's 0 included
    d -= top[:, None]
    e, own_e = d.exp(), (-top).exp()
    total = e.sum(1)
    # e is 0 where d = -inf, and 0 * -inf is nan.
    dot = torch.einsum("nv,nv->n", e, d.clamp_(min=torch.finfo(d.dtype).min)) - own_e * top
    everything = total + own_e
    log_sum = torch.where(top == 0, torch.log1p(total), everything.log())
    own = total / everything
    if slope is not None:
        own = own * slope.gather(1, rows).squeeze(1)
        e *= slope
    return Rows(-top - log_sum, log_sum - dot / everything, own, 1 / everything, e if store else None)


def entropy_weights(z: Tensor, temperature: float, softcap: float | None, scale: float) -> Tensor:
    """p_v (log p_v + entropy) f_v, [rows, V]. z: [rows, V], h W^T."""
    y = z * scale
    slope = None
    if softcap is not None:
        y = torch.tanh(y / softcap)
        slope = 1 - y * y
        y = y * softcap
    log_p = torch.log_softmax(y / temperature, dim=-1)
    p = log_p.exp()
    log_p = log_p.clamp(min=torch.finfo(p.dtype).min)  # p is 0 there
    entropy = -torch.einsum("nv,nv->n", p, log_p)
    q = p * (log_p + entropy[:, None])
    return q if slope is None else q * slope


# ---- in Triton ---------------------------------------------------------------------------------------------------


@jit
def _capped(z, cap, CAPPED: tl.constexpr):
    """Softcap and its slope; tanh by the exponential, exact to 1e-7."""
    slope = 1.0
    if CAPPED:
        a = tl.exp(-2 * tl.abs(z / cap))
        h = (1 - a) / (1 + a)
        z = tl.where(z < 0, -h, h) * cap
        slope = 1 - h * h
    return z, slope


@jit
def _rows_kernel(
    z, targets, weights, parts, V, z_stride, w_stride, splits, scale, cap, cold,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, STORE: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One split of one row: sum of e, sum of e d and max of d, with d = y - y_t; e f for the second product."""
    pid = tl.program_id(0)
    row, split = (pid // splits).to(tl.int64), pid % splits
    t = tl.load(targets + row)
    z_t = tl.load(z + row * z_stride + t, mask=(t >= 0) & (t < V), other=float("nan"))
    y_t, _ = _capped(z_t * scale, cap, CAPPED)
    columns = split * BLOCK + tl.arange(0, BLOCK)
    y, slope = _capped(tl.load(z + row * z_stride + columns, mask=columns < V, other=0.0) * scale, cap, CAPPED)
    # The mask comes after the scaling: a negative scale would turn -inf round.
    d = tl.where((columns < V) & (columns != t), (y - y_t) * cold, float("-inf"))
    # Beyond FAR the row is done again. Not a minimum, which would make a number of nan.
    e = tl.exp(tl.where(d > FAR, FAR, d))
    out = parts + (row * splits + split) * 3
    tl.store(out, tl.sum(e))
    tl.store(out + 1, tl.sum(e * tl.where(e > 0, d, 0.0)))
    tl.store(out + 2, tl.max(d))
    if STORE:
        tl.store(weights + row * w_stride + columns, (e * slope).to(weights.dtype.element_ty), mask=columns < V)


@jit
def _finish_kernel(
    z, targets, weights, parts, logprob, entropy, own, others, V, z_stride, w_stride, splits, scale, cap, cold,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, CAPPED: tl.constexpr, STORE: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Add up the splits of one row; a row whose target lies far below its maximum is done again with the maximum."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    at = parts + (row * splits + s) * 3
    total = tl.sum(tl.load(at, mask=s < splits, other=0.0))
    dot = tl.sum(tl.load(at + 1, mask=s < splits, other=0.0))
    top = tl.max(tl.load(at + 2, mask=s < splits, other=float("-inf")))
    t = tl.load(targets + row)
    z_t = tl.load(z + row * z_stride + t, mask=(t >= 0) & (t < V), other=float("nan"))
    y_t, slope_t = _capped(z_t * scale, cap, CAPPED)
    own_e = tl.where(top > FAR, tl.exp(-tl.maximum(top, 0.0)), 1.0)
    if top > FAR:
        total = 0.0
        dot = 0.0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            y, slope = _capped(tl.load(z + row * z_stride + columns, mask=columns < V, other=0.0) * scale, cap, CAPPED)
            d = tl.where((columns < V) & (columns != t), (y - y_t) * cold, float("-inf"))
            e = tl.exp(d - top)
            total += tl.sum(e)
            dot += tl.sum(e * tl.where(e > 0, d - top, 0.0))
            if STORE:
                tl.store(weights + row * w_stride + columns, (e * slope).to(weights.dtype.element_ty), mask=columns < V)
    everything = total + own_e
    # log1p(total) without cancellation: u - 1 is exact, so log(u) x / (u - 1) corrects the rounding of u = 1 + x.
    u = 1.0 + total
    small = tl.where(u == 1.0, total, tl.log(u) * total / tl.where(u == 1.0, 1.0, u - 1.0))
    # The entropy of such a row is relative to its maximum: log_sum and dot would cancel.
    base = tl.where(top > FAR, top, 0.0)
    log_sum = tl.where(top > FAR, tl.log(everything), small)
    tl.store(logprob + row, -base - log_sum)
    tl.store(entropy + row, log_sum - (dot - own_e * base) / everything)
    tl.store(own + row, total / everything * slope_t)
    tl.store(others + row, 1.0 / everything)


def launch_rows(
    z: Tensor, targets: Tensor, found: Sequence[Tensor], weights: Tensor | None, temperature: float,
    softcap: float | None, scale: float, block: int = BLOCK,
) -> Rows:  # fmt: skip
    """`target_softmax_reference` by the kernels. z: [rows, V] fp32, any row stride. found: four [rows], contiguous,
    where log-probs, entropies, `own` and `others` go. weights: [rows, V], written."""
    rows, vocab = z.shape
    splits = -(-vocab // block)
    parts = torch.empty(rows, splits, 3, dtype=torch.float32, device=z.device)
    out = z if weights is None else weights
    common = (vocab, z.stride(0), out.stride(0), splits, scale, softcap or 1.0, 1.0 / temperature)
    flags = {
        "BLOCK": block, "CAPPED": softcap is not None, "STORE": weights is not None,
        "FAR": FAR_FP16 if out.dtype == torch.float16 else FAR,
    }  # fmt: skip
    launch(_rows_kernel, (rows * splits,), z, targets, out, parts, *common, **flags, num_warps=8)
    launch(
        _finish_kernel, (rows,), z, targets, out, parts, *found, *common, **flags, SPLITS=power_of_2(splits),
        num_warps=4,
    )  # fmt: skip
    return Rows(found[0], found[1], found[2], found[3], weights)
