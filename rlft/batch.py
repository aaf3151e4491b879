"""Pack rollouts into micro-batches, with a loss weight per token.

`count` computes the denominators of a whole optimiser update before its first forward. `pack` turns them into a weight
per token, so that a loss is `(token_loss * batch.weight).sum()` and the gradient does not depend on the split into
micro-batches and ranks. Nothing is padded or truncated, and the completions of a prompt can share its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlft.errors import EngineError, TrainError
from rlft.positions import completion_positions, on_axes, prompt_positions
from rlft.types import Batch, Counts, Group, Image, LeftOut, PackPlan, Rollout, Sample


def group_ids(rollouts: Sequence[Rollout]) -> Tensor:
    """Return the group of each rollout: [N] int64, numbered from 0 in order of appearance.

    A new group starts where the prompt changes or `sample_index` does not increase, so a prompt that occurs twice in a
    step makes two groups.
    """
    ids, group = [], -1
    for i, rollout in enumerate(rollouts):
        previous = rollouts[i - 1] if i else None
        if (
            previous is None
            or previous.prompt.index != rollout.prompt.index
            or rollout.sample_index <= previous.sample_index
        ):
            group += 1
        ids.append(group)
    return torch.tensor(ids, dtype=torch.int64)


def groups_of(rollouts: Sequence[Rollout], advantages: Sequence[float] | None = None) -> list[Group]:
    """Wrap rollouts in samples and groups, as `group_ids` divides them. advantages: one per rollout, by default nan."""
    values = [math.nan] * len(rollouts) if advantages is None else advantages
    groups: list[Group] = []
    for rollout, group, advantage in zip(rollouts, group_ids(rollouts).tolist(), values, strict=True):
        if group == len(groups):
            groups.append(Group([]))
        groups[group].samples.append(Sample(rollout, advantage=advantage))
    return groups


def samples_of(groups: Sequence[Group]) -> list[Sample]:
    """Return the samples of all groups in order."""
    return [sample for group in groups for sample in group.samples]


def group_numbers(groups: Sequence[Group]) -> Tensor:
    """Return the group of each sample: [N] int64, numbered from 0."""
    return torch.tensor([i for i, group in enumerate(groups) for _ in group.samples], dtype=torch.int64)


def count(groups: Sequence[Group]) -> Counts:
    """Count the trained tokens, sequences and groups of the samples that are kept.

    Rows of zero advantage and tokens masked by a correction count; tool output and tokens whose sampler log-prob is not
    finite do not. An empty completion is a sequence without tokens.
    """
    kept = [sample for sample in samples_of(groups) if sample.kept]
    tokens = sum(int(sample.rollout.trained.sum()) for sample in kept)
    return Counts(tokens, len(kept), sum(any(sample.kept for sample in group.samples) for group in groups))


class _Row(NamedTuple):
    """A sample to be packed."""

    sample: Sample
    group: int
    mask: np.ndarray
    """`Rollout.trained`."""
    tokens: int
    """Number of trained tokens."""
    weight: float
    """Weight of each trained token."""

    @property
    def rollout(self) -> Rollout:
        return self.sample.rollout

    @property
    def advantage(self) -> float:
        return self.sample.advantage


def pack(groups: Sequence[Group], plan: PackPlan, counts: Counts) -> list[Batch]:
    """Pack the kept samples of an update into micro-batches of at most `plan.budget` tokens.

    counts: of the whole update, over all its micro-batches and ranks. A trained token of a sequence with L trained
    tokens has the weight

        token_mean      1 / tokens                            equal weight per token (DAPO)
        sequence_mean   1 / (sequences * L)                   equal weight per sequence (GRPO)
        constant        1 / (sequences * plan.max_len)        no length bias (Dr. GRPO)
        sequence_sum    1 / sequences                         the plain policy gradient (REINFORCE)
        prompt_mean     1 / (groups * tokens of its group)    equal weight per prompt (ScaleRL)

    and the weight of a sequence is the sum over its tokens. The unit of packing is a completion with its prompt; with
    `plan.share_prefix` a prompt with all its completions, split into parts that repeat the prompt where the budget
    requires it; with `plan.whole_groups` a group. Micro-batches are filled longest unit first, then evened out without
    increasing their number. A unit longer than the budget runs alone. Units whose advantages are all exactly 0 come
    last, in separate micro-batches, so that skipping them changes no other. A row without trained tokens (with
    `plan.whole_groups`, a group without any) is counted but not run. Recorded completions (without sampler log-probs)
    have temperature 1, since they were not sampled at `plan.temperature`. Raises TrainError when the advantage of a
    kept rollout is not finite.
    """
    rows = _rows(groups, plan, counts)
    for name in ("sampler_logprobs", "routes"):
        kinds = {getattr(row.rollout, name) is not None for row in rows}
        assert len(kinds) <= 1, f"either every rollout of an update has {name} or none has"
    return [_batch(units, plan, counts) for units in _micro_batches(rows, plan)]


def micro_batch_tokens(groups: Sequence[Group], plan: PackPlan, counts: Counts) -> Callable[[int], list[int]]:
    """Return a function from a budget to the tokens of each micro-batch that `pack` makes with it."""
    rows = _rows(groups, plan, counts)

    def tokens(budget: int) -> list[int]:
        own = replace(plan, budget=budget)
        return [sum(_tokens(unit, own) for unit in units) for units in _micro_batches(rows, own)]

    return tokens


def _micro_batches(rows: Sequence[_Row], plan: PackPlan) -> list[list[list[_Row]]]:
    """Return the units of each micro-batch, those of zero advantage last."""
    nonzero, zeros = [], []
    for _, group in groupby(rows, key=lambda row: row.group):
        for part in _parts(list(group), plan):
            (nonzero if any(row.advantage for row in part) else zeros).append(part)
    return [units for parts in (nonzero, zeros) for units in _even(parts, plan)]


def pack_rollouts(rollouts: Sequence[Rollout], advantages: Sequence[float] | Tensor, plan: PackPlan) -> list[Batch]:
    """Pack the rollouts of one optimiser update, as `pack` does; those of one prompt are neighbours.

    advantages: one per rollout, nan for one that is left out.
    """
    groups = groups_of(rollouts, [float(advantage) for advantage in advantages])
    for sample in samples_of(groups):
        sample.left_out = LeftOut.INVALID if math.isnan(sample.advantage) else None
    return pack(groups, plan, count(groups))


def pack_all(rollouts: Sequence[Rollout], plan: PackPlan) -> list[Batch]:
    """Pack rollouts for scoring alone: all of them are kept, and groups may be split.

    Their samples are new, with an advantage of 0, and in the order of `rollouts` within a group.
    """
    groups = groups_of(rollouts, [0.0] * len(rollouts))
    return pack(groups, replace(plan, whole_groups=False), count(groups))


def _rows(groups: Sequence[Group], plan: PackPlan, counts: Counts) -> list[_Row]:
    """Return the kept samples in order, with the weight of their tokens."""
    rows = []
    for number, group in enumerate(groups):
        kept = [sample for sample in group.samples if sample.kept]
        masks = [sample.rollout.trained for sample in kept]
        tokens = [int(mask.sum()) for mask in masks]
        group_tokens = sum(tokens)
        _check_routes(kept)
        for sample, mask, row_tokens in zip(kept, masks, tokens, strict=True):
            if not math.isfinite(sample.advantage):
                raise TrainError(
                    f"the advantage of sample {sample.rollout.sample_index} of row {group.prompt.index} of the data is "
                    f"{sample.advantage}: rewards and algo.advantage must give finite numbers"
                )
            divisor = {
                "token_mean": counts.tokens,
                "sequence_mean": counts.sequences * row_tokens,
                "constant": counts.sequences * plan.max_len,
                "sequence_sum": counts.sequences,
                "prompt_mean": counts.groups * group_tokens,
            }[plan.aggregation]
            rows.append(_Row(sample, number, mask, row_tokens, 1 / divisor if row_tokens else 0.0))
    return rows


def _check_routes(samples: Sequence[Sample]) -> None:
    """Raise EngineError where an engine has reported the experts of some tokens of a sample and not of others."""
    for rollout in (sample.rollout for sample in samples):
        if rollout.routes is not None:
            found = len(rollout.routes.prompt), len(rollout.routes.completion)
            tokens = len(rollout.prompt.ids), len(rollout.completion_ids)
            if found != tokens:
                raise EngineError(
                    f"row {rollout.prompt.index}: the engine reported the experts of {found[0]} + {found[1]} tokens, "
                    f"and there are {tokens[0]} + {tokens[1]}; set engine.routing_replay = false, and report it"
                )


def _parts(group: list[_Row], plan: PackPlan) -> list[list[_Row]]:
    """Return the rows of a group to run, with those of zero advantage as a separate part unless `plan.whole_groups`."""
    if plan.whole_groups:
        return [group] if any(row.tokens for row in group) else []
    group = [row for row in group if row.tokens]
    parts = [row for row in group if row.advantage], [row for row in group if not row.advantage]
    return [part for part in parts if part]


def _units(part: list[_Row], plan: PackPlan, room: int) -> list[list[_Row]]:
    """Split a part into units, each of which must stay in one micro-batch of `room` tokens."""
    if plan.whole_groups:
        return [part]
    if not plan.share_prefix:
        return [[row] for row in part]
    bins = _first_fit([len(row.mask) for row in part], room - len(part[0].rollout.prompt.ids))
    return [[part[i] for i in sorted(bin_)] for bin_ in bins]


def _fill(parts: list[list[_Row]], plan: PackPlan, room: int) -> tuple[list[list[list[_Row]]], int]:
    """Return the units of each micro-batch of at most `room` tokens, and the total number of tokens."""
    units = [unit for part in parts for unit in _units(part, plan, room)]
    sizes = [_tokens(unit, plan) for unit in units]
    return [[units[i] for i in bin_] for bin_ in _first_fit(sizes, room)], sum(sizes)


EVEN = 64
"""Largest number of micro-batches that are evened out: more take long on the host and are nearly even anyway."""


def _even(parts: list[list[_Row]], plan: PackPlan) -> list[list[list[_Row]]]:
    """Return the units of each micro-batch: as few micro-batches as the budget allows, of nearly equal size.

    Uses the smallest room that needs no more micro-batches and repeats no prompt more often. Equal sizes lower the peak
    memory, and a short last micro-batch would have another length in every step, for which CUDA graphs are captured.
    """
    best, tokens = _fill(parts, plan, plan.budget)
    if not 1 < len(best) <= EVEN:
        return best
    low, high = plan.budget // 2, plan.budget
    while high - low > max(1, plan.budget // 64):
        room = (low + high) // 2
        batches, total = _fill(parts, plan, room)
        if len(batches) <= len(best) and total <= tokens:
            best, high = batches, room
        else:
            low = room
    return best


def _first_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Assign indices of `sizes` to bins of at most `room`, largest first. A larger item gets a separate bin."""
    bins: list[list[int]] = []
    totals: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((bin_ for bin_, total in enumerate(totals) if total + sizes[i] <= room), None)
        if place is None:
            bins.append([i])
            totals.append(sizes[i])
        else:
            bins[place].append(i)
            totals[place] += sizes[i]
    return bins


