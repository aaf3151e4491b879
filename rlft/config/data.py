"""The sections of a config about what goes in and what is measured: datasets, rewards, sampling, evaluation.

`rlft.config.run` holds the other sections and puts them together; import all of them from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlft.errors import ConfigError


def require(ok: bool, name: str, value: object, want: str) -> None:
    """Raise ConfigError naming the field, its value and what is wanted, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} = {value!r}: {want}")


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture (`data.sources`)."""

    path: str
    """File, `datasets` folder, hub id, or "reasoning_gym:TASK"."""
    weight: float = 1.0
    """Share of this source in the mixture, relative to the other weights."""
    split: str = "train"
    """Split of a hub dataset or `datasets` folder."""
    subset: str | None = None
    """Subset (configuration name) of a hub dataset."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a reasoning-gym task (its config fields, and `size` and `seed`)."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "data.sources.weight", self.weight, "a weight is above 0")


@dataclass(frozen=True)
class Data:
    """Where the prompts come from and how a row becomes one."""

    path: str = ""
    """File (.jsonl, .json, .parquet, .csv), `datasets` folder, hub id, or "reasoning_gym:TASK"."""
    split: str = "train"
    """Split of a hub dataset or `datasets` folder."""
    subset: str | None = None
    """Subset (configuration name) of a hub dataset."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a reasoning-gym task (its config fields, and `size` and `seed`)."""
    sources: tuple[Source, ...] = ()
    """Several datasets mixed by weight, instead of `path`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column name = the dataset's, for example {prompt = "question", answer = "solution"}."""
    system: str | None = None
    """System message put before every prompt."""
    template: str | None = None
    """"file.py:function" that turns a raw row into a row with our columns; runs before `columns`."""
    chat: Literal["auto", "never"] = "auto"
    """"auto": a string prompt becomes one user turn where there is a chat template. "never": it is encoded as it is."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments handed to the chat template, for example {enable_thinking = false}."""
    shuffle: bool = True
    """Visit rows in an order drawn from `seed`, another one each epoch."""
    epochs: float | None = None
    """Passes over the data; give this or `steps`."""
    max_prompt_tokens: int | None = None
    """Longer prompts are dropped and counted, or an error (`long_prompts`). None: no limit."""
    long_prompts: Literal["drop", "error"] = "drop"
    """What happens to a prompt longer than `max_prompt_tokens`."""

    def __post_init__(self) -> None:
        require(bool(self.path) != bool(self.sources), "data.path", self.path, "give either data.path or data.sources")
        require(self.epochs is None or self.epochs > 0, "data.epochs", self.epochs, "a number above 0")
        limit = self.max_prompt_tokens
        require(limit is None or limit >= 1, "data.max_prompt_tokens", limit, "at least 1, or leave it out")


@dataclass(frozen=True)
class Reward:
    """One reward function."""

    use: str
    """A name in rlft.rewards ("number"), "file.py:function" or "package.module:function". In the rewards given to
    `rlft.train` from Python it may be the function itself."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    timeout: float = 30.0
    """Seconds one call may take; then its process is killed and the rows it was scoring are invalid."""
    memory_mb: int | None = None
    """Address space the worker may use, in MiB; None for no limit."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments passed to the function besides the columns."""

    def __post_init__(self) -> None:
        require(self.timeout > 0, "rewards.timeout", self.timeout, "seconds above 0")
        require(self.memory_mb is None or self.memory_mb >= 64, "rewards.memory_mb", self.memory_mb, "at least 64 MiB")


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    group_size: int = 8
    """Completions per prompt (G)."""
    max_tokens: int = 1024
    """Longest completion, in tokens; longer ones are cut and reported as clipped."""
    temperature: float = 1.0
    """Softmax temperature of sampled completions; the trainer divides its logits by it too. Recorded completions are
    trained at 1. 0 (greedy) only in evaluation."""
    top_p: float = 1.0
    """Nucleus sampling: evaluation only, since it changes the distribution that is sampled from."""
    top_k: int = 0
    """Sample among the k most likely tokens, 0 for all: evaluation only."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's own EOS."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; its text ends before one, its tokens with it."""

    def __post_init__(self) -> None:
        require(all(self.stop), "sampling.stop", list(self.stop), "strings that are not empty")
        require(self.group_size >= 1, "sampling.group_size", self.group_size, "at least 1")
        require(self.max_tokens >= 1, "sampling.max_tokens", self.max_tokens, "at least 1")
        require(0 <= self.temperature < 100, "sampling.temperature", self.temperature, "between 0 and 100")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "above 0, at most 1")
        require(self.top_k >= 0, "sampling.top_k", self.top_k, "0 (all) or more")

    def check_for_training(self) -> None:
        """Raise ConfigError for what would make the sampler's log-probs another distribution than the trainer's."""
        want = "above 0 in training: the policy gradient is that of a sampled token; greedy decoding belongs in [eval]"
        require(self.temperature > 0, "sampling.temperature", self.temperature, want)
        why = "in training every token must be reachable, or log-probs are of another distribution; allowed in [eval]"
        require(self.top_p == 1, "sampling.top_p", self.top_p, why)
        require(self.top_k == 0, "sampling.top_k", self.top_k, why)


