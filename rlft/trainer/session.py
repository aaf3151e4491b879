"""The parts of a run: what it samples with, what it trains, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlft.algos.algorithm import Algorithm
from rlft.config.run import Config
from rlft.data.prompts import Prompts
from rlft.errors import TrainError
from rlft.models.policy import Policy
from rlft.monitor.background import Background
from rlft.monitor.console import Console
from rlft.monitor.health import HealthMonitor
from rlft.monitor.token_text import TokenText
from rlft.monitor.tracking import Tracking
from rlft.rewards.score import RewardFunction
from rlft.rollout.engine import Engine
from rlft.runs.folder import Run
from rlft.trainer.callbacks import Callbacks
from rlft.trainer.disagreement import Limit
from rlft.trainer.optim import Optimizer
from rlft.trainer.progress import Progress
from rlft.trainer.reference import Reference
from rlft.types import PackPlan, Prompt, State


@dataclass(frozen=True)
class Sampler:
    """What a run samples and scores with."""

    engine: Engine
    eval_engine: Engine
    """Engine that samples for the evaluation: `engine` itself, unless that replays recorded completions."""
    prompts: Prompts
    eval_prompts: Sequence[Prompt]
    """Held-out rows."""
    eval_loss: bool
    """Whether the training loss is also measured on the recorded completions of the held-out rows."""
    functions: list[RewardFunction]
    eval_functions: list[RewardFunction]
    progress: Callable[[str, int, int], None] | None = None
    """Called with what a step waits for, and how much of it is done."""

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each reward function by name."""
        return {function.name: function.weight for function in self.functions}


@dataclass(frozen=True)
class Trainer:
    """What a run trains, and how far it is."""

    cfg: Config
    steps: int
    """Rollout batches of the whole run, from `steps` or `data.epochs`."""
    policy: Policy
    algorithm: Algorithm
    optimizer: Optimizer
    reference: Reference
    plan: PackPlan
    """How updates are packed."""
    limit: Limit
    """How far engine and trainer may disagree."""
    state: State
    identity: dict[str, str]
    """Properties that a checkpoint must share with this run to be resumed."""
    progress: Progress
    """What the last completed step left, while the next one runs."""


@dataclass(frozen=True)
class Recorder:
    """What a run leaves behind: its folder, and what is shown and sent while it goes on."""

    run: Run
    writer: Background
    """Writes completions while the loop goes on."""
    console: Console
    health: HealthMonitor
    tracking: Tracking
    pieces: TokenText
    tokenizer: Any
    """Of transformers; saved with every checkpoint."""
    callbacks: Callbacks


class Session(NamedTuple):
    """All parts of a run."""

    sampler: Sampler
    trainer: Trainer
    recorder: Recorder


def check_adapter(policy: Policy, origin: str) -> None:
    """Raise TrainError when the adapter is not finite. origin: where its values came from, and what to do."""
    if wrong := policy.flat.not_finite():
        raise TrainError(f"{len(wrong)} of the adapter's tensors are not finite, {wrong[0]} for one: {origin}")
