"""The steps that the forward and the backward of a decoder layer share, in tiles of rows.

Names and shapes: T rows, t of a tile, H hidden size, Hq query heads, D head size, R rotary columns, I width of the MLP,
Y columns of qkv, or of what a mixer (`rlft.models.fused.mixers`) reads in its place; x the residual stream, n a norm's
output, q, k, v of attention, o the output projection, h = act(gate) * up, or act(gate) in families without a gate,
where "gate" is the only projection before h; S or s = x A^T of an adapter.
c is the factor on the outputs of attention and MLP, 1 in most families.
"Tail": columns behind a projection's output that hold S.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlft.kernels import lora
from rlft.kernels.attention import Saved, Sequences
from rlft.models.fused import ops
from rlft.models.fused.layer_modules import DOWN, GATE_UP, OUT, QKV, FusedLayer
from rlft.models.fused.levels import Level
from rlft.models.fused.offload import Offload, Stored
from rlft.models.fused.projection import Bound, Store


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
    stored: dict[int, Stored] = field(default_factory=dict)
    """Layer -> what it moved to the host."""


@dataclass
class SavedActivations:
    """What the backward of a layer starts from, for T rows. Fields are None where they are recomputed."""

    x: Tensor | None
    attention: Saved | None = None
    qkv: Tensor | None = None
    """[T, Y + tail]: q and k before the norm where there is one, else rotated; or what a mixer reads."""
    s_qkv: Tensor | None = None
    mid: Tensor | None = None
    gate_up: Tensor | None = None
    """[T, 2 I + tail], without a gate [T, I + tail]."""
    s_down: Tensor | None = None
    """[T, rank]."""


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
        if layer.mixer is None:
            cos, sin, *scale = run.tables[layer.type]
            flags = (layer.qk_norm_whole, layer.interleaved)
            self.rope = ops.Rope(cos, sin, *layer.qk_norm, *flags, *scale, after=layer.qk_norm_after)

    def normed(self, x: Tensor, norm: ops.Norm | None, i: int, **residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the norm's output, with room for S of projection i behind each row, and 1 / rms."""
        n = x.new_empty(x.shape[0], x.shape[1] + self.bound[i].group.tail)
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
        q, k, v = self.layer.heads(qkv)
        q, k = self.rope.forward(q, k)
        return self.layer.attention.forward(q, k, v, self.run.sequences)

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

    def gates(self, gate_up: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return views of gate and up; None for up in families without a gate."""
        width = self.layer.width
        return gate_up[:, :width], gate_up[:, width : 2 * width] if self.layer.gated else None

    def hidden(self, gate_up: Tensor) -> Tensor:
        """Return h with room for S of the down projection."""
        h = gate_up.new_empty(gate_up.shape[0], self.layer.width + self.bound[DOWN].group.tail)
        ops.gate_forward(*self.gates(gate_up), self.layer.activation, h[:, : self.layer.width])
        return h
