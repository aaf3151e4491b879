"""The benchmark's own exact sums: what each correction does to the gradient's bias, as its table says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import correction_bias as benchmark


@pytest.fixture(scope="module")
def bias() -> dict[str, float]:
    """Of every correction, at a sampler half a nat away."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        g = torch.Generator().manual_seed(0)
        shape = (benchmark.LENGTH, benchmark.TOKENS + 1, benchmark.TOKENS)
        logits, noise = torch.randn(shape, generator=g), 0.5 * torch.randn(shape, generator=g)
        rewards, batch = torch.rand(len(benchmark.EVERY), generator=g), benchmark.frame()
        names = ("none", "token TIS, 2", "sequence TIS, 5", "sequence weight, no bound")
        return {name: benchmark.measured(name, logits, noise, rewards, batch)["bias"] for name in names}
    finally:
        torch.set_default_dtype(before)


def test_only_the_whole_sequences_ratio_takes_all_of_the_bias_away(bias: dict[str, float]) -> None:
    assert bias["sequence weight, no bound"] < 1e-12
    assert bias["sequence TIS, 5"] < bias["token TIS, 2"] < bias["none"] and bias["none"] > 0.3
