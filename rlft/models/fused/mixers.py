"""What mixes the tokens of a layer in place of attention: a gated DeltaNet, or a gated short convolution.

A mixer reads the buffer [T, Y + tail] that its input was projected to, and its backward overwrites that buffer with its
gradient. What it saves in place of attention's output is `out`; the rest is computed again from the buffer.

Names and shapes: T rows, t rows of a tile, H hidden size, Y columns of the buffer; of a DeltaNet, Hk and Hv heads of q
and k and of v, Dk and Dv their sizes, C = 2 Hk Dk + Hv Dv channels of its convolution, K its taps, z, b and a the
columns of the gate, of beta and of the decay, g the logarithm of the decay, n a norm's output; of a gated convolution,
the columns B, C and u. x is the input of a convolution, e the bytes of an activation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlft.kernels.attention import Saved
from rlft.kernels.delta import MAX_D
from rlft.kernels.delta_chunks import CHUNK
from rlft.kernels.short_conv import MAX_K
from rlft.models.families import Conv, Delta
from rlft.models.fused import ops
from rlft.models.fused.mixer_shape import MixerShape

SILU = ops.Activation("silu")


class DeltaMixer:
    """A gated DeltaNet, as views of its modules' tensors."""

    title = "gated DeltaNet"
    finishes = True
    """What the output projection reads is computed from `out` and the buffer."""

    def __init__(self, layer: nn.Module, delta: Delta, norm: ops.Norm, config: Any) -> None:
        """Read constants and weights. norm: of the output. Raises ValueError for what no kernel computes."""
        block: Any = layer.get_submodule(delta.conv.rpartition(".")[0])
        self.q_heads, self.v_heads = block.num_k_heads, block.num_v_heads
        self.q_dim, self.v_dim = block.head_k_dim, block.head_v_dim
        self.q, self.width = self.q_heads * self.q_dim, self.v_heads * self.v_dim
        """Columns of q, and of what is projected next."""
        self.channels = 2 * self.q + self.width
        self.columns = self.channels + self.width + 2 * self.v_heads
        self.order = self._by_head().to(block.A_log.device) if delta.by_head else None
        """Where each column of the buffer is among what was projected; None: in its place."""
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act is {config.hidden_act}, and the convolution before the delta rule has silu")
        if max(self.q_dim, self.v_dim) > MAX_D:
            raise ValueError(f"heads of {max(self.q_dim, self.v_dim)} in the delta rule")
        self.norm, self.conv = norm, _convolution(layer.get_submodule(delta.conv), "silu")
        self.scale = self.q_dim**-0.5
        doubles = delta.double_beta is not None and getattr(config, delta.double_beta)
        self.most = 2.0 if doubles else 1.0
        """Upper bound of beta."""
        # g and beta are computed in the wide dtype, as in transformers.
        wide = torch.promote_types(block.A_log.dtype, torch.float32)
        self.rate, self.bias = -block.A_log.detach().to(wide).exp(), block.dt_bias.detach().to(wide)

    def sizes(self, element: int) -> MixerShape:
        """Return what the memory plan is computed from. element: bytes of an activation."""
        e, key, value, Hk, Hv = element, self.q, self.width, self.q_heads, self.v_heads
        mixed, decays = e * self.channels, 8 * Hv
        prepared, state = 4 * Hv + 8 * Hk, Hv * self.q_dim * self.v_dim
        # Per row of a chunk: M and the state before it.
        inverse, states = e * Hv * CHUNK, e * state // CHUNK
        forward = mixed + decays + prepared + e * value
        # n, dr, dv, do; dq and dk in fp32 and rounded; parts of dg and dbeta, and these.
        parts = -(-self.q_dim // 64) + 1
        backward = mixed + decays + prepared + 4 * e * value + 2 * (4 + e) * key + 8 * Hv * parts + 8 * Hv
        ordered = 0 if self.order is None else e * self.columns
        return MixerShape(
            columns=self.columns,
            forward=forward + ordered,
            backward=backward + ordered,
            forward_chunks=inverse + states,
            # Three tables of products more, and the gradients of the states.
            backward_chunks=4 * inverse + 2 * states,
            state=4 * state,
            finishes=True,
        )

    def forward(self, projected: Tensor, places: ops.Places) -> Saved:
        """Return out [T, Hv, Dv]."""
        projected = self._ordered(projected)
        mixed = self.conv.forward(projected[:, : self.channels], places)
        out = ops.delta_forward(self._inputs(mixed, projected), places, self.scale)
        return Saved(out, out.new_empty(0))

    def finish(self, out: Tensor, projected: Tensor) -> Tensor:
        """Return norm(out) * silu(z), [t, Hv Dv], of some rows."""
        n = torch.empty_like(out)
        ops.norm_forward(out.flatten(0, 1), self.norm, n.flatten(0, 1))
        n = n.flatten(1)
        z = self._gate(projected)
        if self.order is not None:
            z = projected.index_select(1, self.order[self.channels : self.channels + self.width])
        ops.gate_forward(z, n, SILU, n)
        return n

    def backward(self, dfinished: Tensor, projected: Tensor, saved: Saved, places: ops.Places) -> None:
        """Overwrite projected with its gradient, and dfinished [T, Hv Dv]."""
        ordered = self._ordered(projected)
        self._backward(dfinished, ordered, saved, places)
        if self.order is not None:
            projected.index_copy_(1, self.order, ordered)

    def _by_head(self) -> Tensor:
        """Return the places of all columns where they lie by key head, [Y]."""
        Hk, first = self.q_heads, 2 * self.q + 2 * self.width
        values, betas = self.width // Hk, self.v_heads // Hk
        qkvz = torch.arange(first).view(Hk, -1).split([self.q_dim, self.q_dim, values, values], dim=1)
        ba = (first + torch.arange(2 * self.v_heads)).view(Hk, -1).split([betas, betas], dim=1)
        return torch.cat([part.flatten() for part in (*qkvz, *ba)])

    def _ordered(self, projected: Tensor) -> Tensor:
        """Return what was projected with the columns of q, k, v, z, b and a side by side; a copy where they are not."""
        return projected if self.order is None else projected.index_select(1, self.order)

    def _backward(self, dfinished: Tensor, projected: Tensor, saved: Saved, places: ops.Places) -> None:
        """Overwrite ordered columns with their gradients."""
        dout = self._through_gate(dfinished, projected, saved.out)
        mixed = self.conv.forward(projected[:, : self.channels], places)
        inputs = self._inputs(mixed, projected)
        *dqkv, dg, dbeta = ops.delta_backward(dout, inputs, places, self.scale)
        beta, (b, a) = inputs[4], self._decay_columns(projected)
        del mixed, inputs, dout
        b.copy_(dbeta.to(beta.dtype) * beta * (1 - beta / self.most))
        a.copy_(dg * self.rate * torch.sigmoid(a.to(self.bias.dtype) + self.bias))
        first = 0
        for dy in dqkv:
            columns = slice(first, first := first + dy.shape[1] * dy.shape[2])
            x = projected[:, columns]
            x.copy_(self.conv.part(columns).backward(dy.flatten(1), x, places))

    def _through_gate(self, dfinished: Tensor, projected: Tensor, out: Tensor) -> Tensor:
        """Return the gradient of out, and write that of the gate over it."""
        n = torch.empty_like(out)
        rstd = ops.norm_forward(out.flatten(0, 1), self.norm, n.flatten(0, 1))
        ops.gate_backward(dfinished, self._gate(projected), n.flatten(1), SILU)
        dout = n.flatten(0, 1)
        ops.norm_backward(dout, out.flatten(0, 1), self.norm, rstd, None, dout)
        return n

    def _inputs(self, mixed: Tensor, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v, g and beta."""
        q, k, v = mixed.split([self.q, self.q, self.width], dim=1)
        b, a = (columns.to(self.bias.dtype) for columns in self._decay_columns(projected))
        g, beta = self.rate * F.softplus(a + self.bias), torch.sigmoid(b).mul_(self.most)
        q, k = (one.unflatten(1, (self.q_heads, self.q_dim)) for one in (q, k))
        return q, k, v.unflatten(1, (self.v_heads, self.v_dim)), g, beta

    def _gate(self, projected: Tensor) -> Tensor:
        return projected[:, self.channels : self.channels + self.width]

    def _decay_columns(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Return views of b and a, [T, Hv] each."""
        first = self.channels + self.width
        return projected[:, first : first + 2 * self.v_heads].chunk(2, dim=1)


class ConvMixer:
    """A gated short convolution, as views of its modules' tensors."""

    title = "short convolutions"
    finishes = False

    def __init__(self, layer: nn.Module, conv: Conv) -> None:
        """Read the weights. Raises ValueError for what no kernel computes."""
        self.norm: ops.Norm | None = None
        self.conv = _convolution(layer.get_submodule(conv.conv), None)
        self.width = self.conv.weight.shape[0]

    def sizes(self, element: int) -> MixerShape:
        """Return what the memory plan is computed from. element: bytes of an activation."""
        # B * u; in the backward also its gradient, or what the convolution gives.
        return MixerShape(columns=3 * self.width, forward=element * self.width, backward=2 * element * self.width)

    def forward(self, projected: Tensor, places: ops.Places) -> Saved:
        """Return out [T, H]."""
        B, C, u = self._parts(projected)
        out = self.conv.forward(B * u, places).mul_(C)
        return Saved(out, out.new_empty(0))

    def finish(self, out: Tensor, projected: Tensor) -> Tensor:
        """Return out, which is what the output projection reads."""
        return out

    def backward(self, dfinished: Tensor, projected: Tensor, saved: Saved, places: ops.Places) -> None:
        """Overwrite projected with its gradient, and dfinished [T, H]."""
        B, C, u = self._parts(projected)
        x = B * u
        dC = self.conv.forward(x, places).mul_(dfinished)
        dfinished.mul_(C)
        C.copy_(dC)
        del dC
        dx = self.conv.backward(dfinished, x, places)
        dB = torch.mul(dx, u, out=x)
        u.copy_(dx.mul_(B))
        B.copy_(dB)

    def _parts(self, projected: Tensor) -> tuple[Tensor, ...]:
        return projected[:, : 3 * self.width].chunk(3, dim=1)


Mixer = DeltaMixer | ConvMixer


def _convolution(module: Any, activation: str | None) -> ops.ShortConv:
    """Describe a depthwise nn.Conv1d. Raises ValueError for more taps than the kernel has."""
    taps = module.weight.shape[2]
    if not 2 <= taps <= MAX_K:
        raise ValueError(f"a convolution of {taps} taps")
    bias = None if module.bias is None else module.bias.detach()
    return ops.ShortConv(module.weight.detach().squeeze(1), bias, activation)