def _shared(unit: list[_Row], plan: PackPlan) -> bool:
    return plan.share_prefix and len(unit) > 1 and len(unit[0].rollout.prompt.ids) > 0


def _tokens(unit: list[_Row], plan: PackPlan) -> int:
    prompts = 1 if _shared(unit, plan) else len(unit)
    return prompts * len(unit[0].rollout.prompt.ids) + sum(len(row.mask) for row in unit)


class _Sequence(NamedTuple):
    """One sequence of a micro-batch: a prompt, a completion after a shared prompt, or both together."""

    ids: tuple[int, ...]
    row: _Row | None
    """None for a shared prefix."""
    positions: np.ndarray
    """[3, tokens] int64, see `rlft.positions`."""
    images: tuple[Image, ...]
    """Those whose tokens it holds."""
    prefix: int
    """Index of the sequence that holds its prompt, -1 for none."""
    routes: tuple[np.ndarray, ...] = ()
    """[tokens, layers, k] in parts; () where the engine reported none."""

    def spread(self, values: Sequence[float] | np.ndarray, dtype: type) -> np.ndarray:
        """Spread `values`, one per completion token, over the sequence, with 0 on the prompt."""
        array = np.zeros(len(self.ids), dtype)
        array[len(array) - len(values) :] = values
        return array


