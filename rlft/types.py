"""The data types of a training step, with their shapes and the alignment of per-token arrays.

Shape letters used in every file: T tokens of a packed micro-batch, S sequences in it, N rollouts of a step, P prompts
of a step, G rollouts per prompt, L tokens of a completion or sequence, V vocabulary, H hidden size.

Alignment: index t of every per-token array describes `input_ids[t]`, and
`logprobs[t] = log p(input_ids[t] | the tokens before it)`. The hidden state that predicts token t is in row `source[t]`
(the previous row, or the last row of a shared prefix). The shift happens only inside `Policy`.

There are four kinds of log-probs: `sampler_logprobs` (the engine's, at sampling), `old_logprobs` (the trainer's before
the first of several updates), `logprobs` (the trainer's current ones, with gradient) and `ref_logprobs` (adapter off,
or the adapter that training started from).

Token ids are never round-tripped: text is decoded for rewards and never encoded again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rlft.routes import Routes
from rlft.upload import upload

Aggregation = Literal["token_mean", "sequence_mean", "constant", "sequence_sum", "prompt_mean"]


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """By EOS or a stop token."""
    LENGTH = "length"
    """Cut at `sampling.max_tokens`."""
    DONE = "done"
    """The environment ended the episode."""
    TURNS = "turns"
    """Cut at the largest number of turns."""
    TIME = "time"
    """Cut at a time limit."""


class LeftOut(StrEnum):
    """Why a sample is not trained on."""

    INVALID = "invalid"
    """It has no valid reward."""
    TRUNCATED = "truncated"
    """It was cut, and `overlong.mask` is set."""
    FILTERED = "filtered"
    """Dynamic sampling dropped its group."""


Layout = Literal["axes", "block", "plain", "lines", "cross"]
"""Tokens of an image: "axes" have positions for time, row and column (M-RoPE), the others as text. All tokens of a
"block" attend to each other. Each row of "lines" ends with a token that is a word. "cross" has one token, and features
that layers of cross-attention read."""


class Image(NamedTuple):
    """An image in a prompt, read and decoded when its features are needed."""

    source: str | bytes
    """Absolute path, or the bytes of the file."""
    digest: str
    """32 hex digits of the file's bytes."""
    start: int
    """Index of its first token in `Prompt.ids`."""
    height: int
    """Rows of tokens; of tiles where its layout is "cross"."""
    width: int
    """Tokens with features in each row."""
    layout: Layout = "axes"

    @property
    def tokens(self) -> int:
        """Tokens that stand for it in the prompt."""
        return 1 if self.layout == "cross" else self.height * (self.width + (self.layout == "lines"))


class Recorded(NamedTuple):
    """A completion recorded in the data instead of sampled by an engine (SFT, DPO, debugging)."""

    ids: tuple[int, ...]
    """Token ids after the prompt, including the end of turn or EOS."""
    mask: tuple[bool, ...]
    """True where the token is to be trained on (an assistant's turn), same length as `ids`."""
    reward: float
    """1 for SFT; +1 and -1 for the chosen and rejected side of a pair."""
    text: str
    """The decoded completion."""


@dataclass(frozen=True)
class Prompt:
    """Prompt tokens and the dataset row they come from."""

    ids: tuple[int, ...]
    """Token ids, chat template applied. Empty only for plain-text SFT rows, which are all completion."""
    row: dict[str, Any]
    """The dataset row after column mapping, without a column `prompt` that is not what the model is asked. Every column
    but `prompt` and `completion` reaches the rewards."""
    index: int
    """Row number in the dataset, stable over epochs, shuffling and resume."""
    messages: tuple[dict[str, Any], ...] | None = None
    """The conversation for a chat prompt; None for a plain string. Rewards then get message lists."""
    recorded: tuple[Recorded, ...] = ()
    """Completions recorded with the row; empty when an engine samples them."""
    images: tuple[Image, ...] = ()
    """Images in the order of their tokens, which are all in `ids`."""


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt, with how it was sampled."""

    prompt: Prompt
    completion_ids: tuple[int, ...]
    completion_mask: tuple[bool, ...]
    """True where the policy chose the token. False, so not trained on, for tool output and other inserted tokens, and
    where the sampler's log-prob is not finite."""
    sampler_logprobs: tuple[float, ...] | None
    """Log-prob of each token under the distribution it was sampled from; None for recorded completions."""
    text: str
    """The decoded completion without special tokens, used only by rewards and displays."""
    finish_reason: FinishReason
    sample_index: int
    """Position in the group, 0 to G-1."""
    policy_version: int
    """The step whose adapter sampled this (-1 for recorded completions)."""
    seed: int
    """Seed of this rollout's random stream."""
    recorded_reward: float | None = None
    """Reward recorded in the data, which `score` returns where there are no reward functions."""
    routes: Routes | None = None
    """The experts that the engine chose, which training passes take too; None where each pass chooses by itself."""

    @property
    def truncated(self) -> bool:
        """Whether a limit cut the completion, instead of the policy or the environment ending it."""
        return self.finish_reason in (FinishReason.LENGTH, FinishReason.TURNS, FinishReason.TIME)

    @cached_property
    def trained(self) -> np.ndarray:
        """Mask of the trained completion tokens, [L] bool: chosen by the policy, with a finite sampler log-prob.

        The first token of a text without a prompt is never trained, since nothing precedes it to predict it from.
        """
        length, sampler = len(self.completion_ids), self.sampler_logprobs
        assert len(self.completion_mask) == length, "completion_mask and completion_ids differ in length"
        # One byte per flag: np.fromiter takes three times as long for bools.
        mask = np.frombuffer(bytearray(self.completion_mask), bool)
        if sampler is not None:
            assert len(sampler) == length, "sampler_logprobs and completion_ids differ in length"
            mask &= np.isfinite(np.fromiter(sampler, np.float64, length))
        if not self.prompt.ids:
            mask[:1] = False
        mask.flags.writeable = False
        return mask