@dataclass(frozen=True)
class DynamicSampling:
    """Dynamic sampling (DAPO): groups of equal rewards teach nothing, so other prompts are drawn in their place."""

    rounds: int = 0
    """Rounds of drawing at most; then the step trains on the groups there are. 0 switches it off."""
    by: str | None = None
    """Reward function whose values must differ within a group; None: the reward without the overlong penalty. Name the
    one that says right or wrong where others shape the reward."""

    def __post_init__(self) -> None:
        require(self.rounds >= 0, "dynamic_sampling.rounds", self.rounds, "0 (off) or more")
        require(
            self.by is None or self.rounds > 0,
            "dynamic_sampling.by",
            self.by,
            "set dynamic_sampling.rounds too, or no group is replaced",
        )


@dataclass(frozen=True)
class Curriculum:
    """Which prompts are drawn, by how often they were solved."""

    solved_share: float | None = None
    """A prompt is not drawn again once at least this share of its group was solved (ScaleRL: 0.9); None: all are."""
    threshold: float = 1.0
    """A completion with at least this reward, without the overlong penalty, counts as solved."""

    def __post_init__(self) -> None:
        share = self.solved_share
        why = "above 0, at most 1; leave it out to draw every prompt"
        require(share is None or 0 < share <= 1, "curriculum.solved_share", share, why)


@dataclass(frozen=True)
class Overlong:
    """Completions that come near `sampling.max_tokens` (DAPO)."""

    penalty_share: float = 0.0
    """Over this last share of max_tokens a penalty grows from 0 to -1, added to the reward; 0 switches it off."""
    mask: bool = False
    """Leave completions that were cut at max_tokens out of the loss. Their reward stays in the group's statistics."""

    def __post_init__(self) -> None:
        require(0 <= self.penalty_share <= 1, "overlong.penalty_share", self.penalty_share, "0 (off) to 1")


@dataclass(frozen=True)
class Eval:
    """Measuring on rows that are never trained on."""

    rows: int = 0
    """Held-out rows; 0 switches evaluation off. Without `data` they are set aside from the training data."""
    data: Data | None = None
    """Another dataset to evaluate on; its first `rows` rows are used, and training rows with the same prompt are left
    out."""
    every: int = 0
    """Evaluate every this many steps, and save where the result is the best so far; 0: only before the first step and
    after the last."""
    rewards: tuple[Reward, ...] = ()
    """Reward functions of the evaluation; none: those of the run."""
    samples: int = 1
    """Completions per row; with one, decoding is greedy unless `temperature` says otherwise."""
    pass_at: tuple[int, ...] = ()
    """The k of pass@k; none: 1, 2, 4, 8, ... up to `samples`."""
    threshold: float = 1.0
    """A completion with at least this reward (the weighted sum) counts as solved in pass@k."""
    temperature: float = 0.0
    """Sampling temperature of the evaluation; 0 is greedy."""
    max_tokens: int | None = None
    """Longest completion; None: `sampling.max_tokens`."""
    top_p: float = 1.0
    """Nucleus sampling in the evaluation."""
    top_k: int = 0
    """Sample among the k most likely tokens in the evaluation, 0 for all."""
    stop_token_ids: tuple[int, ...] | None = None
    """Token ids that end a completion, besides the model's own EOS; None: `sampling.stop_token_ids`."""

    def __post_init__(self) -> None:
        require(self.rows >= 0, "eval.rows", self.rows, "0 or more")
        require(self.every >= 0, "eval.every", self.every, "0 or more")
        require(not (self.every and not self.rows), "eval.every", self.every, "nothing to evaluate on: set eval.rows")
        require(not (self.data and not self.rows), "eval.rows", self.rows, "say how many rows of eval.data to use")
        require(self.samples >= 1, "eval.samples", self.samples, "at least 1")
        greedy = self.temperature == 0 and self.samples > 1
        require(not greedy, "eval.samples", self.samples, "greedy samples are all equal: set eval.temperature above 0")
        fits = all(1 <= k <= self.samples for k in self.pass_at)
        require(fits, "eval.pass_at", self.pass_at, f"each from 1 to eval.samples = {self.samples}")
        require(0 <= self.temperature < 100, "eval.temperature", self.temperature, "between 0 and 100")
        limit = self.max_tokens
        require(limit is None or limit >= 1, "eval.max_tokens", limit, "at least 1, or leave it out")
        require(0 < self.top_p <= 1, "eval.top_p", self.top_p, "above 0, at most 1")
        require(self.top_k >= 0, "eval.top_k", self.top_k, "0 (all) or more")
        truncated = self.temperature == 0 and (self.top_p < 1 or self.top_k)
        why = "greedy decoding takes the most likely token, whatever top_p and top_k say: set a temperature above 0"
        require(not truncated, "eval.temperature", self.temperature, why)

    def ks(self) -> tuple[int, ...]:
        """The k of pass@k."""
        return self.pass_at or tuple(2**i for i in range(self.samples.bit_length()))
