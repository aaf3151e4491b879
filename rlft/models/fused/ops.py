"""The operations of a decoder layer without autograd: forward and backward write into buffers of the caller.

Shapes: T rows, H hidden size, M width of the MLP, R rotary columns, Hq query heads, Hk key heads, D head size; x is the
input of an operation, h = act(gate) * up or act(gate), q, k, v those of attention or of the delta rule, g its decay.

On a GPU these launch kernels. On a CPU (and for float64, which only tests use) the forward is the reference in the
kernel's file, and the backward runs PyTorch's autograd over that reference: slower, and exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlft.kernels import attention_backends as backends
from rlft.kernels import delta
from rlft.kernels.attention import Saved, Sequences, attention_backward, attention_forward, varlen_attention
from rlft.kernels.delta_chunks import Chunks, gated_delta_chunked
from rlft.kernels.qk_rope import qk_rope_backward, qk_rope_forward, qk_rope_reference
from rlft.kernels.rms_norm import LLAMA, rms_norm_backward, rms_norm_forward, rms_norm_reference
from rlft.kernels.short_conv import ConvRows, short_conv_backward, short_conv_forward, short_conv_reference
from rlft.kernels.swiglu import swiglu_backward, swiglu_forward, swiglu_reference
from rlft.upload import upload


class Norm(NamedTuple):
    """A frozen RMSNorm."""

    weight: Tensor
    eps: float
    style: int = LLAMA
    """How the weight is multiplied, see `rlft.kernels.rms_norm`."""


def _uses_kernel(x: Tensor) -> bool:
    """Return whether the kernels run this tensor."""
    return x.is_cuda and x.dtype != torch.float64


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `function(*inputs)` by autograd."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        # With zero rows the output may depend on no leaf.
        return torch.autograd.grad(function(*leaves), leaves, upstream, allow_unused=True, materialize_grads=True)


def norm_forward(
    x: Tensor, norm: Norm | None, out: Tensor, delta: Tensor | None = None, total: Tensor | None = None
) -> Tensor | None:
    """Compute out = norm(x), or with delta: total = x + delta, out = norm(total). All are [T, H], rows of any stride.

    norm: None: out = x, or total. Returns 1 / rms [T], which `norm_backward` takes; None on a CPU and without a norm.
    """
    if norm is None:
        out.copy_(x if delta is None else torch.add(x, delta, out=total))
        return None
    if _uses_kernel(x):
        return rms_norm_forward(x, norm.weight, norm.eps, norm.style, delta=delta, out=out, total_out=total)[1]
    if delta is not None:
        assert total is not None
        x = torch.add(x, delta, out=total)
    out.copy_(rms_norm_reference(x, norm.weight, norm.eps, norm.style))
    return None


def norm_backward(
    dy: Tensor, x: Tensor, norm: Norm | None, rstd: Tensor | None, residual: Tensor | None, out: Tensor
) -> Tensor:
    """Compute out = gradient of x, the norm's input, plus `residual`, which may be `out`."""
    if norm is None:
        return out.copy_(dy) if residual is None else torch.add(dy, residual, out=out)
    if _uses_kernel(x):
        assert rstd is not None
        return rms_norm_backward(dy, x, norm.weight, rstd, norm.style, dres=residual, dx_out=out)
    (dx,) = _gradients(lambda value: rms_norm_reference(value, norm.weight, norm.eps, norm.style), (x,), dy)
    return out.copy_(dx if residual is None else dx + residual)


