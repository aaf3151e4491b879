"""DPO by hand, and its laws on packed pairs."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import records
import torch
from torch import Tensor

from rlft.algos.losses.dpo import Dpo
from rlft.errors import ConfigError
from rlft.types import Batch, PackPlan, Prompt, Rollout

LENGTHS = ((5, 2), (3, 7), (1, 4), (6, 6))
"""Tokens of the chosen and the rejected side of each pair."""
LONGEST = 7


def pairs() -> list[Rollout]:
    made = []
    for p, lengths in enumerate(LENGTHS):
        prompt = Prompt(tuple(range(1, 3 + p)), {}, p)
        for side, n in enumerate(lengths):
            made.append(Rollout(prompt, tuple(range(9, 9 + n)), (True,) * n, None, "", "stop", side, -1, 0))
    return made


def packed(now: Tensor, ref: Tensor, budget: int = 25, share: bool = True) -> list[tuple[Batch, Tensor]]:
    """Micro-batches with reference log-probs from `ref` [8, 7], and which cell of that grid each token is."""
    made = pairs()
    plan = PackPlan(Dpo.aggregation, budget, LONGEST, 1.0, whole_groups=True, share_prefix=share)
    found = []
    for batch in records.packed(made, plan, torch.tensor([1.0, -1.0] * len(LENGTHS))):
        own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
        cells = torch.zeros(len(batch.input_ids), dtype=torch.long)
        for s, row in zip(own, records.rows(batch, made), strict=True):
            mine = ((batch.seq_ids == s) & batch.train_mask).nonzero().squeeze(1)
            cells[mine] = row * LONGEST + torch.arange(len(mine))
        found.append((replace(batch, ref_logprobs=ref.flatten()[cells]), cells))
    return found


def grids() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    now = -2 + torch.rand(2 * len(LENGTHS), LONGEST, generator=g, dtype=torch.float64)
    return now, now + (torch.rand(now.shape, generator=g, dtype=torch.float64) - 0.5) * 2


def total(now: Tensor, ref: Tensor, budget: int = 25, share: bool = True) -> tuple[Tensor, dict[str, float]]:
    value, sums = torch.zeros((), dtype=torch.float64), defaultdict(lambda: [0.0, 0.0])
    for batch, cells in packed(now, ref, budget, share):
        loss, stats = Dpo(beta=0.3)(now.flatten()[cells], batch)
        value = value + loss
        for name, stat in stats.items():
            sums[name][0] += float(stat.value)
            sums[name][1] += float(stat.count)
    return value, {name: a / b for name, (a, b) in sums.items()}


def test_the_first_loss_is_ln_2() -> None:
    now, _ = grids()
    assert total(now, now)[0].item() == pytest.approx(0.69315, abs=1e-5) == pytest.approx(math.log(2), abs=1e-5)


def test_swapping_the_sides_turns_the_margin_round() -> None:
    """-log sigmoid(x) and -log sigmoid(-x) differ by x: the mean loss changes by the mean margin."""
    now, ref = grids()
    value, stats = total(now, ref)
    turned = torch.zeros((), dtype=torch.float64)
    for batch, cells in packed(now, ref):
        swapped = replace(batch, advantages=-batch.advantages)
        turned = turned + Dpo(beta=0.3)(now.flatten()[cells], swapped)[0]
    assert turned.item() - value.item() == pytest.approx(stats["rewards/margins"], abs=1e-12)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 20, 40])
def test_no_split_changes_loss_or_gradient(budget: int, share: bool) -> None:
    now, ref = grids()
    results = []
    for b, s in ((1000, True), (budget, share)):
        leaf = now.clone().requires_grad_()
        value, _ = total(leaf, ref, b, s)
        value.backward()
        results.append((value.item(), leaf.grad))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    assert (results[0][1] - results[1][1]).abs().max() < 1e-12


def test_a_wild_log_ratio_and_a_token_of_weight_zero_leave_the_gradient_finite() -> None:
    now, ref = grids()
    for batch, cells in packed(now, ref):
        row = batch.train_mask.nonzero()[0]
        batch = replace(batch, weight=batch.weight.index_fill(0, row, 0.0), ref_logprobs=batch.ref_logprobs + 1e4)
        leaf = now.flatten()[cells].index_fill(0, row, float("nan")).requires_grad_()
        value, stats = Dpo()(leaf, batch)
        value.backward()
        assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad[row] == 0
        assert all(math.isfinite(float(s.value)) for s in stats.values())


def test_an_empty_side_adds_nothing_to_the_margin() -> None:
    prompt = Prompt((1, 2), {}, 0)
    made = [Rollout(prompt, (5,) * n, (True,) * n, None, "", "stop", s, -1, 0) for s, n in enumerate((2, 0))]
    plan = PackPlan("sequence_sum", 100, 5, 1.0, whole_groups=True)
    (batch,) = records.packed(made, plan, torch.tensor([1.0, -1.0]))
    now = torch.where(batch.train_mask, -1.0, 0.0)
    batch = replace(batch, ref_logprobs=torch.where(batch.train_mask, -1.5, 0.0))
    value, _ = Dpo(beta=1.0)(now, batch)  # D = 2 * 0.5
    assert value.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_beta_must_be_above_zero() -> None:
    with pytest.raises(ConfigError, match=r"algo.beta = 0: want a number above 0"):
        Dpo(beta=0)
