"""Every loss with the settings its laws are tested under, and a toy policy that gives it log-probs in float64."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlft.algos.losses import (
    apo,
    cispo,
    cpo,
    dft,
    dpo,
    dppo,
    exo,
    gmpo,
    grpo,
    gspo,
    hinge,
    ipo,
    kto,
    nca,
    orpo,
    reinforce,
    rloo,
    robust_dpo,
    rpo,
    sapo,
    sft,
    simpo,
    sppo,
    topr,
    vespo,
)
from rlft.batch import count, pack
from rlft.types import Aggregation, Batch, Counts, PackPlan, Prompt, Rollout

VOCAB = 7
LOSSES: dict[str, tuple[ModuleType, Any]] = {
    "grpo": (grpo, grpo.Config()),
    "grpo-uncorrected": (grpo, grpo.Config(correction="none")),
    "grpo-kl": (grpo, grpo.Config(kl_coef=0.3, clip_high=0.28)),
    "grpo-k1": (grpo, grpo.Config(kl_coef=0.3, kl="k1_ratio", delta=1.5)),
    "grpo-k2": (grpo, grpo.Config(kl_coef=0.3, kl="k2", correction="none")),
    "grpo-forward": (grpo, grpo.Config(kl_coef=0.3, kl="forward", correction_cap=1.1)),
    "grpo-decoupled": (grpo, grpo.Config(clip_high=0.28, correction="decoupled")),
    "grpo-bypass": (grpo, grpo.Config(clip_high=0.28, correction="bypass")),
    "grpo-icepop": (grpo, grpo.Config(correction_weight="token_mask", correction_floor=0.9, correction_cap=1.2)),
    "grpo-sequence-tis": (grpo, grpo.Config(correction_weight="sequence_truncate", correction_cap=1.5)),
    "grpo-sequence-mask": (grpo, grpo.Config(correction_weight="sequence_mask", correction_cap=1.3)),
    "grpo-gate": (grpo, grpo.Config(sequence_mask_low=0.95, sequence_mask_high=1.05)),
    "grpo-opsm": (grpo, grpo.Config(correction="none", off_policy_limit=0.05)),
    "grpo-entropy": (grpo, grpo.Config(entropy_coef=0.2, entropy_share=0.5)),
    "gspo": (gspo, gspo.Config(clip_low=0.2, clip_high=0.3)),
    "gspo-uncorrected": (gspo, gspo.Config(clip_low=0.2, clip_high=0.3, correction="none", kl_coef=0.1)),
    "gspo-sequence": (gspo, gspo.Config(clip_low=0.2, clip_high=0.3, form="sequence")),
    "cispo": (cispo, cispo.Config(clip_max=1.2)),
    "sapo": (sapo, sapo.Config()),
    "gmpo": (gmpo, gmpo.Config(clip_low=0.2, clip_high=0.2)),
    "rloo": (rloo, rloo.Config()),
    "reinforce": (reinforce, reinforce.Config()),
    "dppo": (dppo, dppo.Config(limit_low=0.03, limit_high=0.03)),
    "dppo-kl": (dppo, dppo.Config(divergence="kl", limit_low=0.003, limit_high=0.003)),
    "topr": (topr, topr.Config()),
    "topr-token": (topr, topr.Config(level="token")),
    "vespo": (vespo, vespo.Config()),
    "sft": (sft, sft.Config()),
    "dft": (dft, dft.Config()),
    "dpo": (dpo, dpo.Config()),
    "cdpo": (dpo, dpo.Config(label_smoothing=0.2)),
    "robust_dpo": (robust_dpo, robust_dpo.Config(label_smoothing=0.2)),
    "ipo": (ipo, ipo.Config()),
    "ipo-sum": (ipo, ipo.Config(length="sum")),
    "exo": (exo, exo.Config()),
    "nca": (nca, nca.Config()),
    "sppo": (sppo, sppo.Config()),
    "hinge": (hinge, hinge.Config()),
    "apo-zero": (apo, apo.Config()),
    "apo-down": (apo, apo.Config(variant="down")),
    "rpo": (rpo, rpo.Config(nll_coef=0.5)),
    "simpo": (simpo, simpo.Config()),
    "cpo": (cpo, cpo.Config(label_smoothing=0.1)),
    "orpo": (orpo, orpo.Config()),
    "kto": (kto, kto.Config(desirable_weight=1.2)),
}
PAIRS = tuple(name for name, (module, _) in LOSSES.items() if module.WHOLE_GROUPS)
"""Losses over whole groups: here of two rows, the second of which is the better one."""
POLICY = tuple(name for name, (_, cfg) in LOSSES.items() if hasattr(cfg, "correction"))


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
                prepared={"z0": 0.1, "entropy_floor": 1.3},
            )

    def loss(self, batch: Batch, name: str) -> Tensor:
        """The loss `name` of a filled batch, with gradient to the weights."""
        module, cfg = LOSSES[name]
        now, entropy = self.both(batch)
        return module.loss(now, replace(batch, entropy=entropy), cfg)[0]

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
    plan = PackPlan((True,) * len(made), aggregation, budget, 6, 1.0, whole_groups, share)
    values = torch.linspace(-1, 1.5, len(made)) if values is None else values
    return pack(made, values, plan, counts or count(made, plan))


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
