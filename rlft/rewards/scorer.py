"""Reward functions for a loop of one's own: each in its own process, stopped when it takes too long."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import Tensor

from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards.parts import RewardBreakdown
from rlft.rewards.score import build_rewards, score
from rlft.types import FinishReason, Prompt, Rollout


class Scorer:
    """A context manager over the processes of reward functions; call it with completions or rollouts."""

    def __init__(
        self,
        rewards: str | Reward | Callable[..., Any] | Sequence[str | Reward | Callable[..., Any]],
        timeout: float | None = None,
    ) -> None:
        """Start the functions.

        rewards: as `Config.rewards`, or functions. A function of a file or module runs in its own process; one that can
        only be called here (a lambda, a function of a notebook) cannot be stopped, which is a warning. timeout: seconds
        for one call of each, in place of the reward's own. Raises RewardError and ConfigError.
        """
        several = [rewards] if isinstance(rewards, str | Reward) or callable(rewards) else list(rewards)
        whole = [each if isinstance(each, Reward) else Reward(each) for each in several]
        self.functions = build_rewards([each if timeout is None else replace(each, timeout=timeout) for each in whole])
        for function in self.functions:
            if function.note:
                warnings.warn(f"rlft: {function.note}", stacklevel=2)
        self.breakdown: RewardBreakdown | None = None
        """The last call's rewards by function, with faults and what the functions logged; None before the first."""

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for function in self.functions:
            function.close()

    def __call__(
        self, completions: Sequence[Rollout] | Sequence[str], prompts: Sequence[str] | None = None, **columns: Any
    ) -> Tensor:
        """Return the weighted sum of the functions for each completion, [N] float32, nan where invalid.

        completions: rollouts, which have prompts and columns with them, or texts. prompts, columns: with texts, one
        value per completion. Raises RewardError for a function that is itself at fault.
        """
        rollouts = self._rollouts(completions, prompts, columns)
        total, self.breakdown = score(rollouts, self.functions, {"global_step": 0})
        return total

    def _rollouts(
        self, completions: Sequence[Any], prompts: Sequence[str] | None, columns: dict[str, Any]
    ) -> list[Rollout]:
        if all(isinstance(each, Rollout) for each in completions):
            if prompts is not None or columns:
                raise RewardError("prompts and columns: rollouts have their own; give them with texts only")
            return list(completions)
        for function in self.functions:
            if "completion_ids" in function.names:
                raise RewardError(f'reward "{function.name}" takes completion_ids, and texts have none; give rollouts')
        given = {"prompt": [""] * len(completions) if prompts is None else prompts, **columns}
        for name, values in given.items():
            if len(values) != len(completions):
                raise RewardError(f"{name} has {len(values)} values for {len(completions)} completions; give one each")
        return [
            Rollout(
                Prompt((), {name: values[i] for name, values in given.items()}, i),
                completion_ids=(),
                completion_mask=(),
                sampler_logprobs=None,
                text=text,
                finish_reason=FinishReason.STOP,
                sample_index=0,
                policy_version=-1,
                seed=0,
            )
            for i, text in enumerate(completions)
        ]


scorer = Scorer
"""The name it has in `rlft`."""
