"""One decoder layer as one autograd Function that decides itself what it saves for its backward.

What that is depends on the layer's level, a row of the table in `rlft.models.fused.levels`.

Shapes and names: T rows, H hidden size, r rank; x [T, H] the layer's input, o the output projection, mid [T, H] the
residual stream after attention, n a norm's output, h [T, I] = act(gate) * up, S = x A^T of an adapter (A, B).
c is the factor on the outputs of attention and MLP, 1 in most families. Families without a gate have h = act(gate), and
gate alone where this file has gate and up. A gated DeltaNet or a short convolution may be in the place of attention
(`rlft.models.fused.mixers`). e [T, P] is the layer's own input in families that have one.

Where later layers read k and v of a layer, these stay in the pass from that layer's forward to its backward, and the
backwards of the others, all of which come before it, add their gradients there.

The down projection is never recomputed: its backward needs only S = h A^T, 2 r bytes per token, which every level saves
(a norm behind it, as in Gemma, needs its output; it is recomputed there). Everything but attention runs in tiles of
rows, forward and backward, so that gate, up and h of all tokens never exist at once above L0: the backward of a tile
needs nothing of other tiles, and no forward is run a third time. Buffers that the layer owns are overwritten: gate and
up become their gradients, dh becomes h, qkv becomes dqkv, d mid becomes dx. A second backward therefore raises
RuntimeError.

Gradients of A and B are accumulated over the tiles in fp32: into the caller's buffers (`Pass.gradients`), and the
Function returns None for them, or into new ones, which it returns as any other gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlft.models.fused import ops
from rlft.models.fused.layer_backward import Backward
from rlft.models.fused.layer_modules import DOWN, GATE_UP, QKV, FusedLayer, PerLayer
from rlft.models.fused.layer_steps import Pass, SavedActivations, Steps, tiles


def run_layer(layer: FusedLayer, x: Tensor, run: Pass, per_layer: Tensor | None = None) -> Tensor:
    """Run the layer on x [T, H] and e, with gradient to both and to the adapter where `run.keep`."""
    bound = layer.bind(run.adapter)
    if not run.keep:
        # Fill what a backward would need and drop it: with the same buffers both cases round alike.
        return Forward(layer, run, bound, x)(x, SavedActivations(x, per_layer))
    parameters = layer.adapter_tensors(run.adapter)
    # Where gradients go into the caller's buffers, one parameter is enough for autograd, and each takes host time.
    inputs = (
        parameters if run.gradients is None else [parameter for parameter in parameters if parameter.requires_grad][:1]
    )
    return _Layer.apply(x, per_layer, layer, run, bound, *inputs)  # type: ignore[return-value]


def versions(adapter: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """Return each tensor with its count of in-place changes, which `check_versions` compares."""
    return [(tensor, tensor._version) for tensor in adapter]


def check_versions(before: list[tuple[Tensor, int]], where: str) -> None:
    """Raise RuntimeError where an adapter's tensor was modified in place since `versions`.

    In-place operations of autograd are detected, and steps of `rlft.trainer.optim`, which raises the versions itself.
    """
    if any(tensor._version != version for tensor, version in before):
        raise RuntimeError(
            f"{where}: the adapter was modified in place between forward and backward, whose gradients would mix the "
            f"two; run the forward again"
        )


class Forward(Steps):
    """The forward of one layer."""

    def __call__(self, x: Tensor, saved: SavedActivations) -> Tensor:
        """Return the layer's output, [T, H], and fill `saved` as far as the level of the layer says."""
        level = self.run.levels[self.layer.index]
        T, qkv_group = x.shape[0], self.bound[QKV].group
        s_qkv = x.new_empty(T, qkv_group.rank) if level.keep_qkv else None
        qkv = self.qkv(x, s_qkv)
        attention = self.mix(qkv)
        attended = self.finished(attention.out, qkv, slice(None))
        if self.layer.has_mlp:
            saved.s_down = x.new_empty(T, self.bound[DOWN].group.rank)
        if self.experts is not None:
            saved.routing = self.experts.routing(x, level.keep_mlp)
        if level.keep_qkv:
            saved.qkv, saved.s_qkv = qkv, s_qkv
        if level.keep_attention:
            saved.attention = attention
        if level.keep_mlp:
            saved.mid = torch.empty_like(x)
        if level.keep_mlp and self.layer.has_mlp:
            gate_up = self.bound[GATE_UP].group
            saved.gate_up = x.new_empty(T, gate_up.out + gate_up.tail)
        del qkv, attention
        return self._mlp(x, attended, saved)

    def _mlp(self, x: Tensor, attended: Tensor, saved: SavedActivations) -> Tensor:
        out, routes = torch.empty_like(x), self.run.routes.get(self.layer.index)
        for rows in tiles(x.shape[0], self.run.tile):
            o, _ = self.out(attended[rows])
            mid = out[rows] if saved.mid is None else saved.mid[rows]
            n, _ = self.mid(x[rows], o, mid)
            del o
            if self.experts is not None:
                assert saved.routing is not None
                given = None if routes is None else routes[rows]
                self.experts.forward(n[:, : x.shape[1]], saved.routing[rows], mid, out[rows], given)
                mid = out[rows]
            if self.layer.has_mlp:
                gate_up, weight = self._gate_up(n, saved, rows), self.shared_weight(n[:, : x.shape[1]])
                del n
                h = self.hidden(gate_up)
                del gate_up
                self.down(h, mid, out[rows], weight)
                if saved.s_down is not None:
                    saved.s_down[rows].copy_(h[:, self.layer.width :][:, : saved.s_down.shape[1]])
            if self.layer.per_layer is not None and saved.per_layer is not None:
                self._add_input(out[rows], saved.per_layer[rows], self.layer.per_layer)
            if self.layer.scale != 1:
                out[rows].mul_(self.layer.scale)
        return out

    def _gate_up(self, n: Tensor, saved: SavedActivations, rows: slice) -> Tensor:
        """Return gate and up of a tile; n: [t, H + tail]."""
        group = self.bound[GATE_UP].group
        gate_up = n.new_empty(n.shape[0], group.out) if saved.gate_up is None else saved.gate_up[rows]
        self.project(GATE_UP, n, out=gate_up[:, : group.out])
        return gate_up

    def _add_input(self, x: Tensor, e: Tensor, per_layer: PerLayer) -> None:
        """Add the norm of the projection of act(x gate) * e to x [t, H] in place. e: [t, P]."""
        _, added = self.added_input(self.input_gate(x)[0], e)
        normed = torch.empty_like(added)
        ops.norm_forward(added, per_layer.norm, normed)
        x.add_(normed)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, per_layer, layer, run, bound, *parameters):  # type: ignore[override]
        saved = SavedActivations(None, per_layer)
        out = Forward(layer, run, bound, x)(x, saved)
        if run.levels[layer.index].on_host:
            assert run.offload is not None
            run.stored[layer.index] = run.offload.put(layer.index, x, saved.attention)
            saved.attention = None
        else:
            if run.offload is not None:
                run.offload.settle()
            ctx.save_for_backward(x)
        ctx.activations, ctx.rest = saved, (layer, run, bound)
        ctx.versions = versions(layer.adapter_tensors(run.adapter))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        layer, run, bound = ctx.rest
        saved, ctx.activations = ctx.activations, None
        if saved is None:
            raise RuntimeError(
                f"layer {layer.index}: backward ran before, and turned what it had kept into gradients in place; run "
                f"the forward again"
            )
        check_versions(ctx.versions, f"layer {layer.index}")
        if run.stored:
            run.offload.ahead(run.stored, layer.index, dout.device)
        if run.levels[layer.index].on_host:
            saved.x, saved.attention = run.offload.get(run.stored, layer.index)
        else:
            (saved.x,) = ctx.saved_tensors
        work = Backward(layer, run, bound, saved.x)
        dx = work(dout, saved, *ctx.needs_input_grad[:2])
        parameters = len(ctx.needs_input_grad) - 5
        return dx, work.d_per_layer, None, None, None, *work.grads.returned[:parameters]
