"""Resolve `[algo]` to an Algorithm: the loss with its settings, its advantage estimator, and where old comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from rlft.algos import advantages, corrections
from rlft.algos.loss import Loss
from rlft.algos.policy_loss import PolicyLoss
from rlft.config import resolve
from rlft.config.files import presets
from rlft.config.run import Algo
from rlft.config.section import options_of
from rlft.errors import ConfigError
from rlft.types import Aggregation

LOSSES = "rlft.algos.losses"
"""The package with one file per loss."""

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
    """A loss with its settings, and what follows from the run's updates per rollout batch."""

    name: str
    """`algo.name`."""
    loss: Loss
    """(logprobs [T] with gradient, micro-batch) -> (0-dim, metrics); its traits say what the loop has to set."""
    advantage_name: str
    advantage: Callable[..., Tensor]
    """(rewards [N], group_ids [N], keyword arguments of `rlft.algos.advantages`) -> advantages [N]; lists will do."""
    aggregation: Aggregation
    old: Literal["now", "trainer", "sampler"]
    """Source of old log-probs: detached `logprobs` (one update per rollout batch, or a loss without a ratio), a forward
    of the trainer before the first update, or the sampler (correction "bypass")."""
    updates: int
    """Optimiser updates per rollout batch."""


def loss_class(name: str) -> type[Loss]:
    """Return the loss that `algo.name` names: a built-in one, "file.py", "file.py:Class" or "package.module:Class".

    Raises ConfigError listing the known names, or saying what the file lacks.
    """
    if ":" in name:
        return _checked(resolve.attribute(name, "algo.name"), name)
    if resolve.names_user_code(name):
        return _only_loss(resolve.user_module(name, "algo.name"), name)
    if name in presets() and name not in resolve.names_in(LOSSES):
        raise ConfigError(
            f'algo.name = "{name}": a preset, which a config file or a flag can name; from Python: '
            f'rlft.preset("{name}", model=..., data=..., ...)'
        )
    return _only_loss(resolve.module(name, LOSSES, "algo.name"), name)


def _only_loss(module: ModuleType, name: str) -> type[Loss]:
    """Return the one loss that is defined in a file. Raises ConfigError for none or several."""
    classes = {key: value for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Loss)}
    # What the file imports is not its own.
    own = [key for key, cls in classes.items() if (cls.__module__, cls.__name__) == (module.__name__, key)]
    if not own:
        raise ConfigError(
            f'algo.name = "{name}": defines no loss; write a frozen dataclass that extends Loss, PolicyLoss or '
            f"PairLoss, as in rlft/algos/losses/reinforce.py"
        )
    if len(own) > 1:
        raise ConfigError(f'algo.name = "{name}": defines {", ".join(own)}; write which one, "{name}:{own[0]}"')
    return _checked(classes[own[0]], name)


def _checked(loss: Any, name: str) -> type[Loss]:
    """Return `loss` if it is the class of a loss. Raises ConfigError for anything else, and where parts are missing."""
    where, _, attribute = name.rpartition(":")
    if not isinstance(loss, type) or not issubclass(loss, Loss):
        file = f'"{where}" or "{where}:Class"' if where.endswith(".py") else f'"{where}:Class"'
        raise ConfigError(
            f'algo.name = "{name}": {attribute} is no loss; a loss is a frozen dataclass that extends Loss, PolicyLoss '
            f"or PairLoss, as in rlft/algos/losses/reinforce.py; write {file}"
        )
    if missing := sorted(loss.__abstractmethods__):
        raise ConfigError(
            f'algo.name = "{name}": {loss.__name__} lacks {", ".join(missing)}, as in rlft/algos/losses/reinforce.py'
        )
    if "__dataclass_fields__" not in vars(loss):
        raise ConfigError(
            f'algo.name = "{name}": {loss.__name__} is no dataclass, so it would have no settings; write '
            f"@dataclass(frozen=True) above it"
        )
    return loss


