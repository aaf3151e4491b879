"""Compute log-prob of the target, entropy, and the weights of the head's second product, from rows of logits.

With z the logits (softcap c: z <- c tanh(z / c)), y = scale z / temperature, p = softmax(y), t the target,
f = 1 (softcap: 1 - (z / c)^2), d_v = y_v - y_t and e_v = exp(d_v):

    s = sum_{v != t} e_v         logprob = -log1p(s)          1 - p_t = s / (1 + s)          p_v = e_v / (1 + s)
    entropy = log1p(s) - sum_{v != t} e_v d_v / (1 + s)
    d entropy / d y_v = -p_v (log p_v + entropy) = -p_v (d_v - D),    D = sum_v p_v d_v

The target is left out of every sum, so nothing cancels for p_t near 1, the common case in RL: subtracting a bf16 p_t
from the one-hot would round 1 - p_t to 0.

One kernel reads the logits once and writes e f in the dtype of the head: bf16 has the exponent range of fp32, so e
needs no maximum first. Only if a logit exceeds the target's by more than 16 is the row recomputed relative to its
maximum, by the kernel that adds up the parts of a row. Bytes per logit: 4 read, 2 written; nothing is written without
grad.

fp16 has a smaller range: values below 6e-8 are 0, and a tail of 150,000 times 1e-8 is 0.15% of the probability. A
separate kernel writes its weights, relative to the row's largest, for 4 more bytes read. That kernel also writes the
weights of the entropy's Jacobian, over those of the log-prob's: an entropy bonus needs no further chunk.

V is the vocabulary; in code, own_e is e of the target, base the maximum that exponentials are relative to,
q = p (log p + entropy), u = 1 + s, h the tanh, w a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlft.kernels.launch import jit, kernel, launch, power_of_2, tl

BLOCK = 4096
"""Columns per program of the row kernel."""
FAR = 16.0
"""Largest d for which exponentials are not relative to the maximum m: the logarithm of such a sum has an error of m
roundings, and so does the entropy's Jacobian."""
MAX_FP16_WEIGHT = 2.0**15
"""Largest weight of a row in fp16, whose largest number is 65,504."""
MIN_ENTROPY = 2.0**-12
"""Smaller entropies count as this where weights are scaled by them, since FAR allows errors of 1e-6."""


class Rows(NamedTuple):
    """Per row of logits, everything that results and gradients need."""

    logprob: Tensor
    """[rows]."""
    entropy: Tensor
    """[rows]."""
    own: Tensor
    """[rows]: d logprob / d y_t = (1 - p_t) f_t."""
    others: Tensor
    """[rows]: factor on `weights` that yields -d logprob / d y_v = p_v f_v."""
    weights: Tensor | None
    """[rows, V] in the dtype of the head: a multiple of e_v f_v per row, 0 at the target; None if no gradient is
    needed."""
    sums: Tensor
    """[rows, 3]: the maximum m of d without the target; log sum_v exp(d_v - b); sum_v p_v d_v - b. b = m if m is above
    FAR (in PyTorch: above 0), else 0."""


# ---- in PyTorch --------------------------------------------------------------------------------------------------


