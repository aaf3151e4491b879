"""The contract of `rlft.rollout.engine`, one test per clause over every engine; guards against a wrong adapter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import records
import torch
from tiny import prompts, tiny_policy, tiny_tokenizer

from rlft.config.data import Sampling
from rlft.config.run import Parity as ParityConfig
from rlft.errors import ConfigError, EngineError, ParityError
from rlft.rollout.eager import EagerEngine
from rlft.rollout.replay import ReplayEngine
from rlft.trainer import parity
from rlft.types import PackPlan

SAMPLING = Sampling(group_size=3, max_tokens=6)
PLAN = PackPlan("token_mean", 1000, 6, 1.0)
LIMIT = parity.Limit.of(0.02, 5.0)


def make(name: str, trained: float = 0.3):
    """(policy, engine) with a trained adapter, not yet handed over."""
    policy = tiny_policy(trained=trained)
    return policy, EagerEngine(policy, tiny_tokenizer(), batch_size=7) if name == "eager" else ReplayEngine()


def generate(engine, version: int = 0, seed: tuple[int, ...] = (1, 0), count: int = 4, sampling: Sampling = SAMPLING):
    return engine.generate(prompts(count, recorded=True), sampling, seed)


def mismatch_of(policy, rollouts, temperature: float = 1.0) -> parity.Mismatch:
    found = parity.Mismatch()
    plan = replace(PLAN, temperature=temperature)
    for batch in records.packed(rollouts, plan):
        found.add(policy.score(batch), batch)
    return found


@pytest.fixture(params=["eager", "replay"])
def pair(request):
    policy, engine = make(request.param)
    engine.load_adapter(policy.adapter(), version=5)
    yield policy, engine
    engine.close()


def test_order_is_kept_with_g_completions_per_prompt(pair) -> None:
    _, engine = pair
    rollouts = generate(engine)
    per_prompt = 3 if engine.SAMPLES else 1
    assert [r.prompt.index for r in rollouts] == [i for i in range(4) for _ in range(per_prompt)]
    assert [r.sample_index for r in rollouts] == list(range(per_prompt)) * 4


def test_a_group_is_given_away_when_it_is_complete(pair) -> None:
    """Decoding batches of 7 and completions of different lengths: groups end one after the other."""
    _, engine = pair
    seen: list[list] = []
    rollouts = engine.generate(prompts(4, recorded=True), SAMPLING, (1, 0), lambda group: seen.append(list(group)))
    if not engine.SAMPLES:
        assert seen == []
        return
    groups = [rollouts[i : i + 3] for i in range(0, 12, 3)]
    assert sorted(map(groups.index, seen)) == [0, 1, 2, 3]
    assert {id(rollout) for group in seen for rollout in group} == {id(rollout) for rollout in rollouts}
    assert rollouts == generate(engine)


def test_the_first_group_is_given_away_before_the_last_token_is_sampled() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    lengths: list[int] = []
    calls = 0
    step = engine._step

    def counted(*arguments):
        nonlocal calls
        calls += 1
        return step(*arguments)

    engine._step = counted  # type: ignore[method-assign]
    engine.generate(prompts(4), SAMPLING, (1, 0), lambda group: lengths.append(calls))
    assert len(lengths) == 4 and lengths[0] < calls


def test_every_rollout_says_which_policy_version_made_it(pair) -> None:
    policy, engine = pair
    assert {r.policy_version for r in generate(engine)} == {5}
    engine.load_adapter(policy.adapter(), version=6)
    assert {r.policy_version for r in generate(engine)} == {6}


def test_log_probs_are_finite_and_at_most_zero_or_absent(pair) -> None:
    _, engine = pair
    for r in generate(engine):
        if not engine.SAMPLES:
            assert r.sampler_logprobs is None and r.recorded_reward == 1.0
        else:
            assert r.sampler_logprobs is not None and len(r.sampler_logprobs) == len(r.completion_ids) > 0
            assert all(math.isfinite(x) and x <= 0 for x in r.sampler_logprobs)


def test_generate_before_load_adapter_is_an_error() -> None:
    for name in ("eager", "replay"):
        with pytest.raises(EngineError, match="generate before load_adapter"):
            generate(make(name)[1])


def test_sleep_and_wake_change_nothing(pair) -> None:
    _, engine = pair
    before = generate(engine)
    engine.sleep()
    engine.wake()
    assert generate(engine) == before


def test_a_changed_adapter_changes_log_probs_and_the_same_one_does_not() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    first = generate(engine)
    engine.load_adapter(policy.adapter(), version=0)
    assert generate(engine) == first  # loading the same adapter twice does not scale it twice
    policy.adapter_params.data.mul_(1.5)
    assert generate(engine) == first  # the engine has its own copy
    engine.load_adapter(policy.adapter(), version=1)
    assert [r.sampler_logprobs for r in generate(engine)] != [r.sampler_logprobs for r in first]


def test_a_missing_or_unknown_tensor_is_an_error() -> None:
    policy, engine = make("eager")
    tensors = policy.adapter()
    name = next(iter(tensors))
    with pytest.raises(EngineError, match=r"misses .*q_proj.lora_A.weight \(1 missing, 0 unknown\)"):
        engine.load_adapter({n: t for n, t in tensors.items() if n != name}, version=0)
    with pytest.raises(EngineError, match="has extra, which the engine does not know"):
        engine.load_adapter({**tensors, "extra": tensors[name]}, version=0)
    with pytest.raises(EngineError, match=r"\(4, 32\)"):
        engine.load_adapter({**tensors, name: tensors[name].T}, version=0)


def test_same_seed_same_rollouts_other_seed_other_rollouts() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    assert generate(engine, seed=(1, 0)) == generate(engine, seed=(1, 0))
    assert generate(engine, seed=(1, 1)) != generate(engine, seed=(1, 0))
    assert len({r.completion_ids for r in generate(engine)}) > 9


def test_a_completion_does_not_depend_on_the_batch_it_was_decoded_in() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    together = generate(engine)
    engine._batch_size = 1
    alone = generate(engine)
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]
    for a, b in zip(together, alone, strict=True):
        assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=1e-5)


def test_a_row_that_comes_twice_in_a_step_gets_different_completions() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    (row,) = prompts(1)
    rollouts = engine.generate([row, row], replace(SAMPLING, group_size=1), (1, 0))
    assert rollouts[0].completion_ids != rollouts[1].completion_ids


def test_stop_tokens_end_a_completion_and_stay_in_it() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    free = generate(engine)
    stop = free[0].completion_ids[2]
    stopped = generate(engine, sampling=replace(SAMPLING, stop_token_ids=(stop,)))[0]
    assert stopped.completion_ids == free[0].completion_ids[: free[0].completion_ids.index(stop) + 1]
    assert stopped.finish_reason == "stop" and free[0].finish_reason == "length"


def test_greedy_takes_the_most_likely_token_and_top_k_1_the_same() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    greedy = generate(engine, sampling=replace(SAMPLING, group_size=1, temperature=0.0))
    top1 = generate(engine, sampling=replace(SAMPLING, group_size=1, top_k=1))
    tiny_p = generate(engine, sampling=replace(SAMPLING, group_size=1, top_p=1e-6))
    assert [r.completion_ids for r in greedy] == [r.completion_ids for r in top1] == [r.completion_ids for r in tiny_p]
    ids = torch.tensor([greedy[0].prompt.ids])
    with torch.no_grad():
        assert greedy[0].completion_ids[0] == policy.model(ids).logits[0, -1].argmax().item()


def test_first_tokens_are_drawn_from_the_distribution_they_report() -> None:
    """2,000 draws of one token: each frequent token's share is within 4 standard deviations of its probability."""
    policy, engine = make("eager", trained=0.0)
    engine._batch_size = 2000
    engine.load_adapter(policy.adapter(), version=0)
    drawn = engine.generate(prompts(1), Sampling(group_size=2000, max_tokens=1), (3, 0))
    shares: dict[int, list[float]] = {}
    for r in drawn:
        assert r.sampler_logprobs is not None
        shares.setdefault(r.completion_ids[0], []).append(math.exp(r.sampler_logprobs[0]))
    checked = 0
    for token, probabilities in shares.items():
        p = probabilities[0]
        if p > 0.01:
            checked += 1
            assert abs(len(probabilities) / 2000 - p) < 4 * math.sqrt(p * (1 - p) / 2000), token
    assert checked > 10


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_trainer_agrees_with_the_engine(temperature: float) -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    rollouts = generate(engine, sampling=replace(SAMPLING, temperature=temperature))
    found = mismatch_of(policy, rollouts, temperature)
    assert found.tokens > 30 and found.mean < 1e-5


