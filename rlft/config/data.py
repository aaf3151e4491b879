"""The sections of a config about what goes in and what is measured: datasets, rewards, sampling, evaluation."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from rlft.config.section import INFINITE, holds_rows, refuse, refuse_all, section, shown

ROWS = (
    "a list of dicts, a datasets.Dataset, a pandas.DataFrame, a pyarrow.Table or an iterable of dicts (a file, a "
    "folder or a hub id is given as data.path)"
)
"""What `data.rows` takes, for errors."""


@section("data.sources", short="path")
class Source:
    """One dataset of a mixture (`data.sources`)."""

    path: str
    """File, `datasets` folder, hub id, or "reasoning_gym:TASK"."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Share of this source in the mixture, relative to the other weights."""
    split: str = "train"
    """Split of a hub dataset or `datasets` folder."""
    subset: str | None = None
    """Subset (configuration name) of a hub dataset."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a reasoning-gym task (its config fields, and `size` and `seed`)."""


@section("data", short="path", rows="rows")
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
    rows: Any = field(default=None, repr=False)
    """From Python, instead of `path`: a list of dicts, a datasets.Dataset, a pandas.DataFrame, a pyarrow.Table or an
    iterable of dicts. They are copied into the run folder, whose config then names the copy."""
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
    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over the data; give this or `steps`."""
    max_prompt_tokens: Annotated[int, Ge(1)] | None = None
    """Longer prompts are dropped and counted, or an error (`long_prompts`). None: no limit."""
    long_prompts: Literal["drop", "error"] = "drop"
    """What happens to a prompt longer than `max_prompt_tokens`."""
    min_pixels: Annotated[int, Ge(1)] | None = None
    """Images of fewer pixels are enlarged to about this many; None: as the model's image processor has it."""
    max_pixels: Annotated[int, Ge(1)] | None = None
    """Images of more pixels are reduced to about this many, which is what bounds their tokens; None: as the model's
    image processor has it."""
    on_error: Literal["stop", "drop"] = "stop"
    """What happens to a row that cannot be used. "drop": it is left out, counted by reason and written to dropped.jsonl
    in the run folder."""

    def __post_init__(self) -> None:
        refuse(self.rows is not None and not holds_rows(self.rows), f"data.rows = {shown(self.rows)}: want {ROWS}")
        refuse(
            [bool(self.path), bool(self.sources), self.rows is not None].count(True) != 1,
            f"data.path = {self.path!r}: give one of data.path, data.sources and data.rows",
        )
        refuse(
            self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels,
            f"data.min_pixels = {self.min_pixels}: more than data.max_pixels = {self.max_pixels}",
        )


@section("rewards", short="use")
class Reward:
    """One reward function."""

    use: Any
    """A name in rlft.rewards ("number"), "file.py:function" or "package.module:function". In the rewards given to
    `rlft.train` from Python it may be the function itself."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    timeout: Annotated[float, Gt(0), INFINITE] = 30.0
    """Seconds one call may take, inf for no limit; then its process is killed and the rows it was scoring are
    invalid."""
    memory_mb: Annotated[int, Ge(64)] | None = None
    """Address space each process of the worker may use, in MiB; None for no limit."""
    file_mb: Annotated[int, Ge(1)] = 16384
    """Largest file the worker may write, in MiB."""
    env: tuple[str, ...] = ()
    """Environment variables the worker gets although they look like secrets, such as ["OPENAI_API_KEY"]."""
    network: bool = True
    """false: the worker has no network (Linux with namespaces; elsewhere an error)."""
    batch: Literal["step", "group", "any"] | None = None
    """What one call gets. "step": all completions of the step. "group": those of one prompt, while others are still
    sampled. "any": any of them, for a function that scores each by itself. None: "any" for built-ins, else "step"."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments passed to the function besides the columns."""

    def __post_init__(self) -> None:
        refuse(
            not self.use or not (isinstance(self.use, str) or callable(self.use)),
            f"rewards.use = {self.use!r}: want the name of a reward function, or from Python the function",
        )


