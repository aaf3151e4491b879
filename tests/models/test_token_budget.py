"""How many tokens a micro-batch should have."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import records
import torch
from test_families import fused, model_of
from test_memory import QWEN3_8B
from tiny import tiny_policy

from rlft.algos.algorithm import build_algorithm
from rlft.config.data import Data, Sampling
from rlft.config.run import Algo, Config, Packing
from rlft.models.fused.levels import L0
from rlft.models.fused.memory import GIB, scratch
from rlft.models.fused.plan_search import GRAPH_MEMORY_SHARE, choose_plan
from rlft.models.fused.token_budget import ALONE, BUDGETS, Group, token_budget
from rlft.trainer.plans import pack_plan_of
from rlft.types import PackPlan, Prompt, Rollout


def test_tokens_per_micro_batch() -> None:
    assert token_budget(QWEN3_8B, 150 * GIB, 0.0) == BUDGETS[0]
    assert token_budget(QWEN3_8B, 0.0, 0.0) == BUDGETS[-1]
    some = token_budget(QWEN3_8B, 60 * GIB, 0.0)
    assert BUDGETS[-1] < some < BUDGETS[0] and set(choose_plan(QWEN3_8B, some, some, 60 * GIB, 0.0).levels) == {L0}


def test_tight_memory_has_few_tokens_rather_than_levels() -> None:
    """4,096 tokens at L0 take less time than 8,192 of which layers are at L4: 1.34 and 1.54 s in
    benchmarks/results/recorded_tight_gpu_2026-11-27.json."""
    for shape, gib, want in ((replace(QWEN3_8B, layers=8), 3.4, (4096, 0)), (QWEN3_8B, 14.0, (4608, 1))):
        some = token_budget(shape, gib * GIB, 100 * GIB)
        levels = choose_plan(shape, some, some, gib * GIB, 100 * GIB).levels
        assert (some, sum(level != L0 for level in levels)) == want


def test_passes_that_graphs_can_run_have_no_launches_to_wait_for() -> None:
    small = replace(QWEN3_8B, layers=30, hidden=576, q=576, kv=192, q_heads=9, intermediate=1536, vocab=49152)
    for gib in (16, 22, 60):
        tokens = token_budget(small, gib * GIB, 100 * GIB)
        plan = choose_plan(small, tokens, tokens, gib * GIB, 100 * GIB)
        # More would be launched, and wait for the host.
        assert set(plan.levels) == {L0} and plan.peak - scratch(small, plan.store) <= GRAPH_MEMORY_SHARE * gib * GIB
        assert tokens == BUDGETS[0] if gib == 60 else BUDGETS[-1] < tokens < BUDGETS[0]
        assert token_budget(small, gib * GIB, 100 * GIB, graphs=False) == BUDGETS[0]  # a decoder that has no graphs
    assert token_budget(small, 2 * GIB, 100 * GIB) == BUDGETS[0], "where none can be captured, many wait least"


def test_budgets_go_from_the_most_to_the_least_in_steps_of_a_quarter_at_most() -> None:
    assert BUDGETS[0] == 32768 and BUDGETS[-1] == 4096
    assert all(b < a <= 1.25 * b for a, b in pairwise(BUDGETS))


def test_prompts_that_every_micro_batch_repeats_want_more_tokens() -> None:
    """25 micro-batches of 4,096 tokens have 22% more rows than the rollouts of `grpo-step/lognormal-p1024` with each
    prompt once, 9 of 10,240 have 3% more."""
    slab = replace(QWEN3_8B, layers=8)
    few, some, many = (token_budget(slab, 3.5 * GIB, 100 * GIB, Group(prompt, 8192)) for prompt in (0, 256, 1024))
    assert few <= some < many == 10240, "the first that holds a whole group"
    # All of a group in one micro-batch, or a prompt longer than any: nothing to win.
    assert token_budget(slab, 3.5 * GIB, 100 * GIB, Group(1024, 1024)) == few
    assert token_budget(slab, 3.5 * GIB, 100 * GIB, Group(10**6, 8192)) == few


@pytest.mark.parametrize("rows", [1000, 2000, 3000])
def test_the_share_of_completions_in_a_micro_batch(rows: int) -> None:
    """A group of 500 + 1,500: a part of it, the whole, or one and a half of them."""
    assert Group(500, 1500).useful(rows) == {1000: 0.5, 2000: 0.75, 3000: 0.75}[rows]


@pytest.mark.parametrize("gib", [16, 18, 24])
def test_short_passes_have_the_weights_where_full_ones_have_them(gib: int) -> None:
    """A step's last micro-batch is mostly short: it would bring a shadow of its own, to be given back by the next."""
    decoder = fused(model_of("qwen3", torch.float32))
    decoder.shape, budget = QWEN3_8B, gib * GIB
    full = token_budget(QWEN3_8B, budget, 0.0)
    short = full // 4
    assert [decoder.plan_for(rows, budget=budget).store for rows in (full, short)] == ["layer", "shadow"]
    decoder.set_micro_batch(full)
    assert [decoder.plan_for(rows, budget=budget).store for rows in (full, short)] == ["layer", "layer"]
    decoder.set_micro_batch(short)
    assert decoder.plan_for(short, budget=budget).store == "shadow", "as many rows as they have at most"
    decoder.set_micro_batch(token_budget(QWEN3_8B, 60 * GIB, 0.0))
    assert decoder.plan_for(short, budget=60 * GIB).store == "shadow"


