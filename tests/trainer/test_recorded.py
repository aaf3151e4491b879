"""The recorded rollouts of benchmarks/peers, which all stacks are to train on, and rlft's gradient over them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import records
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import recorded
import recorded_step
import stacks

from rlft import batch
from rlft.algos.algorithm import build_algorithm
from rlft.config.run import Algo, Lora
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.types import PackPlan

WORKS = recorded.WORKS


def test_every_process_draws_the_same_rollouts_as_long_as_the_peers_figures_say() -> None:
    plain, outlier, median = (
        recorded.recorded(WORKS[f"grpo-step/{name}"], "slab") for name in ("lognormal", "outlier", "lognormal-median")
    )
    assert plain == recorded.recorded(WORKS["grpo-step/lognormal"], "slab")
    lengths = [len(ids) for ids in plain.completions]
    # 87,656 real tokens on the machine where the peers were measured; float32 rounds otherwise elsewhere.
    assert plain.tokens == 64 * 256 + sum(lengths) == pytest.approx(87_656, rel=1e-3)
    assert min(lengths) >= 16 and max(lengths) == 8000 and len(plain.prompts) == 8
    assert median.padded / median.tokens == pytest.approx(3.31, abs=0.02)  # of plain 6.03; the median of seeds 3.34
    assert [len(ids) for ids in outlier.completions] == [16_384 if i == 5 else n for i, n in enumerate(lengths)]
    assert all(ids[-1] == recorded.EOS and recorded.EOS not in ids[:-1] for ids in plain.completions)
    assert all(0 < sum(plain.rewards[g : g + 8]) < 8 for g in range(0, 64, 8))  # no group teaches nothing


def test_the_tokenizer_of_the_peers_gives_the_recorded_ids_back() -> None:
    """A special token named "2" was found inside of "127"."""
    data, tokenizer = recorded.recorded(WORKS["dpo-step/lognormal"], "tiny"), stacks.tokenizer_of("tiny")
    for ids in data.completions:
        assert tuple(tokenizer(recorded._text(ids))["input_ids"]) == ids


@pytest.mark.parametrize(("work", "algo"), [("grpo-step/outlier", "grpo"), ("sft-step/packed", "sft")])
def test_prefixes_packing_and_padding_leave_the_gradient_alone(work: str, algo: str) -> None:
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    base = Qwen3ForCausalLM(stacks.config_of("tiny")).eval().requires_grad_(False)
    policy, algorithm, found = Policy(attach_lora(base, Lora(rank=4, alpha=8), 0)), build_algorithm(Algo(algo)), []
    for share, budget, padded in ((True, 4096, False), (False, 4096, False), (False, 1, False), (False, 2080, True)):
        rollouts = recorded.rollouts_of(WORKS[work], "tiny", padded)
        rewards = torch.tensor([r.recorded_reward for r in rollouts])
        plan = PackPlan(algorithm.aggregation, budget, 512, 1.0, share_prefix=share)
        advantages = algorithm.advantage(rewards, batch.group_ids(rollouts))
        policy.flat.zero_grad()
        for part in records.packed(rollouts, plan, advantages):
            algorithm.loss(policy.logprobs(part)[0], part)[0].backward()
        found.append(policy.flat.gradient.clone())
    assert found[0].norm() > 1e-3
    assert all((other - found[0]).norm() < 1e-5 * found[0].norm() for other in found[1:])


@pytest.mark.parametrize(
    ("taken", "want"),
    [
        (lambda asked: 0.85 * asked, 9.7),  # plans leave a margin
        (lambda asked: 1.1 * asked, 8.8),  # or foresee too little
        (lambda asked: 0.85 * asked if asked < 11 else 10.5, 8.5),  # the next plan takes too much: back to the last
        (lambda asked: min(asked, 4.0), 4.0),  # all that it can use
        (lambda asked: 12.0, 12.0),  # it cannot do with less
    ],
)
def test_rlft_is_held_to_a_peak_and_next_to_it(taken: Any, want: float) -> None:
    class Asked:
        def ask(self, timeout: float, work: str, peak: float) -> dict[str, float]:
            return {"peak": taken(peak)}

    _, _, question = recorded_step.budgeted(recorded_step.Found("rlft"), Asked(), "a work", 10.0)  # type: ignore[arg-type]
    assert want <= taken(question["peak"]) <= max(10.0, want)
