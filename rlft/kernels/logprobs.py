"""Compute log-prob and entropy of target tokens from hidden states, without storing all logits.

With z = scale * h W^T (softcap c: z <- c tanh(z / c)), y = z / temperature, p = softmax(y), t the target:

    logprob = y_t - logsumexp(y)                    entropy = logsumexp(y) - sum_v p_v y_v
    d logprob / d h = (scale / temperature) ((1 - p_t) f_t W_t - sum_{v != t} p_v f_v W_v)
    d entropy / d h = -(scale / temperature) sum_v p_v (log p_v + entropy) f_v W_v,    f = 1 (softcap: 1 - (z/c)^2)

With V = 152k and 8k rows the fp32 logits take 5.0 GB, so rows are processed in chunks of a byte budget. The forward of
a chunk also computes its Jacobian J [rows, H]: two matrix products with the frozen head in total (logits, J), and the
backward is one row-wise multiplication with the upstream gradient, in place over J. Without grad there is one product.
Saved for backward: J, N x H (twice that with `entropy_grad`). A trainable head takes a recomputation in the backward.

Logits are in max(fp32, dtype of h): bf16 logits alone are off by 2^-9 |z|, 0.06 nat at z = 30. `target_softmax.py`
turns a chunk of them into results and the exponentials E for the second product, in one pass without cancellation for
p_t near 1; the normalizing factor is applied to the [rows, H] result. Bytes per row in a chunk: 4 V written (logits),
4 V read, 2 V written (E), 2 V read; W is read twice per chunk. `entropy_grad` writes another E of the same logits over
the first and takes one more product: 4 V read, 2 V written, 2 V read, and W once more.

Shapes: N rows with a target, H hidden size, V vocabulary. In the kernels, a and b are the factors of W_t and E W, g the
upstream gradient, j an entry of J.

Sources: gradient in the forward over chunks as in Liger-Kernel (arXiv 2410.10989) and TRL's chunked head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.kernels.launch import check_args, kernel, launch, on_gpu, power_of_2, tl
from rlft.kernels.target_softmax import Rows, entropy_reference, launch_entropy, launch_rows, target_softmax_reference

CHUNK_BYTES = 448 * 2**20
"""Memory budget for the logits and exponentials of one chunk: 512 rows at V = 151,936 in bf16, 1,536 at V = 49,152."""


V_PART = 2048
"""Columns of the vocabulary per part, for products on a CPU that sum over it."""


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the formula with all logits in memory, differentiable by autograd. Arguments as `linear_logprobs`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = scale * (hidden.to(dtype) @ weight.to(dtype).T)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    # p = 0 contributes 0, not 0 * -inf.
    entropy = -torch.where(log_p > float("-inf"), log_p.exp() * log_p, 0).sum(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


def chunk_rows(vocab: int, dtype: torch.dtype, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return the rows per chunk: above 128 a multiple of 128, so that the matrix products fill their tiles."""
    rows = max(1, chunk_bytes // (vocab * (torch.promote_types(dtype, torch.float32).itemsize + dtype.itemsize)))
    return rows - rows % 128 if rows > 128 else rows


@kernel()
def _jacobian_kernel(product, picked, own, others, out, H, factor, p_stride, o_stride, BLOCK: tl.constexpr):
    """Compute out = factor (own W_t - others E W) of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < H
    a, b = tl.load(own + row) * factor, tl.load(others + row) * factor
    w_t = tl.load(picked + row * H + columns, mask=live).to(tl.float32)
    j = a * w_t - b * tl.load(product + row * p_stride + columns, mask=live)
    tl.store(out + row * o_stride + columns, j.to(out.dtype.element_ty), mask=live)


@kernel()
def _scale_rows_kernel(jacobian, upstream, out, H, BLOCK: tl.constexpr):
    """Compute out = upstream * jacobian of one row; with upstream 0 the row is 0 even if its Jacobian is not finite."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(upstream + row).to(tl.float32)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = columns < H
    j = tl.load(jacobian + row * H + columns, mask=live).to(tl.float32)
    tl.store(out + row * H + columns, tl.where(g == 0, 0.0, j * g).to(out.dtype.element_ty), mask=live)


def launch_jacobian(product: Tensor, picked: Tensor, rows_: Rows, factor: float, out: Tensor) -> None:
    """Compute out [rows, H] = factor (own W_t - others product). product: fp32 [rows, H]. picked: [rows, H], W_t of
    each row."""
    rows, width = out.shape
    block = min(1024, power_of_2(width))
    grid = (rows, -(-width // block))
    strides = (product.stride(0), out.stride(0))
    launch(_jacobian_kernel, grid, product, picked, rows_.own, rows_.others, out, width, factor, *strides, BLOCK=block)


def launch_scale_rows(jacobian: Tensor, upstream: Tensor, out: Tensor) -> None:
    """Compute out = jacobian * upstream per row; `out` may be `jacobian`. All are contiguous."""
    rows, width = jacobian.shape
    block = min(1024, power_of_2(width))
    launch(_scale_rows_kernel, (rows, -(-width // block)), jacobian, upstream, out, width, BLOCK=block)


# ---- the operation -----------------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out = a @ b with fp32 results of 16-bit operands. out: rows may have a stride."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _over_vocabulary(weights: Tensor, head: Tensor) -> Tensor:
    """Compute weights [rows, V] @ head [V, H] on a CPU, summed in parts of V.

    In a single product MKL adds all V terms sequentially if rows % 4 is not 0 and rows are few; the Jacobian, a
    difference of large sums, then had an error of 3e-4.
    """
    total = weights.new_zeros(weights.shape[0], head.shape[1])
    for part, rows in zip(weights.split(V_PART, 1), head.split(V_PART), strict=True):
        total += part @ rows  # addmm_ would extend one long sequential sum
    return total


class _Scratch:
    """Buffers for one chunk, reused by all chunks of a call. Rows are padded to 64 columns for the matrix products."""

    def __init__(self, rows: int, hidden: Tensor, weight: Tensor, grad: bool, workspace: Tensor | None) -> None:
        vocab, dtype = weight.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        wide = -(-vocab // 64) * 64
        free = None if workspace is None else workspace.view(torch.uint8)

        def empty(columns: int, kind: torch.dtype) -> Tensor:
            nonlocal free
            size = rows * columns * kind.itemsize
            if free is None or free.numel() < size:
                return hidden.new_empty(rows, columns, dtype=kind)
            part, free = free[:size], free[-(-size // 256) * 256 :]
            return part.view(kind).view(rows, columns)

        self.z = empty(wide, dtype)[:, :vocab]
        # On a GPU always: with one compiled kernel, log-probs are bitwise equal with and without gradient.
        self.weights = empty(wide, weight.dtype)[:, :vocab] if grad or hidden.is_cuda else None
        self.product = empty(weight.shape[1], dtype) if grad else None
        self.own, self.others = (hidden.new_empty(rows, dtype=dtype) for _ in range(2))
        """The fields of `Rows`, written by the kernels."""


def _logits(scratch: _Scratch, h: Tensor, weight: Tensor) -> Tensor:
    """Compute the logits of a chunk."""
    z = scratch.z[: h.shape[0]]
    _product(h if h.device.type == "cuda" else h.to(z.dtype), weight.T, z)
    return z


def _forward_chunk(
    scratch: _Scratch,
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: tuple[float, float | None, float],
    into: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> None:
    """Compute the results of one chunk.

    options: temperature, softcap, scale. into: views of the caller's tensors for log-probs and entropies, [rows], and
    for their Jacobians, [rows, H], or None.
    """
    z, rows, factor = _logits(scratch, h, weight), h.shape[0], options[2] / options[0]
    logprobs, entropy, by_logprob, by_entropy = into
    if z.device.type != "cuda":
        softmax = target_softmax_reference(z, targets, *options, by_logprob is not None)
        logprobs.copy_(softmax.logprob)
        entropy.copy_(softmax.entropy)
        if by_logprob is not None:
            by_logprob.copy_(_jacobian(softmax, weight, targets, factor))
        if by_entropy is not None:
            softmax = softmax._replace(weights=None)  # frees one chunk
            z = _logits(scratch, h, weight)
            by_entropy.copy_(_jacobian(entropy_reference(z, targets, softmax, *options), weight, targets, factor))
        return
    weights = None if scratch.weights is None else scratch.weights[:rows]
    # Results are written to their final place: with 128 rows or more a chunk is aligned, so no kernel is recompiled.
    softmax = launch_rows(z, targets, (logprobs, entropy, scratch.own[:rows], scratch.others[:rows]), weights, *options)
    if by_logprob is None:
        return
    assert weights is not None and scratch.product is not None
    product = scratch.product[:rows]
    # For a target outside the vocabulary logprob is nan already; any row of the head will do.
    picked = weight[targets.clamp(0, weight.shape[0] - 1)]
    _product(weights, weight, product)
    launch_jacobian(product, picked, softmax, factor, by_logprob)
    if by_entropy is not None:
        softmax = launch_entropy(z, targets, softmax, *options)
        _product(weights, weight, product)
        launch_jacobian(product, picked, softmax, factor, by_entropy)


def _jacobian(softmax: Rows, weight: Tensor, targets: Tensor, factor: float) -> Tensor:
    """Compute factor (own W_t - others E W), [rows, H], on a CPU."""
    assert softmax.weights is not None
    product = _over_vocabulary(softmax.weights, weight).mul_(softmax.others[:, None])
    return (weight[targets] * softmax.own[:, None]).sub_(product).mul_(factor)


class _LinearLogprobs(torch.autograd.Function):
    """Chunked forward that saves the Jacobians."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, options, rows, entropy_grad, grad, workspace):  # type: ignore[override]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # On a CPU 16-bit products are slow and round, so the head is cast once.
        head = weight if hidden.device.type == "cuda" else weight.to(dtype)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=dtype)
        entropy = torch.empty_like(logprobs)
        by_logprob = torch.empty_like(hidden) if grad else None
        by_entropy = torch.empty_like(hidden) if grad and entropy_grad else None
        scratch = _Scratch(min(rows, max(1, hidden.shape[0])), hidden, head, grad, workspace)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logprob_part, entropy_part = (
                None if jacobian is None else jacobian[part] for jacobian in (by_logprob, by_entropy)
            )
            into = (logprobs[part], entropy[part], logprob_part, entropy_part)
            _forward_chunk(scratch, hidden[part], head, targets[part], options, into)
        trained_head = weight.requires_grad and ctx.needs_input_grad[1]
        ctx.save_for_backward(*((hidden, weight, targets) if trained_head else ()))
        ctx.jacobians, ctx.options, ctx.rows = (by_logprob, by_entropy), options, rows
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        if ctx.jacobians is None:
            raise RuntimeError(
                "linear_logprobs: backward ran before, and turned its jacobian into the gradient in place"
            )
        by_logprob, by_entropy = ctx.jacobians
        if grad_logprobs.device.type == "cuda":
            ctx.jacobians = None
        grad_weight = None
        if ctx.saved_tensors:
            hidden, weight, targets = ctx.saved_tensors
            grad_weight = _head_gradient(hidden, weight, targets, ctx.options, ctx.rows, grad_logprobs, grad_entropy)
        grad = None
        if ctx.needs_input_grad[0]:
            grad = _scaled_rows(by_logprob, grad_logprobs)
            if by_entropy is not None:
                grad += _scaled_rows(by_entropy, grad_entropy)
        return grad, grad_weight, None, None, None, None, None, None


def _scaled_rows(jacobian: Tensor, upstream: Tensor) -> Tensor:
    """Compute upstream * jacobian per row; on a GPU in place."""
    if jacobian.device.type == "cuda":
        launch_scale_rows(jacobian, upstream.contiguous(), jacobian)
        return jacobian
    live = upstream != 0
    return torch.where(live[:, None], jacobian * upstream[:, None].to(jacobian.dtype), 0)


def _head_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: tuple[float, float | None, float],
    rows: int,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Return the gradient of a trainable head, [V, H] in its dtype: logits are recomputed, dz^T h is summed over chunks
    in fp32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        h, t = hidden[part].to(dtype), targets[part]
        z = h @ weight.to(dtype).T
        softmax = target_softmax_reference(z, t, *options, True)
        dz = _logit_gradient(softmax, t, grad_logprobs[part].to(dtype))
        if grad_entropy is not None:
            softmax = entropy_reference(
                torch.mm(h, weight.to(dtype).T, out=z), t, softmax._replace(weights=None), *options
            )
            dz += _logit_gradient(softmax, t, grad_entropy[part].to(dtype))
        total += torch.where((dz != 0).any(1, keepdim=True), dz, 0).T @ h
    return (total * (options[2] / options[0])).to(weight.dtype)


def _logit_gradient(softmax: Rows, targets: Tensor, upstream: Tensor) -> Tensor:
    """Write the gradient with respect to y, [rows, V], over the weights: upstream (own at the target, -others E
    elsewhere)."""
    assert softmax.weights is not None
    dz = softmax.weights.mul_((-softmax.others * upstream)[:, None])
    return dz.scatter_(1, targets[:, None], (softmax.own * upstream)[:, None])


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    entropy_grad: bool = False,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the log-prob of each target and the entropy of its distribution.

    hidden: [N, H] float, the rows that predict the targets (gather the trained rows first: no other row should reach
    the head). weight: [V, H], same dtype; frozen, or trainable at the price of a recomputation. targets: [N] int64 in
    [0, V); on a GPU one outside gives nan. temperature: the sampling temperature, above 0; required, since a log-prob
    at another temperature belongs to another distribution. softcap: c of c tanh(z / c), or None. scale: factor on the
    logits. chunk_bytes: memory for one chunk's logits and exponentials. entropy_grad: the entropy has a gradient too
    (one more product with the head, and twice the saved memory). workspace: contiguous memory, of any dtype, that the
    buffers of a chunk use as far as they fit; free again afterwards.

    Returns logprobs [N] and entropy [N], both in max(fp32, hidden.dtype). Deterministic. On a GPU the backward runs
    once. Raises ValueError on shapes, dtypes or devices that do not fit and on a temperature that is not positive.
    """
    op = "linear_logprobs"
    fits = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1:] == weight.shape[1:]
    fits = fits and targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
    wanted = "hidden [N, H] and weight [V, H] of one float dtype, targets [N] int64"
    same = hidden.dtype == weight.dtype and hidden.dtype.is_floating_point
    check_args(op, fits and same, wanted, hidden=hidden, weight=weight, targets=targets)
    on_gpu(op, hidden=hidden, weight=weight, targets=targets)
    if not temperature > 0:
        raise ValueError(f"{op}: temperature = {temperature}: want a number above 0")
    grad = torch.is_grad_enabled() and hidden.requires_grad
    hidden, weight = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (hidden, weight))
    rows = chunk_rows(weight.shape[0], hidden.dtype, chunk_bytes)
    options = (float(temperature), None if softcap is None else float(softcap), float(scale))
    return _LinearLogprobs.apply(hidden, weight, targets.contiguous(), options, rows, entropy_grad, grad, workspace)  # type: ignore[return-value]
