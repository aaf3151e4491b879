"""Log-probability and entropy of target tokens straight from hidden states, without ever storing the logits.

With z = scale * h W^T (softcap c: z <- c tanh(z / c)), y = z / temperature, p = softmax(y):

    logprob = y_t - logsumexp(y)                    entropy = logsumexp(y) - sum_v p_v y_v
    d logprob / d h = (scale / temperature) * ((onehot_t - p) * f) W,    f = 1 (softcap: 1 - (z/c)^2)

At V = 152k and T = 8k the fp32 logits are 5.0 GB, so rows go through in chunks from a byte budget, and the forward of
a chunk already makes its jacobian J [rows, H]: two matrix products with the frozen head in all (logits, J), and the
backward is one row-wise multiply with the upstream gradient. What is kept for backward is J, N x H. Without grad one
product. Logits, softmax and J are computed in max(fp32, dtype of h): bf16 logits alone are off by 2^-9 |z|, 0.06 nat
at z = 30. The one-hot is subtracted outside the product, where 1 - p does not cancel for p near 1 (the common case in
RL).

Sources: grad-in-forward over chunks as in Liger-Kernel (arXiv 2410.10989) and TRL's chunked head.
Bytes: reads W twice per chunk, reads h and writes J once, and moves 4 V bytes per row a few times inside the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""Budget for the fp32 logits of one chunk: 1,365 rows at V = 49,152, 441 at V = 151,936."""


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The formula with the whole logits in memory, differentiable by autograd. Arguments as `linear_logprobs`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = scale * (hidden.to(dtype) @ weight.to(dtype).T)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    # p = 0 contributes 0, not 0 * -inf.
    entropy = -torch.where(log_p > float("-inf"), log_p.exp() * log_p, 0).sum(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


def _chunk(
    h: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None, scale: float, jacobian: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-prob [rows], entropy [rows] and, if asked, J [rows, H] of one chunk, in the dtype of h."""
    y = h @ weight.T
    y *= scale / temperature
    rows = targets[:, None]
    if softcap is not None:
        y = y.mul_(temperature / softcap).tanh_()
        slope_p, slope_t = 1 - y * y, 1 - y.gather(1, rows) ** 2
        y = y * (softcap / temperature)
    lse = torch.logsumexp(y, dim=-1, keepdim=True)
    logprob = (y.gather(1, rows) - lse).squeeze(1)
    p = (y - lse).exp_()
    entropy = lse.squeeze(1) - torch.einsum("nv,nv->n", p, y)
    if not jacobian:
        return logprob, entropy, None
    picked = weight[targets]
    if softcap is not None:
        p, picked = p * slope_p, picked * slope_t
    return logprob, entropy, (picked - p @ weight) * (scale / temperature)


class _LinearLogprobs(torch.autograd.Function):
    """Chunked forward that keeps the jacobian; the entropy carries no gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap, scale, rows):  # type: ignore[override]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = weight.to(dtype)
        grad = hidden.requires_grad
        logprobs = hidden.new_empty(hidden.shape[0], dtype=dtype)
        entropy = torch.empty_like(logprobs)
        jacobian = torch.empty_like(hidden) if grad else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            lp, ent, jac = _chunk(hidden[part].to(dtype), wide, targets[part], temperature, softcap, scale, grad)
            logprobs[part], entropy[part] = lp, ent
            if jacobian is not None and jac is not None:
                jacobian[part] = jac
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _grad_entropy):  # type: ignore[override]
        (jacobian,) = ctx.saved_tensors
        # A row with zero upstream gradient stays zero even where its jacobian is not finite.
        live = grad_logprobs != 0
        grad = torch.where(live[:, None], jacobian * grad_logprobs[:, None].to(jacobian.dtype), 0)
        return grad, None, None, None, None, None, None


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None = None,
    scale: float = 1.0, chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability of each target and entropy of its distribution.

    hidden: [N, H] float, the rows that predict the targets (gather the trained rows first: no other row should reach
    the head). weight: [V, H] float, frozen. targets: [N] int64 in [0, V). temperature: the sampling temperature, above
    0; required, because a log-prob at another temperature than the sampler's is of another distribution.
    softcap: c of c tanh(z / c), or None. scale: factor on the logits. chunk_bytes: memory for one chunk's logits.
    Returns logprobs [N] with gradient to hidden and entropy [N] without, both in max(fp32, hidden.dtype).
    Raises ValueError on shapes that do not fit, a temperature that is not positive, or a head that wants a gradient.
    """
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            f"linear_logprobs: want hidden [N, H], weight [V, H], targets [N]; "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"linear_logprobs: temperature = {temperature}: want a number above 0")
    if weight.requires_grad:
        raise ValueError("linear_logprobs: weight.requires_grad is True: the head is frozen here")
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    return _LinearLogprobs.apply(hidden, weight, targets, float(temperature), softcap, scale, rows)  # type: ignore[return-value]