def build_algorithm(algo: Algo, updates: int = 1) -> Algorithm:
    """Build the algorithm of a run with `updates` optimiser updates per rollout batch.

    Raises ConfigError for an unknown name, setting or estimator, and a correction that does not fit the updates.
    """
    loss = options_of(loss_class(algo.name), algo.options, "algo")
    old: Literal["now", "trainer", "sampler"] = "trainer" if updates > 1 and loss.has_ratio else "now"
    if isinstance(loss, PolicyLoss):
        loss = replace(loss, correction=corrections.resolve(loss.correction, updates, loss.has_ratio))
        old = "sampler" if loss.correction == "bypass" else old
    if loss.advantage == "gdpo" and loss.kl_in_reward:
        raise ConfigError(
            'algo.kl = "reward" with algo.advantage = "gdpo": that estimator takes each reward function by itself, so '
            'the KL taken off their sum would be lost; set algo.kl = "k3_ratio"'
        )
    if loss.aggregation not in AGGREGATIONS:
        raise ConfigError(f'algo.aggregation = "{loss.aggregation}": want one of {", ".join(AGGREGATIONS)}')
    return Algorithm(
        name=algo.name,
        loss=loss,
        advantage_name=loss.advantage,
        advantage=estimator_of(loss.advantage),
        aggregation=loss.aggregation,
        old=old,
        updates=updates,
    )


def algorithm(name: str = "grpo", updates: int = 1, **options: Any) -> Algorithm:
    """Return an algorithm for a loop of one's own: `.loss(logprobs, batch)` and `.advantage(rewards, group_ids)`.

    name, options: as in [algo]. updates: optimiser updates per batch of rollouts; with several, set
    `Batch.old_logprobs`. Raises ConfigError.
    """
    return build_algorithm(Algo(name, options), updates)


def estimator_of(name: str) -> Callable[..., Tensor]:
    """Return the estimator that `algo.advantage` names, wrapped to drop the keyword arguments it does not take.

    Raises ConfigError for an unknown name and, when called, for a user's estimator that returns a wrong shape.
    """
    if ":" in name:
        estimator = resolve.attribute(name, "algo.advantage")
        if not callable(estimator):
            raise ConfigError(f'algo.advantage = "{name}": not a function of (rewards, group_ids)')
    elif name in advantages.ESTIMATORS:
        estimator = advantages.ESTIMATORS[name]
    else:
        hint = resolve.did_you_mean(name, list(advantages.ESTIMATORS))
        raise ConfigError(
            f'algo.advantage = "{name}": unknown.{hint} Known: {", ".join(advantages.ESTIMATORS)}; or '
            f'"file.py:function"'
        )
    accepted = set(inspect.signature(estimator).parameters)

    def advantage(rewards: Tensor, group_ids: Tensor, **inputs: Tensor) -> Tensor:
        # Lists in a loop of one's own.
        rewards, group_ids = torch.as_tensor(rewards), torch.as_tensor(group_ids)
        result = estimator(rewards, group_ids, **{key: value for key, value in inputs.items() if key in accepted})
        if not isinstance(result, Tensor) or result.shape != rewards.shape:
            got = f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ConfigError(f'algo.advantage = "{name}": want a tensor of shape {list(rewards.shape)}, got {got}')
        return result.float()

    return advantage


def describe(algorithm: Algorithm) -> list[str]:
    """Describe the five choices (ratio, clip, KL, advantage, aggregation), as printed at the start of a run."""
    aggregation = f"{algorithm.aggregation}, {AGGREGATIONS[algorithm.aggregation]}"
    lines = [f"{algorithm.name}: {algorithm.loss.summary()}; advantage {algorithm.advantage_name}; {aggregation}"]
    if algorithm.updates > 1:
        old = {
            "now": "",
            "trainer": "; old log-probs from a forward of the trainer before the first",
            "sampler": "; old log-probs are the sampler's",
        }[algorithm.old]
        lines.append(f"{algorithm.updates} updates per rollout batch{old}")
    elif algorithm.old == "now" and algorithm.loss.has_clip:
        lines.append("one update per rollout batch: the ratio is exactly 1, so clipping never acts")
    return lines