def test_a_run_tells_of_its_groups_and_the_layers_of_its_micro_batches() -> None:
    told: list[Group] = []

    def budget(group: Group) -> int:
        told.append(group)
        return 5120

    bonus: list[bool] = []
    full: list[int] = []
    policy: Any = SimpleNamespace(token_budget=budget, packed=True, fused=SimpleNamespace(expect=bonus.append))
    policy.set_micro_batch = full.append
    prompts = [Prompt((5,) * n, {}, n) for n in (10, 300, 7000)]
    cfg = Config("m", Data("d"), "out", steps=1, sampling=Sampling(group_size=4, max_tokens=8192))
    for algo, sampled in (("grpo", prompts), ("grpo", ()), ("dpo", prompts)):
        assert pack_plan_of(cfg, build_algorithm(Algo(algo), 1), policy, sampled).budget == full[-1] == 5120
    assert told == [Group(300, 4 * 1024), ALONE, ALONE]
    fixed = pack_plan_of(
        replace(cfg, packing=Packing(tokens_per_micro_batch=99)), build_algorithm(Algo("grpo"), 1), policy, prompts
    )
    assert fixed.budget == full[-1] == 99 and len(told) == 3
    pack_plan_of(cfg, build_algorithm(Algo("grpo", {"entropy_coef": 0.01}), 1), policy, prompts)
    assert bonus == [False] * 4 + [True]


def test_every_plan_of_a_run_with_an_entropy_bonus_has_its_jacobian() -> None:
    """Of log-probs with and without gradient, of the start line, and of modules that were looked at again."""
    policy = tiny_policy(torch.float32)
    decoder = policy.fused
    assert decoder is not None
    rollouts = [Rollout(Prompt((1, 2, 3), {}, 0), (4, 5), (True, True), None, "", "stop", 0, 0, 0)]
    plan = PackPlan("token_mean", 99, 8, 1.0)
    (batch,) = records.packed(rollouts, plan)
    policy.logprobs(batch)
    assert not decoder.shape.entropy_grad
    policy.logprobs(batch, entropy_grad=True)
    assert decoder.shape.entropy_grad and decoder._shape().entropy_grad and copy.deepcopy(decoder).entropy_grad
    big = replace(QWEN3_8B, layers=2)
    peaks = []
    for entropy_grad in (True, False):
        decoder.expect(entropy_grad)
        decoder.shape = replace(big, entropy_grad=decoder.shape.entropy_grad)
        peaks.append(decoder.plan_for(32768, budget=100 * GIB).peak)
    assert peaks[0] - peaks[1] == 2 * 4096 * 32768
