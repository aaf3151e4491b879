"""A batch from padded tensors [N, L], as other trainers have them, for a loss in a loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlft.batch import pack_rollouts
from rlft.errors import DataError
from rlft.types import Aggregation, Batch, FinishReason, PackPlan, Prompt, Rollout


def padded_batch(
    input_ids: Tensor,
    completion_mask: Tensor,
    advantages: Sequence[float] | Tensor,
    attention_mask: Tensor | None = None,
    group_ids: Sequence[int] | Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    aggregation: Aggregation = "token_mean",
    temperature: float = 1.0,
) -> tuple[Batch, Tensor]:
    """Return the batch of N padded rows for a loss, and where its T tokens are in them, [T] int64 of N L places.

    input_ids: [N, L], prompts with their completions. completion_mask: [N, L], true where the policy chose a token; the
    completion begins at the first. advantages: [N]. attention_mask: [N, L], false at padding on either side; None: no
    padding. group_ids: [N], equal for the completions of a prompt, which are neighbours; None: each row is a group.
    sampler_logprobs: [N, L], those of the engine. aggregation, temperature: as in `rlft.PackPlan`.

    A loss takes the log-probs of the batch, `logprobs.flatten()[places]` of log-probs [N, L] in which entry (n, l) is
    that of token l of row n. Raises DataError for shapes that differ, a row without a completion, and completions of a
    group with other prompts.
    """
    rows, length = input_ids.shape
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    tensors = {"completion_mask": completion_mask, "attention_mask": real, "sampler_logprobs": sampler_logprobs}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise DataError(f"{name}: {list(tensor.shape)}, and input_ids is {list(input_ids.shape)}")
    chosen = completion_mask.bool() & real
    groups = list(range(rows)) if group_ids is None else [int(group) for group in group_ids]
    values = [float(advantage) for advantage in advantages]
    for name, given in (("advantages", values), ("group_ids", groups)):
        if len(given) != rows:
            raise DataError(f"{name}: {len(given)} for {rows} rows of input_ids")
    rollouts: list[Rollout] = []
    for row in range(rows):
        at = real[row].nonzero().flatten()
        mask = chosen[row, at].tolist()
        if not any(mask):
            raise DataError(f"completion_mask: row {row} has no token of a completion")
        start, ids = mask.index(True), tuple(input_ids[row, at].tolist())
        prompt = Prompt(ids[:start], {}, groups[row])
        if rollouts and rollouts[-1].prompt.index == groups[row]:
            if rollouts[-1].prompt.ids != prompt.ids:
                raise DataError(f"group_ids: rows {row - 1} and {row} are of one group and have different prompts")
            prompt = rollouts[-1].prompt
        sampler = None if sampler_logprobs is None else tuple(sampler_logprobs[row, at[start:]].tolist())
        rollouts.append(
            Rollout(prompt, ids[start:], tuple(mask[start:]), sampler, "", FinishReason.STOP, row, 0, seed=0)
        )
    plan = PackPlan(aggregation, rows * length, length, temperature, whole_groups=True, share_prefix=False)
    (batch,) = pack_rollouts(rollouts, values, plan)
    flat = torch.arange(rows * length).view(rows, length)
    order = [sample.rollout.sample_index for sample in batch.samples]
    return batch, torch.cat([flat[row, real[row].cpu()] for row in order])
