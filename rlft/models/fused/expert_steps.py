"""A mixture of experts in a decoder layer: forward and backward of a tile of rows.

Rows of a tile are sorted by expert and multiplied in groups. With n the norm's output, w the weights of a token's k
choices, g the gate and o the row's token:

    u = W1 n_o + B1 (A1 n_o) + b1        h = g(u)        y = W2 h + B2 (A2 h) + b2        out = residual + sum of w y

down is never run again. With d the gradient of out at the row's token, the backward is

    p = (W2 + B2 A2)^T d      dw = <p, h> + <d, b2>      dh = w p      du = g'(u)^T dh
    dn = sum of (W1 + B1 A1)^T du, and through the router's logits from dw
    dA2 = sum of (w B2^T d) h^T,  dB2 = sum of d (w A2 h)^T,  and so for A1 and B1 with du and n

so a weight of 0 has a gradient too. Choices and weights are kept, 8 bytes per token and choice; the order follows from
the choices, and is sorted again. A shared expert is not here: it is the layer's MLP.

t tokens, H hidden size, I width of an expert, E experts, M = t k sorted rows; x and dy are rows of a product and their
gradients, S and dS low-rank columns behind them ("tail").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlft.kernels.expert_choice import choose_experts
from rlft.kernels.gather import combine, gather, row_dots
from rlft.kernels.route import sort_by_expert
from rlft.models.fused import ops
from rlft.models.fused.expert_layer import DOWN, UP, Mixture
from rlft.models.fused.expert_weights import StackStore
from rlft.models.fused.gradients import Gradients


@dataclass
class Routing:
    """What a layer keeps of its experts for the backward, for T tokens."""

    experts: Tensor
    """[T, k] int32."""
    weights: Tensor
    """[T, k], fp32 or float64."""
    u: Tensor | None
    """[T k, 2 I + tail], sorted by expert within each tile; None where it is computed again."""

    def __getitem__(self, rows: slice) -> Routing:
        """Return the part of a tile."""
        k = self.experts.shape[1]
        u = None if self.u is None else self.u[rows.start * k : rows.stop * k]
        return Routing(self.experts[rows], self.weights[rows], u)


class ExpertSteps:
    """Forward and backward of the mixture of one layer."""

    def __init__(self, mixture: Mixture, store: StackStore, layer: int, adapter: str | None, like: Tensor) -> None:
        """like: activations, which give device and dtype."""
        self.mixture, self.adapters = mixture, mixture.bind(adapter)
        self.weights = store.weights(layer, mixture.stacks, self.adapters, like)

    def routing(self, x: Tensor, keep: bool) -> Routing:
        """Return an unset `Routing` for rows like x [T, H]. keep: with room for u."""
        T, k = x.shape[0], self.mixture.k
        experts = x.new_empty(T, k, dtype=torch.int32)
        weights = x.new_empty(T, k, dtype=torch.promote_types(x.dtype, torch.float32))
        return Routing(experts, weights, self._u(x, T * k) if keep else None)

    def forward(self, n: Tensor, routing: Routing, residual: Tensor, out: Tensor, given: Tensor | None = None) -> None:
        """Write out = residual + the weighted outputs of each token's experts, and fill `routing`.

        n: [t, H], rows of any stride. residual: [t, H], may be out. given: [t, k] integers, the experts to take; None:
        the router's choice.
        """
        mixture = self.mixture
        given = None if given is None else given.int().contiguous()
        choice = choose_experts(self._logits(n), mixture.k, mixture.scoring, mixture.correction, given)
        routing.experts.copy_(choice.experts)
        routing.weights.copy_(choice.weights)
        order, inverse, offsets = sort_by_expert(choice.experts, mixture.experts)
        x = self._gathered(n, order, UP)
        kept = None if routing.u is None else self._without_tail(routing.u)
        u = self.weights(UP).forward(x, offsets, out=kept)
        del x
        h = self._hidden(u)
        del u
        y = self.weights(DOWN).forward(h, offsets)
        del h
        combine(y, inverse, routing.weights, residual=residual, out=out)

    def backward(self, dout: Tensor, n: Tensor, routing: Routing, grads: Gradients, dn: Tensor | None) -> Tensor:
        """Return the gradient of n [t, H], plus dn, and add those of the adapters to `grads`."""
        k = self.mixture.k
        order, inverse, offsets = sort_by_expert(routing.experts, self.mixture.experts)
        x = self._gathered(n, order, UP)
        u = routing.u
        if u is None:
            u = self._u(x, x.shape[0])
            self.weights(UP).forward(x, offsets, out=self._without_tail(u))
        dh, h, dweights = self._through_down(dout, u, routing, order, offsets, grads)
        self._through_gate(dh, h, u)
        del dh, h
        up = self.weights(UP)
        if routing.u is not None:
            up.with_s(x, offsets)
        dx = up.input_gradient(u, offsets)
        up.add_gradients(u, x, offsets, *grads.of_stack(UP))
        del x, u
        dn = combine(dx, inverse, None, k, residual=dn)
        return self._through_router(dn, dweights[inverse.long()].view(-1, k), dout, n, routing)

    def _logits(self, n: Tensor) -> Tensor:
        """Return the router's logits, [t, E]."""
        mixture, dtype = self.mixture, self._logit_dtype(n)
        bias = None if mixture.router_bias is None else mixture.router_bias.to(dtype)
        return torch.nn.functional.linear(n.to(dtype), mixture.router.to(dtype), bias)

    def _logit_dtype(self, n: Tensor) -> torch.dtype:
        return torch.promote_types(n.dtype, torch.float32) if self.mixture.wide_router else n.dtype

    def _gathered(self, rows: Tensor, order: Tensor, i: int) -> Tensor:
        """Return the rows of tokens at their sorted places, with room for the low-rank columns of stack i."""
        H = rows.shape[1]
        out = rows.new_empty(order.shape[0], H + self.adapters[i].tail)
        gather(rows, order, self.mixture.k, out=out[:, :H])
        return out

    def _u(self, like: Tensor, rows: int) -> Tensor:
        """Return room for u with its tail."""
        return like.new_empty(rows, self.mixture.stacks[UP].out + self.adapters[UP].tail)

    def _without_tail(self, u: Tensor) -> Tensor:
        return u[:, : self.mixture.stacks[UP].out]

    def _gate_columns(self, u: Tensor) -> tuple[Tensor, Tensor]:
        width = self.mixture.width
        return u[:, :width], u[:, width : 2 * width]

    def _hidden(self, u: Tensor) -> Tensor:
        """Return h with room for S, [M, I + tail]."""
        width = self.mixture.width
        h = u.new_empty(u.shape[0], width + self.adapters[DOWN].tail)
        if self.mixture.own_gate is not None:
            h[:, :width].copy_(self.mixture.own_gate(self._without_tail(u)))
        else:
            ops.gate_forward(*self._gate_columns(u), self.mixture.activation, h[:, :width])
        return h

    def _through_down(
        self, dout: Tensor, u: Tensor, routing: Routing, order: Tensor, offsets: Tensor, grads: Gradients
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dh [M, I], h [M, I + tail], and <p, h> [M]."""
        down, width = self.weights(DOWN), self.mixture.width
        d = self._gathered(dout, order, DOWN)
        p = down.input_gradient(d, offsets)
        h = self._hidden(u)
        dots = row_dots(p, h[:, :width])
        down.with_s(h, offsets)
        w = routing.weights.view(-1)[order.long(), None]
        # The weight of a row is a factor of both gradients: of dS, and of S.
        d[:, down.out :].mul_(w)
        h[:, width:].mul_(w)
        down.add_gradients(d, h, offsets, *grads.of_stack(DOWN))
        return p.mul_(w), h, dots

    def _through_gate(self, dh: Tensor, h: Tensor, u: Tensor) -> None:
        """Turn u into its gradient in place; dh is overwritten. h: of u."""
        gate = self.mixture.own_gate
        if gate is None:
            ops.gate_backward(dh, *self._gate_columns(u), self.mixture.activation)
            return
        columns = self._without_tail(u)
        with torch.enable_grad():
            leaf = columns.detach().requires_grad_()
            (du,) = torch.autograd.grad(gate(leaf), leaf, dh)
        columns.copy_(du)

    def _through_router(self, dn: Tensor, dweights: Tensor, dout: Tensor, n: Tensor, routing: Routing) -> Tensor:
        """Add the gradient of n through the weights to dn [t, H], and return it. dweights: [t, k], without bias."""
        mixture, bias = self.mixture, self.mixture.stacks[DOWN].bias
        if bias is not None:
            wide = dweights.dtype
            dweights = dweights + (dout.to(wide) @ bias.to(wide).T).gather(1, routing.experts.long())
        with torch.enable_grad():
            logits = self._logits(n).detach().requires_grad_()
            weights = choose_experts(logits, mixture.k, mixture.scoring, given=routing.experts).weights
            (dlogits,) = torch.autograd.grad(weights, logits, dweights.to(weights.dtype))
        router = mixture.router.to(self._logit_dtype(n))
        return dn.add_(dlogits.to(router.dtype) @ router)
