"""From rollouts to packed micro-batches: what is counted, what each token weighs, which sequences run side by side.

`count` says what one optimiser update averages over, before the first forward and over the whole update; `pack` turns
those counts into a weight per token, so that a loss is `(token_loss * batch.weight).sum()` and no split into
micro-batches or ranks can change the gradient. Nothing is padded and nothing is cut; the completions of a prompt can
share its tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from itertools import accumulate, chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.errors import TrainError
from rlft.types import Batch, Counts, PackPlan, Rollout


def group_ids(rollouts: Sequence[Rollout]) -> Tensor:
    """Group of each rollout: [N] int64, 0 upwards in order of appearance.

    A new group starts where the prompt changes or `sample_index` does not increase: a prompt that comes twice in a step
    makes two groups.
    """
    ids, group = [], -1
    for i, rollout in enumerate(rollouts):
        before = rollouts[i - 1] if i else None
        if before is None or before.prompt.index != rollout.prompt.index or rollout.sample_index <= before.sample_index:
            group += 1
        ids.append(group)
    return torch.tensor(ids, dtype=torch.int64)


def count(rollouts: Sequence[Rollout], plan: PackPlan) -> Counts:
    """Trained tokens, sequences and groups of the rollouts that `plan.keep` keeps.

    Rows of zero advantage and tokens that a correction masks are in; tool output and tokens whose sampler log-prob is
    not finite are out; an empty completion is a sequence without tokens.
    """
    assert len(plan.keep) == len(rollouts), "plan.keep needs one flag per rollout"
    groups = group_ids(rollouts).tolist()
    kept = [i for i, keep in enumerate(plan.keep) if keep]
    tokens = sum(int(rollouts[i].trained.sum()) for i in kept)
    return Counts(tokens, len(kept), len({groups[i] for i in kept}))


class _Row(NamedTuple):
    """A rollout on its way into a micro-batch."""

    at: int
    """Its index in the rollouts."""
    rollout: Rollout
    group: int
    mask: np.ndarray
    """`trained` of the rollout."""
    tokens: int
    """How many are trained."""
    advantage: float
    weight: float
    """Weight of each trained token."""


def pack(rollouts: Sequence[Rollout], advantages: Tensor, plan: PackPlan, counts: Counts) -> list[Batch]:
    """Cut an update into micro-batches of at most `plan.budget` tokens.

    rollouts: N, the completions of a prompt side by side. advantages: [N] float. counts: of the whole update, over all
    its micro-batches and ranks. A trained token of a sequence with L of them weighs

        token_mean      1 / tokens                            every token alike (DAPO)
        sequence_mean   1 / (sequences * L)                   every sequence alike (GRPO)
        constant        1 / (sequences * plan.max_len)        no preference for short or long (Dr. GRPO)
        sequence_sum    1 / sequences                         the plain policy gradient (REINFORCE)
        prompt_mean     1 / (groups * tokens of its group)    every prompt alike (ScaleRL)

    and a sequence weighs the sum over its tokens. Micro-batches are filled longest first, and evenly, as far as that
    makes no more of them; what is longer than the budget runs alone. The unit is a completion with its prompt; with
    `plan.share_prefix` a prompt once with all its completions, in parts that each repeat the prompt where the budget
    asks for it; with `plan.whole_groups` a group. Units whose every advantage is exactly 0 come last, in micro-batches
    of their own, so that leaving those out changes no other. A row without a trained token (with `plan.whole_groups`, a
    group without one) is counted and not run. Recorded completions, those without sampler log-probs, are at temperature
    1: nothing drew them at `plan.temperature`. Raises TrainError when the advantage of a kept rollout is not finite.
    """
    rows = _rows(rollouts, advantages.tolist(), plan, counts)
    sampled = {row.rollout.sampler_logprobs is not None for row in rows}
    assert len(sampled) <= 1, "either every rollout of an update has sampler log-probs or none has"
    some, zeros = [], []
    for _, group in groupby(rows, key=lambda row: row.group):
        for part in _parts(list(group), plan):
            (some if any(row.advantage for row in part) else zeros).append(part)
    return [_batch(units, plan, counts) for parts in (some, zeros) for units in _even(parts, plan)]


def _rows(rollouts: Sequence[Rollout], advantages: list[float], plan: PackPlan, counts: Counts) -> list[_Row]:
    """The kept rollouts with the weight of their tokens, in order."""
    assert len(plan.keep) == len(rollouts) == len(advantages), "one keep flag and one advantage per rollout"
    groups = group_ids(rollouts).tolist()
    masks = [rollout.trained for rollout in rollouts]
    tokens = [int(mask.sum()) for mask in masks]
    of_group: dict[int, int] = {}
    for group, own, keep in zip(groups, tokens, plan.keep, strict=True):
        of_group[group] = of_group.get(group, 0) + own * keep
    rows = []
    for i, rollout in enumerate(rollouts):
        if not plan.keep[i]:
            continue
        if not math.isfinite(advantages[i]):
            raise TrainError(
                f"the advantage of rollout {i} (row {rollout.prompt.index} of the data) is {advantages[i]}: "
                f"rewards and algo.advantage must give finite numbers"
            )
        divisor = {
            "token_mean": counts.tokens,
            "sequence_mean": counts.sequences * tokens[i],
            "constant": counts.sequences * plan.max_len,
            "sequence_sum": counts.sequences,
            "prompt_mean": counts.groups * of_group[groups[i]],
        }[plan.aggregation]
        weight = 1 / divisor if tokens[i] else 0.0
        rows.append(_Row(i, rollout, groups[i], masks[i], tokens[i], advantages[i], weight))
    return rows


def _parts(group: list[_Row], plan: PackPlan) -> list[list[_Row]]:
    """The rows of a group that run: as they are with `plan.whole_groups`, else those of no advantage apart."""
    if plan.whole_groups:
        return [group] if any(row.tokens for row in group) else []
    group = [row for row in group if row.tokens]
    parts = [row for row in group if row.advantage], [row for row in group if not row.advantage]
    return [part for part in parts if part]


def _units(part: list[_Row], plan: PackPlan, room: int) -> list[list[_Row]]:
    """The rows of `_parts`, cut into what has to stay in one micro-batch of `room` tokens."""
    if plan.whole_groups:
        return [part]
    if not plan.share_prefix:
        return [[row] for row in part]
    bins = _first_fit([len(row.mask) for row in part], room - len(part[0].rollout.prompt.ids))
    return [[part[i] for i in sorted(bin_)] for bin_ in bins]


def _filled(parts: list[list[_Row]], plan: PackPlan, room: int) -> tuple[list[list[list[_Row]]], int]:
    """Units by micro-batches of at most `room` tokens, and how many tokens they have."""
    units = [unit for part in parts for unit in _units(part, plan, room)]
    sizes = [_tokens(unit, plan) for unit in units]
    return [[units[i] for i in bin_] for bin_ in _first_fit(sizes, room)], sum(sizes)


EVEN = 64
"""Micro-batches beyond which they are not made even: it would take the host long, and they are nearly."""


def _even(parts: list[list[_Row]], plan: PackPlan) -> list[list[list[_Row]]]:
    """Units by micro-batches, as few as the budget allows and with as little room in each as makes no more of them, nor
    repeats a prompt more often: a short last one would waste what the long ones need most, memory, and its length would
    be another one in every step, for which CUDA graphs are captured."""
    best, tokens = _filled(parts, plan, plan.budget)
    if not 1 < len(best) <= EVEN:
        return best
    low, high = plan.budget // 2, plan.budget
    while high - low > max(1, plan.budget // 64):
        room = (low + high) // 2
        found, taken = _filled(parts, plan, room)
        if len(found) <= len(best) and taken <= tokens:
            best, high = found, room
        else:
            low = room
    return best


def _first_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Indices of `sizes` in bins of at most `room`, largest first; what is larger gets a bin of its own."""
    bins: list[list[int]] = []
    used: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = next((b for b, filled in enumerate(used) if filled + sizes[i] <= room), None)
        if at is None:
            bins.append([i])
            used.append(sizes[i])
        else:
            bins[at].append(i)
            used[at] += sizes[i]
    return bins


