"""Every loss with the settings its laws are tested under, and a toy policy that gives it log-probs in float64."""

from __future__ import annotations

import functools
from dataclasses import replace

import records
import torch
from torch import Tensor

from rlft.algos.loss import Loss
from rlft.algos.losses.apo import Apo
from rlft.algos.losses.cispo import Cispo
from rlft.algos.losses.cpo import Cpo
from rlft.algos.losses.dft import Dft
from rlft.algos.losses.dpo import Dpo
from rlft.algos.losses.dppo import Dppo
from rlft.algos.losses.exo import Exo
from rlft.algos.losses.gmpo import Gmpo
from rlft.algos.losses.grpo import Grpo
from rlft.algos.losses.gspo import Gspo
from rlft.algos.losses.hinge import Hinge
from rlft.algos.losses.ipo import Ipo
from rlft.algos.losses.kto import Kto
from rlft.algos.losses.nca import Nca
from rlft.algos.losses.orpo import Orpo
from rlft.algos.losses.reinforce import Reinforce
from rlft.algos.losses.rloo import Rloo
from rlft.algos.losses.robust_dpo import RobustDpo
from rlft.algos.losses.rpo import Rpo
from rlft.algos.losses.sapo import Sapo
from rlft.algos.losses.sft import Sft
from rlft.algos.losses.simpo import Simpo
from rlft.algos.losses.sppo import Sppo
from rlft.algos.losses.topr import Topr
from rlft.algos.losses.vespo import Vespo
from rlft.algos.policy_loss import PolicyLoss
from rlft.types import Aggregation, Batch, Counts, PackPlan, Prompt, Rollout, StepInputs

VOCAB = 7
LOSSES: dict[str, Loss] = {
    "grpo": Grpo(),
    "grpo-uncorrected": Grpo(correction="none"),
    "grpo-kl": Grpo(kl_coef=0.3, clip_high=0.28),
    "grpo-k1": Grpo(kl_coef=0.3, kl="k1_ratio", delta=1.5),
    "grpo-k2": Grpo(kl_coef=0.3, kl="k2", correction="none"),
    "grpo-forward": Grpo(kl_coef=0.3, kl="forward", correction_cap=1.1),
    "grpo-decoupled": Grpo(clip_high=0.28, correction="decoupled"),
    "grpo-bypass": Grpo(clip_high=0.28, correction="bypass"),
    "grpo-icepop": Grpo(correction_weight="token_mask", correction_floor=0.9, correction_cap=1.2),
    "grpo-sequence-tis": Grpo(correction_weight="sequence_truncate", correction_cap=1.5),
    "grpo-sequence-mask": Grpo(correction_weight="sequence_mask", correction_cap=1.3),
    "grpo-gate": Grpo(sequence_mask_low=0.95, sequence_mask_high=1.05),
    "grpo-opsm": Grpo(correction="none", off_policy_limit=0.05),
    "grpo-entropy": Grpo(entropy_coef=0.2, entropy_share=0.5),
    "gspo": Gspo(clip_low=0.2, clip_high=0.3),
    "gspo-uncorrected": Gspo(clip_low=0.2, clip_high=0.3, correction="none", kl_coef=0.1),
    "gspo-sequence": Gspo(clip_low=0.2, clip_high=0.3, form="sequence"),
    "cispo": Cispo(clip_max=1.2),
    "sapo": Sapo(),
    "gmpo": Gmpo(clip_low=0.2, clip_high=0.2),
    "rloo": Rloo(),
    "reinforce": Reinforce(),
    "dppo": Dppo(limit_low=0.03, limit_high=0.03),
    "dppo-kl": Dppo(divergence="kl", limit_low=0.003, limit_high=0.003),
    "topr": Topr(),
    "topr-token": Topr(level="token"),
    "vespo": Vespo(),
    "sft": Sft(),
    "dft": Dft(),
    "dpo": Dpo(),
    "cdpo": Dpo(label_smoothing=0.2),
    "robust_dpo": RobustDpo(label_smoothing=0.2),
    "ipo": Ipo(),
    "ipo-sum": Ipo(length="sum"),
    "exo": Exo(),
    "nca": Nca(),
    "sppo": Sppo(),
    "hinge": Hinge(),
    "apo-zero": Apo(),
    "apo-down": Apo(variant="down"),
    "rpo": Rpo(nll_coef=0.5),
    "simpo": Simpo(),
    "cpo": Cpo(label_smoothing=0.1),
    "orpo": Orpo(),
    "kto": Kto(desirable_weight=1.2),
}
PAIRS = tuple(name for name, loss in LOSSES.items() if loss.whole_groups)
"""Losses over whole groups: here of two rows, the second of which is the better one."""
POLICY = {name: loss for name, loss in LOSSES.items() if isinstance(loss, PolicyLoss)}


