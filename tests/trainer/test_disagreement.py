"""The gate sees single sequences, honest noise does not stop runs, and the message says what fits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import records
import torch
from tiny import prompts, tiny_policy, tiny_tokenizer

from rlft.config.data import Sampling
from rlft.config.run import Parity
from rlft.errors import ParityError
from rlft.rollout.eager import EagerEngine
from rlft.trainer import parity
from rlft.trainer.agreement import long_prompts
from rlft.trainer.disagreement import CAP
from rlft.types import Batch, PackPlan, Prompt, Rollout

PLAN = PackPlan("token_mean", 1000, 24, 1.0)
MEAN, SD, P99, OUTSIDE = 0.0373, 0.0507, 0.229, 0.091
"""Of |d| on an H100 (benchmarks/results/grpo_run); a ratio outside of [0.9, 1.1] is about |d| > 0.1."""


def limit_there() -> parity.Limit:
    """What a probe on that card gives."""
    return parity.limit(parity.Probe(MEAN, MEAN, 1.0, 1000, 0.0, SD), Parity())


def draws(kind: str, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """|d| in nats of that mean; gamma and log-normal of that standard deviation, "t" without a third moment."""
    ratio = (SD / MEAN) ** 2
    if kind == "gamma":
        return generator.gamma(1 / ratio, MEAN * ratio, size)
    if kind == "lognormal":
        return generator.lognormal(math.log(MEAN) - math.log1p(ratio) / 2, math.log1p(ratio) ** 0.5, size)
    nu = 2.6
    mean_of_t = 2 * nu**0.5 * math.gamma((nu + 1) / 2) / (math.gamma(nu / 2) * (nu - 1) * math.pi**0.5)
    return np.abs(generator.standard_t(nu, size)) * (MEAN / mean_of_t)


@pytest.mark.parametrize("kind", ["gamma", "lognormal", "t"])
def test_honest_heavy_tailed_noise_stops_no_run(kind: str) -> None:
    """A million sequences of 1 to 512 tokens with the noise of an H100, and none is stopped."""
    generator, most = np.random.default_rng(0), limit_there()
    sample = draws(kind, (1000, 400), generator)
    assert sample.mean() == pytest.approx(MEAN, rel=0.05) and np.quantile(sample, 0.99) == pytest.approx(P99, rel=0.15)
    assert 0.05 < (sample > 0.1).mean() < 0.13  # OUTSIDE is between
    for tokens, sequences in ((1, 400_000), (2, 300_000), (3, 200_000), (8, 80_000), (32, 20_000), (512, 1_000)):
        means = np.minimum(draws(kind, (sequences, tokens), generator), CAP).mean(1)
        assert (means > float(most.allowed(torch.tensor([tokens])))).sum() == 0, tokens


@pytest.mark.parametrize("tokens", [4, 8, 32, 512])
def test_two_nats_are_seen_in_every_sequence_of_four_tokens(tokens: int) -> None:
    generator, most = np.random.default_rng(1), limit_there()
    off = np.abs(draws("gamma", (2000, tokens), generator) * generator.choice([-1, 1], (2000, tokens)) + 2)
    assert (np.minimum(off, CAP).mean(1) > float(most.allowed(torch.tensor([tokens])))).all()


def sampled(count_: int = 10, max_tokens: int = 24):
    policy = tiny_policy(trained=0.3)
    engine = EagerEngine(policy, tiny_tokenizer())
    engine.load_adapter(policy.adapter(), version=0)
    return policy, engine.generate(prompts(count_), Sampling(group_size=2, max_tokens=max_tokens), (1, 0))


def mismatch_of(rollouts: list[Rollout], score) -> parity.Mismatch:
    found, plan = parity.Mismatch(), PLAN
    for batch in records.packed(rollouts, plan):
        found.add(score(batch), batch)
    return found


def shifted(rollout: Rollout, by: float, start: int = 0) -> Rollout:
    """The rollout with sampler log-probs off by `by` from token `start` on."""
    values = rollout.sampler_logprobs or ()
    return replace(rollout, sampler_logprobs=tuple(x + by * (i >= start) for i, x in enumerate(values)))


def longest(rollouts: list[Rollout]) -> int:
    return max(range(len(rollouts)), key=lambda i: len(rollouts[i].completion_ids))


def test_one_sequence_of_twenty_is_stopped_and_named() -> None:
    policy, rollouts = sampled()
    at = longest(rollouts)
    rollouts[at] = shifted(rollouts[at], 2.0)
    found = mismatch_of(rollouts, policy.score)
    assert found.mean < 0.25 and found.sd > 0.1
    most = parity.Limit.of(0.2 if found.mean <= 0.2 else 0.25, 5.0)
    row, sample, n = rollouts[at].prompt.index, rollouts[at].sample_index, len(rollouts[at].completion_ids)
    wanted = rf"about 1 of 20 sequences, most about sample {sample} of row {row} of the data: .* 2 nat over its {n} "
    with pytest.raises(ParityError, match=wanted + ".*Token ids or weights fit"):
        parity.gate(found, most, policy.score)
    # In separate micro-batches the sums are the same.
    apart = parity.Mismatch()
    for rollout in rollouts:
        plan = PLAN
        for batch in records.packed([rollout], plan):
            apart.add(policy.score(batch), batch)
    assert apart.excess(most) == pytest.approx(found.excess(most), abs=1e-4) and apart.tokens == found.tokens


def test_a_fault_beyond_a_position_is_said() -> None:
    policy, rollouts = sampled()
    rollouts = [shifted(r, 2.0, max(0, 20 - len(r.prompt.ids))) for r in rollouts]
    assert sum(len(r.prompt.ids) + len(r.completion_ids) > 24 for r in rollouts) >= 2
    with pytest.raises(ParityError, match=r"Positions fit the numbers: tokens before position 20 are .*sliding window"):
        parity.gate(mismatch_of(rollouts, policy.score), parity.Limit.of(0.02, 5.0), policy.score)


def test_what_packing_and_another_pass_do_is_not_called_temperature() -> None:
    policy, rollouts = sampled()

    def packed(batch: Batch):
        return policy.score(batch) + (2.0 if len(batch.samples) > 1 else 0.0)

    most = parity.Limit.of(0.02, 5.0)
    with pytest.raises(ParityError, match="Packing fits the numbers"):
        parity.gate(mismatch_of(rollouts, packed), most, packed)
    noisy = mismatch_of(rollouts, lambda batch: policy.score(batch) * 1.3)  # as at a lower temperature
    with pytest.raises(ParityError, match=r"a pass that computes otherwise with a gradient than without fits"):
        parity.gate(noisy, most, policy.score)


def test_the_probe_has_long_prompts_in_bounded_room() -> None:
    rows = [Prompt(tuple(range(10, 10 + n)), {}, n, None) for n in (3, 50, 20, 40, 30)]
    assert [len(p.ids) for p in long_prompts(rows, 120, 1000)] == [50, 120, 40, 30, 20]
    assert [len(p.ids) for p in long_prompts(rows, 120, 100)] == [50, 40]  # nothing longer fits
    assert [len(p.ids) for p in long_prompts(rows, 120, 110)] == [50, 60]
    assert [len(p.ids) for p in long_prompts(rows, 50, 10)] == [50]


def test_the_probe_sees_what_only_long_prompts_show() -> None:
    class Windowed(EagerEngine):
        """As if it forgot what is far back: log-probs are off where the prompt is long."""

        def _rollout(self, row):
            made = super()._rollout(row)
            return shifted(made, 2.0) if len(row.prompt.ids) > 30 else made

    policy = tiny_policy(trained=0.3)
    engine, one = Windowed(policy, tiny_tokenizer()), Sampling(group_size=1, max_tokens=16)
    parity.probe(policy, engine, prompts(16), one, 1, PLAN)
    long = [Prompt(tuple(10 + i % 80 for i in range(60)), {}, 77, None)]
    with pytest.raises(ParityError, match=r"at the start, on the base, .* of row 77 of the data"):
        parity.probe(policy, engine, prompts(16), one, 1, PLAN, long)


def test_a_model_that_no_adapter_moves_far_is_told_and_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.base.lm_head.weight.mul_(0.01)  # type: ignore[union-attr]
    engine, one = EagerEngine(policy, tiny_tokenizer()), Sampling(group_size=1, max_tokens=6)
    found = parity.probe(policy, engine, prompts(6), one, 1, PLAN)
    assert 0 < found.shift < 0.5 and "no random adapter moved log-probs by 0.5 nat (reached 0.0" in found.weaker
    engine.close()
    engine = EagerEngine(policy, tiny_tokenizer())
    monkeypatch.setattr(EagerEngine, "_write", lambda self, tensors: None)
    monkeypatch.setattr("rlft.rollout.eager.check_read_back", lambda *a: None)
    with pytest.raises(ParityError, match="the engine does not apply the adapter as the trainer does"):
        parity.probe(policy, engine, prompts(6), one, 1, PLAN)
