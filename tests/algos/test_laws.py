"""Laws that every loss obeys, one parametrised test for each."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import records
import torch
from losses import LOSSES, PAIRS, POLICY, Toy, batches_of, file_of, filled_step, rows_of, step

from rlft.algos import algorithm
from rlft.algos.advantages import ESTIMATORS
from rlft.algos.loss import Loss
from rlft.algos.pair_loss import PairLoss
from rlft.algos.policy_loss import PolicyLoss
from rlft.batch import count
from rlft.config import resolve
from rlft.config.files import presets
from rlft.types import Aggregation, Batch, PackPlan, Prompt, Rollout

TOY = Toy()


def test_every_file_of_the_folder_is_under_the_laws() -> None:
    files = set(resolve.names_in(algorithm.LOSSES))
    assert files == {file_of(loss) for loss in LOSSES.values()}
    for loss in LOSSES.values():
        text = " ".join((inspect.getdoc(inspect.getmodule(loss)) or "").split())
        assert "The five choices:" in text, file_of(loss)


def test_no_loss_extends_another_loss() -> None:
    for loss in LOSSES.values():
        assert type(loss).__bases__ in ((Loss,), (PolicyLoss,), (PairLoss,)), file_of(loss)


def test_the_page_of_algorithms_has_every_loss_estimator_and_preset() -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    names = {file_of(loss) for loss in LOSSES.values()} | set(ESTIMATORS) | set(presets())
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("name", LOSSES)
def test_no_split_of_a_step_changes_loss_or_gradient(name: str, aggregation: Aggregation) -> None:
    pair = name in PAIRS
    value, whole = TOY.gradient(filled_step(pair, aggregation), name)
    assert whole.abs().max() > 1e-3
    for budget, share in ((1, True), (8, False), (13, True)):
        split = filled_step(pair, aggregation, budget, share)
        assert len(split) > 1
        other_value, other = TOY.gradient(split, name)
        assert other_value == pytest.approx(value, abs=1e-12)
        assert (other - whole).abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_groups_changes_nothing(name: str) -> None:
    pair = name in PAIRS
    made, values = rows_of(pair)
    turned = [*range(4, 8), *range(4)]
    other = batches_of([made[i] for i in turned], "prompt_mean", values=values[turned], whole_groups=pair)
    first, second = filled_step(pair, "prompt_mean"), [TOY.filled(batch) for batch in other]
    assert (TOY.gradient(first, name)[1] - TOY.gradient(second, name)[1]).abs().max() < 1e-12


PLAIN = [name for name, loss in POLICY.items() if not loss.kl_coef and "entropy" not in name]
"""Losses that claim REINFORCE's gradient where policy, old and sampler are one."""