# ---- guard 1: the adapter is read back ---------------------------------------------------------------------------


def broken(write):
    """An engine whose copying step is replaced, over a policy whose adapter moved since the last hand-over."""

    class Broken(EagerEngine):
        def _write(self, named_tensors) -> None:
            write(self, named_tensors, super()._write)

    policy = tiny_policy(trained=0.3)
    return policy, Broken(policy, tiny_tokenizer())


def test_a_withheld_adapter_stops_at_the_hand_over() -> None:
    policy, engine = broken(lambda self, tensors, write: None)
    with pytest.raises(EngineError, match=r"policy version 3 the engine does not hold the trainer's adapter: .*lora_"):
        engine.load_adapter(policy.adapter(), version=3)


def test_an_adapter_stale_by_one_stops_at_the_hand_over() -> None:
    held: list[dict] = []

    def late(self, tensors, write) -> None:
        held.append({n: t.clone() for n, t in tensors.items()})
        write(held[max(0, len(held) - 2)])

    policy, engine = broken(late)
    engine.load_adapter(policy.adapter(), version=0)
    policy.adapter_params.data.add_(1e-3)
    with pytest.raises(EngineError, match=r"policy version 1 .* differs by up to 0.001"):
        engine.load_adapter(policy.adapter(), version=1)


