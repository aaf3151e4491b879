"""The config of a small run of GRPO over a folder with a model, prompts and a reward that counts digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlft.config.data import Data, Reward
from rlft.config.run import Config, Lora, Optim


def small_run(home: Path, out: Path, **settings: Any) -> Config:
    """home: has model/, prompts.jsonl and rewards.py with `digits`. settings: what the run has besides or instead."""
    base = Config(
        model=str(home / "model"),
        data=Data(str(home / "prompts.jsonl")),
        out=str(out),
        rewards=(Reward(f"{home}/rewards.py:digits"),),
        steps=2,
        lora=Lora(rank=4, alpha=8),
        optim=Optim(lr=1e-2),
    )
    return replace(base, **settings)
