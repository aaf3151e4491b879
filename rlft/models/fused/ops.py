"""A decoder layer's operations without autograd: raw forward and raw backward, into buffers of the caller's.

On a GPU these are the kernels' launches. On a CPU (and for float64, which only tests use) the forward is the kernel
file's reference, and the backward runs PyTorch's autograd over that reference again: slower, and exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlft.kernels import attention_backends as backends
from rlft.kernels.attention import Saved, Sequences, attention_backward, attention_forward, varlen_attention
from rlft.kernels.qk_rope import qk_rope_backward, qk_rope_forward, qk_rope_reference
from rlft.kernels.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference
from rlft.kernels.swiglu import swiglu_backward, swiglu_forward, swiglu_reference


class Norm(NamedTuple):
    """A frozen RMSNorm."""

    weight: Tensor
    eps: float
    gemma: bool = False


def _kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` by PyTorch."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        # Without rows nothing may depend on a leaf.
        return torch.autograd.grad(function(*leaves), leaves, upstream, allow_unused=True, materialize_grads=True)


def norm_forward(
    x: Tensor, norm: Norm, out: Tensor, delta: Tensor | None = None, total: Tensor | None = None
) -> Tensor | None:
    """out = norm(x), or with delta: total = x + delta, out = norm(total). All [T, H], rows of any stride.

    Returns 1 / rms [T], which `norm_backward` takes back; None on a CPU.
    """
    if _kernel(x):
        return rms_norm_forward(x, norm.weight, norm.eps, norm.gemma, delta=delta, out=out, total_out=total)[1]
    if delta is not None:
        assert total is not None
        x = torch.add(x, delta, out=total)
    out.copy_(rms_norm_reference(x, norm.weight, norm.eps, norm.gemma))
    return None


def norm_backward(
    dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor | None, residual: Tensor | None, out: Tensor
) -> Tensor:
    """out = gradient of x (what the norm read), plus `residual`, which may be `out`."""
    if _kernel(x):
        assert rstd is not None
        return rms_norm_backward(dy, x, norm.weight, rstd, norm.gemma, dres=residual, dx_out=out)
    (dx,) = _gradients(lambda t: rms_norm_reference(t, norm.weight, norm.eps, norm.gemma), (x,), dy)
    return out.copy_(dx if residual is None else dx + residual)


class Rope(NamedTuple):
    """Rotary tables [T, R], a line per row, and the norms of q and k where the family has them."""

    cos: Tensor
    sin: Tensor
    q: Norm | None
    k: Norm | None

    def options(self) -> dict:
        """As the kernels take the norms."""
        if self.q is None or self.k is None:
            return {}
        assert (self.q.eps, self.q.gemma) == (self.k.eps, self.k.gemma)
        return {"q_weight": self.q.weight, "k_weight": self.k.weight, "eps": self.q.eps, "gemma": self.q.gemma}

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated q [T, Hq, D] and k [T, Hk, D]: in place without norms, else in new memory."""
        places = (q, k) if self.q is None else (q.new_empty(q.shape), k.new_empty(k.shape))
        if _kernel(q):
            return qk_rope_forward(q, k, self.cos, self.sin, **self.options(), q_out=places[0], k_out=places[1])
        made = qk_rope_reference(q, k, self.cos, self.sin, **self.options())
        return places[0].copy_(made[0]), places[1].copy_(made[1])

    def backward(self, dq: Tensor, dk: Tensor, q: Tensor, k: Tensor) -> None:
        """The gradients of what the forward read, written over q and k; without norms these are not read."""
        if _kernel(dq):
            kept = (q, k) if self.q is not None else (None, None)
            qk_rope_backward(dq, dk, *kept, self.cos, self.sin, **self.options(), dq=q, dk=k)
            return

        def joined(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat(qk_rope_reference(a, b, self.cos, self.sin, **self.options()), dim=1)

        for into, value in zip((q, k), _gradients(joined, (q, k), torch.cat([dq, dk], dim=1)), strict=True):
            into.copy_(value)


def gate_forward(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    """out = act(gate) * up, [T, M] each, rows of any stride."""
    if _kernel(gate):
        swiglu_forward(gate, up, activation, out=out)
    else:
        out.copy_(swiglu_reference(gate, up, activation))


def gate_backward(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """In place: dh becomes h, gate and up become their gradients."""
    if _kernel(dh):
        swiglu_backward(dh, gate, up, activation, h_out=dh, dgate=gate, dup=up)
        return
    h = swiglu_reference(gate, up, activation)
    grads = _gradients(lambda g, u: swiglu_reference(g, u, activation), (gate, up), dh)
    for into, value in zip((dh, gate, up), (h, *grads), strict=True):
        into.copy_(value)


class Attention(NamedTuple):
    """Constants of one layer's attention."""

    scale: float
    window: int | None
    softcap: float | None

    def backend(self, q: Tensor) -> str:
        """Which back end runs; "sdpa" and "plain" keep no lse and run again in the backward."""
        return backends.choose_backend(q.device, q.dtype, q.shape[-1], self.softcap)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Saved:
        """out [T, Hq, D] and lse [Hq, T]; lse is empty where the back end gives none."""
        backend = self.backend(q)
        if backend in ("fa4", "fa2"):
            return attention_forward(q, k, v, sequences, self.scale, backend, self.window, self.softcap)
        out = varlen_attention(q, k, v, sequences, self.scale, self.window, self.softcap, backend)
        return Saved(out, q.new_empty(0))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, sequences: Sequences
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""
        backend = self.backend(q)
        if backend in ("fa4", "fa2"):
            return attention_backward(dout, q, k, v, saved, sequences, self.scale, backend, self.window, self.softcap)

        def again(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return varlen_attention(a, b, c, sequences, self.scale, self.window, self.softcap, backend)

        dq, dk, dv = _gradients(again, (q, k, v), dout)
        return dq, dk, dv