def _sequences(units: list[list[_Row]], plan: PackPlan) -> list[_Sequence]:
    """Order the sequences: shared prompts, their completions in the same order, then completions with a prompt each.

    The completions of all shared prompts are then one block of rows for the attention over prefixes
    (rlft.kernels.attention).
    """
    prompts, completions, alone = [], [], []
    for unit in units:
        prompt = unit[0].rollout.prompt
        assert all(row.rollout.prompt.ids == prompt.ids for row in unit), "a group has one prompt"
        assert all(row.rollout.prompt.images == prompt.images for row in unit), "a group has the same images"
        before = prompt_positions(prompt)
        for row in unit:
            ids, routes = row.rollout.completion_ids, row.rollout.routes
            own = () if routes is None else (routes.completion,)
            positions = completion_positions(prompt, len(ids))
            if _shared(unit, plan):
                completions.append(_Sequence(ids, row, positions, (), len(prompts), own))
            else:
                whole = np.concatenate([before, positions], axis=1)
                own = own if routes is None else (routes.prompt, *own)
                alone.append(_Sequence(prompt.ids + ids, row, whole, prompt.images, -1, own))
        if _shared(unit, plan):
            routes = unit[0].rollout.routes
            own = () if routes is None else (routes.prompt,)
            prompts.append(_Sequence(prompt.ids, None, before, prompt.images, -1, own))
    return prompts + completions + alone


