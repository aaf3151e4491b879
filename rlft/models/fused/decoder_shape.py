"""Sizes of a decoder and of its layers, from which the memory plan is computed.

q, k and v are those of attention; S is the low-rank product of an adapter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch

from rlft.models.fused.expert_shape import ExpertShape
from rlft.models.fused.mixer_shape import MixerShape


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder, and of a kind of its layers.

    Where layers differ, the decoder has `kinds`, and as fields of a layer those of the first kind.
    """

    layers: int
    hidden: int
    q: int
    """Columns of q: heads times head size."""
    kv: int
    """Columns of k, and of v, that attention reads."""
    q_heads: int
    intermediate: int
    vocab: int
    dtype: torch.dtype
    """Dtype of activations."""
    tails: tuple[int, ...]
    """Columns behind qkv, o, gate_up, down that hold the low-rank product S; also of both projections of an input per
    layer."""
    ranks: tuple[int, ...]
    qk_norm: bool
    """q and k have norms, so that their rotated form is a separate tensor."""
    post_norm: bool
    """There are norms behind attention and MLP."""
    attention: str
    """Name of the attention back end."""
    gated: bool = True
    """The MLP has a gate, so that two projections as wide as `intermediate` come before its activation, not one."""
    residual_factor: bool = False
    """The outputs of attention and MLP are multiplied by a constant."""
    entropy_grad: bool = False
    """The loss has an entropy bonus, so that the head holds a second Jacobian."""
    output_gate: bool = False
    """Attention's output is multiplied by a gate, whose columns are beside those of q."""
    kv_projections: int = 2
    """Projections of k and v: 1 if they have the same, 0 if the layer reads those of another."""
    value_norm: bool = False
    """v has a norm, so that attention reads a separate tensor."""
    shares_kv: bool = False
    """Other layers read k and v, and add to their gradients."""
    per_layer: int = 0
    """Columns of what the layer reads beside the residual stream."""
    per_layer_total: int = 0
    """Those of all layers together; a size of the decoder."""
    per_layer_trained: bool = False
    """What projects the embedded tokens to them has an adapter."""
    mixer: MixerShape | None = None
    """What mixes the tokens; None: attention. `q` is the width of its output, `kv` 0."""
    experts: ExpertShape | None = None
    """The mixture of experts; `intermediate` is then that of the shared expert, 0 without one."""
    kinds: tuple[DecoderShape, ...] = ()
    """Sizes of each kind of layer; empty: all are alike."""
    order: tuple[int, ...] = ()
    """For each layer the index of its kind."""

    @property
    def layer_kinds(self) -> tuple[DecoderShape, ...]:
        """Sizes of each kind of layer."""
        return self.kinds or (self,)

    def kind(self, layer: int) -> int:
        """Return the kind of a layer, as an index of `layer_kinds`."""
        return self.order[layer] if self.order else 0

    def count(self, layers: int) -> Counter[int]:
        """Count the first `layers` layers by kind."""
        return self._counts[layers] if self.order else Counter({0: layers})

    def last_of_each_kind(self, first: int, last: int) -> list[int]:
        """Return the last layer of each kind among layers first to last - 1."""
        if not self.order:
            return [last - 1] if first < last else []
        return list({self.order[layer]: layer for layer in range(first, last)}.values())

    @cached_property
    def _counts(self) -> list[Counter[int]]:
        return [Counter(self.order[:layers]) for layers in range(self.layers + 1)]

    @property
    def projected(self) -> int:
        """Columns of the buffer that q, k and v, or what the mixer reads, are projected to."""
        if self.mixer is not None:
            return self.mixer.columns
        return self.q * (1 + self.output_gate) + self.kv_projections * self.kv

    @property
    def rotated(self) -> int:
        """Columns of q, k and v that norms and rotary embedding write beside that buffer; those of shared k and v are
        counted as saved."""
        if not self.qk_norm:
            return 0
        fresh = self.kv_projections > 0 and not self.shares_kv
        return self.q + (self.kv * (1 + self.value_norm) if fresh else 0)

    @property
    def finishes(self) -> bool:
        """What the output projection reads is computed from that buffer, too."""
        return self.output_gate if self.mixer is None else self.mixer.finishes

    @property
    def flash(self) -> bool:
        """Attention of all layers is by flash attention, which reads the bounds of sequences on the device."""
        return all(kind.mixer is not None or kind.attention in ("fa4", "fa2") for kind in self.layer_kinds)

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize

    @property
    def qkv(self) -> int:
        """Columns of the qkv buffer, tail included."""
        return self.projected + self.tails[0]

    @property
    def gates(self) -> int:
        """Columns of gate and up."""
        return (1 + self.gated) * self.intermediate

    @property
    def gate_up(self) -> int:
        """Columns of the gate_up buffer, tail included."""
        return self.gates + self.tails[2]

    @property
    def weights(self) -> int:
        """Elements of a layer's matrices that a token is multiplied with, on average where layers differ."""
        if self.kinds:
            return sum(self.kinds[kind].weights for kind in self.order) // self.layers
        routed = 0 if self.experts is None else self.experts.active
        return routed + self.hidden * (self.projected + self.q + self.gates + self.intermediate + 2 * self.per_layer)

    @cached_property
    def decoded(self) -> float:
        """Weights that are decoded for each that a token is multiplied with, on average over the layers."""
        stacks = [kind.experts and sum(kind.experts.stacks) - kind.experts.active for kind in self.layer_kinds]
        more = sum(stacks[self.kind(layer)] or 0 for layer in range(self.layers))
        return 1 + more / (self.layers * self.weights)

    @property
    def lse(self) -> int:
        """Bytes of the log-sum-exp per row."""
        return 4 * self.q_heads if self.attention in ("fa4", "fa2") else 0
