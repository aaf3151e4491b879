"""What every layer reads of a token beside the residual stream: made once in a pass, from ids and embedded tokens.

Shapes: T rows, H hidden size, L layers, P columns of what one layer reads. Of all layers together it is as wide as
several residual streams, and exists through the whole pass; the memory plan counts it. An adapter of the projection
gets its gradient through autograd.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlft.kernels.lora import lora_linear
from rlft.kernels.rms_norm import rms_norm
from rlft.models.families import Family
from rlft.models.fused.layer_modules import describe_norm
from rlft.models.fused.projection import Projection


class PerLayerInputs:
    """The modules of a decoder that make the inputs of its layers."""

    def __init__(self, decoder: Any, family: Family, like: Tensor) -> None:
        """Take the modules. like: as of `FusedLayer`. Raises ValueError for weights that no kernel reads."""
        names = family.per_layer_input
        assert names is not None
        self.size: int = getattr(decoder.config, names.size)
        self.projection = Projection([decoder.get_submodule(names.projection)])
        self._norm = describe_norm(decoder.get_submodule(names.projection_norm), family.norm_style, like, self.size)
        self._embedding: nn.Module = decoder.get_submodule(names.embedding)
        self._projected_factor, self._factor = (float(getattr(decoder, name)) for name in names.factors)

    def __call__(self, ids: Tensor, embedded: Tensor, adapter: str | None) -> tuple[Tensor, ...]:
        """Return what each layer reads, [T, P], rows of any stride. ids: [T]. embedded: [T, H]."""
        bound, projection = self.projection.bind(adapter), self.projection
        scales = bound.group.scales
        projected = lora_linear(embedded, projection.weights, bound.A, bound.B, scales, projection.bias)
        projected = (projected * self._projected_factor).unflatten(1, (-1, self.size))
        normed = rms_norm(projected, *self._norm)
        del projected
        both = normed + self._embedding(ids).unflatten(1, (-1, self.size))
        del normed
        return both.mul_(self._factor).unbind(1)
