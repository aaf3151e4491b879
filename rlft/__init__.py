"""rlft: reinforcement-learning-first post-training of language models.

>>> import rlft
>>> rlft.train(rlft.Config(model=..., data=rlft.Data("train.jsonl"), out="runs/a", steps=100), rewards=[my_reward])

The names below are loaded when they are first used: `import rlft` imports no torch, touches no GPU, patches nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Config": "config", "Source": "config", "Data": "config", "Reward": "config", "Algo": "config", "Sampling": "config",
    "Lora": "config", "Optim": "config", "Engine": "config", "Packing": "config", "Parity": "config", "Eval": "config",
    "Checkpoint": "config",
    "Prompt": "types", "Rollout": "types", "Batch": "types", "PackPlan": "types", "Stat": "types", "State": "types",
    "RlftError": "errors", "ConfigError": "errors", "DataError": "errors", "RewardError": "errors",
    "EngineError": "errors", "ParityError": "errors", "TrainError": "errors",
}  # fmt: skip

__all__ = ["__version__", "train", *sorted(_WHERE)]

if TYPE_CHECKING:
    from rlft import train as train


def __getattr__(name: str) -> Any:
    if name == "train":
        # The module itself, which is callable: `rlft.train(cfg)` and `from rlft.train import build` both work.
        return importlib.import_module("rlft.train")
    if name in _WHERE:
        return getattr(importlib.import_module(f"rlft.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'rlft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
