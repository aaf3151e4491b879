"""The last completed step, kept while the next one changes it, so that a step that fails leaves something to save.

A step is complete once its updates are done, its numbers are recorded and its checks have passed. An exception before
that may find the adapter between two updates; `Progress.restore` puts everything back to where the step began.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rlft.data.prompts import Prompts
from rlft.models.policy import Policy
from rlft.trainer.optim import Optimizer
from rlft.trainer.reference import Reference
from rlft.types import State


@dataclass(eq=False)
class Progress:
    """What a step changes: the state of the run, the adapter, the optimiser, and the cache of reference log-probs."""

    state: State
    policy: Policy
    optimizer: Optimizer
    reference: Reference
    prompts: Prompts
    _began: State | None = None
    """The state as the unfinished step found it; None between steps."""
    _cached: int = 0
    """Completions whose reference log-probs were cached then."""
    _tensors: dict[str, Tensor] | None = None
    """Adapter and optimiser before the first update of the step, on the host; None before that update."""
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    """Memory of `_tensors`, used again by every step."""

    def begin(self) -> None:
        """Mark the beginning of a step."""
        self._tensors = None
        self._cached = len(self.reference)
        # The other fields are replaced and never changed in place.
        self._began = replace(
            self.state, invalid_history=[*self.state.invalid_history], adapted=dict(self.state.adapted)
        )

    def before_updates(self) -> None:
        """Copy adapter and optimiser. Called right before the first update of a step.

        On a GPU the copies are queued before the update and the host does not wait for them.
        """
        tensors = {"adapter": self.policy.adapter_params.detach(), **self.optimizer.tensors()}
        self._tensors = {name: self._copy(name, tensor) for name, tensor in tensors.items()}

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=tensor.is_cuda)

    def end(self) -> None:
        """Mark the step as complete."""
        self._began = self._tensors = None

    def restore(self) -> None:
        """Put everything back to the beginning of an unfinished step; does nothing between steps."""
        if self._began is None:
            return
        if self._tensors is not None:
            if self.policy.device.type == "cuda":
                torch.cuda.synchronize()
            tensors = dict(self._tensors)
            self.policy.adapter_params.data.copy_(tensors.pop("adapter"))
            self.optimizer.load_tensors({})  # frees the moments on the device before their copies come back
            self.optimizer.load_tensors(tensors)
        self.reference.forget_after(self._cached)
        self.go_to(self._began)
        self.end()

    def go_to(self, state: State) -> None:
        """Set state and data cursor, in place."""
        for entry in fields(State):
            setattr(self.state, entry.name, getattr(state, entry.name))
        self.prompts.consumed, self.prompts.solved = state.consumed, set(state.solved)
