"""What is counted, what a token weighs, and how rows share micro-batches and prompts."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import records
import torch

from rlft.batch import _fill, _parts, _rows, _tokens, count, group_ids, segment_sum
from rlft.errors import EngineError, TrainError
from rlft.routes import Routes, type_of
from rlft.trainer.step_metrics import packing_stats
from rlft.types import Aggregation, Batch, Counts, PackPlan, Prompt, Rollout

NAN = float("nan")


def rollout(
    prompt: int = 0,
    sample: int = 0,
    tokens: int = 2,
    mask: tuple[bool, ...] | None = None,
    sampled: tuple[float, ...] | None = None,
    prompt_tokens: int = 3,
) -> Rollout:
    """Prompt tokens 100, 101, ...; completion tokens 10 * sample + 1, 2, ..."""
    ids = tuple(10 * sample + 1 + t for t in range(tokens))
    p = Prompt(tuple(100 + t for t in range(prompt_tokens)), {}, prompt)
    return Rollout(p, ids, (True,) * tokens if mask is None else mask, sampled, "", "stop", sample, 0, 0)


def plan(n: int, aggregation: Aggregation = "token_mean", budget: int = 1000, **options: bool) -> PackPlan:
    return PackPlan(aggregation, budget, max_len=10, temperature=1.0, **options)


def packed(made: list[Rollout], the_plan: PackPlan, advantages: list[float] | None = None) -> list[Batch]:
    return records.packed(made, the_plan, torch.tensor(advantages or [1.0] * len(made)))


def ragged() -> list[Rollout]:
    """Two groups: lengths 1, 2, 3 and 4, 0, 2; row 2 has a tool token, row 3 a token without a sampler log-prob."""
    return [
        rollout(0, 0, 1, sampled=(-1.0,)),
        rollout(0, 1, 2, sampled=(-1.0, -2.0)),
        rollout(0, 2, 3, mask=(True, False, True), sampled=(-1.0, NAN, -2.0)),
        rollout(1, 0, 4, sampled=(-1.0, -math.inf, -3.0, -4.0), prompt_tokens=5),
        rollout(1, 1, 0, sampled=(), prompt_tokens=5),
        rollout(1, 2, 2, sampled=(-1.0, -2.0), prompt_tokens=5),
    ]


def test_a_prompt_that_comes_twice_in_a_step_makes_two_groups() -> None:
    made = [rollout(7, 0), rollout(7, 1), rollout(7, 0), rollout(7, 1), rollout(8, 2), rollout(7, 3)]
    assert group_ids(made).tolist() == [0, 0, 1, 1, 2, 3]
    assert group_ids([rollout(7, 0), rollout(7, 0)]).tolist() == [0, 1]
    assert group_ids([]).dtype == torch.int64


def test_trained_tokens_are_those_the_policy_chose_with_a_finite_sampler_log_prob() -> None:
    assert ragged()[2].trained.tolist() == [True, False, True]
    assert ragged()[3].trained.tolist() == [True, False, True, True]
    assert rollout(tokens=3).trained.tolist() == [True, True, True]
    # Nothing comes before the first token of a text without prompt.
    assert rollout(tokens=3, prompt_tokens=0).trained.tolist() == [False, True, True]
    assert rollout(tokens=0, prompt_tokens=0).trained.tolist() == []


def test_counts_hold_zero_advantage_rows_and_empty_completions_but_no_dropped_rows() -> None:
    made = ragged()
    assert count(records.groups(made)) == Counts(tokens=1 + 2 + 2 + 3 + 0 + 2, sequences=6, groups=2)
    keep = (True, False, True, False, False, False)
    assert count(records.groups(made, keep=keep)) == Counts(tokens=3, sequences=2, groups=1)
    assert count([]) == Counts(0, 0, 0)


# One group with 1 and 3 tokens, one with 2: 6 tokens, 3 sequences, 2 groups, max_len 10.
WEIGHTS = {
    "token_mean": [1 / 6, 1 / 6, 1 / 6],
    "sequence_mean": [1 / 3, 1 / 9, 1 / 6],
    "constant": [1 / 30, 1 / 30, 1 / 30],
    "sequence_sum": [1 / 3, 1 / 3, 1 / 3],
    "prompt_mean": [1 / 8, 1 / 8, 1 / 4],
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_each_aggregation_is_a_fixed_weight_per_token(aggregation: Aggregation, share: bool) -> None:
    made = [rollout(0, 0, 1), rollout(0, 1, 3), rollout(1, 0, 2)]
    (batch,) = packed(made, plan(3, aggregation, share_prefix=share))
    own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
    found = {}
    for s, row in zip(own, records.rows(batch, made), strict=True):
        weights = batch.weight[(batch.seq_ids == s) & batch.train_mask].tolist()
        assert weights == pytest.approx([WEIGHTS[aggregation][row]] * len(made[row].completion_ids))
        assert batch.seq_weight[s].item() == pytest.approx(sum(weights))
        found[row] = weights[0]
    assert sorted(found) == [0, 1, 2]
    assert batch.weight[~batch.train_mask].abs().sum() == 0
    assert batch.seq_weight[batch.group_ids < 0].abs().sum() == 0
    assert batch.group_weight.tolist() == [0.5, 0.5]


def test_weights_come_from_the_counts_of_the_whole_update_not_of_this_call() -> None:
    made = [rollout(tokens=2)]
    (batch,) = records.packed(made, plan(1), counts=Counts(tokens=8, sequences=4, groups=2))
    assert batch.weight.tolist() == [0, 0, 0, 0.125, 0.125]
    assert batch.seq_weight.tolist() == [0.25] and batch.group_weight.tolist() == [0.5]


def test_a_row_that_is_not_kept_is_in_no_batch_and_does_not_weigh_on_its_group() -> None:
    made = [rollout(0, 0, 2), rollout(0, 1, 5)]
    (batch,) = records.packed(
        made, plan(2, "prompt_mean"), [1.0, NAN], (True, False)
    )  # nobody asks for the advantage of a dropped row
    assert records.rows(batch, made) == (0,)
    assert batch.weight[batch.train_mask].tolist() == [0.5, 0.5]


def test_only_trained_tokens_of_kept_rows_divide_a_mean_over_sequences() -> None:
    made = [rollout(0, 0, 3, mask=(True, False, True)), rollout(0, 1, 5), rollout(0, 2, 1)]
    (batch,) = records.packed(made, plan(3, "sequence_mean"), keep=(True, False, True))
    # Two sequences, the first with two trained tokens: 1 / (2 * 2), and 1 / 2.
    assert sorted(batch.weight[batch.train_mask].tolist()) == [0.25, 0.25, 0.5]


def test_without_sharing_a_sequence_is_prompt_and_completion() -> None:
    (batch,) = packed([rollout(0, 0, 2), rollout(1, 1, 1)], plan(2, share_prefix=False), [2.0, -1.0])
    assert batch.input_ids.tolist() == [100, 101, 102, 1, 2, 100, 101, 102, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 5, 9] and batch.cu_seqlens.dtype == torch.int32
    assert batch.seq_ids.tolist() == [0] * 5 + [1] * 4
    assert batch.source.tolist() == [-1, 0, 1, 2, 3, -1, 5, 6, 7]
    assert batch.train_mask.tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True]
    assert batch.advantages.tolist() == [0, 0, 0, 2, 2, 0, 0, 0, -1]
    assert batch.prefix.tolist() == [-1, -1] and batch.group_ids.tolist() == [0, 1]
    assert (batch.max_seqlen, batch.max_prefix, batch.zero_advantage) == (5, 0, False)


def test_with_sharing_the_prompt_runs_once_and_completions_continue_it() -> None:
    made = [rollout(0, 0, 2, sampled=(-1.0, -2.0)), rollout(0, 1, 1, sampled=(-3.0,))]
    (batch,) = packed(made, plan(2), [2.0, -1.0])
    assert batch.input_ids.tolist() == [100, 101, 102, 1, 2, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    # Both first completion tokens are predicted by the last token of the prompt.
    assert batch.source.tolist() == [-1, 0, 1, 2, 3, 2]
    assert batch.prefix.tolist() == [-1, 0, 0] and batch.group_ids.tolist() == [-1, 0, 0]
    assert batch.sampler_logprobs is not None and batch.sampler_logprobs.tolist() == [0, 0, 0, -1, -2, -3]
    assert (records.rows(batch, made), batch.max_seqlen, batch.max_prefix) == ((0, 1), 3, 3)


def test_a_prompt_with_one_completion_or_without_tokens_is_not_shared() -> None:
    (one,) = packed([rollout(0, 0, 2), rollout(1, 0, 2)], plan(2))
    assert one.prefix.tolist() == [-1, -1] and one.max_prefix == 0
    (text,) = packed([rollout(0, 0, 3, prompt_tokens=0), rollout(0, 1, 2, prompt_tokens=0)], plan(2))
    assert text.prefix.tolist() == [-1, -1]
    assert text.source.tolist() == [-1, 0, 1, -1, 3]
    assert text.train_mask.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("share", [True, False])
def test_arrays_have_the_types_that_kernels_and_losses_expect(share: bool) -> None:
    (batch,) = packed(ragged(), plan(6, share_prefix=share))
    found = {name: value.dtype for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    int64 = dict.fromkeys(("input_ids", "position_ids", "seq_ids", "source", "group_ids"), torch.int64)
    int32 = dict.fromkeys(("cu_seqlens", "prefix"), torch.int32)
    floats = ("weight", "seq_weight", "advantages", "group_weight", "sampler_logprobs")
    assert found == int64 | int32 | {"train_mask": torch.bool} | dict.fromkeys(floats, torch.float32)


def test_every_trained_token_has_a_source_and_no_untrained_one_leaks_a_number() -> None:
    for share in (True, False):
        for batch in packed(ragged(), plan(6, share_prefix=share, budget=9)):
            assert (batch.source[batch.train_mask] >= 0).all()
            for values in (batch.weight, batch.advantages, batch.sampler_logprobs):
                assert values is not None and (values[~batch.train_mask] == 0).all()
                assert values.isfinite().all() and values.dtype == torch.float32


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 6, 7, 9, 12, 1000])
def test_each_trained_row_is_in_one_micro_batch_within_the_budget(budget: int, share: bool) -> None:
    made = ragged()
    batches = packed(made, plan(6, share_prefix=share, budget=budget))
    assert sorted(row for b in batches for row in records.rows(b, made)) == [
        0,
        1,
        2,
        3,
        5,
    ]  # 4 is empty: counted, not run
    for batch in batches:
        assert len(batch.input_ids) <= budget or len(records.rows(batch, made)) == 1
        assert batch.cu_seqlens[-1] == len(batch.input_ids)
    assert sum(b.weight.double().sum().item() for b in batches) == pytest.approx(1)  # a mean over all tokens
    again = packed(made, plan(6, share_prefix=share, budget=budget))
    assert [records.rows(b, made) for b in again] == [records.rows(b, made) for b in batches]


def test_micro_batches_are_filled_longest_first() -> None:
    # With the prompt of 3: 5, 9, 4, 6 tokens into 10, three micro-batches, for which 9 are enough. 9 | 6 | 5, 4.
    made = [rollout(i, 0, tokens) for i, tokens in enumerate((2, 6, 1, 3))]
    batches = packed(made, plan(4, budget=10, share_prefix=False))
    assert [records.rows(b, made) for b in batches] == [(1,), (3,), (0, 2)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 40, 150, 10**4])
def test_micro_batches_are_even_without_more_of_them_or_of_prompts(budget: int, share: bool) -> None:
    draw, shorter = random.Random(budget), 0
    for _ in range(30):
        made = [rollout(g, s, draw.randint(1, 60), prompt_tokens=9) for g in range(5) for s in range(4)]
        the_plan = plan(20, budget=budget, share_prefix=share)
        rows = _rows(records.groups(made), the_plan, count(records.groups(made)))
        parts = [part for g in range(5) for part in _parts(rows[4 * g : 4 * g + 4], the_plan)]
        greedy, tokens = _fill(parts, the_plan, budget)
        sizes = [len(b.input_ids) for b in packed(made, the_plan)]
        assert len(sizes) <= len(greedy) and sum(sizes) <= tokens
        longest = max(sum(_tokens(unit, the_plan) for unit in units) for units in greedy)
        assert max(sizes) <= longest
        shorter += max(sizes) < longest
    assert shorter >= 10 if budget == 150 else shorter == 0, "rows longer than the budget, or all in one micro-batch"


def test_a_short_last_micro_batch_takes_from_the_long_ones() -> None:
    made = [rollout(i, 0, 97) for i in range(21)]
    sizes = [len(b.input_ids) for b in packed(made, plan(21, budget=1000))]
    assert sizes == [700, 700, 700], "not 1000, 1000, 100"


def test_a_group_over_the_budget_is_split_and_each_part_repeats_the_prompt() -> None:
    made = [rollout(0, s, 4) for s in range(4)]
    # 3 + 4 + 4 = 11 fit, a third completion does not.
    first, second = packed(made, plan(4, budget=11))
    assert (records.rows(first, made), records.rows(second, made)) == ((0, 1), (2, 3))
    assert first.input_ids[:3].tolist() == second.input_ids[:3].tolist() == [100, 101, 102]
    assert first.prefix.tolist() == second.prefix.tolist() == [-1, 0, 0]
    assert second.group_ids.tolist() == [-1, 0, 0]


def test_rows_of_zero_advantage_come_last_on_their_own_and_leaving_them_out_changes_no_other() -> None:
    made = [rollout(g, s, 2 + s) for g in range(3) for s in range(3)]
    advantages = [1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.5, -0.5, 0.0]
    for budget in (6, 12, 1000):
        for share in (True, False):
            batches = packed(made, plan(9, budget=budget, share_prefix=share), advantages)
            flags = [b.zero_advantage for b in batches]
            assert flags == sorted(flags) and any(flags) and not all(flags)
            zeros = sorted(row for b in batches if b.zero_advantage for row in records.rows(b, made))
            assert zeros == [1, 3, 4, 5, 8]
            counts, keep = count(records.groups(made)), [advantage != 0 for advantage in advantages]
            alone = records.packed(made, plan(9, budget=budget, share_prefix=share), advantages, keep, counts)
            for with_zeros, without in zip(batches, alone, strict=False):
                assert torch.equal(with_zeros.input_ids, without.input_ids)
                assert torch.equal(with_zeros.weight, without.weight)
            assert len(alone) == flags.count(False)


@pytest.mark.parametrize("share", [True, False])
def test_whole_groups_stay_together_even_above_the_budget(share: bool) -> None:
    made = [rollout(0, 0, 3), rollout(0, 1, 0), rollout(1, 0, 2), rollout(1, 1, 2)]
    first, second = packed(made, plan(4, budget=4, whole_groups=True, share_prefix=share), [1.0, 0.0, 0.0, 0.0])
    # The empty side of a pair is there: the loss needs both.
    assert records.rows(first, made) == (0, 1) and not first.zero_advantage
    assert records.rows(second, made) == (2, 3) and second.zero_advantage
    own = first.cu_seqlens.diff()[first.group_ids >= 0].tolist()
    assert own == ([3, 0] if share else [6, 3])
    assert first.group_weight.tolist() == [0.5]
    assert first.seq_weight[first.group_ids >= 0].tolist() == pytest.approx([3 / 7, 0])


def test_a_group_of_empty_completions_is_counted_and_not_run() -> None:
    made = [rollout(0, 0, 0), rollout(0, 1, 0), rollout(1, 0, 2)]
    for options in ({}, {"whole_groups": True}, {"share_prefix": False}):
        (batch,) = packed(made, plan(3, "sequence_mean", **options))
        assert records.rows(batch, made) == (2,)
        assert batch.weight[batch.train_mask].tolist() == pytest.approx([1 / 6, 1 / 6])
    assert packed(made[:2], plan(2)) == [] and packed([], plan(0)) == []


def test_an_advantage_that_is_not_finite_stops_the_step_with_its_row() -> None:
    with pytest.raises(TrainError, match=r"the advantage of sample 0 of row 5 of the data is nan: rewards and"):
        packed([rollout(4), rollout(5)], plan(2), [1.0, NAN])


def test_recorded_completions_have_no_sampler_log_probs() -> None:
    assert packed([rollout(tokens=2)], plan(1))[0].sampler_logprobs is None
    with pytest.raises(AssertionError, match="either every rollout"):
        packed([rollout(tokens=1), rollout(1, tokens=1, sampled=(-1.0,))], plan(2))


def test_segment_sum_adds_per_segment_and_has_a_gradient() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = segment_sum(values, torch.tensor([0, 2, 0]), 3)
    assert sums.tolist() == [5, 0, 2]
    (sums * torch.tensor([1.0, 1.0, 3.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1, 3, 1]


def test_packing_stats_say_what_sharing_padding_and_skipping_save() -> None:
    made = [rollout(0, 0, 2), rollout(0, 1, 5), rollout(1, 0, 1)]
    batches = packed(made, plan(3), [1.0, -1.0, 0.0])
    # Run: 3 + 2 + 5 = 10 tokens instead of 5 + 8 = 13; padded 2 rows of 8. The zero-advantage row is skipped.
    assert packing_stats(batches, batches[:1]) == pytest.approx(
        {
            "batch/tokens": 10,
            "batch/micro_batches": 1,
            "batch/packing_ratio": 1.6,
            "batch/shared_prefix_saving": 3 / 13,
            "batch/skipped": 1,
        }
    )
    assert packing_stats(batches, [])["batch/skipped"] == 3


# ---- experts of the engine -----------------------------------------------------------------------------------------


def routed(made: list[Rollout]) -> list[Rollout]:
    """Rollouts with the experts of an engine: in layer 0 of a completion 10 * sample + token, of a prompt 100 + token;
    prompts of a group are one array."""
    prompts = {
        p: np.arange(100, 100 + n)[:, None, None] for p, n in {(r.prompt.index, len(r.prompt.ids)) for r in made}
    }
    return [replace(r, routes=Routes(prompts[r.prompt.index], np.array(r.completion_ids)[:, None, None])) for r in made]


@pytest.mark.parametrize("share", [True, False])
def test_experts_stay_with_their_tokens(share: bool) -> None:
    """A token's expert is its id here, behind a shared prompt and alone."""
    made = routed([*(rollout(0, i, tokens=3 + i) for i in range(3)), rollout(1, 0, prompt_tokens=5)])
    for batch in packed(made, plan(4, share_prefix=share, budget=20)):
        assert batch.routes is not None and batch.routes.shape == (len(batch.input_ids), 1, 1)
        assert torch.equal(batch.routes[:, 0, 0], batch.input_ids)
    assert all(batch.routes is None for batch in packed([rollout(0, i) for i in range(2)], plan(2)))


def test_missing_experts_are_refused() -> None:
    made = routed([rollout(0, 0), rollout(0, 1)])
    assert made[1].routes is not None
    made[1].routes.completion = made[1].routes.completion[:1]
    with pytest.raises(EngineError, match=r"row 0: .* experts of 3 \+ 1 tokens, and there are 3 \+ 2; set"):
        packed(made, plan(2))
    with pytest.raises(AssertionError, match="either every rollout of an update has routes or none has"):
        packed([*routed([rollout(0, 0)]), rollout(0, 1)], plan(2))


def test_rollouts_with_equal_experts_are_equal() -> None:
    made = [rollout(0, 0), rollout(0, 1)]
    assert routed(made) == routed(made) != made
    other = routed(made)
    assert other[0].routes is not None
    other[0].routes.completion = other[0].routes.completion + 1
    assert other != routed(made)
    assert [type_of(count) for count in (8, 255, 256, 2**15 - 1)] == [np.uint8, np.uint8, np.int16, np.int16]
