"""The records that flow through a step, the shapes they have, and the one alignment rule.

Letters used for shapes in every file: T tokens of a packed micro-batch, S sequences in it, N rollouts of a step,
P prompts of a step, G rollouts per prompt, V vocabulary, H hidden size.

Alignment. Index t of every per-token array describes `input_ids[t]`, and
`logprobs[t] = log p(input_ids[t] | the tokens before it)`. The hidden state that predicts token t lies in another row,
`source[t]` (the row before it, or the last row of a shared prompt). The shift happens inside `Policy`, nowhere else.

Four log-probabilities, never confused: `sampler_logprobs` (the engine's, when it sampled), `old_logprobs` (the
trainer's before the first of several updates), `logprobs` (the trainer's now, with gradient), `ref_logprobs` (adapter
off, or the adapter that training started from).

Tokens in, tokens out: text is decoded for rewards and never encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rlft.upload import upload

FinishReason = Literal["stop", "length"]
Aggregation = Literal["token_mean", "sequence_mean", "constant", "sequence_sum", "prompt_mean"]


class Recorded(NamedTuple):
    """A completion that came with the data instead of from an engine (SFT, DPO, debugging)."""

    ids: tuple[int, ...]
    """Token ids after the prompt's, the end of the turn or EOS included."""
    mask: tuple[bool, ...]
    """True where the token is to be trained on (an assistant's turn), same length as `ids`."""
    reward: float
    """1 for SFT; +1 and -1 for the chosen and the rejected side of a pair."""
    text: str
    """The completion as a reader would see it."""


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and the dataset row they came from."""

    ids: tuple[int, ...]
    """Token ids, chat template applied. Empty only for plain-text SFT rows, whose text is all completion."""
    row: dict[str, Any]
    """The dataset row after column mapping. Every column but `prompt` and `completion` reaches the rewards."""
    index: int
    """Row number in the dataset, stable over epochs, shuffling and resume."""
    messages: tuple[dict[str, Any], ...] | None = None
    """The conversation for a chat prompt; None for a plain string. Rewards then get message lists."""
    recorded: tuple[Recorded, ...] = ()
    """Completions recorded with the row; empty when an engine is to sample them."""


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt, with everything that was known when it was made."""

    prompt: Prompt
    completion_ids: tuple[int, ...]
    completion_mask: tuple[bool, ...]
    """True where the policy chose the token; False for tool output and other inserted tokens, and where the sampler's
    log-prob is not finite: those are not trained on."""
    sampler_logprobs: tuple[float, ...] | None
    """Log-probability of each token under the distribution it was drawn from; None for recorded completions."""
    text: str
    """The completion decoded, special tokens skipped. Only rewards and people read it."""
    finish_reason: FinishReason
    """"stop": ended by EOS or a stop token. "length": cut at `sampling.max_tokens`."""
    sample_index: int
    """Position in the group, 0 to G-1."""
    policy_version: int
    """The step whose adapter sampled this (-1 for recorded completions)."""
    seed: int
    """Seed of this rollout's own random stream."""
    recorded_reward: float | None = None
    """Reward that came with the data: what `score` returns where there are no reward functions."""

    @cached_property
    def trained(self) -> np.ndarray:
        """Which completion tokens are trained, [L] bool: chosen by the policy, with a finite sampler log-prob.

        The first token of a text without a prompt has nothing before it to be predicted from, so it is not.
        """
        length, sampler = len(self.completion_ids), self.sampler_logprobs
        assert len(self.completion_mask) == length, "completion_mask and completion_ids differ in length"
        # A byte per flag: np.fromiter takes three times as long over bools.
        mask = np.frombuffer(bytearray(self.completion_mask), bool)
        if sampler is not None:
            assert len(sampler) == length, "sampler_logprobs and completion_ids differ in length"
            mask &= np.isfinite(np.fromiter(sampler, np.float64, length))
        if not self.prompt.ids:
            mask[:1] = False
        mask.flags.writeable = False
        return mask


@dataclass(frozen=True)
class PackPlan:
    """What `count` and `pack` need to know about an update besides its rollouts."""

    keep: tuple[bool, ...]
    """One flag per rollout. False (invalid reward, filtered, dropped group): out of the counts and of the batches."""
    aggregation: Aggregation
    """How per-token losses become one number; see `rlft.batch.pack`."""
    budget: int
    """Tokens per micro-batch. A single sequence longer than this gets a micro-batch of its own."""
    max_len: int
    """Longest completion allowed; the denominator of the "constant" aggregation."""
    temperature: float
    """Of sampled completions: the trainer divides its logits by it too. Recorded ones are trained at 1, see `pack`."""
    whole_groups: bool = False
    """Keep every group in one micro-batch (pair losses)."""
    share_prefix: bool = True
    """Run the prompt of a group once for all of its completions in a micro-batch."""


