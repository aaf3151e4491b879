"""Sizes of the experts of a layer, from which the memory plan is computed.

Bytes are per token; rows of a token's k choices are x, u, h and y of `rlft.models.fused.expert_steps`, d the gathered
gradient, p that of h. e bytes of an activation, H hidden size, I width of an expert, E experts, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

SHARE = 1024
"""Rows whose sums `rlft.kernels.grouped_gradient` keeps apart until they are added; it is between 256 and 2,048."""
GATE_FORWARD, GATE_BACKWARD = 5, 7
"""Tensors as wide as h that exist at once where the module of a layer computes its gate."""


class ExpertShape(NamedTuple):
    """Sizes of a layer's mixture of experts."""

    experts: int
    k: int
    """Experts of a token."""
    hidden: int
    width: int
    """I."""
    tails: tuple[int, int]
    """Columns behind rows into and out of the two products."""
    ranks: tuple[int, int]
    own_gate: bool = False
    """The module of the layer computes the gate, by autograd."""
    shared: bool = False
    """There is a shared expert, whose sizes are those of the layer's MLP."""

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with, those of the router included."""
        return self.hidden * (3 * self.k * self.width + self.experts)

    @property
    def stacks(self) -> tuple[int, int]:
        """Elements of the buffers of both stacks."""
        up, down = self.tails
        into = (2 * self.width + up) * (self.hidden + up)
        return self.experts * into, self.experts * (self.hidden + down) * (self.width + down)

    def routing(self, element: int) -> int:
        """Return the bytes of choices and weights, which every level keeps."""
        return self.k * (4 + max(4, element))

    def u(self, element: int) -> int:
        """Return the bytes of u with its tail, which L0 keeps."""
        return element * self.k * (2 * self.width + self.tails[0])

    def forward(self, element: int, keeps_u: bool) -> int:
        """Return the bytes of a forward beyond n."""
        e, k = element, self.k
        x, h, y = k * (self.hidden + self.tails[0]), k * (self.width + self.tails[1]), k * self.hidden
        gate = GATE_FORWARD * k * self.width if self.own_gate else 0
        u = 2 * k * self.width
        # A product that is written into what L0 keeps is made as another tensor first, in `rlft.kernels.grouped`.
        return 8 * k + e * max(x + u, (0 if keeps_u else u) + h + gate, h + y)

    def backward(self, element: int, keeps_u: bool) -> int:
        """Return the bytes of a backward beyond n, the gradients around it, and what is kept."""
        e, k = element, self.k
        x, d, h = (
            k * (size + tail)
            for size, tail in ((self.hidden, self.tails[0]), (self.hidden, self.tails[1]), (self.width, self.tails[1]))
        )
        u, p = 0 if keeps_u else self.u(e) // e, k * self.width
        again, back = (each * k * self.width if self.own_gate else 0 for each in (GATE_FORWARD, GATE_BACKWARD))
        kept = e * (self.hidden if self.shared else 0)
        return kept + 24 * k + e * (x + u + max(d + p + h + again, p + h + back, k * self.hidden))

    def sums(self, rows: int) -> int:
        """Return the bytes of the partial sums of gradients, of a tile of `rows` tokens."""
        shares = self.experts + rows * self.k // SHARE
        widest = max(self.ranks[0] * max(2 * self.width, self.hidden), self.ranks[1] * max(self.width, self.hidden))
        return 4 * shares * widest