def test_a_doubled_scaling_stops_at_the_hand_over_even_while_b_is_zero() -> None:
    policy, engine = make("eager", trained=0.0)
    for module in policy.model.modules():
        if isinstance(getattr(module, "scaling", None), dict) and "engine" in module.scaling:
            module.scaling["engine"] *= 2
    with pytest.raises(EngineError, match=r"scales .*lora_B.weight by 4.0, the trainer by 2.0: .* exactly once"):
        engine.load_adapter(policy.adapter(), version=0)
    policy, engine = broken(
        lambda self, tensors, write: write({n: 2 * t if "lora_B" in n else t for n, t in tensors.items()})
    )
    with pytest.raises(EngineError, match="does not hold the trainer's adapter"):
        engine.load_adapter(policy.adapter(), version=0)


def test_an_adapter_that_changed_during_sleep_stops_at_wake() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=2)
    engine.sleep()
    next(iter(engine._slots.values())).add_(1)
    with pytest.raises(EngineError, match=r"changed while it slept \(policy version 2\)"):
        engine.wake()


# ---- guards 2 and 3: probe and gate ------------------------------------------------------------------------------


def test_the_probe_measures_noise_and_restores_adapter_and_random_state() -> None:
    policy, engine = make("eager")
    before, rng = policy.adapter_params.detach().clone(), torch.get_rng_state()
    found = parity.probe(policy, engine, prompts(6), replace(SAMPLING, group_size=1), 1, PLAN)
    assert torch.equal(policy.adapter_params, before) and torch.equal(torch.get_rng_state(), rng)
    assert found.shift >= 0.5 and 0 < found.noise < 1e-5 and found.tokens > 30
    assert parity.limit(found, ParityConfig()).step == 0.02  # five times almost nothing is kept at the floor


