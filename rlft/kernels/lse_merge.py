"""Merge two attentions of the same queries over different keys into one over all keys.

    lse = log(exp(lse_1) + exp(lse_2)),    out = a out_1 + b out_2,   a = exp(lse_1 - lse),   b = exp(lse_2 - lse)

An attention over no key has lse = -inf and contributes nothing. Bytes per token: out_1 and out_2 read, out written,
once.

Attention sinks are the second attention of a simpler kernel: out_2 = 0, and lse_2 is a logit per head. Bytes per token:
out read and written once.

Shapes: T tokens, H heads, D head size. In the kernels a and b are the two lse, x and y their exponentials relative to
the larger one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.launch import kernel, launch, on_gpu, power_of_2, tl


def merge_reference(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Return out [T, H, D] and lse [H, T] of both attentions, whose arguments have the same shapes."""
    lse = torch.logaddexp(lse_1, lse_2)
    a, b = (torch.where(x == float("-inf"), 0, (x - lse).exp()).T[..., None] for x in (lse_1, lse_2))
    return (a * out_1 + b * out_2).to(out_1.dtype), lse


@kernel(varying=("head_1", "head_2"))
def _merge_kernel(out_1, lse_1, out_2, lse_2, H, D, row_1, row_2, head_1, head_2, BLOCK: tl.constexpr):
    """Merge one token of one head; out_1 and lse_1 are overwritten."""
    pid = tl.program_id(0)
    token, head = (pid // H).to(tl.int64), pid % H
    a, b = tl.load(lse_1 + head * head_1 + token), tl.load(lse_2 + head * head_2 + token)
    top = tl.maximum(a, b)
    # If neither side has a key, the exponents below would be -inf - -inf.
    safe = tl.where(top == float("-inf"), 0.0, top)
    x, y = tl.exp(a - safe), tl.exp(b - safe)
    total = tl.where(x + y == 0, 1.0, x + y)
    columns = tl.arange(0, BLOCK)
    live = columns < D
    first = out_1 + token * row_1 + head * D + columns
    one = tl.load(first, mask=live, other=0.0).to(tl.float32)
    two = tl.load(out_2 + token * row_2 + head * D + columns, mask=live, other=0.0).to(tl.float32)
    tl.store(first, ((x * one + y * two) / total).to(out_1.dtype.element_ty), mask=live)
    tl.store(lse_1 + head * head_1 + token, tl.where(x + y == 0, float("-inf"), safe + tl.log(total)))


def launch_merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> None:
    """Run `merge` by the kernel. out: [T, H, D] with D contiguous and heads adjacent; lse: [H, T], T contiguous."""
    tokens, heads, dim = out_1.shape
    if tokens:
        launch(
            _merge_kernel,
            (tokens * heads,),
            out_1,
            lse_1,
            out_2,
            lse_2,
            heads,
            dim,
            out_1.stride(0),
            out_2.stride(0),
            lse_1.stride(0),
            lse_2.stride(0),
            BLOCK=power_of_2(dim),
            num_warps=1,
        )


def merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> None:
    """Merge the second attention into the first, in place. out: [T, H, D]. lse: [H, T] fp32."""
    if on_gpu("merge", out_1=out_1, lse_1=lse_1, out_2=out_2, lse_2=lse_2):
        launch_merge(out_1, lse_1, out_2, lse_2)
    else:
        out, lse = merge_reference(out_1, lse_1, out_2, lse_2)
        out_1.copy_(out)
        lse_1.copy_(lse)


def add_sinks_reference(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return out [T, H, D] and lse [H, T] with one more key of logit `sinks` [H] and value 0."""
    return merge_reference(out, lse, torch.zeros_like(out), sinks.to(lse.dtype)[:, None].expand_as(lse))


@kernel(varying=("T", "stride_head"))
def _sinks_kernel(out, lse, sinks, T, H, D, stride_row, stride_head, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Overwrite ROWS head vectors of `out`, and their lse; a row is one head of one token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < T * H
    token, head = row // H, row % H
    at = lse + head.to(tl.int64) * stride_head + token
    a = tl.load(at, mask=live, other=0.0)
    b = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
    top = tl.maximum(a, b)
    # With neither a key nor a sink the exponents below would be -inf - -inf.
    safe = tl.where(top == float("-inf"), 0.0, top)
    x, y = tl.exp(a - safe), tl.exp(b - safe)
    total = tl.where(x + y == 0, 1.0, x + y)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (columns < D)
    place = out + (token.to(tl.int64) * stride_row + head * D)[:, None] + columns
    values = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, values * (x / total)[:, None], mask=mask)
    tl.store(at, tl.where(x + y == 0, float("-inf"), safe + tl.log(total)), mask=live)


def launch_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Run `add_sinks` by the kernel. out: [T, H, D] with D contiguous and heads adjacent; lse: [H, T], T contiguous."""
    tokens, heads, dim = out.shape
    block = power_of_2(dim)
    # As many elements per program as in qk_rope.
    rows = max(4, 2048 // block)
    if tokens:
        launch(
            _sinks_kernel,
            (-(-tokens * heads // rows),),
            out,
            lse,
            sinks,
            tokens,
            heads,
            dim,
            out.stride(0),
            lse.stride(0),
            BLOCK=block,
            ROWS=rows,
            num_warps=4,
        )


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Add sinks to an attention, in place. out: [T, H, D]. lse: [H, T] fp32. sinks: [H], any floating dtype.

    A row must have all its keys in `lse` before, since its sink counts once.
    """
    if on_gpu("add_sinks", out=out, lse=lse, sinks=sinks):
        launch_sinks(out, lse, sinks)
    else:
        with_sinks, total = add_sinks_reference(out, lse, sinks)
        out.copy_(with_sinks)
        lse.copy_(total)
