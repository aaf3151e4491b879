"""Resolve `[algo]` to an Algorithm: the loss, its settings, its advantage estimator, and its requirements."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Literal

from torch import Tensor

from rlft.algos import advantages, corrections
from rlft.config import resolve
from rlft.config.files import presets
from rlft.config.run import Algo
from rlft.config.section import options_of
from rlft.errors import ConfigError
from rlft.types import Aggregation, Batch, Stats, StepView

LOSSES = "rlft.algos.losses"
"""The package with one file per loss."""
REQUIRED = (
    "Config",
    "loss",
    "ADVANTAGE",
    "AGGREGATION",
    "RATIO",
    "NEEDS_REFERENCE",
    "WHOLE_GROUPS",
    "NEEDS_SAMPLER",
    "ZERO_ADV_ZERO_GRAD",
    "ENTROPY_GRAD",
)

AGGREGATIONS = {
    "token_mean": "mean over all tokens of the step",
    "sequence_mean": "mean over sequences of the mean over tokens",
    "constant": "sum over tokens / (sequences x max_tokens)",
    "sequence_sum": "mean over sequences of the sum over tokens",
    "prompt_mean": "mean over prompts of the mean over tokens",
}
"""Description of each aggregation."""


@dataclass(frozen=True)
class Algorithm:
    """A loss with its settings."""

    name: str
    config: Any
    """An instance of the loss file's Config."""
    loss: Callable[[Tensor, Batch, Any], tuple[Tensor, Stats]]
    advantage_name: str
    advantage: Callable[..., Tensor]
    """(rewards [N], group_ids [N], keyword arguments of `rlft.algos.advantages`) -> advantages [N]."""
    aggregation: Aggregation
    needs_reference: bool
    """The loop sets `ref_logprobs` before the loss."""
    whole_groups: bool
    """All rollouts of a group must be in one micro-batch."""
    needs_sampler: bool
    """The loss requires sampler log-probs."""
    zero_adv_zero_grad: bool
    """A micro-batch of zero advantage has exactly zero gradient and may be skipped."""
    entropy_grad: bool
    old: Literal["now", "trainer", "sampler"]
    """Source of old log-probs: detached `logprobs` (one update per rollout batch, or a loss without a ratio), a forward
    of the trainer before the first update, or the sampler (correction "bypass")."""
    updates: int
    """Optimiser updates per rollout batch."""
    prepare: Callable[[StepView, Any], dict[str, float]] | None
    """(view, config) -> numbers of a whole update for `Batch.prepared`, called before the update; None if not used."""
    adapt: Callable[[dict[str, float], float, Any], dict[str, float]] | None
    """(State.adapted, mean entropy of the step, config) -> State.adapted of the next step; None if not used."""
    summary: str
    """Description of ratio, clip, KL and correction from the file's `summary(cfg)`, or else its settings."""


def module_of(name: str) -> Any:
    """Return the loss file (or object with the same attributes) that `algo.name` names.

    Raises ConfigError listing the known names, or the attributes that are missing.
    """
    if ":" in name:
        module, attribute_name = resolve.container(name, "algo.name")
        loss_file = getattr(module, attribute_name)
        if isinstance(loss_file, FunctionType) and not hasattr(loss_file, "Config"):
            loss_file = module  # "my_loss.py:loss" names the file
    elif name in presets() and name not in resolve.names_in(LOSSES):
        raise ConfigError(
            f'algo.name = "{name}": a preset, which a config file or a flag can name; from Python: '
            f'rlft.preset("{name}", model=..., data=..., ...)'
        )
    else:
        loss_file = resolve.module(name, LOSSES, "algo.name")
    missing = [attribute for attribute in REQUIRED if not hasattr(loss_file, attribute)]
    if missing:
        raise ConfigError(
            f'algo.name = "{name}": not an algorithm, it lacks {", ".join(missing)} (see rlft/algos/losses/sft.py)'
        )
    return loss_file