class Counts(NamedTuple):
    """What one optimiser update averages over: summed over all micro-batches and ranks before the first forward."""

    tokens: int
    sequences: int
    groups: int


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch: T tokens of S sequences, side by side, no padding.

    With shared prompts some sequences are prefixes: they hold a prompt, train nothing, and have group_id -1 and
    seq_weight 0; the sequences that continue one name it in `prefix`.
    """

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64: restarts with each sequence, continues after a shared prefix."""
    cu_seqlens: Tensor
    """[S+1] int32: sequence s is rows cu_seqlens[s] to cu_seqlens[s+1]."""
    seq_ids: Tensor
    """[T] int64: the sequence each token belongs to."""
    source: Tensor
    """[T] int64: row whose hidden state predicts this token; -1 for the first token of a sequence with no prefix."""
    prefix: Tensor
    """[S] int32: sequence whose keys and values this one also attends to; -1 for none."""
    train_mask: Tensor
    """[T] bool: tokens with a log-probability: chosen by the policy, with a finite sampler log-prob."""
    weight: Tensor
    """[T] float32: weight of a per-token loss; 0 outside `train_mask`. Nothing else divides, anywhere."""
    seq_weight: Tensor
    """[S] float32: weight of a per-sequence loss; the sum of the sequence's token weights."""
    advantages: Tensor
    """[T] float32: the sequence's advantage on trained tokens, 0 elsewhere."""
    group_ids: Tensor
    """[S] int64: group within the micro-batch, 0 to groups-1; -1 for a prefix."""
    group_weight: Tensor
    """[groups] float32: 1 / groups of the update, for losses over whole groups."""
    temperature: float
    """Divides the logits: the plan's for sampled completions, 1 for recorded ones."""
    max_seqlen: int
    max_prefix: int
    """Longest shared prefix, 0 for none. With max_seqlen a host int, so that no kernel launch waits for the GPU."""
    zero_advantage: bool
    """True when every advantage is exactly 0: the loop may skip this micro-batch."""
    rows: tuple[int, ...]
    """For each sequence that is not a prefix, in order: its index in the rollouts given to `pack`."""
    sampler_logprobs: Tensor | None = None
    """[T] float32; None when no engine sampled these tokens."""
    old_logprobs: Tensor | None = None
    """[T] float32; None with one update per rollout batch, where old is now without gradient."""
    ref_logprobs: Tensor | None = None
    """[T] float32; None unless the loss needs a reference."""
    entropy: Tensor | None = None
    """[T]: entropy of the distribution each trained token was drawn from, in nats, under the policy now; with gradient
    where the loss says ENTROPY_GRAD."""
    plan: Any = None
    """How every pass over it runs on fused layers (`rlft.models.fused.memory.MemoryPlan`), so that two passes round
    alike; None: each is planned for the memory that is free. Filled by `Policy.planned`."""
    prepared: dict[str, float] = field(default_factory=dict)
    """Numbers of the whole update that the loss needs, the same on every rank: what its `prepare` gave and
    State.adapted."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        tensors = {name: upload(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class Stat(NamedTuple):
    """A number that adds up over micro-batches and ranks: `how` says in which way."""

    how: Literal["mean", "sum", "min", "max"]
    value: Tensor | float
    """The sum for "mean" and "sum", the extreme for "min" and "max". A 0-dim tensor stays on its device."""
    count: Tensor | float = 1.0
    """Number of things summed, for "mean"; a mean over nothing is not reported."""

    @staticmethod
    def mean(values: Tensor, mask: Tensor) -> Stat:
        """Mean of `values` where `mask` (same shape, bool) holds."""
        # where, not a product: a NaN outside the mask must not reach the sum.
        return Stat("mean", torch.where(mask, values.detach(), 0).sum(), mask.sum())


Stats = dict[str, Stat]


class StepView(Protocol):
    """What `prepare(look, cfg)` of a loss file may ask about an update before it is made: all that it trains on, and
    the policy that it starts from."""

    @property
    def rollouts(self) -> Sequence[Rollout]:
        """Those of the update that are in the loss, on this rank."""
        ...

    def entropy_quantile(self, share: float) -> float:
        """Entropy that `share` of the update's trained tokens stay below, over all ranks, in nats."""
        ...

    def log_ratios(self, rollouts: Sequence[Rollout]) -> Tensor:
        """log of policy over reference of each completion given its prompt, [N] float64: the sum over its tokens."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over ranks."""
        ...


class Best(NamedTuple):
    """The best evaluation so far, of those whose checkpoint is there."""

    step: int
    metric: str
    """"eval/reward", the highest; "eval/loss", the lowest, where no reward is measured."""
    value: float


@dataclass
class State:
    """Where a run is: what a checkpoint restores besides tensors."""

    step: int = 0
    """Steps done; also the policy version of the adapter in training, and `train/global_step`."""
    updates: int = 0
    """Optimiser updates done; drives the learning-rate schedule."""
    consumed: int = 0
    """Prompts consumed from the dataset: the data cursor."""
    num_tokens: int = 0
    """Tokens trained or sampled so far (TRL's `num_tokens`)."""
    skipped_updates: int = 0
    """Updates skipped in a row because loss or gradient was not finite."""
    untrained: int = 0
    """Steps in a row in which no token could be trained."""
    invalid_history: list[float] = field(default_factory=list)
    """Share of invalid rewards in each of the last five steps."""
    solved: list[int] = field(default_factory=list)
    """Rows of the data that are not drawn again because they were solved (`curriculum`)."""
    adapted: dict[str, float] = field(default_factory=dict)
    """Numbers that the loss file's `adapt` changes from step to step."""
    data: str = ""
    """Digest of the training rows: what `consumed` counts in, and what held-out rows must not be among."""
