"""Losses over padded tensors are those of their formulae."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rlft
from rlft.errors import DataError

IDS = torch.arange(4 * 6).view(4, 6)
REAL = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
CHOSEN = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()
SAME = IDS.clone()
SAME[1, :3], SAME[3, :2] = SAME[0, :3], SAME[2, :2]


def logprobs() -> Tensor:
    return (-torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_gradient_of_grpo_is_the_advantage_over_the_tokens(aggregation: str) -> None:
    advantages = torch.tensor([1.0, -0.5, 0.25, 2.0])
    batch, places = rlft.padded_batch(IDS, CHOSEN, advantages, REAL, aggregation=aggregation)  # type: ignore[arg-type]
    assert torch.equal(batch.input_ids, IDS.flatten()[places]) and len(places) == int(REAL.sum())
    table = logprobs()
    loss, _ = rlft.algorithm("grpo", aggregation=aggregation).loss(table.flatten()[places], batch)
    loss.backward()
    tokens = CHOSEN.sum(1, keepdim=True)
    divisor = CHOSEN.sum() if aggregation == "token_mean" else 4 * tokens
    torch.testing.assert_close(table.grad, (-advantages[:, None] * CHOSEN / divisor).double())


def test_dpo_over_padded_pairs() -> None:
    batch, places = rlft.padded_batch(SAME, CHOSEN, [1, -1, -1, 1], REAL, group_ids=[7, 7, 8, 8])
    table, reference = logprobs(), logprobs().detach().roll(1, 0)
    batch = replace(batch, ref_logprobs=reference.flatten()[places])
    loss, _ = rlft.algorithm("dpo", beta=0.3).loss(table.flatten()[places], batch)
    ratio = ((table - reference) * CHOSEN).sum(1)
    margin = 0.3 * torch.stack([ratio[0] - ratio[1], ratio[3] - ratio[2]])
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(margin).mean())


def test_a_row_left_out_has_no_place() -> None:
    batch, places = rlft.padded_batch(IDS, CHOSEN, [1.0, float("nan"), 1.0, 1.0])
    assert not any(6 <= place < 12 for place in places.tolist()) and len(batch.samples) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_mask": CHOSEN[:, :5]}, r"completion_mask: \[4, 5\], and input_ids is \[4, 6\]"),
        ({"completion_mask": CHOSEN & (torch.arange(4) != 2)[:, None]}, "row 2 has no token of a completion"),
        ({"advantages": [1.0]}, "advantages: 1 for 4 rows"),
        ({"group_ids": [0, 0, 1, 2]}, "rows 0 and 1 are of one group and have different prompts"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    given = {"input_ids": IDS, "completion_mask": CHOSEN, "advantages": [0.0] * 4, **change}
    with pytest.raises(DataError, match=message):
        rlft.padded_batch(**given)  # type: ignore[arg-type]


def test_advantages_of_lists() -> None:
    grpo = rlft.algorithm("grpo")
    assert (
        grpo.advantage([1.0, 0.0, 1.0], [0, 0, 1]).tolist()
        == grpo.advantage(  # type: ignore[arg-type]
            torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1])
        ).tolist()
    )
