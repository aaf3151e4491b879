"""Does it learn? The demo's first twelve steps on the real small model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sums import sums

from rlft.runs.folder import Run
from rlft.trainer.loop import train


@pytest.mark.slow
def test_twelve_steps_on_sums_raise_the_reward(smollm2: Path, tmp_path: Path) -> None:
    """The learning test: reward of the last four steps at least 0.1 above the first four's (0.08). Without the probe of
    the engine, which tests/test_examples.py runs on this config."""
    cfg = sums(smollm2, tmp_path / "run", steps=12)
    train(replace(cfg, parity=replace(cfg.parity, probe=False)))
    rewards = [line["reward"] for line in Run.resume(tmp_path / "run").metrics()]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1, rewards
