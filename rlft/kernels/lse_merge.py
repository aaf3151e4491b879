"""Merge two attentions of the same queries over different keys into one over all keys.

    lse = log(exp(lse_1) + exp(lse_2)),    out = a out_1 + b out_2,   a = exp(lse_1 - lse),   b = exp(lse_2 - lse)

An attention over no key has lse = -inf and contributes nothing. Bytes per token: out_1 and out_2 read, out written,
once.

Shapes: T tokens, H heads, D head size. In the kernel a and b are the two lse, x and y their exponentials relative to
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
