"""The backward of a decoder layer, from whatever its level saved; see `rlft.models.fused.layer`.

Names: T rows, H hidden size, D head size, Hq query heads; A [r, in] and B [out, r] of an adapter, S = x A^T, dS its
gradient; x the input of the layer or of a norm, n a norm's output, q, k, v of attention; in families with an input per
layer e [T, P] that of the layer and x' the residual stream before it is added. "Tail": the columns behind the output
of a projection that hold S or dS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlft.kernels import lora
from rlft.kernels.attention import Saved
from rlft.kernels.gather import row_dots
from rlft.kernels.low_rank import gradients_a, gradients_b, shrink
from rlft.models.fused import ops
from rlft.models.fused.gradients import Gradients
from rlft.models.fused.layer_modules import DOWN, GATE_UP, INPUT_GATE, INPUT_OUT, OUT, QKV, FusedLayer
from rlft.models.fused.layer_steps import Pass, SavedActivations, Steps, tiles
from rlft.models.fused.projection import Bound


class Backward(Steps):
    """The backward of one layer."""

    def __init__(self, layer: FusedLayer, run: Pass, bound: Sequence[Bound], x: Tensor) -> None:
        super().__init__(layer, run, bound, x)
        stacks = () if self.experts is None else self.experts.adapters
        self.grads = Gradients.of([*bound, *stacks], run.gradients, x)
        self.d_per_layer: Tensor | None = None
        """The gradient of e, if it was asked for."""

    def __call__(
        self, dout: Tensor, saved: SavedActivations, input_gradient: bool, of_per_layer: bool = False
    ) -> Tensor | None:
        """Return dx [T, H], whose rows may have a stride; None without `input_gradient`. of_per_layer: whether e has a
        gradient."""
        x, qkv, s_qkv = saved.x, saved.qkv, saved.s_qkv
        assert x is not None
        if of_per_layer and saved.per_layer is not None:
            self.d_per_layer = x.new_empty(saved.per_layer.shape)
        # q and k of a kept attention, projected again, are not yet rotated where that is in place.
        in_place = self.layer.mixer is None and self.rope.q is None
        rotates = in_place and saved.attention is not None and qkv is None
        if qkv is None and (saved.attention is None or self.layer.finishes):
            qkv, s_qkv = self._projected(x)
        if saved.attention is None:
            assert qkv is not None
            saved.attention = self.mix(qkv)
        attention = saved.attention
        dmid, dattended = self._mlp(dout, x, attention.out, qkv, saved)
        saved.mid = saved.gate_up = saved.s_down = saved.routing = None
        if qkv is None:
            qkv, s_qkv = self._projected(x)
        rotated = self.rope.forward(*self.layer.heads(qkv)[:2]) if rotates else None
        assert s_qkv is not None
        self._mixed(dattended, qkv, rotated, attention)
        del dattended, attention, rotated
        saved.attention = saved.qkv = None
        return self._inputs(qkv, s_qkv, x, dmid, input_gradient)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return qkv of all rows, and S of its projection."""
        s = x.new_empty(x.shape[0], self.bound[QKV].group.rank)
        return self.qkv(x, s), s

    def _gradient_b(self, i: int, dy: Tensor, s: Tensor) -> Tensor:
        """Add the gradient of B of projection i and write dS into the tail of dy; return that tail."""
        group = self.bound[i].group
        if group.tail:
            gradients_b(group, dy[:, : group.out], s, self.weights(i).b, dy[:, group.out :], self.grads.B[i])
        return dy[:, group.out :]

    def _dx(self, i: int, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the gradient of the input of projection i."""
        return lora.input_gradient(self.weights(i), dy, out)

    def _gradient_a(self, i: int, ds: Tensor, x: Tensor) -> None:
        """Add the gradient of A of projection i."""
        if self.bound[i].group.tail:
            gradients_a(self.bound[i].group, ds, x, self.grads.A[i])

    def _recompute_s(self, i: int, x: Tensor) -> Tensor:
        """Compute S of rows x [t, H] again."""
        group = self.bound[i].group
        s = x.new_empty(x.shape[0], group.tail)
        if group.tail:
            shrink(group, x, self.weights(i).a, s)
        return s

    def _mlp(
        self, dout: Tensor, x: Tensor, out: Tensor, projected: Tensor | None, saved: SavedActivations
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of mid [T, H + tail] and of what o is projected from [T, Hq D]: from the layer's output
        down to o. out: of attention. projected: as in `finished`."""
        T, H = x.shape
        dmid = x.new_empty(T, H + self.bound[OUT].group.tail)
        dattended = x.new_empty(T, self.bound[OUT].group.in_features)
        for rows in tiles(T, self.run.tile):
            attended = self.finished(out, projected, rows)
            s_out = None
            raw = None
            if saved.mid is None or self.layer.attention_norm is not None:
                raw, s_out = self.out(attended)
            if saved.mid is None:
                assert raw is not None
                mid = torch.empty_like(raw) if self.layer.attention_norm is not None else raw
                n, rstd = self.mid(x[rows], raw, mid)
            else:
                mid = saved.mid[rows]
                n, rstd = self.normed(mid, self.layer.mlp_norm, GATE_UP)
            dy, dn = self._through_mlp(dout[rows], mid, n, saved, rows)
            ops.norm_backward(dn, mid, self.layer.mlp_norm, rstd, dy, dmid[rows, :H])
            del dy, dn, n, mid
            norm, factor = self.layer.attention_norm, self.layer.residual_factor
            do = self._of_output(dmid[rows, :H], dmid[rows], raw, norm, OUT, factor)
            del raw
            s = self._recompute_s(OUT, attended) if s_out is None else s_out
            ds = self._gradient_b(OUT, do, s)
            self._dx(OUT, do, dattended[rows])
            self._gradient_a(OUT, ds, attended)
        return dmid, dattended

    def _through_mlp(
        self, dout: Tensor, mid: Tensor, n: Tensor, saved: SavedActivations, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x' and of the MLP norm's output, through experts and MLP, for the rows of a tile."""
        if self.experts is None:
            return self._gated(dout, mid, n, saved, rows)
        assert saved.routing is not None
        dn = self._gated(dout, mid, n, saved, rows)[1] if self.layer.has_mlp else None
        return dout, self.experts.backward(dout, n[:, : dout.shape[1]], saved.routing[rows], self.grads, dn)

    def _gated(
        self, dout: Tensor, mid: Tensor, n: Tensor, saved: SavedActivations, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x' and of the MLP norm's output, from the layer's output: down, gate and up, for the
        rows of a tile."""
        H, group = dout.shape[1], self.bound[GATE_UP].group
        if saved.gate_up is None:
            gate_up = n.new_empty(n.shape[0], group.out + group.tail)
            self.project(GATE_UP, n, out=gate_up[:, : group.out])
            s = n[:, H:]
        else:
            gate_up, s = saved.gate_up[rows], self._recompute_s(GATE_UP, n[:, :H])
        assert saved.s_down is not None
        if self.layer.scale != 1:
            dout = dout * self.layer.scale
        if self.layer.per_layer is not None:
            assert saved.per_layer is not None
            after = torch.empty_like(mid)
            raw = self.down(self.hidden(gate_up), mid, after)
            dout = self._through_input(dout, after, saved.per_layer[rows], rows)
            del after
        else:
            raw = None if self.layer.down_norm is None else self.project(DOWN, self.hidden(gate_up))
        dy = self._of_output(dout, None, raw, self.layer.down_norm, DOWN, self.layer.residual_factor)
        del raw
        weight = self.shared_weight(n[:, :H])
        if weight is not None:
            dy[:, :H].mul_(weight)
        ds = self._gradient_b(DOWN, dy, saved.s_down[rows])
        dh = self._dx(DOWN, dy)
        # By <dh, h> = weight <dout, y>, the logit's gradient needs no y.
        dots = None if weight is None else row_dots(dh, self.hidden(gate_up)[:, : self.layer.width])
        ops.gate_backward(dh, *self.gates(gate_up), self.layer.activation)
        self._gradient_a(DOWN, ds, dh)
        del dh, dy
        ds = self._gradient_b(GATE_UP, gate_up, s)
        dn = self._dx(GATE_UP, gate_up)
        self._gradient_a(GATE_UP, ds, n[:, :H])
        if weight is not None and dots is not None:
            self._add_through_weight(dn, dots, weight)
        return dout, dn

    def _add_through_weight(self, dn: Tensor, dots: Tensor, weight: Tensor) -> None:
        """Add the gradient of n through the gate of the shared expert. dots: <dh, h> of its rows, [t]."""
        assert self.layer.experts is not None and self.layer.experts.shared_gate is not None
        dlogit = (dots[:, None] * (1 - weight)).to(dn.dtype)
        dn.addmm_(dlogit, self.layer.experts.shared_gate)

    def _through_input(self, dout: Tensor, x: Tensor, e: Tensor, rows: slice) -> Tensor:
        """Return the gradient of x' [t, H], from that of the sum with the input, and write that of e [t, P]."""
        P, per_layer = e.shape[1], self.layer.per_layer
        assert per_layer is not None
        gate, s = self.input_gate(x)
        gated, added = self.added_input(gate, e)
        dy = self._of_output(dout, None, added, per_layer.norm, INPUT_OUT)
        del added
        ds = self._gradient_b(INPUT_OUT, dy, gated[:, P:])
        dgated = self._dx(INPUT_OUT, dy)
        de = torch.empty_like(dgated) if self.d_per_layer is None else self.d_per_layer[rows]
        ops.gate_backward(dgated, gate[:, :P], de.copy_(e), self.layer.activation)
        self._gradient_a(INPUT_OUT, ds, dgated)
        ds = self._gradient_b(INPUT_GATE, gate, s)
        dx = self._dx(INPUT_GATE, gate).add_(dout)
        self._gradient_a(INPUT_GATE, ds, x)
        return dx

    def _with_tail(self, dy: Tensor, i: int) -> Tensor:
        """Return a copy of dy with room for dS behind its rows."""
        wide = dy.new_empty(dy.shape[0], self.bound[i].group.out + self.bound[i].group.tail)
        wide[:, : dy.shape[1]].copy_(dy)
        return wide

    def _of_output(
        self, dy: Tensor, wide: Tensor | None, x: Tensor | None, norm: ops.Norm | None, i: int, factor: float = 1.0
    ) -> Tensor:
        """Return the gradient of the output x of projection i, with a tail, through its norm and factor.

        dy: [t, H], what the residual stream has. wide: dy with a tail; returned itself without norm and factor.
        """
        H = dy.shape[1]
        if norm is None:
            result = wide if wide is not None and factor == 1 else self._with_tail(dy, i)
        else:
            assert x is not None
            rstd = ops.norm_forward(x, norm, torch.empty_like(x))
            result = x.new_empty(x.shape[0], H + self.bound[i].group.tail)
            ops.norm_backward(dy, x, norm, rstd, None, result[:, :H])
        if factor != 1:
            result[:, :H].mul_(factor)
        return result

    def _mixed(self, dattended: Tensor, projected: Tensor, rotated: Any, saved: Saved) -> None:
        """Overwrite what attention, or the layer's mixer, read with its gradient."""
        if self.layer.mixer is None:
            self._attention(dattended, projected, rotated, saved)
        else:
            self.layer.mixer.backward(dattended, projected, saved, self.places)

    def _attention(self, dattended: Tensor, qkv: Tensor, rotated: Any, saved: Saved) -> None:
        """Overwrite qkv with its gradient. rotated: q and k, where they were rotated again; else None."""
        layer = self.layer
        if self.rope.q is not None:
            q_read, k_read, v_read = self.prepared(qkv)
        else:
            q, k, v_read = layer.heads(qkv)
            q_read, k_read = rotated or (q, k)
        dout = dattended.unflatten(1, saved.out.shape[1:])
        if layer.output_gate:
            ops.sigmoid_gate_backward(dout, saved.out, layer.q_and_gate(qkv)[1])
        dq, dk, dv = layer.attention.backward(dout, q_read, k_read, v_read, saved, self.run.sequences)
        if layer.kv_from is not None:
            self.run.shared[layer.kv_from].add(dk, dv)
            q = layer.queries(qkv)
            self.rope.backward_queries(dq, q)
        else:
            if layer.shares_kv:
                dk, dv = self.run.shared.pop(layer.index).add(dk, dv)
            q, k, v = layer.heads(qkv)
            if layer.value_norm is not None:
                dv = ops.head_norm_backward(dv, v, layer.value_norm)  # before k, which may be v, is overwritten
            self.rope.backward(dq, dk, q, k, (q_read, k_read))
            if layer.key_is_value:
                v.add_(dv)
            else:
                v.copy_(dv)
        if layer.output_gate:
            layer.q_and_gate(qkv)[0].copy_(q)

    def _inputs(self, dqkv: Tensor, s: Tensor, x: Tensor, dmid: Tensor, input_gradient: bool) -> Tensor | None:
        """Write dx over dmid and return it; None without `input_gradient`."""
        H = x.shape[1]
        for rows in tiles(x.shape[0], self.run.tile):
            n, rstd = self.normed(x[rows], self.layer.input_norm, QKV)
            ds = self._gradient_b(QKV, dqkv[rows], s[rows])
            self._gradient_a(QKV, ds, n[:, :H])
            if input_gradient:
                target = dmid[rows, :H]
                ops.norm_backward(self._dx(QKV, dqkv[rows]), x[rows], self.layer.input_norm, rstd, target, target)
        return dmid[:, :H] if input_gradient else None