class Outcome(NamedTuple):
    """What one reward function made of one completion."""

    value: float
    """nan where not applicable or invalid."""
    invalid: bool
    """True when the function failed on it."""
    extras: dict[str, Any]
    """What the function logged about it: column -> value."""


@dataclass(eq=False)
class Sample:
    """A rollout with everything that a step learns about it, each field set once."""

    rollout: Rollout
    reward: float = math.nan
    """Sum of the reward functions, or the recorded reward; nan where invalid."""
    answer: float = math.nan
    """The reward without the overlong penalty. Summed by itself, since subtracting the penalty from `reward` leaves a
    rounding error, by which equal answers would differ."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By name of the reward function."""
    advantage: float = math.nan
    """nan until it is estimated, and for a group that dynamic sampling dropped."""
    left_out: LeftOut | None = None
    """Why it is not trained on; None for a sample that is."""
    logprobs: Tensor | None = None
    """[tokens of its packed sequence] float32, on the CPU: the trainer's log-probs before the first update of the step,
    nan where not trained; None for a sample that was not run."""

    @property
    def kept(self) -> bool:
        """Whether it counts and is trained on."""
        return self.left_out is None


@dataclass(eq=False)
class Group:
    """The samples of one prompt."""

    samples: list[Sample]

    @property
    def prompt(self) -> Prompt:
        """The prompt that all samples of the group continue."""
        return self.samples[0].rollout.prompt


@dataclass(frozen=True)
class PackPlan:
    """Settings of an update for `pack`."""

    aggregation: Aggregation
    """How per-token losses are reduced to one number; see `rlft.batch.pack`."""
    budget: int
    """Tokens per micro-batch. A single longer sequence gets a separate micro-batch."""
    max_len: int
    """Longest completion allowed; the denominator of the "constant" aggregation."""
    temperature: float
    """Sampling temperature, by which the trainer also divides its logits. Recorded completions use 1, see `pack`."""
    whole_groups: bool = False
    """Keep every group in one micro-batch (pair losses)."""
    share_prefix: bool = True
    """Run the prompt of a group once for all of its completions in a micro-batch."""


class Counts(NamedTuple):
    """Denominators of one optimiser update, summed over all micro-batches and ranks before the first forward."""

    tokens: int
    sequences: int
    groups: int


