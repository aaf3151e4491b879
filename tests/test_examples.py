"""Every config in examples/ runs two steps through the command line, on the real small model, made small by flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlft.cli.main import main

ROOT = Path(__file__).parents[1]
LONG = ("dapo", "gspo")
"""Examples that update several times a step."""
EXAMPLES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LONG else ())
    for path in sorted((ROOT / "examples").glob("*.toml"))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_two_steps(example: Path, smollm2: Path, tmp_path: Path, monkeypatch) -> None:
    from rlft.config.run import Config

    monkeypatch.chdir(ROOT)  # paths in the examples are the repository's
    cfg, out = Config.load(example), tmp_path / "run"
    flags = ["--prompts_per_step=2", "--sampling.group_size=2", "--sampling.max_tokens=8", "--parity.probe_prompts=2"]
    flags += ["--eval.rows=2"] if cfg.eval.rows else []
    flags += ["--data.args.size=50"] if "size" in cfg.data.args else []
    # Two completions of eight tokens mostly have equal rewards: there is nothing to draw again for.
    flags += ["--dynamic_sampling.rounds=0", "--dynamic_sampling.by=None"] if cfg.dynamic_sampling.rounds else []
    flags += ["--optim.minibatches=2"] if cfg.optim.minibatches > 2 else []
    assert main(["train", str(example), "--model", str(smollm2), "--steps=2", "--out", str(out), *flags]) == 0
    steps = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2] and all(line["loss"] is not None for line in steps)
    assert (out / "checkpoints" / "step-000002" / "adapter_model.safetensors").is_file()
    assert (out / "report.html").is_file()
