"""The steps that the forward and the backward of a decoder layer share, in tiles of rows.

Names and shapes: T rows, t of a tile, H hidden size, Hq query heads, D head size, R rotary columns, I width of the MLP,
Y columns of qkv, or of what a mixer (`rlft.models.fused.mixers`) reads in its place; x the residual stream, n a norm's
output, q, k, v of attention, o the output projection, h = act(gate) * up, or act(gate) in families without a gate,
where "gate" is the only projection before h; S or s = x A^T of an adapter.
c is the factor on the outputs of attention and MLP, 1 in most families. In families with an input per layer, e [T, P]
is that of a layer, and x' the residual stream after its MLP, which the input is added to.
"Tail": columns behind a projection's output that hold S.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlft.kernels import lora
from rlft.kernels.attention import Saved, Sequences
from rlft.models.fused import ops
from rlft.models.fused.expert_steps import ExpertSteps, Routing
from rlft.models.fused.layer_modules import DOWN, GATE_UP, INPUT_GATE, INPUT_OUT, OUT, QKV, FusedLayer
from rlft.models.fused.levels import Level
from rlft.models.fused.offload import Offload, Stored
from rlft.models.fused.projection import Bound, Store


@dataclass
class SharedKV:
    """k and v of one layer as attention reads them, [T, Hk, D] each, which later layers read too."""

    k: Tensor
    v: Tensor
    gradients: tuple[Tensor, Tensor] | None = None
    """Sums of dk and dv over the layers whose backwards have run."""

    def add(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of one more layer, which may be overwritten, and return the sums."""
        if self.gradients is not None:
            for own, total in zip((dk, dv), self.gradients, strict=True):
                own.add_(total)
        self.gradients = (dk, dv)
        return self.gradients


