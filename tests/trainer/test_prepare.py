"""What a step knows as a whole: KL in the reward against the enumerated truth, KTO's baseline, the inputs of
estimators; and kto, online pairs and labels through the loop."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import records
import torch
from torch import Tensor

from rlft.algos.algorithm import build_algorithm
from rlft.algos.losses.kto import Kto, mismatched
from rlft.config.run import Algo
from rlft.errors import ConfigError
from rlft.models.policy import Policy
from rlft.routes import Routes
from rlft.trainer.prepare import PackedStep, estimator_inputs, kl_in_reward
from rlft.types import Batch, PackPlan, Prompt, Rollout

PLAN = PackPlan("token_mean", 7, 4, 1.0)


def completion(ids: tuple[int, ...], prompt: int = 0, sample: int = 0) -> Rollout:
    return Rollout(Prompt((0, 1), {}, prompt), ids, (True,) * len(ids), None, "", "stop", sample, 0, 0)


class Table:
    """A policy over three tokens whose distribution depends on the token before: [3, 3] log-probs, and a reference."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.theta = torch.randn(3, 3, generator=g, dtype=torch.float64, requires_grad=True)
        self.ref = torch.randn(3, 3, generator=g, dtype=torch.float64).log_softmax(-1)

    def score(self, batch: Batch, weights: str = "policy") -> Tensor:
        table = self.ref if weights == "reference" else self.theta.detach().log_softmax(-1)
        before = batch.input_ids[batch.source.clamp(min=0)]
        return torch.where(batch.train_mask, table[before, batch.input_ids], 0)

    def logprob(self, ids: tuple[int, ...]) -> Tensor:
        table = self.theta.log_softmax(-1)
        return torch.stack([table[a, b] for a, b in itertools.pairwise((1, *ids))]).sum()


def test_kl_in_the_reward_has_the_gradient_of_the_kl_of_whole_sequences() -> None:
    """Two tokens: what the first one does to the KL of the second is in it, as in no term of the loss."""
    policy, coef = Table(), 0.3
    every = list(itertools.product(range(3), repeat=2))
    rollouts = [completion(ids, sample=i) for i, ids in enumerate(every)]
    algorithm = build_algorithm(Algo("reinforce", {"kl": "reward", "kl_coef": coef}))
    rewards, stats = kl_in_reward(cast(Policy, policy), algorithm, PLAN, records.samples(rollouts, [0.0] * 9))
    logs = torch.stack([policy.logprob(ids) for ids in every])
    reinforce = -(logs.detach().exp() * rewards.double() * logs).sum()
    got = torch.autograd.grad(reinforce, policy.theta, retain_graph=True)[0]
    ref = torch.stack(
        [torch.stack([policy.ref[a, b] for a, b in itertools.pairwise((1, *ids))]).sum() for ids in every]
    )
    kl = (logs.exp() * (logs - ref)).sum()
    want = torch.autograd.grad(coef * kl, policy.theta)[0]
    assert (got - want).abs().max() < 1e-6 < want.abs().max()
    d = logs.detach() - ref
    assert stats["kl/k1"].value == pytest.approx(d.sum().item()) and stats["kl/k1"].count == 18


def test_kl_elsewhere_leaves_rewards_alone_and_invalid_ones_stay_invalid() -> None:
    policy, rollouts = cast(Policy, Table()), [completion((0,)), completion((1,), sample=1)]
    samples = records.samples(rollouts, [1.0, float("nan")])
    for options in ({"kl_coef": 0.1}, {"kl": "reward"}):
        same, stats = kl_in_reward(policy, build_algorithm(Algo("grpo", options)), PLAN, samples)
        assert same[0] == 1 and same[1].isnan() and stats == {}
    algorithm = build_algorithm(Algo("grpo", {"kl": "reward", "kl_coef": 0.1}))
    assert not algorithm.loss.needs_reference and algorithm.loss.zero_adv_zero_grad
    made, _ = kl_in_reward(policy, algorithm, PLAN, samples)
    assert made[1].isnan() and made[0] != 1


def test_kto_compares_with_completions_of_other_prompts() -> None:
    rollouts = [completion((0,), 0, 0), completion((1, 1), 0, 1), completion((2,), 1), completion((2, 0), 2)]
    other = mismatched(rollouts)
    assert [r.completion_ids for r in other] == [(2,), (2,), (2, 0), (0,)]
    assert [r.prompt.index for r in other] == [0, 0, 1, 2] and all(len(r.completion_mask) for r in other)
    routed = [replace(each, routes=Routes()) for each in rollouts]
    assert not any(each.routes for each in mismatched(routed)), "experts of another prompt's completion"
    policy = Table()
    gains = PackedStep(cast(Policy, policy), PLAN, rollouts, []).log_ratios(other)
    for gain, r in zip(gains, other, strict=True):
        ref = sum(policy.ref[a, b] for a, b in itertools.pairwise((1, *r.completion_ids)))
        assert gain.item() == pytest.approx((policy.logprob(r.completion_ids) - ref).item())
    z0 = Kto().prepare(PackedStep(cast(Policy, policy), PLAN, rollouts, [])).z0
    assert z0 == pytest.approx(max(0.0, gains.mean().item()))
    with pytest.raises(ConfigError, match="an update of one prompt: kto compares"):
        mismatched(rollouts[:2])


def test_estimators_get_lengths_and_parts_of_the_kept_rollouts() -> None:
    parts = {"a": [1.0, 3.0], "b": [0.0, 0.0]}
    samples = records.samples([completion((0, 1)), completion((2,))], [1.0, 3.0], parts)
    made = estimator_inputs(samples, {"a": 1.0, "b": 0.5})
    assert made["lengths"].tolist() == [2, 1] and made["weights"].tolist() == [1, 0.5]
    assert made["parts"].tolist() == [[1, 0], [3, 0]]


def test_the_quantile_of_entropies_is_torchs() -> None:
    entropies = torch.rand(40, generator=torch.Generator().manual_seed(3))
    batches: Any = [
        SimpleNamespace(train_mask=torch.ones(20, dtype=torch.bool), input_ids=torch.zeros(20), at=i) for i in (0, 20)
    ]
    policy: Any = SimpleNamespace(entropy=lambda batch: entropies[batch.at : batch.at + 20])
    for share in (0.0, 0.3, 0.8, 1.0):
        got = PackedStep(policy, PLAN, [], batches).entropy_quantile(share)
        assert got == pytest.approx(entropies.quantile(share).item())