def test_the_probe_sees_an_engine_that_never_applies_the_adapter() -> None:
    class Deaf(EagerEngine):
        def load_adapter(self, named_tensors, version) -> None:
            self._version = version  # no copy, no read-back

        def wake(self) -> None:
            pass

    policy = tiny_policy(trained=0.3)
    engine = Deaf(policy, tiny_tokenizer())
    with pytest.raises(ParityError, match="the engine does not apply the adapter as the trainer does"):
        parity.probe(policy, engine, prompts(6), replace(SAMPLING, group_size=1), 1, PLAN)


def test_a_wrong_temperature_is_stopped_by_the_gate_and_named() -> None:
    """The engine samples at 0.7, the trainer believes 1.0: the gate finds the temperature that fits."""
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    rollouts = generate(engine, sampling=replace(SAMPLING, temperature=0.7))
    found = mismatch_of(policy, rollouts)
    with pytest.raises(ParityError, match=r"Temperature fits the numbers: at 0.7 .* sampling.temperature is 1"):
        parity.gate(found, LIMIT, policy.score)


def test_the_gate_is_silent_below_its_limit_and_without_sampler_log_probs() -> None:
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    parity.gate(mismatch_of(policy, generate(engine)), LIMIT, policy.score)
    policy, engine = make("replay")
    engine.load_adapter(policy.adapter(), version=0)
    found = mismatch_of(policy, generate(engine))
    assert found.tokens == 0 and found.values() == {}
    parity.gate(found, LIMIT, policy.score)


def test_mismatch_arithmetic() -> None:
    """d = 0, 0.2, -0.2: mean |d| = 0.4 / 3; two of three ratios outside [0.9, 1.1]; k3 by hand."""
    policy, engine = make("eager")
    engine.load_adapter(policy.adapter(), version=0)
    rollouts = [replace(r, sampler_logprobs=(-1.0,) * len(r.completion_ids)) for r in generate(engine, count=1)[:1]]
    plan = PLAN
    (batch,) = records.packed(rollouts, plan)
    d = torch.zeros(batch.input_ids.shape)
    rows = batch.train_mask.nonzero().squeeze(1)[:3]
    batch = replace(batch, train_mask=torch.zeros_like(batch.train_mask).index_fill(0, rows, True))
    d[rows] = torch.tensor([0.0, 0.2, -0.2])
    found = parity.Mismatch()
    found.add(d - 1.0, batch)
    values = found.values()
    assert found.mean == pytest.approx(0.4 / 3, rel=1e-6)
    assert values["mismatch/outside"] == pytest.approx(2 / 3)
    w = [1.0, math.exp(0.2), math.exp(-0.2)]
    assert values["mismatch/ess"] == pytest.approx(sum(w) ** 2 / (3 * sum(x * x for x in w)), rel=1e-5)
    assert values["mismatch/k3"] == pytest.approx((math.exp(0.2) - 1.2 + math.exp(-0.2) - 0.8) / 3, rel=1e-5)
    assert values["sampling/sampling_logp_difference/max"] == pytest.approx(0.2, rel=1e-6)
    assert values["mismatch/p50"] == values["mismatch/p90"] == values["mismatch/p99"]  # two of three in one bin
    assert found.percentile(0.3) == pytest.approx(1e-7)
    found.store_logprobs()
    assert all(sample.logprobs is not None for sample in batch.samples)
    assert 0.2 <= values["mismatch/p99"] * 1.0000001 <= 0.2 * 1.13


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}])
def test_sampling_that_changes_the_distribution_is_refused_in_training(bad: dict) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(bad))}"):
        Sampling(**bad).check_for_training()