def _capped_reference(
    z: Tensor, temperature: float, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Compute y in place of z, and its slope f, [rows, V]; None for a slope of 1."""
    y, slope = z.mul_(scale), None
    if softcap is not None:
        y = y.div_(softcap).tanh_()
        slope = (y * y).neg_().add_(1)
        y = y.mul_(softcap)
    return y.mul_(1 / temperature), slope


def target_softmax_reference(
    z: Tensor, targets: Tensor, temperature: float, softcap: float | None, scale: float, store: bool
) -> Rows:
    """Compute what the kernels compute, in PyTorch.

    z: [rows, V], h W^T, overwritten. Allocates one more [rows, V], two with a softcap.
    """
    rows = targets[:, None]
    y, slope = _capped_reference(z, temperature, softcap, scale)
    d = y.sub_(y.gather(1, rows)).scatter_(1, rows, float("-inf"))
    top = d.amax(1)
    base = top.clamp(min=0)  # maximum of d including the target's 0
    d -= base[:, None]
    e, own_e = d.exp(), (-base).exp()
    total = e.sum(1)
    # e is 0 where d = -inf, and 0 * -inf is nan.
    dot = torch.einsum("nv,nv->n", e, d.clamp_(min=torch.finfo(d.dtype).min)) - own_e * base
    denominator = total + own_e
    log_sum = torch.where(base == 0, torch.log1p(total), denominator.log())
    own, mean = total / denominator, dot / denominator
    if slope is not None:
        own = own * slope.gather(1, rows).squeeze(1)
        e *= slope
    sums = torch.stack([top, log_sum, mean], 1)
    return Rows(-base - log_sum, log_sum - mean, own, 1 / denominator, e if store else None, sums)


def entropy_reference(
    z: Tensor, targets: Tensor, found: Rows, temperature: float, softcap: float | None, scale: float
) -> Rows:
    """Replace own, others and weights by those of the entropy: d entropy / d y_t and the factors of -d entropy / d y_v.

    z: [rows, V], h W^T, overwritten by the weights. found: from `target_softmax_reference`. Memory as there.
    """
    rows, (top, log_sum, mean) = targets[:, None], found.sums.unbind(1)
    y, slope = _capped_reference(z, temperature, softcap, scale)
    base = top.clamp(min=0)
    d = y.sub_(y.gather(1, rows)).sub_(base[:, None])
    p = (d - log_sum[:, None]).exp_()
    # p is 0 where d = -inf, and 0 * -inf is nan.
    q = d.clamp_(min=torch.finfo(d.dtype).min).sub_(mean[:, None]).mul_(p)
    if slope is not None:
        q *= slope
    own = -q.gather(1, rows).squeeze(1)
    return found._replace(own=own, others=torch.ones_like(own), weights=q.scatter_(1, rows, 0))


# ---- in Triton ---------------------------------------------------------------------------------------------------


@jit
def _capped(z, cap, CAPPED: tl.constexpr):
    """Compute softcap and slope, with tanh by the exponential, exact to 1e-7."""
    slope = 1.0
    if CAPPED:
        a = tl.exp(-2 * tl.abs(z / cap))
        h = (1 - a) / (1 + a)
        z = tl.where(z < 0, -h, h) * cap
        slope = 1 - h * h
    return z, slope


@jit
def _differences(z, columns, t, y_t, V, scale, cap, cold, CAPPED: tl.constexpr):
    """Compute d = y - y_t of some columns of row z, -inf at the target and beyond the row, and the softcap's slope."""
    y, slope = _capped(tl.load(z + columns, mask=columns < V, other=0.0) * scale, cap, CAPPED)
    # The mask comes after the scaling, since a negative scale would flip the sign of -inf.
    return tl.where((columns < V) & (columns != t), (y - y_t) * cold, float("-inf")), slope


@kernel()
def _rows_kernel(
    z,
    targets,
    weights,
    parts,
    V,
    z_stride,
    w_stride,
    splits,
    scale,
    cap,
    cold,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    FAR: tl.constexpr,
    STORE: tl.constexpr,
):
    """Compute, for one split of a row, the sums of e and e d and the maximum of d; write e f."""
    pid = tl.program_id(0)
    row, split = (pid // splits).to(tl.int64), pid % splits
    t = tl.load(targets + row)
    z_t = tl.load(z + row * z_stride + t, mask=(t >= 0) & (t < V), other=float("nan"))
    y_t, _ = _capped(z_t * scale, cap, CAPPED)
    columns = split * BLOCK + tl.arange(0, BLOCK)
    d, slope = _differences(z + row * z_stride, columns, t, y_t, V, scale, cap, cold, CAPPED)
    # Beyond FAR the row is recomputed. Not tl.minimum, which would turn nan into a number.
    e = tl.exp(tl.where(d > FAR, FAR, d))
    out = parts + (row * splits + split) * 3
    tl.store(out, tl.sum(e))
    tl.store(out + 1, tl.sum(e * tl.where(e > 0, d, 0.0)))
    tl.store(out + 2, tl.max(d))
    if STORE:
        tl.store(weights + row * w_stride + columns, (e * slope).to(weights.dtype.element_ty), mask=columns < V)


@kernel()
def _finish_kernel(
    z,
    targets,
    weights,
    parts,
    logprob,
    entropy,
    own,
    others,
    sums,
    V,
    z_stride,
    w_stride,
    splits,
    scale,
    cap,
    cold,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    FAR: tl.constexpr,
    STORE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add up the splits of one row; recompute a row whose target is far below its maximum relative to that maximum."""
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
            d, slope = _differences(z + row * z_stride, columns, t, y_t, V, scale, cap, cold, CAPPED)
            e = tl.exp(d - top)
            total += tl.sum(e)
            dot += tl.sum(e * tl.where(e > 0, d - top, 0.0))
            if STORE:
                tl.store(weights + row * w_stride + columns, (e * slope).to(weights.dtype.element_ty), mask=columns < V)
    everything = total + own_e
    # log1p(total) without cancellation: u - 1 is exact, so log(u) x / (u - 1) corrects the rounding of u = 1 + x.
    u = 1.0 + total
    small = tl.where(u == 1.0, total, tl.log(u) * total / tl.where(u == 1.0, 1.0, u - 1.0))
    # The entropy of such a row uses sums relative to its maximum: otherwise log_sum and dot would cancel.
    base = tl.where(top > FAR, top, 0.0)
    log_sum = tl.where(top > FAR, tl.log(everything), small)
    mean = (dot - own_e * base) / everything
    tl.store(logprob + row, -base - log_sum)
    tl.store(entropy + row, log_sum - mean)
    tl.store(own + row, total / everything * slope_t)
    tl.store(others + row, 1.0 / everything)
    tl.store(sums + row * 3, top)
    tl.store(sums + row * 3 + 1, log_sum)
    tl.store(sums + row * 3 + 2, mean)


@kernel()
def _weights_kernel(
    z,
    targets,
    weights,
    sums,
    own,
    others,
    V,
    z_stride,
    w_stride,
    splits,
    scale,
    cap,
    cold,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    FAR: tl.constexpr,
    ENTROPY: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Write weights of one split of a row, scaled to at most LARGEST, and the factor that undoes the scaling.

    With ENTROPY these are the weights of the entropy's Jacobian, and the factor of the target's row of the head.
    """
    pid = tl.program_id(0)
    row, split = (pid // splits).to(tl.int64), pid % splits
    t = tl.load(targets + row)
    z_t = tl.load(z + row * z_stride + t, mask=(t >= 0) & (t < V), other=float("nan"))
    y_t, slope_t = _capped(z_t * scale, cap, CAPPED)
    top, log_sum = tl.load(sums + row * 3), tl.load(sums + row * 3 + 1)
    base = tl.where(top > FAR, top, 0.0)
    columns = split * BLOCK + tl.arange(0, BLOCK)
    d, slope = _differences(z + row * z_stride, columns, t, y_t, V, scale, cap, cold, CAPPED)
    if ENTROPY:
        mean = tl.load(sums + row * 3 + 2)
        # |p (log p + entropy)| is at most twice the entropy, since that bounds their sum.
        entropy = tl.maximum(log_sum - mean, LEAST)
        unit = 0.5 * LARGEST / entropy
        p = tl.exp(d - base - log_sum)
        # p is 0 where d = -inf, and 0 * -inf is nan.
        w = p * (tl.where(p > 0, d - base, 0.0) - mean) * unit
        if split == 0:
            tl.store(own + row, tl.exp(-base - log_sum) * (base + mean) * slope_t)
            tl.store(others + row, 1.0 / unit)
    else:
        # A row of only the target has no maximum.
        top = tl.where(top == float("-inf"), 0.0, top)
        w = tl.exp(d - top) * LARGEST
        if split == 0:
            tl.store(others + row, tl.exp(top - base - log_sum) / LARGEST)
    tl.store(weights + row * w_stride + columns, (w * slope).to(weights.dtype.element_ty), mask=columns < V)


def launch_rows(
    z: Tensor,
    targets: Tensor,
    into: Sequence[Tensor],
    weights: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    block: int = BLOCK,
) -> Rows:
    """Compute `target_softmax_reference` by the kernels.

    z: [rows, V] fp32, any row stride. into: four contiguous [rows] tensors for log-probs, entropies, `own` and
    `others`. weights: [rows, V], overwritten.
    """
    rows, vocab = z.shape
    splits = -(-vocab // block)
    parts = torch.empty(rows, splits, 3, dtype=torch.float32, device=z.device)
    sums = torch.empty(rows, 3, dtype=torch.float32, device=z.device)
    half = weights is not None and weights.dtype == torch.float16
    out = z if weights is None else weights
    common = (vocab, z.stride(0), out.stride(0), splits, scale, softcap or 1.0, 1.0 / temperature)
    flags = {"BLOCK": block, "CAPPED": softcap is not None, "FAR": FAR, "STORE": weights is not None and not half}
    launch(_rows_kernel, (rows * splits,), z, targets, out, parts, *common, **flags, num_warps=8)
    launch(
        _finish_kernel,
        (rows,),
        z,
        targets,
        out,
        parts,
        *into,
        sums,
        *common,
        **flags,
        SPLITS=power_of_2(splits),
        num_warps=4,
    )
    result = Rows(into[0], into[1], into[2], into[3], weights, sums)
    if half:
        _launch_weights(z, targets, result, temperature, softcap, scale, block, entropy=False)
    return result


def launch_entropy(
    z: Tensor, targets: Tensor, found: Rows, temperature: float, softcap: float | None, scale: float, block: int = BLOCK
) -> Rows:
    """Compute `entropy_reference` by the kernels, over weights, own and others of `found`; z is unchanged.

    found: from `launch_rows` for this z.
    """
    _launch_weights(z, targets, found, temperature, softcap, scale, block, entropy=True)
    return found


def _launch_weights(
    z: Tensor,
    targets: Tensor,
    result: Rows,
    temperature: float,
    softcap: float | None,
    scale: float,
    block: int,
    entropy: bool,
) -> None:
    """Launch `_weights_kernel`, which overwrites weights, others and, with `entropy`, own of `result`."""
    rows, vocab = z.shape
    assert result.weights is not None
    splits = -(-vocab // block)
    launch(
        _weights_kernel,
        (rows * splits,),
        z,
        targets,
        result.weights,
        result.sums,
        result.own,
        result.others,
        vocab,
        z.stride(0),
        result.weights.stride(0),
        splits,
        scale,
        softcap or 1.0,
        1.0 / temperature,
        BLOCK=block,
        CAPPED=softcap is not None,
        FAR=FAR,
        ENTROPY=entropy,
        LARGEST=MAX_FP16_WEIGHT,
        LEAST=MIN_ENTROPY,
        num_warps=8,
    )