def _shared(unit: list[_Row], plan: PackPlan) -> bool:
    return plan.share_prefix and len(unit) > 1 and len(unit[0].rollout.prompt.ids) > 0


def _tokens(unit: list[_Row], plan: PackPlan) -> int:
    prompts = 1 if _shared(unit, plan) else len(unit)
    return prompts * len(unit[0].rollout.prompt.ids) + sum(len(row.mask) for row in unit)


class _Sequence(NamedTuple):
    """One sequence of a micro-batch: a prompt, a completion behind a shared prompt, or both together."""

    ids: tuple[int, ...]
    row: _Row | None
    """None for a shared prompt."""
    start: int
    """Position of its first token."""
    prefix: int
    """The sequence that holds its prompt, -1 for none."""

    def spread(self, values: Sequence[float] | np.ndarray, dtype: type) -> np.ndarray:
        """`values`, one per completion token, over the sequence: 0 on the prompt."""
        made = np.zeros(len(self.ids), dtype)
        made[len(made) - len(values) :] = values
        return made


def _sequences(units: list[list[_Row]], plan: PackPlan) -> list[_Sequence]:
    """Shared prompts first, then their completions in the same order, then what has its prompt with it: so the
    completions of all prompts are one block of rows for the attention over the prompts (rlft.kernels.attention)."""
    prompts, continued, alone = [], [], []
    for unit in units:
        prompt = unit[0].rollout.prompt.ids
        assert all(row.rollout.prompt.ids == prompt for row in unit), "a group has one prompt"
        if _shared(unit, plan):
            continued += [_Sequence(row.rollout.completion_ids, row, len(prompt), len(prompts)) for row in unit]
            prompts.append(_Sequence(prompt, None, 0, -1))
        else:
            alone += [_Sequence(prompt + row.rollout.completion_ids, row, 0, -1) for row in unit]
    return prompts + continued + alone