@dataclass
class Pass:
    """Everything that the layers of one forward and its backward share."""

    sequences: Sequences
    tables: dict[str | None, tuple[Tensor, ...]]
    """Type of layer (None: all) -> rotary cos and sin [T, R], and in some families a scale of q [T, 1]."""
    store: Store
    adapter: str | None
    """Name of the PEFT adapter; None: the base alone."""
    levels: Sequence[Level]
    """The level of each layer."""
    tile: int
    """Rows that run at a time, except in attention."""
    keep: bool
    """Whether a backward will follow."""
    gradients: dict[Tensor, Tensor] | None = None
    """Parameter -> fp32 buffer that its gradient is added to; None: returned to autograd."""
    offload: Offload | None = None
    places: ops.Places | None = None
    """Where the sequences are; None: all layers have attention."""
    routes: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> the experts of each row [T, k], any integers; layers that are not in it choose by their routers."""
    stored: dict[int, Stored] = field(default_factory=dict)
    """Layer -> what it moved to the host."""
    shared: dict[int, SharedKV] = field(default_factory=dict)
    """Layer -> its k and v, from its forward to its backward, where other layers read them."""


@dataclass
class SavedActivations:
    """What the backward of a layer starts from, for T rows. Fields are None where they are recomputed."""

    x: Tensor | None
    per_layer: Tensor | None = None
    """e [T, P], in families with an input per layer."""
    attention: Saved | None = None
    qkv: Tensor | None = None
    """[T, Y + tail]: q and k before the norm where there is one, else rotated; or what a mixer reads."""
    s_qkv: Tensor | None = None
    mid: Tensor | None = None
    gate_up: Tensor | None = None
    """[T, 2 I + tail], without a gate [T, I + tail]."""
    s_down: Tensor | None = None
    """[T, rank]."""
    routing: Routing | None = None
    """In layers of experts."""


def tiles(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` rows, as even as multiples of 64 allow."""
    parts = max(1, -(-count // size))
    step = min(size, max(64, -(-count // (64 * parts)) * 64))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class Steps:
    """Computations that the forward and the backward of one layer share."""

    def __init__(self, layer: FusedLayer, run: Pass, bound: Sequence[Bound], x: Tensor) -> None:
        self.layer, self.run, self.bound = layer, run, bound
        self.weights = run.store.weights(layer.index, layer.projections, bound, x)
        self.experts: ExpertSteps | None = None
        if layer.experts is not None:
            self.experts = ExpertSteps(layer.experts, run.store.stacks, layer.index, run.adapter, x)
        if layer.mixer is None:
            cos, sin, *scale = run.tables[layer.type]
            flags = (layer.qk_norm_whole, layer.interleaved)
            self.rope = ops.Rope(cos, sin, *layer.qk_norm, *flags, *scale, after=layer.qk_norm_after)

    def normed(self, x: Tensor, norm: ops.Norm | None, i: int, **residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the norm's output, with room for S of projection i behind each row, and 1 / rms."""
        tail = self.bound[i].group.tail if i < len(self.bound) else 0
        n = x.new_empty(x.shape[0], x.shape[1] + tail)
        return n, ops.norm_forward(x, norm, n[:, : x.shape[1]], **residual)

    def project(self, i: int, x: Tensor, **options: Tensor | None) -> Tensor:
        """Run projection i on x, adapter and bias included."""
        bias = self.layer.projections[i].bias
        return lora.forward(self.weights(i), x, bias, **options)  # type: ignore[arg-type]

    def qkv(self, x: Tensor, s: Tensor | None) -> Tensor:
        """Return qkv [T, Y + tail] of all rows. s: [T, rank] that S is copied to."""
        group = self.bound[QKV].group
        out = x.new_empty(x.shape[0], group.out + group.tail)
        for rows in tiles(x.shape[0], self.run.tile):
            n, _ = self.normed(x[rows], self.layer.input_norm, QKV)
            self.project(QKV, n, out=out[rows, : group.out])
            if s is not None:
                s[rows].copy_(n[:, group.in_features : group.in_features + group.rank])
        return out

    def attend(self, qkv: Tensor) -> Saved:
        """Run attention on a new qkv; in families without norms of q and k these are rotated in place."""
        return self.layer.attention.forward(*self.prepared(qkv), self.run.sequences)

    def prepared(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as attention reads them. k and v that other layers read too are made once in a pass."""
        layer = self.layer
        shared = self.run.shared.get(layer.index if layer.kv_from is None else layer.kv_from)
        if shared is not None:
            return self.rope.forward_queries(layer.queries(qkv)), shared.k, shared.v
        q, k, v = layer.heads(qkv)
        if layer.value_norm is not None:
            v = ops.head_norm_forward(v, layer.value_norm)
        q, k = self.rope.forward(q, k)
        if layer.shares_kv:
            self.run.shared[layer.index] = SharedKV(k, v)
        return q, k, v

    def mix(self, projected: Tensor) -> Saved:
        """Run attention, or what the layer has in its place, on what its input was projected to."""
        if self.layer.mixer is None:
            return self.attend(projected)
        return self.layer.mixer.forward(projected, self.places)

    @property
    def places(self) -> ops.Places:
        """Where the sequences are, for a mixer."""
        assert self.run.places is not None
        return self.run.places

    def finished(self, out: Tensor, projected: Tensor | None, rows: slice) -> Tensor:
        """Return what the output projection reads, [t, Hq D], of some rows of what `mix` returned and of its input.

        projected: needed if the layer `finishes`.
        """
        if not self.layer.finishes:
            return out[rows].flatten(1)
        assert projected is not None
        if self.layer.mixer is not None:
            return self.layer.mixer.finish(out[rows], projected[rows])
        return ops.sigmoid_gate_forward(out[rows], self.layer.q_and_gate(projected[rows])[1]).flatten(1)

    def out(self, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Return the o projection of rows of attention's output, and its S."""
        s = attended.new_empty(attended.shape[0], self.bound[OUT].group.tail)
        return self.project(OUT, attended, s=s), s

    def mid(self, x: Tensor, o: Tensor, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the MLP norm's output with its tail, and 1 / rms; write mid = x + [c] [norm](o) into `total`.

        Without a norm of its output, o is multiplied by c in place.
        """
        norm = self.layer.attention_norm
        if norm is not None:
            raw, o = o, torch.empty_like(o)
            ops.norm_forward(raw, norm, o)
        if self.layer.residual_factor != 1:
            o.mul_(self.layer.residual_factor)
        return self.normed(x, self.layer.mlp_norm, GATE_UP, delta=o, total=total)

    def shared_weight(self, n: Tensor) -> Tensor | None:
        """Return the factor on the output of a shared expert, [t, 1], from n [t, H]; None where it has no gate."""
        gate = None if self.layer.experts is None else self.layer.experts.shared_gate
        return None if gate is None else torch.sigmoid(n @ gate.T)

    def down(self, h: Tensor, mid: Tensor, out: Tensor, weight: Tensor | None = None) -> Tensor | None:
        """Write out = mid + [c] [norm](down projection of h) [weight]; `out` may be `mid`. Return what a norm has read.

        weight: [t, 1] or None, of a shared expert.
        """
        norm, factor = self.layer.down_norm, self.layer.residual_factor
        if weight is not None:
            torch.addcmul(mid, self.project(DOWN, h), weight, out=out)
            return None
        if norm is None and factor == 1:
            self.project(DOWN, h, residual=out if mid.data_ptr() == out.data_ptr() else mid, out=out)
            return None
        down = raw = self.project(DOWN, h)
        if norm is not None:
            down = torch.empty_like(raw)
            ops.norm_forward(raw, norm, down)
        if factor != 1:
            down.mul_(factor)
        torch.add(mid, down, out=out)
        return raw

    def input_gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what x' [t, H] is projected to before the activation, [t, P + tail], and its S."""
        group = self.bound[INPUT_GATE].group
        s, gate = x.new_empty(x.shape[0], group.tail), x.new_empty(x.shape[0], group.out + group.tail)
        self.project(INPUT_GATE, x, out=gate[:, : group.out], s=s)
        return gate, s

    def added_input(self, gate: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return act(gate) * e with S of the projection that reads it, [t, P + tail], and its projection [t, H]."""
        P = e.shape[1]
        gated = e.new_empty(e.shape[0], P + self.bound[INPUT_OUT].group.tail)
        ops.gate_forward(gate[:, :P], e, self.layer.activation, gated[:, :P])
        return gated, self.project(INPUT_OUT, gated)

    def gates(self, gate_up: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return views of gate and up; None for up in families without a gate."""
        width = self.layer.width
        return gate_up[:, :width], gate_up[:, width : 2 * width] if self.layer.gated else None

    def hidden(self, gate_up: Tensor) -> Tensor:
        """Return h with room for S of the down projection."""
        h = gate_up.new_empty(gate_up.shape[0], self.layer.width + self.bound[DOWN].group.tail)
        ops.gate_forward(*self.gates(gate_up), self.layer.activation, h[:, : self.layer.width])
        return h