def file_of(loss: Loss) -> str:
    """The file of a loss, which is its name in a config: "grpo"."""
    return type(loss).__module__.rpartition(".")[2]


class Toy:
    """logprobs of a packed batch in float64: the token, its position and its source's token through an embedding."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, 4, generator=g, dtype=torch.float64, requires_grad=True)
        self.head = torch.randn(4, VOCAB, generator=g, dtype=torch.float64, requires_grad=True)
        self.shift = torch.randn(VOCAB, VOCAB, generator=g, dtype=torch.float64) * 0.5

    def both(self, batch: Batch, off: float = 0.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [T]; off: how far the weights are moved, for old, sampler and reference policies."""
        before = batch.input_ids[batch.source.clamp(min=0)]
        log_p = (self.embedding[before] @ self.head + off * self.shift[before]).log_softmax(-1)
        return log_p.gather(1, batch.input_ids[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)

    def logprobs(self, batch: Batch, off: float = 0.0) -> Tensor:
        return self.both(batch, off)[0]

    def filled(self, batch: Batch, old: bool = True, sampler: bool = True) -> Batch:
        """The batch with log-probs of three other policies; one engine noise per token id and position."""
        with torch.no_grad():
            noise = 0.3 * torch.sin(1.0 * batch.position_ids + batch.input_ids)
            before = self.logprobs(batch, 0.7)
            return replace(
                batch,
                old_logprobs=before if old else None,
                sampler_logprobs=before + noise if sampler else None,
                ref_logprobs=self.logprobs(batch, -0.8),
                inputs=StepInputs(z0=0.1, entropy_floor=1.3),
            )

    def loss(self, batch: Batch, name: str) -> Tensor:
        """The loss `name` of a filled batch, with gradient to the weights."""
        now, entropy = self.both(batch)
        return LOSSES[name](now, replace(batch, entropy=entropy))[0]

    def gradient(self, batches: list[Batch], name: str) -> tuple[float, Tensor]:
        """Loss summed over filled micro-batches, and the flat gradient."""
        total = torch.stack([self.loss(batch, name) for batch in batches]).sum()
        grads = torch.autograd.grad(total, (self.embedding, self.head))
        return total.item(), torch.cat([g.flatten() for g in grads])


def step(lengths: tuple[int, ...] = (3, 1, 4, 2, 0, 5, 2, 3), group: int = 4) -> list[Rollout]:
    """Rollouts in groups, one of them empty, one with a token of a tool."""
    made = []
    for i, n in enumerate(lengths):
        g, s = divmod(i, group)
        prompt = Prompt(tuple((g + 2 * t) % VOCAB for t in range(2 + g)), {}, g)
        ids = tuple((3 * i + t * t + 1) % VOCAB for t in range(n))
        mask = tuple(not (i == 2 and t == 1) for t in range(n))
        made.append(Rollout(prompt, ids, mask, None, "", "stop", s, 0, 0))
    return made


def batches_of(
    made: list[Rollout],
    aggregation: Aggregation = "token_mean",
    budget: int = 1000,
    share: bool = True,
    values: Tensor | None = None,
    whole_groups: bool = False,
    counts: Counts | None = None,
) -> list[Batch]:
    plan = PackPlan(aggregation, budget, 6, 1.0, whole_groups, share)
    values = torch.linspace(-1, 1.5, len(made)) if values is None else values
    return records.packed(made, plan, values, counts=counts)


def rows_of(pair: bool) -> tuple[list[Rollout], Tensor]:
    """A step and its advantages, for a pair loss or another one."""
    values = torch.tensor([-1.0, 1.0] * 4) if pair else torch.linspace(-1, 1.5, 8)
    return step(group=2 if pair else 4), values


@functools.cache
def filled_step(
    pair: bool, aggregation: Aggregation = "token_mean", budget: int = 1000, share: bool = True
) -> list[Batch]:
    """The micro-batches of that step with the log-probs of the other policies; nothing in them may be changed."""
    made, values = rows_of(pair)
    return [Toy().filled(batch) for batch in batches_of(made, aggregation, budget, share, values, pair)]
