"""rlft: reinforcement-learning-first post-training of language models.

>>> import rlft
>>> cfg = rlft.Config(model="Qwen/Qwen3-0.6B", data=rlft.Data("train.jsonl"), out="runs/a", steps=100)
>>> rlft.train(cfg, rewards=[my_reward])  # doctest: +SKIP

The names below are loaded when they are first used: `import rlft` imports no torch, touches no GPU, patches nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "config.run": "Config Source Data Reward Algo Sampling Lora Optim Engine Packing Parity Eval Checkpoint Track",
    "types": "Prompt Rollout Batch PackPlan Stat State",
    "errors": "RlftError ConfigError DataError RewardError EngineError ParityError TrainError",
    "config.files": "preset",
    "models.load": "load",
    "trainer.loop": "train",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_WHERE)]

if TYPE_CHECKING:
    from rlft.config.files import preset as preset
    from rlft.models.load import load as load
    from rlft.trainer.loop import train as train


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"rlft.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'rlft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