def build_algorithm(algo: Algo, updates: int = 1) -> Algorithm:
    """Build the algorithm of a run with `updates` optimiser updates per rollout batch.

    Raises ConfigError for an unknown name, setting or estimator, and a correction that does not fit the updates.
    """
    module = module_of(algo.name)
    config = options_of(module.Config, algo.options, "algo")
    correction = getattr(config, "correction", None)
    if correction is not None:
        correction = corrections.resolve(correction, updates, bool(module.RATIO))
        config = replace(config, correction=correction)
    name = getattr(config, "advantage", module.ADVANTAGE)
    if name == "gdpo" and getattr(config, "kl", "") == "reward" and config.kl_coef:
        raise ConfigError(
            'algo.kl = "reward" with algo.advantage = "gdpo": that estimator takes each reward function by itself, so '
            'the KL taken off their sum would be lost; set algo.kl = "k3_ratio"'
        )
    aggregation = getattr(config, "aggregation", module.AGGREGATION)
    if aggregation not in AGGREGATIONS:
        raise ConfigError(f'algo.aggregation = "{aggregation}": want one of {", ".join(AGGREGATIONS)}')

    def trait(constant: str) -> bool:
        value = getattr(module, constant)
        return bool(value(config)) if callable(value) else bool(value)

    return Algorithm(
        name=algo.name,
        config=config,
        loss=module.loss,
        advantage_name=name,
        advantage=estimator_of(name),
        aggregation=aggregation,
        needs_reference=trait("NEEDS_REFERENCE"),
        whole_groups=trait("WHOLE_GROUPS"),
        needs_sampler=trait("NEEDS_SAMPLER"),
        zero_adv_zero_grad=trait("ZERO_ADV_ZERO_GRAD"),
        entropy_grad=trait("ENTROPY_GRAD"),
        old="sampler" if correction == "bypass" else "trainer" if updates > 1 and trait("RATIO") else "now",
        updates=updates,
        prepare=getattr(module, "prepare", None),
        adapt=getattr(module, "adapt", None),
        summary=module.summary(config) if hasattr(module, "summary") else str(config),
    )


def estimator_of(name: str) -> Callable[..., Tensor]:
    """Return the estimator that `algo.advantage` names, wrapped to drop the keyword arguments it does not take.

    Raises ConfigError for an unknown name and, when called, for a user's estimator that returns a wrong shape.
    """
    if ":" in name:
        estimator = resolve.attribute(name, "algo.advantage")
        if not callable(estimator):
            raise ConfigError(f'algo.advantage = "{name}": not a function of (rewards, group_ids)')
    elif name in advantages.ESTIMATORS:
        estimator = getattr(advantages, name)
    else:
        hint = resolve.did_you_mean(name, list(advantages.ESTIMATORS))
        raise ConfigError(
            f'algo.advantage = "{name}": unknown.{hint} Known: {", ".join(advantages.ESTIMATORS)}; or '
            f'"file.py:function"'
        )
    accepted = set(inspect.signature(estimator).parameters)

    def advantage(rewards: Tensor, group_ids: Tensor, **inputs: Tensor) -> Tensor:
        result = estimator(rewards, group_ids, **{key: value for key, value in inputs.items() if key in accepted})
        if not isinstance(result, Tensor) or result.shape != rewards.shape:
            got = f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ConfigError(f'algo.advantage = "{name}": want a tensor of shape {list(rewards.shape)}, got {got}')
        return result.float()

    return advantage


def describe(algorithm: Algorithm) -> list[str]:
    """Describe the five choices (ratio, clip, KL, advantage, aggregation), as printed at the start of a run."""
    aggregation = f"{algorithm.aggregation}, {AGGREGATIONS[algorithm.aggregation]}"
    lines = [f"{algorithm.name}: {algorithm.summary}; advantage {algorithm.advantage_name}; {aggregation}"]
    if algorithm.updates > 1:
        old = {
            "now": "",
            "trainer": "; old log-probs from a forward of the trainer before the first",
            "sampler": "; old log-probs are the sampler's",
        }[algorithm.old]
        lines.append(f"{algorithm.updates} updates per rollout batch{old}")
    elif algorithm.old == "now" and hasattr(algorithm.config, "clip_low"):
        lines.append("one update per rollout batch: the ratio is exactly 1, so clipping never acts")
    return lines