def head_norm_forward(x: Tensor, norm: Norm) -> Tensor:
    """Return the norm over each head of x [T, Hk, D], whose rows may have a stride, in new memory."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    norm_forward(out.flatten(0, 1), norm, out.flatten(0, 1))
    return out


def head_norm_backward(dy: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """Return the gradient of x, the input of `head_norm_forward`, in new memory."""
    rows, out = x.flatten(0, 1), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = norm_forward(rows, norm, out.flatten(0, 1))
    norm_backward(dy.flatten(0, 1), rows, norm, rstd, None, out.flatten(0, 1))
    return out


class Rope(NamedTuple):
    """Rotary tables [T, R], one line per row, and the norms of q and k in families that have them."""

    cos: Tensor
    sin: Tensor
    q: Norm | None
    k: Norm | None
    whole: bool = False
    """The norms are over all heads together, before the kernel of the rotation; else over each head, in it."""
    interleaved: bool = False
    query_scale: Tensor | None = None
    """[T, 1], on q after the rotation."""
    after: bool = False
    """The norms over each head are of the rotated q and k."""

    def options(self) -> dict:
        """Return the keyword arguments of the kernels for the convention and the norms."""
        options: dict = {"interleaved": self.interleaved}
        if self.q is None or self.k is None or self.whole:
            return options
        assert (self.q.eps, self.q.style) == (self.k.eps, self.k.style)
        norms = {"q_weight": self.q.weight, "k_weight": self.k.weight, "eps": self.q.eps, "style": self.q.style}
        return options | norms | {"after": self.after}

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated q [T, Hq, D] and k [T, Hk, D]: in place without norms, else in new memory."""
        places = (q, k) if self.q is None else (q.new_empty(q.shape), k.new_empty(k.shape))
        if self.whole:
            for x, norm, place in zip((q, k), (self.q, self.k), places, strict=True):
                norm_forward(x.flatten(1), norm, place.flatten(1))
            q, k = places
        self._rotate(q, k, places)
        if self.query_scale is not None:
            places[0].mul_(self.query_scale[:, None])
        return places

    def forward_queries(self, q: Tensor) -> Tensor:
        """Return rotated q alone, in new memory, bit for bit that of `forward`; for norms over each head."""
        out = q.new_empty(q.shape)
        self._queries()._rotate(*_split(q), _split(out))
        return out if self.query_scale is None else out.mul_(self.query_scale[:, None])

    def _queries(self) -> Rope:
        """Return the operation for two groups of heads of q, since the kernels rotate two."""
        assert self.q is not None and not self.whole
        return self._replace(k=self.q)

    def _rotate(self, q: Tensor, k: Tensor, places: tuple[Tensor, Tensor]) -> None:
        """Write rotated q and k into `places`, which may be q and k."""
        if _uses_kernel(q):
            qk_rope_forward(q, k, self.cos, self.sin, **self.options(), q_out=places[0], k_out=places[1])
            return
        for place, rotated in zip(places, qk_rope_reference(q, k, self.cos, self.sin, **self.options()), strict=True):
            place.copy_(rotated)

    def backward(self, dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, rotated: tuple[Tensor, Tensor]) -> None:
        """Write the gradients of the forward's inputs over q and k; without norms q and k are not read.

        dq, dk: gradients of the forward's results `rotated`. dq may be overwritten, with norms over
        all heads dk and `rotated` too.
        """
        if self.query_scale is not None:
            dq.mul_(self.query_scale[:, None])
        if self.whole:
            self._rotate_back(dq, dk, dq, dk)
            for dx, x, norm, scratch in zip((dq, dk), (q, k), (self.q, self.k), rotated, strict=True):
                rstd = norm_forward(x.flatten(1), norm, scratch.flatten(1))
                norm_backward(dx.flatten(1), x.flatten(1), norm, rstd, None, x.flatten(1))
        else:
            self._rotate_back(dq, dk, q, k)

    def backward_queries(self, dq: Tensor, q: Tensor) -> None:
        """Write the gradient of q over it. dq: of the result of `forward_queries`; may be overwritten."""
        if self.query_scale is not None:
            dq.mul_(self.query_scale[:, None])
        self._queries()._rotate_back(*_split(dq), *_split(q))

    def _rotate_back(self, dq: Tensor, dk: Tensor, q: Tensor, k: Tensor) -> None:
        """Write the gradients of the rotation's inputs over q and k, which are read where it includes norms."""
        if _uses_kernel(dq):
            inputs = (q, k) if "q_weight" in self.options() else (None, None)
            qk_rope_backward(dq, dk, *inputs, self.cos, self.sin, **self.options(), dq=q, dk=k)
            return

        def rotate(q_leaf: Tensor, k_leaf: Tensor) -> Tensor:
            return torch.cat(qk_rope_reference(q_leaf, k_leaf, self.cos, self.sin, **self.options()), dim=1)

        for target, value in zip((q, k), _gradients(rotate, (q, k), torch.cat([dq, dk], dim=1)), strict=True):
            target.copy_(value)