def _batch(units: list[list[_Row]], plan: PackPlan, counts: Counts) -> Batch:
    """Build the tensors of one micro-batch."""
    sequences = _sequences(units, plan)
    rows = [sequence.row for sequence in sequences if sequence.row is not None]
    local = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in rows))}
    lengths = [len(sequence.ids) for sequence in sequences]
    bounds = [0, *accumulate(lengths)]
    seq_ids = torch.from_numpy(np.repeat(np.arange(len(sequences)), lengths))
    images = tuple(
        (image, start + image.start)
        for sequence, start in zip(sequences, bounds[:-1], strict=True)
        for image in sequence.images
    )
    axes = any(on_axes(image) for image, _ in images)
    positions = np.concatenate([each.positions if axes else each.positions[0] for each in sequences], axis=-1)
    source = np.arange(bounds[-1]) - 1
    for i, sequence in enumerate(sequences):
        if lengths[i]:
            source[bounds[i]] = bounds[sequence.prefix + 1] - 1 if sequence.prefix >= 0 else -1
    masks = [sequence.spread(sequence.row.mask if sequence.row else (), bool) for sequence in sequences]
    train_mask = torch.from_numpy(np.concatenate(masks))
    weights = torch.tensor([sequence.row.weight if sequence.row else 0.0 for sequence in sequences])
    advantages = torch.tensor([sequence.row.advantage if sequence.row else 0.0 for sequence in sequences])
    sampler, temperature = None, 1.0
    if rows[0].rollout.sampler_logprobs is not None:
        temperature = plan.temperature
        values = [
            sequence.spread(sequence.row.rollout.sampler_logprobs or () if sequence.row else (), np.float32)
            for sequence in sequences
        ]
        sampler = torch.where(train_mask, torch.from_numpy(np.concatenate(values)), 0)
    return Batch(
        input_ids=torch.from_numpy(
            np.fromiter(chain.from_iterable(sequence.ids for sequence in sequences), np.int64, bounds[-1])
        ),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        seq_ids=seq_ids,
        source=torch.from_numpy(source),
        prefix=torch.tensor([sequence.prefix for sequence in sequences], dtype=torch.int32),
        train_mask=train_mask,
        weight=torch.where(train_mask, weights[seq_ids], 0),
        seq_weight=torch.tensor(
            [sequence.row.weight * sequence.row.tokens if sequence.row else 0.0 for sequence in sequences]
        ),
        advantages=torch.where(train_mask, advantages[seq_ids], 0),
        group_ids=torch.tensor(
            [local[sequence.row.group] if sequence.row else -1 for sequence in sequences], dtype=torch.int64
        ),
        group_weight=torch.full((len(local),), 1 / counts.groups),
        temperature=temperature,
        max_seqlen=max(lengths),
        max_prefix=max((lengths[sequence.prefix] for sequence in sequences if sequence.prefix >= 0), default=0),
        zero_advantage=not any(row.advantage for row in rows),
        samples=tuple(row.sample for row in rows),
        images=images,
        routes=_routes(sequences),
        sampler_logprobs=sampler,
    )


def _routes(sequences: Sequence[_Sequence]) -> Tensor | None:
    """Return the experts of all tokens; None where the engine reported none."""
    parts = [part for sequence in sequences for part in sequence.routes]
    return torch.from_numpy(np.concatenate(parts)) if parts else None


def segment_sum(values: Tensor, ids: Tensor, segments: int) -> Tensor:
    """Sum `values` [T] per segment, with gradient. ids: [T] int64, 0 to segments-1. Returns [segments]."""
    return values.new_zeros(segments).index_add(0, ids, values)
