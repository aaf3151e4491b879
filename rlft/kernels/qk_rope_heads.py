"""The parts of the rotary kernels that process head vectors of q or of k; formulae in `rlft.kernels.qk_rope`.

T tokens, D head size, R rotated entries, STYLE of the norm, PAIRS: the interleaved convention, AFTER: the norm is of
the rotated vector, HALF = R / 2. In the kernels x is a head vector, 1 and 2 its two rotated parts, 3 what
passes, n the norm's input or output, d the gradient of the result, g of n.
"""

from __future__ import annotations

from rlft.kernels.launch import jit, tl
from rlft.kernels.rms_norm import times_weight


@jit
def _table(cos_ptr, sin_ptr, pos_ptr, token, live, stride_table, cols, HALF: tl.constexpr):
    """Load cos and sin [ROWS, BLOCK] in fp32 for each row's token."""
    line = token.to(tl.int64)
    if pos_ptr is not None:
        line = tl.load(pos_ptr + token, mask=live, other=0).to(tl.int64)
    at = (line * stride_table)[:, None] + cols
    mask = live[:, None] & (cols < HALF)
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)


@jit
def _places(
    row, T, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Return where head vectors are: token, first column and whether it exists, of each row; columns of the tables, of
    both rotated parts and of the entries that pass, and the masks of the parts and of those."""
    HALF: tl.constexpr = R // 2
    live = row < T * HEADS
    token = row // HEADS
    head = (row % HEADS) * D
    cols = tl.arange(0, BLOCK)[None, :]
    first = cols * 2 if PAIRS else cols
    second = first + 1 if PAIRS else HALF + cols
    tail = R + tl.arange(0, TAIL)[None, :]
    mask = live[:, None] & (cols < HALF)
    tail_mask = live[:, None] & (tail < D)
    return token, head, live, cols, first, second, tail, mask, tail_mask


@jit
def forward_heads(
    program, x_ptr, w_ptr, out_ptr, cos_ptr, sin_ptr, pos_ptr, T, stride_x, stride_out, stride_table, eps,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STYLE: tl.constexpr, PAIRS: tl.constexpr,
    AFTER: tl.constexpr,
):  # fmt: skip
    """Process ROWS head vectors of q or of k; a row is one head of one token."""
    HALF: tl.constexpr = R // 2
    row = program * ROWS + tl.arange(0, ROWS)
    places = _places(row, T, HEADS, D, R, BLOCK, TAIL, PAIRS)
    token, head, live, cols, first, second, tail, mask, tail_mask = places
    x = x_ptr + (token.to(tl.int64) * stride_x + head)[:, None]
    n1 = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
    n2 = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
    if R < D:
        n3 = tl.load(x + tail, mask=tail_mask, other=0.0).to(tl.float32)
    if AFTER:
        cos, sin = _table(cos_ptr, sin_ptr, pos_ptr, token, live, stride_table, cols, HALF)
        turned = n1 * cos - n2 * sin
        n2 = n2 * cos + n1 * sin
        n1 = turned
    if w_ptr is not None:
        squares = tl.sum(n1 * n1 + n2 * n2, axis=1)
        if R < D:
            squares += tl.sum(n3 * n3, axis=1)
        rstd = tl.rsqrt(squares * (1.0 / D) + eps)[:, None]
        w1 = tl.load(w_ptr + first, mask=cols < HALF, other=0.0).to(tl.float32)
        w2 = tl.load(w_ptr + second, mask=cols < HALF, other=0.0).to(tl.float32)
        n1 = times_weight(n1 * rstd, w1, out_ptr, STYLE).to(out_ptr.dtype.element_ty).to(tl.float32)
        n2 = times_weight(n2 * rstd, w2, out_ptr, STYLE).to(out_ptr.dtype.element_ty).to(tl.float32)
        if R < D:
            w3 = tl.load(w_ptr + tail, mask=tail < D, other=0.0).to(tl.float32)
            n3 = times_weight(n3 * rstd, w3, out_ptr, STYLE)
    if not AFTER:
        cos, sin = _table(cos_ptr, sin_ptr, pos_ptr, token, live, stride_table, cols, HALF)
    out = out_ptr + (token.to(tl.int64) * stride_out + head)[:, None]
    if AFTER:
        tl.store(out + first, n1, mask=mask)
        tl.store(out + second, n2, mask=mask)
    else:
        tl.store(out + first, n1 * cos - n2 * sin, mask=mask)
        tl.store(out + second, n2 * cos + n1 * sin, mask=mask)
    if R < D:
        tl.store(out + tail, n3, mask=tail_mask)


@jit
def backward_heads(
    program, dout_ptr, x_ptr, w_ptr, dx_ptr, cos_ptr, sin_ptr, pos_ptr,
    T, stride_dout, stride_x, stride_dx, stride_table, eps,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STYLE: tl.constexpr, PAIRS: tl.constexpr,
    AFTER: tl.constexpr,
):  # fmt: skip
    """Process ROWS head vectors of dq or of dk, as `forward_heads`."""
    HALF: tl.constexpr = R // 2
    row = program * ROWS + tl.arange(0, ROWS)
    places = _places(row, T, HEADS, D, R, BLOCK, TAIL, PAIRS)
    token, head, live, cols, first, second, tail, mask, tail_mask = places
    dout = dout_ptr + (token.to(tl.int64) * stride_dout + head)[:, None]
    d1 = tl.load(dout + first, mask=mask, other=0.0).to(tl.float32)
    d2 = tl.load(dout + second, mask=mask, other=0.0).to(tl.float32)
    cos, sin = _table(cos_ptr, sin_ptr, pos_ptr, token, live, stride_table, cols, HALF)
    if AFTER:
        g1 = d1
        g2 = d2
    else:
        g1 = d1 * cos + d2 * sin
        g2 = d2 * cos - d1 * sin
    if R < D:
        g3 = tl.load(dout + tail, mask=tail_mask, other=0.0).to(tl.float32)
    if w_ptr is not None:
        x = x_ptr + (token.to(tl.int64) * stride_x + head)[:, None]
        n1 = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
        n2 = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
        if AFTER:
            turned = n1 * cos - n2 * sin
            n2 = n2 * cos + n1 * sin
            n1 = turned
        ONE = 1.0 if STYLE == 1 else 0.0
        g1 *= tl.load(w_ptr + first, mask=cols < HALF, other=0.0).to(tl.float32) + ONE
        g2 *= tl.load(w_ptr + second, mask=cols < HALF, other=0.0).to(tl.float32) + ONE
        squares = tl.sum(n1 * n1 + n2 * n2, axis=1)
        along = tl.sum(n1 * g1 + n2 * g2, axis=1)
        if R < D:
            n3 = tl.load(x + tail, mask=tail_mask, other=0.0).to(tl.float32)
            g3 *= tl.load(w_ptr + tail, mask=tail < D, other=0.0).to(tl.float32) + ONE
            squares += tl.sum(n3 * n3, axis=1)
            along += tl.sum(n3 * g3, axis=1)
        rstd = tl.rsqrt(squares * (1.0 / D) + eps)
        # n holds the norm's input here, so the mean of (x rstd) g is rstd times the mean of x g.
        along = (rstd * rstd * along * (1.0 / D))[:, None]
        rstd = rstd[:, None]
        g1 = rstd * (g1 - n1 * along)
        g2 = rstd * (g2 - n2 * along)
        if R < D:
            g3 = rstd * (g3 - n3 * along)
    if AFTER:
        back = g1 * cos + g2 * sin
        g2 = g2 * cos - g1 * sin
        g1 = back
    dx = dx_ptr + (token.to(tl.int64) * stride_dx + head)[:, None]
    tl.store(dx + first, g1, mask=mask)
    tl.store(dx + second, g2, mask=mask)
    if R < D:
        tl.store(dx + tail, g3, mask=tail_mask)