def _batch(units: list[list[_Row]], plan: PackPlan, counts: Counts) -> Batch:
    """The tensors of one micro-batch."""
    sequences = _sequences(units, plan)
    rows = [s.row for s in sequences if s.row is not None]
    local = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in rows))}
    lengths = [len(s.ids) for s in sequences]
    bounds = [0, *accumulate(lengths)]
    seq_ids = torch.from_numpy(np.repeat(np.arange(len(sequences)), lengths))
    positions = np.concatenate([np.arange(s.start, s.start + len(s.ids)) for s in sequences])
    source = np.arange(bounds[-1]) - 1
    for s, sequence in enumerate(sequences):
        if lengths[s]:
            source[bounds[s]] = bounds[sequence.prefix + 1] - 1 if sequence.prefix >= 0 else -1
    masks = [s.spread(s.row.mask if s.row else (), bool) for s in sequences]
    train_mask = torch.from_numpy(np.concatenate(masks))
    weights = torch.tensor([s.row.weight if s.row else 0.0 for s in sequences])
    advantages = torch.tensor([s.row.advantage if s.row else 0.0 for s in sequences])
    sampler, temperature = None, 1.0
    if rows[0].rollout.sampler_logprobs is not None:
        temperature = plan.temperature
        theirs = [s.spread(s.row.rollout.sampler_logprobs or () if s.row else (), np.float32) for s in sequences]
        sampler = torch.where(train_mask, torch.from_numpy(np.concatenate(theirs)), 0)
    return Batch(
        input_ids=torch.from_numpy(np.fromiter(chain.from_iterable(s.ids for s in sequences), np.int64, bounds[-1])),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        seq_ids=seq_ids,
        source=torch.from_numpy(source),
        prefix=torch.tensor([s.prefix for s in sequences], dtype=torch.int32),
        train_mask=train_mask,
        weight=torch.where(train_mask, weights[seq_ids], 0),
        seq_weight=torch.tensor([s.row.weight * s.row.tokens if s.row else 0.0 for s in sequences]),
        advantages=torch.where(train_mask, advantages[seq_ids], 0),
        group_ids=torch.tensor([local[s.row.group] if s.row else -1 for s in sequences], dtype=torch.int64),
        group_weight=torch.full((len(local),), 1 / counts.groups),
        temperature=temperature,
        max_seqlen=max(lengths),
        max_prefix=max((lengths[s.prefix] for s in sequences if s.prefix >= 0), default=0),
        zero_advantage=not any(row.advantage for row in rows),
        rows=tuple(row.at for row in rows),
        sampler_logprobs=sampler,
    )


def segment_sum(values: Tensor, ids: Tensor, segments: int) -> Tensor:
    """Sum of `values` per segment, with gradient. values: [T]. ids: [T] int64, 0 to segments-1. Returns [segments]."""
    return values.new_zeros(segments).index_add(0, ids, values)


def packing_stats(batches: Sequence[Batch], ran: Sequence[Batch]) -> dict[str, float]:
    """The batch/* metrics of an update. batches: all that `pack` made; ran: those that were run.

    batch/tokens: tokens run. batch/micro_batches: how many were run. batch/packing_ratio: tokens that the same rows
    would take when padded to the longest, over tokens run. batch/shared_prefix_saving: prompt tokens not run again
    because completions share them, over tokens without sharing. batch/skipped: rows that were packed and not run.
    """
    tokens = sum(len(batch.input_ids) for batch in ran)
    full = []  # prompt and completion of every row that was run
    for batch in ran:
        lengths = [end - start for start, end in itertools.pairwise(batch.cu_seqlens.tolist())]
        rows = zip(lengths, batch.prefix.tolist(), batch.group_ids.tolist(), strict=True)
        full += [own + (lengths[prefix] if prefix >= 0 else 0) for own, prefix, group in rows if group >= 0]
    packed = sum(len(batch.rows) for batch in batches)
    return {
        "batch/tokens": float(tokens),
        "batch/micro_batches": float(len(ran)),
        "batch/packing_ratio": len(full) * max(full, default=0) / max(1, tokens),
        "batch/shared_prefix_saving": 1 - tokens / max(1, sum(full)) if full else 0.0,
        "batch/skipped": float(packed - len(full)),
    }