@pytest.mark.parametrize("name", [*PLAIN, "sft"])
def test_the_on_policy_gradient_is_that_of_reinforce(name: str) -> None:
    assert len(PLAIN) > 15
    for batch in batches_of(step(), "sequence_sum", budget=13):
        reinforce = -(batch.weight.double() * batch.advantages * TOY.logprobs(batch)).sum()
        grads = torch.autograd.grad(reinforce, (TOY.embedding, TOY.head))
        want = torch.cat([g.flatten() for g in grads])
        assert want.abs().max() > 1e-3
        now = TOY.logprobs(batch).detach()
        same = replace(TOY.filled(batch, old=False), sampler_logprobs=now)
        assert (TOY.gradient([same], name)[1] - want).abs().max() < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_a_token_of_weight_zero_may_hold_anything(name: str, bad: float) -> None:
    (batch,) = filled_step(name in PAIRS)
    out = batch.seq_ids == int(batch.seq_ids[batch.train_mask][0])
    batch = replace(batch, weight=torch.where(out, 0, batch.weight))
    now, entropy = (x.detach() for x in TOY.both(batch))
    names = ("old_logprobs", "sampler_logprobs", "ref_logprobs")
    spoiled = {f: torch.where(out, bad, getattr(batch, f)) for f in names}
    grads = []
    for logprobs, fields in ((now, {}), (torch.where(out, bad, now), spoiled)):
        leaf = logprobs.clone().requires_grad_()
        value, stats = LOSSES[name](leaf, replace(batch, entropy=entropy, **fields))
        value.backward()
        assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()
        assert all(math.isfinite(stat.value) for stat in stats.values())
        assert (leaf.grad[out] == 0).all()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1]) and grads[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_weight_zero_equals_the_row_removed(name: str) -> None:
    """The counts stay those of the whole step: what is left out keeps its place in the denominator."""
    pair = name in PAIRS
    made, values = rows_of(pair)
    plan = PackPlan("sequence_mean", 1000, 6, 1.0, pair)
    gone = (0, 1) if pair else (0,)
    rest = [i for i in range(8) if i not in gone]
    less = batches_of(
        [made[i] for i in rest], plan.aggregation, 1000, True, values[rest], pair, count(records.groups(made))
    )
    (whole,) = filled_step(pair, "sequence_mean")
    own = [s for s in range(len(whole.prefix)) if whole.group_ids[s] >= 0]
    out = torch.isin(whole.seq_ids, torch.tensor([own[records.rows(whole, made).index(row)] for row in gone]))
    masked = replace(whole, weight=torch.where(out, 0, whole.weight))
    removed = [TOY.filled(batch) for batch in less]
    assert (TOY.gradient([masked], name)[1] - TOY.gradient(removed, name)[1]).abs().max() < 1e-12


@pytest.mark.parametrize("size", [1e4, -1e4, math.inf])
@pytest.mark.parametrize("which", ["old_logprobs", "sampler_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("name", LOSSES)
def test_wild_log_ratios_leave_loss_and_gradient_finite(name: str, which: str, size: float) -> None:
    """size: added to those log-probs; an infinite one is taken off, for tokens that another policy gives no chance."""
    (batch,) = filled_step(name in PAIRS)
    wild = getattr(batch, which) + (size if math.isfinite(size) else -size)
    now, entropy = (x.float().detach() for x in TOY.both(batch))
    now.requires_grad_()
    value, stats = LOSSES[name](now, replace(batch, entropy=entropy, **{which: wild.float()}))
    value.backward()
    assert value.isfinite() and now.grad is not None and now.grad.isfinite().all()
    assert all(math.isfinite(stat.value) for stat in stats.values())


def one_token(advantage: float, ratio: float) -> Batch:
    """A batch of one trained token, with `ratio` = now / old = now / sampler where now is -1."""
    made = [Rollout(Prompt((0,), {}, 0), (1,), (True,), None, "", "stop", 0, 0, 0)]
    (batch,) = batches_of(made, "sequence_sum", values=torch.tensor([advantage]))
    before = torch.tensor([0.0, -1 - math.log(ratio)])
    return replace(batch, old_logprobs=before, sampler_logprobs=before, ref_logprobs=before)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", ["grpo", "grpo-bypass", "gspo", "gspo-sequence", "gmpo", "rloo", "dppo", "dppo-kl"])
def test_the_clipped_side_has_zero_gradient_and_the_other_has_not(name: str, advantage: float) -> None:
    for ratio in (1.6, 0.6):
        now = torch.tensor([0.0, -1.0], requires_grad=True)
        value, stats = LOSSES[name](now, one_token(advantage, ratio))
        value.backward()
        assert now.grad is not None
        clipped = (ratio > 1) == (advantage > 0)
        assert bool(now.grad[1] == 0) == clipped
        side = "high" if ratio > 1 else "low"
        assert float(stats[f"clip_ratio/{side}_mean"].value) == float(clipped)


def test_a_batch_of_zero_advantage_has_exactly_zero_gradient_where_the_loss_says_so() -> None:
    for name in LOSSES.keys() - set(PAIRS):  # a pair of zero advantages has no better side
        says = LOSSES[name].zero_adv_zero_grad
        batches = [TOY.filled(batch) for batch in batches_of(step(), values=torch.zeros(8))]
        assert bool((TOY.gradient(batches, name)[1] == 0).all()) == says, name


def test_a_group_without_a_better_side_is_no_pair() -> None:
    """Online training: equal rewards. It adds nothing, and the other pairs keep their share of 1 / groups."""
    made, values = rows_of(pair=True)
    tied = torch.where(torch.arange(8) < 2, 0.0, values)
    for name in PAIRS:
        whole = [TOY.filled(b) for b in batches_of(made, "sequence_sum", values=tied, whole_groups=True)]
        less = batches_of(
            made[2:], "sequence_sum", values=values[2:], whole_groups=True, counts=count(records.groups(made))
        )
        got, want = TOY.gradient(whole, name), TOY.gradient([TOY.filled(b) for b in less], name)
        assert got[0] == pytest.approx(want[0], abs=1e-12) and (got[1] - want[1]).abs().max() < 1e-12
