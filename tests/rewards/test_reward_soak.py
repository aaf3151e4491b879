"""The soak of benchmarks/reward_soak.py, smaller: faults of every kind among good calls."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from reward_soak import SIGNS, soak


def test_faults_come_back_as_drawn_and_nothing_is_left() -> None:
    found = soak(calls=500, faults=50, seed=2, timeout=0.2)
    assert set(found["drawn"]) == set(SIGNS), "a seed that draws every kind"
    assert found["seen"] == found["drawn"] and found["wrong"] == []
    assert found["forked"] >= found["drawn"]["fork"] + found["drawn"]["empty environment"] and found["left"] == []
    assert found["descriptors"] == 0 and found["memory_mb"] < 8
    assert found["seconds"] < 200
