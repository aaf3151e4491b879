"""The base of the preference losses: common settings, the two sides of each pair, and the weighted sum over pairs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlft.algos.checks import check_above_zero
from rlft.algos.loss import Loss
from rlft.algos.pairs import Pairs, read
from rlft.types import Aggregation, Batch, Stats


@dataclass(frozen=True)
class PairLoss(Loss):
    """A loss over pairs, with the settings of [algo] common to all of them."""

    aggregation: ClassVar[Aggregation] = "sequence_sum"
    needs_reference: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = True

    advantage: str = "identity"
    """"identity" for recorded pairs; "best_and_worst" for a pair from each sampled group (online)."""
    beta: float = 0.1
    """Factor of the margin: small values let the policy move further from the reference."""

    def __post_init__(self) -> None:
        check_above_zero(beta=self.beta)

    @abstractmethod
    def pair_loss(self, pairs: Pairs) -> tuple[Tensor, Stats]:
        """Return the loss of each pair, [pairs] with gradient, and the metrics."""

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        """Return the weighted sum of `pair_loss` (0-dim) and its metrics. logprobs: [T] with gradient."""
        assert batch.ref_logprobs is not None or not self.needs_reference
        pairs = read(logprobs, batch)
        loss, stats = self.pair_loss(pairs)
        return pairs.total(loss), stats