@section("sampling")
class Sampling:
    """How completions are drawn."""

    group_size: Annotated[int, Ge(1)] = 8
    """Completions per prompt (G)."""
    max_tokens: Annotated[int, Ge(1)] = 1024
    """Longest completion, in tokens; longer ones are cut and reported as clipped."""
    temperature: Annotated[float, Interval(ge=0, lt=100)] = 1.0
    """Softmax temperature of sampled completions; the trainer divides its logits by it too. Recorded completions are
    trained at 1. 0 (greedy) only in evaluation."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Nucleus sampling: evaluation only, since it changes the distribution that is sampled from."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample among the k most likely tokens, 0 for all: evaluation only."""
    stop_token_ids: tuple[Annotated[int, Ge(0)], ...] = ()
    """Token ids that end a completion, besides the model's own EOS."""
    stop: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Strings that end a completion; its text ends before one, its tokens with it."""

    def check_for_training(self) -> None:
        """Raise ConfigError for what would make the sampler's log-probs another distribution than the trainer's."""
        why = "in training every token must be reachable, or log-probs are of another distribution; allowed in [eval]"
        refuse_all(
            (
                self.temperature == 0,
                "sampling.temperature = 0: want above 0 in training, where the policy gradient is that of a sampled "
                "token; greedy decoding belongs in [eval]",
            ),
            (self.top_p != 1, f"sampling.top_p = {self.top_p}: {why}"),
            (self.top_k != 0, f"sampling.top_k = {self.top_k}: {why}"),
        )


@section("dynamic_sampling")
class DynamicSampling:
    """Dynamic sampling (DAPO): groups of equal rewards teach nothing, so other prompts are drawn in their place."""

    rounds: Annotated[int, Ge(0)] = 0
    """Rounds of drawing at most; then the step trains on the groups there are. 0 switches it off."""
    by: str | None = None
    """Reward function whose values must differ within a group; None: the reward without the overlong penalty. Name the
    one that says right or wrong where others shape the reward."""

    def __post_init__(self) -> None:
        refuse(
            self.by is not None and not self.rounds,
            f"dynamic_sampling.by = {self.by!r}: set dynamic_sampling.rounds too, or no group is replaced",
        )


@section("curriculum")
class Curriculum:
    """Which prompts are drawn, by how often they were solved."""

    solved_share: Annotated[float, Interval(gt=0, le=1)] | None = None
    """A prompt is not drawn again once at least this share of its group was solved (ScaleRL: 0.9); None: all are."""
    threshold: float = 1.0
    """A completion with at least this reward, without the overlong penalty, counts as solved."""


@section("overlong")
class Overlong:
    """Completions that come near `sampling.max_tokens` (DAPO)."""

    penalty_share: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Over this last share of max_tokens a penalty grows from 0 to -1, added to the reward; 0 switches it off."""
    mask: bool = False
    """Leave completions that were cut at max_tokens out of the loss. Their reward stays in the group's statistics."""


@section("eval")
class Eval:
    """Measuring on rows that are never trained on."""

    rows: Annotated[int, Ge(0)] = 0
    """Held-out rows; 0 switches evaluation off. Without `data` they are set aside from the training data."""
    data: Data | None = None
    """Another dataset to evaluate on; its first `rows` rows are used, and training rows with the same prompt are left
    out."""
    every: Annotated[int, Ge(0)] = 0
    """Evaluate every this many steps, and save where the result is the best so far; 0: only before the first step and
    after the last."""
    rewards: tuple[Reward, ...] = ()
    """Reward functions of the evaluation; none: those of the run."""
    samples: Annotated[int, Ge(1)] = 1
    """Completions per row; with one, decoding is greedy unless `temperature` says otherwise."""
    pass_at: tuple[int, ...] = ()
    """The k of pass@k; none: 1, 2, 4, 8, ... up to `samples`."""
    threshold: float = 1.0
    """A completion with at least this reward (the weighted sum) counts as solved in pass@k."""
    temperature: Annotated[float, Interval(ge=0, lt=100)] = 0.0
    """Sampling temperature of the evaluation; 0 is greedy."""
    max_tokens: Annotated[int, Ge(1)] | None = None
    """Longest completion; None: `sampling.max_tokens`."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Nucleus sampling in the evaluation."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample among the k most likely tokens in the evaluation, 0 for all."""
    stop_token_ids: tuple[Annotated[int, Ge(0)], ...] | None = None
    """Token ids that end a completion, besides the model's own EOS; None: `sampling.stop_token_ids`."""

    def __post_init__(self) -> None:
        refuse_all(
            (bool(self.every) and not self.rows, f"eval.every = {self.every}: nothing to evaluate on: set eval.rows"),
            (bool(self.data) and not self.rows, "eval.rows = 0: say how many rows of eval.data to use"),
            (
                self.temperature == 0 and self.samples > 1,
                f"eval.samples = {self.samples}: greedy samples are all equal: set eval.temperature above 0",
            ),
            (
                any(not 1 <= k <= self.samples for k in self.pass_at),
                f"eval.pass_at = {self.pass_at}: each from 1 to eval.samples = {self.samples}",
            ),
            (
                self.temperature == 0 and (self.top_p < 1 or self.top_k > 0),
                "eval.temperature = 0: greedy decoding takes the most likely token, whatever top_p and top_k say: set "
                "a temperature above 0",
            ),
        )

    def ks(self) -> tuple[int, ...]:
        """The k of pass@k."""
        return self.pass_at or tuple(2**i for i in range(self.samples.bit_length()))
