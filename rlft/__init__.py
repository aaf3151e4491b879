"""rlft: reinforcement-learning-first post-training of language models.

>>> import rlft
>>> cfg = rlft.Config(model="Qwen/Qwen3-0.6B", data="train.jsonl", rewards=["number"], steps=100, out="runs/first")
>>> result = rlft.train(cfg)  # doctest: +SKIP

The names below are loaded when they are first used: `import rlft` imports no torch, touches no GPU, patches nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlft.algos.algorithm import algorithm as algorithm
    from rlft.algos.padded_batch import padded_batch as padded_batch
    from rlft.batch import group_ids as group_ids
    from rlft.batch import pack_rollouts as pack_rollouts
    from rlft.config.data import Curriculum as Curriculum
    from rlft.config.data import Data as Data
    from rlft.config.data import DynamicSampling as DynamicSampling
    from rlft.config.data import Eval as Eval
    from rlft.config.data import Overlong as Overlong
    from rlft.config.data import Reward as Reward
    from rlft.config.data import Sampling as Sampling
    from rlft.config.data import Source as Source
    from rlft.config.run import Algo as Algo
    from rlft.config.run import BaseWeights as BaseWeights
    from rlft.config.run import Checkpoint as Checkpoint
    from rlft.config.run import Config as Config
    from rlft.config.run import Engine as Engine
    from rlft.config.run import Lora as Lora
    from rlft.config.run import Optim as Optim
    from rlft.config.run import Packing as Packing
    from rlft.config.run import Parity as Parity
    from rlft.config.run import Ranks as Ranks
    from rlft.config.run import Track as Track
    from rlft.config.run import preset as preset
    from rlft.environment import rank as rank
    from rlft.errors import ConfigError as ConfigError
    from rlft.errors import DataError as DataError
    from rlft.errors import EngineError as EngineError
    from rlft.errors import ParityError as ParityError
    from rlft.errors import RewardError as RewardError
    from rlft.errors import RlftError as RlftError
    from rlft.errors import TrainError as TrainError
    from rlft.kernels.logprobs import linear_logprobs as linear_logprobs
    from rlft.models.load import load as load
    from rlft.models.policy import Policy as Policy
    from rlft.rewards.scorer import scorer as scorer
    from rlft.rollout.sampler import sampler as sampler
    from rlft.trainer.callbacks import Callback as Callback
    from rlft.trainer.callbacks import View as View
    from rlft.trainer.loop import train as train
    from rlft.trainer.result import Result as Result
    from rlft.trainer.result import evaluate as evaluate
    from rlft.trainer.result import generate as generate
    from rlft.trainer.result import open as open
    from rlft.types import Batch as Batch
    from rlft.types import PackPlan as PackPlan
    from rlft.types import Prompt as Prompt
    from rlft.types import Rollout as Rollout
    from rlft.types import Stat as Stat
    from rlft.types import State as State

__version__ = "0.1.0"

_MODULES = {
    "trainer.loop": ("train",),
    "trainer.callbacks": ("Callback", "View"),
    "trainer.result": ("Result", "open", "generate", "evaluate"),
    "models.load": ("load",),
    "algos.algorithm": ("algorithm",),
    "algos.padded_batch": ("padded_batch",),
    "batch": ("group_ids", "pack_rollouts"),
    "kernels.logprobs": ("linear_logprobs",),
    "models.policy": ("Policy",),
    "rewards.scorer": ("scorer",),
    "rollout.sampler": ("sampler",),
    "config.run": (
        "Config",
        "preset",
        "Algo",
        "Lora",
        "Optim",
        "Engine",
        "Packing",
        "Parity",
        "Checkpoint",
        "Track",
        "Ranks",
        "BaseWeights",
    ),
    "config.data": ("Data", "Source", "Reward", "Sampling", "DynamicSampling", "Curriculum", "Overlong", "Eval"),
    "types": ("Prompt", "Rollout", "Batch", "PackPlan", "Stat", "State"),
    "environment": ("rank",),
    "errors": ("RlftError", "ConfigError", "DataError", "RewardError", "EngineError", "ParityError", "TrainError"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "__version__", "train", "open", "Callback", "View", "Result", "generate", "evaluate", "load", "Config",
    "preset", "Algo", "Lora", "Optim", "Engine", "Packing", "Parity", "Checkpoint", "Track", "Ranks", "BaseWeights",
    "Data", "Source", "Reward", "Sampling", "DynamicSampling", "Curriculum", "Overlong", "Eval", "Prompt",
    "Rollout", "Batch", "PackPlan", "Stat", "State", "algorithm", "group_ids", "pack_rollouts", "padded_batch",
    "linear_logprobs", "Policy", "sampler", "scorer", "rank", "RlftError", "ConfigError", "DataError", "RewardError",
    "EngineError", "ParityError", "TrainError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"rlft.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'rlft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
