"""Move rows between tokens and experts: copy tokens to their sorted rows, and combine what the experts return.

With order and inverse of `rlft.kernels.route`, T tokens of k choices each, row p of the T k sorted ones:

    gather     out_p = x_{order_p // k},  times weight_{order_p} if there are weights
    combine    out_t = sum over j < k of weight_{t k + j} y_{inverse_{t k + j}},  plus residual_t
    row_dots   d_p = <a_p, b_p>

The backward of gather is combine without weights, of combine gather with weights, and of the weights row_dots. combine
has no atomics: each token reads its k rows in order of choice and sums them in fp32, so two runs are bitwise equal.
Bytes of 2-byte rows of H columns: gather 2 H per row and per token, combine the same, row_dots 4 H per row. x are rows
of tokens, y, a and b sorted rows; j counts the choices of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.launch import KERNEL_DTYPES, check_args, kernel, launch, on_gpu, power_of_2, tl

ELEMENTS, WARPS = 2048, 4
"""Elements of the tile of one program, and its warps: 16 bytes in flight per thread and row of 16-bit elements."""


def gather_reference(x: Tensor, order: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """Compute `gather` in plain PyTorch; differentiable."""
    rows = x.index_select(0, order // k)
    if weights is None:
        return rows
    wide = torch.promote_types(x.dtype, torch.float32)
    return (rows.to(wide) * weights.reshape(-1)[order.long()].to(wide)[:, None]).to(x.dtype)


def combine_reference(
    y: Tensor, inverse: Tensor, weights: Tensor | None, k: int, residual: Tensor | None = None
) -> Tensor:
    """Compute `combine` in plain PyTorch; differentiable."""
    wide = torch.promote_types(y.dtype, torch.float32)
    places = inverse.view(-1, k)
    total = torch.zeros(len(places), y.shape[1], dtype=wide, device=y.device)
    for choice in range(k):
        rows = y.index_select(0, places[:, choice]).to(wide)
        total += rows if weights is None else rows * weights[:, choice, None].to(wide)
    return (total if residual is None else total + residual.to(wide)).to(y.dtype)


def row_dots_reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute `row_dots` in plain PyTorch; differentiable."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(dim=1)


@kernel(varying=("T",))
def _gather(
    x,
    order,
    weights,
    out,
    T,
    x_stride,
    out_stride,
    CHOICES: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write ROWS of the T sorted rows, BLOCK columns of them."""
    PARTS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    rows = (program // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = (rows < T)[:, None] & (columns < H)
    choice = tl.load(order + rows, mask=rows < T, other=0)
    value = tl.load(x + (choice // CHOICES).to(tl.int64)[:, None] * x_stride + columns, mask=live, other=0.0)
    if weights is not None:
        weight = tl.load(weights + choice, mask=rows < T, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * out_stride + columns, value, mask=live)


@kernel(varying=("T",))
def _combine(
    y,
    inverse,
    weights,
    residual,
    out,
    T,
    y_stride,
    residual_stride,
    out_stride,
    CHOICES: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum the rows of ROWS of the T tokens, BLOCK columns of them."""
    PARTS: tl.constexpr = (H + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    tokens = (program // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = (tokens < T)[:, None] & (columns < H)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in tl.static_range(CHOICES):
        row = tl.load(inverse + tokens * CHOICES + j, mask=tokens < T, other=0).to(tl.int64)
        value = tl.load(y + row[:, None] * y_stride + columns, mask=live, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + tokens * CHOICES + j, mask=tokens < T, other=0.0).to(tl.float32)[:, None]
        total += value
    if residual is not None:
        total += tl.load(residual + tokens[:, None] * residual_stride + columns, mask=live, other=0.0).to(tl.float32)
    tl.store(out + tokens[:, None] * out_stride + columns, total.to(out.dtype.element_ty), mask=live)


@kernel(varying=("T",))
def _row_dots(a, b, out, T, a_stride, b_stride, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sum the products of ROWS of the T rows in fp32."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        live = (rows < T)[:, None] & (columns < H)
        left = tl.load(a + rows[:, None] * a_stride + columns, mask=live, other=0.0).to(tl.float32)
        right = tl.load(b + rows[:, None] * b_stride + columns, mask=live, other=0.0).to(tl.float32)
        total += left * right
    tl.store(out + rows, tl.sum(total, axis=1), mask=rows < T)


def _tile(columns: int) -> tuple[int, int, int]:
    """Return columns and rows of a program, and the number of programs for all columns."""
    block = min(1024, power_of_2(columns))
    return block, ELEMENTS // block, -(-columns // block)


def gather_launch(x: Tensor, order: Tensor, k: int, weights: Tensor | None, out: Tensor) -> Tensor:
    """Compute `gather` by the kernel."""
    rows, columns = out.shape
    if out.numel():
        block, together, parts = _tile(columns)
        grid = (-(-rows // together) * parts,)
        strides = rows, x.stride(0), out.stride(0)
        constants = {"CHOICES": k, "H": columns, "BLOCK": block, "ROWS": together, "num_warps": WARPS}
        launch(_gather, grid, x, order, weights, out, *strides, **constants)
    return out


def combine_launch(
    y: Tensor, inverse: Tensor, weights: Tensor | None, k: int, residual: Tensor | None, out: Tensor
) -> Tensor:
    """Compute `combine` by the kernel."""
    tokens, columns = out.shape
    if out.numel():
        block, together, parts = _tile(columns)
        grid = (-(-tokens // together) * parts,)
        strides = tokens, y.stride(0), 0 if residual is None else residual.stride(0), out.stride(0)
        constants = {"CHOICES": k, "H": columns, "BLOCK": block, "ROWS": together, "num_warps": WARPS}
        launch(_combine, grid, y, inverse, weights, residual, out, *strides, **constants)
    return out


def row_dots_launch(a: Tensor, b: Tensor) -> Tensor:
    """Compute `row_dots` by the kernel."""
    rows, columns = a.shape
    out = torch.zeros(rows, dtype=torch.float32, device=a.device)
    if a.numel():
        block, together, _ = _tile(columns)
        grid, constants = (-(-rows // together),), {"H": columns, "BLOCK": block, "ROWS": together, "num_warps": WARPS}
        launch(_row_dots, grid, a, b, out, rows, a.stride(0), b.stride(0), **constants)
    return out


def _adjacent(*tensors: Tensor | None) -> bool:
    """Return whether the columns of all rows are adjacent."""
    return all(tensor is None or tensor.stride(1) == 1 or tensor.shape[1] <= 1 for tensor in tensors)


def gather(x: Tensor, order: Tensor, k: int, weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Copy tokens to the sorted rows, [T k, H].

    x: [T, H]. order: [T k] int32 of `sort_by_expert`. k: choices per token. weights: [T, k] of a float dtype,
    contiguous, by which rows are multiplied in fp32, or None. out: [T k, H] to write to, or None. Rows of x and out may
    have any stride. Raises ValueError on shapes and dtypes that do not fit.
    """
    shape = order.numel(), x.shape[-1]
    check_args(
        "gather",
        x.dim() == 2
        and k >= 1
        and order.numel() == x.shape[0] * k
        and order.dtype == torch.int32
        and (weights is None or (tuple(weights.shape) == (x.shape[0], k) and weights.is_contiguous()))
        and (out is None or (tuple(out.shape) == shape and out.dtype == x.dtype))
        and _adjacent(x, out),
        f"x [T, H], order [T {k}] int32, weights [T, {k}] contiguous, out [T {k}, H] of x's dtype, unit column stride",
        x=x,
        order=order,
        weights=weights,
        out=out,
    )
    if on_gpu("gather", x=x, order=order, weights=weights, out=out):
        _kernel_dtype("gather", x)
        return gather_launch(x, order, k, weights, x.new_empty(shape) if out is None else out)
    rows = gather_reference(x, order, k, weights)
    return rows if out is None else out.copy_(rows)


def combine(
    y: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
    k: int | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum the rows of each token, [T, N]: weighted, in order of choice, in fp32, rounded once.

    y: [T k, N], sorted. inverse: [T k] int32 of `sort_by_expert`, or the same as [T, k]. weights: [T, k] of a float
    dtype, contiguous, or None. k: choices per token, needed where neither weights nor inverse has two dimensions.
    residual: [T, N] of y's dtype, added before rounding, or None. out: [T, N] to write to, may be residual, or None.
    Rows may have any stride. Raises ValueError on shapes and dtypes that do not fit.
    """
    two = weights if weights is not None else inverse if inverse.dim() == 2 else None
    choices = k if two is None else two.shape[1]
    inverse = inverse.reshape(-1)
    tokens = y.shape[0] // choices if choices else 0
    check_args(
        "combine",
        choices is not None
        and choices >= 1
        and k in (None, choices)
        and y.dim() == 2
        and inverse.numel() == y.shape[0] == tokens * choices
        and inverse.dtype == torch.int32
        and (weights is None or (tuple(weights.shape) == (tokens, choices) and weights.is_contiguous()))
        and all(
            rows is None or (tuple(rows.shape) == (tokens, y.shape[1]) and rows.dtype == y.dtype)
            for rows in (residual, out)
        )
        and _adjacent(y, residual, out),
        "y [T k, N], inverse [T k] or [T, k] int32, weights [T, k] contiguous or k, residual and out [T, N] of y's "
        "dtype, unit column stride",
        y=y,
        inverse=inverse,
        weights=weights,
        residual=residual,
        out=out,
    )
    assert choices
    if on_gpu("combine", y=y, inverse=inverse, weights=weights, residual=residual, out=out):
        _kernel_dtype("combine", y)
        target = y.new_empty(tokens, y.shape[1]) if out is None else out
        return combine_launch(y, inverse, weights, choices, residual, target)
    rows = combine_reference(y, inverse, weights, choices, residual)
    return rows if out is None else out.copy_(rows)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Compute the dot product of each row of a with that of b, [M] float32 (float64 of float64 on a CPU).

    a, b: [M, N] of one dtype, rows of any stride. With a the gradient of h and b = h, both sorted, this is the gradient
    of a routing weight that h was multiplied by, times the weight. Raises ValueError on shapes and dtypes that do not
    fit.
    """
    check_args(
        "row_dots",
        a.dim() == 2 and a.shape == b.shape and a.dtype == b.dtype and _adjacent(a, b),
        "a and b [M, N] of one dtype, unit column stride",
        a=a,
        b=b,
    )
    if on_gpu("row_dots", a=a, b=b):
        _kernel_dtype("row_dots", a)
        return row_dots_launch(a, b)
    return row_dots_reference(a, b)


def _kernel_dtype(op: str, tensor: Tensor) -> None:
    """Raise ValueError for a dtype that the kernels do not compute in."""
    check_args(op, tensor.dtype in KERNEL_DTYPES, "float32, bfloat16 or float16 on a GPU", rows=tensor)