@dataclass(frozen=True)
class StepInputs:
    """Numbers of a whole update that a loss needs beside its micro-batch, made by its `prepare`."""

    z0: float | None = None
    """Mean log-ratio to the reference of mismatched completions, in nats, at least 0 (kto)."""
    entropy_floor: float | None = None
    """Smallest entropy of a token in the policy term, in nats; None: every token is in it."""
    entropy_coef: float | None = None
    """Factor of the entropy bonus in this update; None: as the settings have it."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Numbers of a user's loss, by names of its choice."""


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch: T tokens of S sequences, concatenated without padding.

    With shared prompts some sequences are prefixes. A prefix holds a prompt, trains nothing, and has group_id -1 and
    seq_weight 0; the sequences that continue it refer to it in `prefix`.
    """

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64, from 0 in each sequence, or after its shared prefix; [3, T] with images on axes (`rlft.positions`)."""
    cu_seqlens: Tensor
    """[S+1] int32: sequence s is rows cu_seqlens[s] to cu_seqlens[s+1]."""
    seq_ids: Tensor
    """[T] int64: the sequence each token belongs to."""
    source: Tensor
    """[T] int64: row whose hidden state predicts this token; -1 for the first token of a sequence without prefix."""
    prefix: Tensor
    """[S] int32: sequence whose keys and values this one also attends to; -1 for none."""
    train_mask: Tensor
    """[T] bool: trained tokens, chosen by the policy and with a finite sampler log-prob."""
    weight: Tensor
    """[T] float32: weight of a per-token loss; 0 outside `train_mask`. It includes all normalisation."""
    seq_weight: Tensor
    """[S] float32: weight of a per-sequence loss; the sum of the sequence's token weights."""
    advantages: Tensor
    """[T] float32: the sequence's advantage on trained tokens, 0 elsewhere."""
    group_ids: Tensor
    """[S] int64: group within the micro-batch, 0 to groups-1; -1 for a prefix."""
    group_weight: Tensor
    """[groups] float32: 1 / groups of the update, for losses over whole groups."""
    temperature: float
    """Divisor of the logits: the plan's for sampled completions, 1 for recorded ones."""
    max_seqlen: int
    max_prefix: int
    """Longest shared prefix, 0 for none. Like max_seqlen a host int, so that no kernel launch waits for the GPU."""
    zero_advantage: bool
    """True when every advantage is exactly 0: the loop may skip this micro-batch."""
    samples: tuple[Sample, ...]
    """The sample of each sequence that is not a prefix, in order."""
    images: tuple[tuple[Image, int], ...] = ()
    """Each image with the row of its first token, once for all sequences that share it."""
    routes: Tensor | None = None
    """[T, layers, k] uint8 or int16: experts of each token, as in `rlft.routes`; None: routers choose."""
    sampler_logprobs: Tensor | None = None
    """[T] float32; None when no engine sampled these tokens."""
    old_logprobs: Tensor | None = None
    """[T] float32; None with one update per rollout batch, where old log-probs are the detached current ones."""
    ref_logprobs: Tensor | None = None
    """[T] float32; None unless the loss needs a reference."""
    entropy: Tensor | None = None
    """[T]: entropy in nats of the current policy's distribution for each trained token; with gradient where the loss
    has `entropy_grad`."""
    plan: Any = None
    """The `rlft.models.fused.memory.MemoryPlan` of every pass over it, so that two passes round alike. None: each pass
    is planned for the free memory. Set by `Policy.planned`."""
    inputs: StepInputs = StepInputs()
    """Numbers of the whole update that the loss needs, from its `prepare`; the same on every rank."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        tensors = {name: upload(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class Stat(NamedTuple):
    """A number that is merged over micro-batches and ranks as `how` defines."""

    how: Literal["mean", "sum", "min", "max"]
    value: Tensor | float
    """The sum for "mean" and "sum", the extreme for "min" and "max". A 0-dim tensor stays on its device."""
    count: Tensor | float = 1.0
    """Number of things summed, for "mean"; a mean over nothing is not reported."""

    @staticmethod
    def mean(values: Tensor, mask: Tensor) -> Stat:
        """Return the mean of `values` where `mask` (same shape, bool) is True."""
        # where, not a product, so that a NaN outside the mask does not reach the sum.
        return Stat("mean", torch.where(mask, values.detach(), 0).sum(), mask.sum())


Stats = dict[str, Stat]


class StepView(Protocol):
    """The argument of a loss's `prepare`: an update's data and initial policy, before the update runs."""

    @property
    def rollouts(self) -> Sequence[Rollout]:
        """Rollouts of the update that are in the loss."""
        ...

    @property
    def adapted(self) -> Mapping[str, float]:
        """The numbers of the loss's `adapt` after the last step, State.adapted; empty in an evaluation."""
        ...

    def entropy_quantile(self, share: float) -> float:
        """Return the `share` quantile of the entropy of the update's trained tokens over all ranks, in nats."""
        ...

    def log_ratios(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return log(policy / reference) of each completion, [N] float64, summed over its tokens."""
        ...


class Best(NamedTuple):
    """The best evaluation so far among those whose checkpoint exists."""

    step: int
    metric: str
    """"eval/reward", the highest; "eval/loss", the lowest, where no reward is measured."""
    value: float


@dataclass
class State:
    """Progress of a run: the part of a checkpoint that is not tensors."""

    step: int = 0
    """Completed steps; also the policy version of the current adapter, and `train/global_step`."""
    steps: int = 0
    """Steps of the whole run."""
    updates: int = 0
    """Completed optimiser updates; drives the learning-rate schedule."""
    consumed: int = 0
    """Prompts taken from the dataset so far: the data cursor."""
    num_tokens: int = 0
    """Tokens trained or sampled so far (TRL's `num_tokens`)."""
    skipped_updates: int = 0
    """Consecutive updates skipped because loss or gradient was not finite."""
    untrained: int = 0
    """Consecutive steps in which no token could be trained."""
    invalid_history: list[float] = field(default_factory=list)
    """Share of invalid rewards in each of the last five steps."""
    solved: list[int] = field(default_factory=list)
    """Data rows that are not sampled again because they are solved (`curriculum`)."""
    adapted: dict[str, float] = field(default_factory=dict)
    """Numbers that `adapt` of the loss changes from step to step."""
    data: str = ""
    """Digest of the training rows, to detect changed data at resume."""
