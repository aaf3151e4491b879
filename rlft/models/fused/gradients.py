"""Where the gradients of a decoder layer's adapters go. A [r, in] and B [out, r] are the matrices of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlft.models.fused.expert_weights import StackAdapter
from rlft.models.fused.projection import Bound


@dataclass
class Gradients:
    """Where the gradients of one layer's A and B go."""

    A: list[list[Tensor]] = field(default_factory=list)
    B: list[list[Tensor]] = field(default_factory=list)
    _outputs: list[tuple[Tensor | None, torch.dtype]] = field(default_factory=list)

    @classmethod
    def of(cls, bound: Sequence[Bound | StackAdapter], buffers: dict[Tensor, Tensor] | None, like: Tensor) -> Gradients:
        """Return buffers for the gradients of the adapters in `bound`.

        buffers: the caller's, by parameter; None: new ones of at least fp32. like: activations, which give device and
        dtype of new ones.
        """
        result = cls()
        # One allocation, so that one launch zeroes all gradients.
        size = sum(tensor.numel() for adapter in bound for tensor in (*adapter.A, *adapter.B)) if buffers is None else 0
        flat = like.new_zeros(size, dtype=torch.promote_types(like.dtype, torch.float32))
        offset = 0
        for adapter in bound:
            for side, tensors in ((result.A, adapter.A), (result.B, adapter.B)):
                side.append([])
                for tensor in tensors:
                    if buffers is not None:
                        side[-1].append(buffers[tensor] if tensor.numel() else tensor)
                    else:
                        side[-1].append(flat[offset : offset + tensor.numel()].view(tensor.shape))
                        offset += tensor.numel()
                    if tensor.numel():
                        result._outputs.append((None if buffers is not None else side[-1][-1], tensor.dtype))
        return result

    def of_stack(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients of A and of B of a stack of experts: both stacks were the last two adapters."""
        return self.A[i - 2], self.B[i - 2]

    @property
    def returned(self) -> list[Tensor | None]:
        """One gradient per tensor of `adapter_tensors`, in its dtype; None where it went into the caller's buffer."""
        return [None if gradient is None else gradient.to(dtype) for gradient, dtype in self._outputs]
