"""The levels of recomputation: what a decoder layer keeps for its backward, and where.

    level   saved on the device                                         recomputed in the backward
    L0      x, qkv, attention out + lse, mid, gate and up               norms, rotary, h
    L1      x, qkv, attention out + lse                                 + o, gate, up
    L2      x, attention out + lse                                      + q, k, v
    L3      x                                                           + attention
    L4      nothing: x, attention out + lse in host memory              as L2
    L5      nothing: x in host memory                                   as L3

Names as in `rlft.models.fused.layer`: x the layer's input, mid the residual stream after attention. In a layer with a
mixer (`rlft.models.fused.mixers`), qkv is the buffer that the mixer reads, and its output stands for attention's. Where
a gate in that buffer multiplies the output, the levels that recompute it do so before the MLP's backward, not after it.
"""

from __future__ import annotations

from typing import NamedTuple


class Level(NamedTuple):
    """What a layer keeps between its forward and its backward; its input x is always kept."""

    name: str
    keep_qkv: bool
    """Keep q, k, v, and S of their projection."""
    keep_attention: bool
    """Keep attention's output and log-sum-exp."""
    keep_mlp: bool
    """Keep mid, gate and up."""
    on_host: bool
    """Keep x and attention's results in host memory, not on the device."""
    cost: float
    """Approximate cost in percent of a step's time, where copies to and from the host are hidden."""

    @property
    def attention_on_device(self) -> bool:
        """Whether attention's results stay on the device."""
        return self.keep_attention and not self.on_host

    def __str__(self) -> str:
        return self.name


L0 = Level("L0", keep_qkv=True, keep_attention=True, keep_mlp=True, on_host=False, cost=0.0)
L1 = Level("L1", keep_qkv=True, keep_attention=True, keep_mlp=False, on_host=False, cost=10.0)
L2 = Level("L2", keep_qkv=False, keep_attention=True, keep_mlp=False, on_host=False, cost=12.0)
L3 = Level("L3", keep_qkv=False, keep_attention=False, keep_mlp=False, on_host=False, cost=20.0)
L4 = Level("L4", keep_qkv=False, keep_attention=True, keep_mlp=False, on_host=True, cost=12.5)
L5 = Level("L5", keep_qkv=False, keep_attention=False, keep_mlp=False, on_host=True, cost=20.5)
LEVELS = (L0, L1, L2, L3, L4, L5)
