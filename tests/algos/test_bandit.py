"""Learning on tasks whose optimum is known: a bandit, and a choice that only pays with the right one after it. Each
loss reaches the optimum, and with its advantages turned round it does not."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from losses import LOSSES, POLICY, batches_of, file_of
from torch import Tensor

from rlft.algos.algorithm import estimator_of
from rlft.algos.loss import Loss
from rlft.algos.policy_loss import PolicyLoss
from rlft.types import Batch, Prompt, Rollout, StepInputs

ACTIONS = 4
PAYS: dict[str, dict[tuple[int, ...], float]] = {
    "bandit": {(0,): 0.2, (1,): 0.0, (2,): 1.0, (3,): 0.5},
    # A second choice of 0 pays a little after any first one; only 1 then 3 pays in full.
    "two states": {(a, b): 1.0 if (a, b) == (1, 3) else 0.4 * (b == 0) for a in range(ACTIONS) for b in range(ACTIONS)},
}
SAMPLED = {file_of(loss): type(loss) for loss in POLICY.values()}
RECORDED = {file_of(loss): type(loss) for loss in LOSSES.values() if file_of(loss) not in SAMPLED}


class Table:
    """Log-probs of the next action by the token before it; the prompt is token `ACTIONS`. It starts uniform."""

    def __init__(self) -> None:
        self.logits = torch.zeros(ACTIONS + 1, ACTIONS, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=0.1)

    def logprobs(self, batch: Batch) -> Tensor:
        before, action = batch.input_ids[batch.source.clamp(min=0)], batch.input_ids.clamp(max=ACTIONS - 1)
        return torch.where(batch.train_mask, self.logits.log_softmax(-1)[before, action], 0)

    def chance(self, completion: tuple[int, ...]) -> float:
        log_p = self.logits.detach().log_softmax(-1)
        return float(sum(log_p[a, b] for a, b in itertools.pairwise((ACTIONS, *completion))).exp())

    def value(self, pays: dict[tuple[int, ...], float]) -> float:
        """Expected reward, exactly."""
        return sum(self.chance(completion) * reward for completion, reward in pays.items())

    def sample(self, rows: int, length: int, g: torch.Generator) -> Tensor:
        chosen = torch.full((rows, 1), ACTIONS)
        for _ in range(length):
            p = self.logits.detach().softmax(-1)[chosen[:, -1]]
            chosen = torch.cat([chosen, torch.multinomial(p, 1, generator=g)], 1)
        return chosen[:, 1:]

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@functools.cache
def frame(aggregation: Any, groups: int, size: int, length: int, whole: bool = False) -> Batch:
    """A packed batch of that shape, prompts not shared; actions and advantages are put into it."""
    made = [
        Rollout(Prompt((ACTIONS,), {}, g), (0,) * length, (True,) * length, None, "", "stop", s, 0, 0)
        for g in range(groups)
        for s in range(size)
    ]
    (batch,) = batches_of(made, aggregation, 1000, False, torch.ones(len(made)), whole)
    return batch


def filled(batch: Batch, actions: Tensor, advantages: Tensor) -> Batch:
    """The batch with these completions [N, length] and advantages [N]."""
    n, length = actions.shape
    size = n // len(batch.group_weight)
    order = [sample.rollout.prompt.index * size + sample.rollout.sample_index for sample in batch.samples]
    ids, value = batch.input_ids.clone(), torch.zeros(len(batch.input_ids))
    ids[batch.train_mask] = actions[order].flatten()
    value[batch.train_mask] = advantages[order].float().repeat_interleave(length)
    assert n == len(order)
    return replace(batch, input_ids=ids, advantages=value)


def trained(cls: type[PolicyLoss], task: str, sign: float) -> Table:
    """60 rollout batches of two updates each: the second one is off its sampler."""
    table, g, loss = Table(), torch.Generator().manual_seed(0), cls()
    estimator, pays = estimator_of(loss.advantage), PAYS[task]
    length, group_ids = len(next(iter(pays))), torch.arange(4).repeat_interleave(16)
    for _ in range(60):
        actions = table.sample(64, length, g)
        rewards = torch.tensor([pays[tuple(row)] for row in actions.tolist()])
        advantages = sign * estimator(rewards, group_ids, lengths=torch.full((64,), length))
        batch = filled(frame(loss.aggregation, 4, 16, length), actions, advantages)
        now = table.logprobs(batch).detach()
        batch = replace(batch, old_logprobs=now if loss.has_ratio else None, sampler_logprobs=now)
        for _ in range(2):
            table.update(loss(table.logprobs(batch), batch)[0])
    return table


@pytest.mark.parametrize("task", PAYS)
@pytest.mark.parametrize("name", SAMPLED)
def test_a_policy_loss_reaches_the_optimum_and_its_opposite_does_not(name: str, task: str) -> None:
    start = Table().value(PAYS[task])
    assert trained(SAMPLED[name], task, 1).value(PAYS[task]) > 0.9
    assert trained(SAMPLED[name], task, -1).value(PAYS[task]) < start


def fitted(cls: type[Loss], task: str, sign: float) -> Table:
    """Recorded completions: the best one is chosen or good; every other one is rejected or bad, or left out."""
    table, loss, pays = Table(), cls(), PAYS[task]
    best, length = max(pays, key=lambda row: pays[row]), len(next(iter(pays)))
    others = [row for row in pays if row != best]
    single = not loss.whole_groups and not loss.needs_reference  # supervised: only the good side
    rows = [best] * len(others) if single else [row for other in others for row in (best, other)]
    advantages = sign * torch.tensor([1.0 if row == best else -1.0 for row in rows])
    shape = (len(rows), 1) if single else (len(others), 2)
    batch = filled(frame(loss.aggregation, *shape, length, loss.whole_groups), torch.tensor(rows), advantages)
    if loss.needs_reference:
        batch = replace(batch, ref_logprobs=table.logprobs(batch).detach(), inputs=StepInputs(z0=0.0))
    for _ in range(100):
        table.update(loss(table.logprobs(batch), batch)[0])
    return table


@pytest.mark.parametrize("task", PAYS)
@pytest.mark.parametrize("name", RECORDED)
def test_a_loss_over_recorded_rows_makes_the_best_the_likeliest_and_its_opposite_does_not(name: str, task: str) -> None:
    pays = PAYS[task]
    best = max(pays, key=lambda row: pays[row])
    for sign in (1, -1):
        table = fitted(RECORDED[name], task, sign)
        likeliest = max(pays, key=lambda row: table.chance(row))
        assert (likeliest == best) == (sign > 0)
        assert (table.chance(best) > 2 / len(pays)) == (sign > 0)
