"""The base of every loss: a frozen dataclass whose fields are its settings in [algo], called on each micro-batch.

A file in `rlft/algos/losses/` has one such class. Policy losses extend `rlft.algos.policy_loss.PolicyLoss`, losses over
pairs `rlft.algos.pair_loss.PairLoss`, all others `Loss` itself. No loss extends another loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlft.types import Aggregation, Batch, Stats, StepInputs, StepView


@dataclass(frozen=True)
class Loss(ABC):
    """A loss with its settings. The loop reads the traits below, which may be properties where they depend on settings.

    Raises ConfigError for a wrong setting.
    """

    advantage: ClassVar[str] = "identity"
    """Name of the estimator; a field where it is a setting."""
    aggregation: ClassVar[Aggregation] = "token_mean"
    """How token losses are reduced to one number; a field where it is a setting."""
    has_ratio: ClassVar[bool] = False
    """There is a ratio against `batch.old_logprobs`, which the loop sets when there are several updates."""
    has_clip: ClassVar[bool] = False
    """That ratio is clipped, which never acts with one update per rollout batch."""
    needs_reference: ClassVar[bool] = False
    """The loop sets `batch.ref_logprobs`."""
    needs_sampler: ClassVar[bool] = False
    """Recorded completions are refused, since they have no sampler log-probs."""
    whole_groups: ClassVar[bool] = False
    """All rollouts of a group are in one micro-batch."""
    zero_adv_zero_grad: ClassVar[bool] = False
    """A micro-batch of zero advantage has exactly zero gradient and may be skipped."""
    entropy_grad: ClassVar[bool] = False
    """`batch.entropy` has a gradient."""
    kl_in_reward: ClassVar[float] = 0.0
    """Factor of the KL, in nats, that is subtracted from each reward before advantages are estimated."""

    @abstractmethod
    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        """Return the weighted sum of the loss (0-dim) and its metrics. logprobs: [T] with gradient.

        The weights of `batch` hold all normalisation: multiply by them and sum.
        """

    def summary(self) -> str:
        """Describe ratio, clip, KL and correction in one line, for the start of a run."""
        return str(self)

    def prepare(self, view: StepView) -> StepInputs:
        """Return `batch.inputs` of an update, from a look at the whole of it under its initial policy."""
        return StepInputs(extra=view.adapted)

    def adapt(self, adapted: dict[str, float], entropy: float) -> dict[str, float]:
        """Return the numbers that change from step to step; they are logged and saved with a checkpoint.

        adapted: the result of the last step, at first empty. entropy: the mean of the step's tokens in nats, or nan.
        """
        return adapted