def _split(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of all heads but the last, and of the last one."""
    return heads[:, :-1], heads[:, -1:]


class Activation(NamedTuple):
    """The activation of an MLP."""

    name: str
    """One of `rlft.kernels.swiglu.ACTIVATIONS`."""
    curve: Tensor | None = None
    """[4], of xIELU alone."""


def gate_forward(gate: Tensor, up: Tensor | None, activation: Activation, out: Tensor) -> None:
    """Compute out = act(gate) * up, or act(gate) without up; [T, M] each, rows of any stride."""
    if _uses_kernel(gate):
        swiglu_forward(gate, up, *activation, out=out)
    else:
        out.copy_(swiglu_reference(gate, up, *activation))


def gate_backward(dh: Tensor, gate: Tensor, up: Tensor | None, activation: Activation) -> None:
    """In place: turn dh into h, and gate and up into their gradients."""
    if _uses_kernel(dh):
        swiglu_backward(dh, gate, up, *activation, h_out=dh, dgate=gate, dup=up)
        return

    def reference(gate_leaf: Tensor, up_leaf: Tensor | None = None) -> Tensor:
        return swiglu_reference(gate_leaf, up_leaf, *activation)

    inputs = (gate,) if up is None else (gate, up)
    h = reference(*inputs)
    for target, value in zip((dh, *inputs), (h, *_gradients(reference, inputs, dh)), strict=True):
        target.copy_(value)


class Attention(NamedTuple):
    """Constants of one layer's attention."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None
    """[Hq]: a logit per query head in the denominator of its softmax."""

    def backend(self, q: Tensor) -> str:
        """Return the back end; "sdpa" and "plain" return no lse and run their forward again in the backward."""
        return backends.choose_backend(q.device, q.dtype, q.shape[-1], self.softcap)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Saved:
        """Return out [T, Hq, D] and lse [Hq, T]; lse is empty if the back end returns none."""
        backend = self.backend(q)
        if backend in ("fa4", "fa2"):
            return attention_forward(q, k, v, sequences, self.scale, backend, self.window, self.softcap, self.sinks)
        out = varlen_attention(q, k, v, sequences, self.scale, self.window, self.softcap, backend, self.sinks)
        return Saved(out, q.new_empty(0))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, sequences: Sequences
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv."""
        backend = self.backend(q)
        if backend in ("fa4", "fa2"):
            return attention_backward(dout, q, k, v, saved, sequences, self.scale, backend, self.window, self.softcap)

        def recompute(q_leaf: Tensor, k_leaf: Tensor, v_leaf: Tensor) -> Tensor:
            constants = (self.scale, self.window, self.softcap, backend, self.sinks)
            return varlen_attention(q_leaf, k_leaf, v_leaf, sequences, *constants)

        dq, dk, dv = _gradients(recompute, (q, k, v), dout)
        return dq, dk, dv


def sigmoid_gate_forward(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * sigmoid(gate), both [T, H, D]; gate of any strides."""
    return torch.sigmoid(gate).mul_(x)


def sigmoid_gate_backward(dy: Tensor, x: Tensor, gate: Tensor) -> None:
    """In place: turn dy into the gradient of x, and gate into its own."""
    sigmoid = torch.sigmoid(gate)
    gate.copy_(torch.ops.aten.sigmoid_backward(dy * x, sigmoid))
    dy.mul_(sigmoid)


class Places(NamedTuple):
    """Where the sequences of a pass are, for what runs along them."""

    cu_seqlens: Tensor
    """[S + 1], on the CPU."""
    prefix: Tensor
    """[S], likewise."""
    rows: ConvRows
    chunks: Chunks

    @classmethod
    def of(cls, sequences: Sequences) -> Places:
        """Build for a pass; the tables are on the device of the rows."""
        device, rows = sequences.cu_seqlens.device, sequences.bounds[-1]
        bounds, prefix = torch.tensor(sequences.bounds), torch.tensor(sequences.prefix)
        parents = upload(prefix.int(), device)
        return cls(bounds, prefix, ConvRows.of(sequences.cu_seqlens, parents, rows), Chunks.of(bounds, prefix, device))


class ShortConv(NamedTuple):
    """A frozen causal convolution of each channel."""

    weight: Tensor
    """[C, K]."""
    bias: Tensor | None
    activation: str | None

    def part(self, columns: slice) -> ShortConv:
        """Return the convolution of some of the channels."""
        return self._replace(weight=self.weight[columns], bias=None if self.bias is None else self.bias[columns])

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """Return y [T, C] of x [T, C], rows of any stride."""
        if _uses_kernel(x):
            return short_conv_forward(x, self.weight, self.bias, places.rows, self.activation)
        return self._reference(x, places)

    def backward(self, dy: Tensor, x: Tensor, places: Places) -> Tensor:
        """Return the gradient of x."""
        if _uses_kernel(x):
            return short_conv_backward(dy, x, self.weight, self.bias, places.rows, self.activation)
        return _gradients(lambda value: self._reference(value, places), (x,), dy)[0]

    def _reference(self, x: Tensor, places: Places) -> Tensor:
        return short_conv_reference(x, self.weight, self.bias, places.cu_seqlens, places.prefix, self.activation)


def delta_forward(inputs: Sequence[Tensor], places: Places, scale: float) -> Tensor:
    """Return o [T, Hv, Dv] of the gated delta rule. inputs: q, k, v, g, beta, see `rlft.kernels.delta`."""
    q, k, v, g, beta = inputs
    if _uses_kernel(q):
        return delta.delta_forward(q, k, v, g, beta, places.chunks, scale)[0]
    return gated_delta_chunked(q, k, v, g, beta, places.chunks, scale)


def delta_backward(dout: Tensor, inputs: Sequence[Tensor], places: Places, scale: float) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, g and beta. The states of the forward are computed again."""
    q, k, v, g, beta = inputs
    if _uses_kernel(dout):
        return delta.delta_backward(dout, q, k, v, g, beta, places.chunks, scale)

    def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return gated_delta_chunked(q, k, v, g, beta, places.chunks, scale)

    return _gradients(reference, inputs, dout)
