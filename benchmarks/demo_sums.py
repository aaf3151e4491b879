"""The demo over three seeds and with shuffled rewards: accuracy on 200 held-out sums before and after.

    python benchmarks/demo_sums.py            # about half an hour on two cores

Each run is `examples/sums.toml` with another seed: other tasks, other held-out rows, another adapter. The
control gets the same rewards permuted over the completions of each step, and is measured with the true ones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from results_file import write

ROOT = Path(__file__).parents[1]
SEEDS = (42, 1, 2)
CONTROL = ["--rewards.0.use", "benchmarks/shuffled.py:shuffled"]


def run(name: str, flags: list[str]) -> dict[str, float]:
    """Train once through the command line; returns accuracy before and after, and the seconds of training."""
    out = ROOT / "runs" / f"benchmark-{name}"
    shutil.rmtree(out, ignore_errors=True)
    start = time.time()
    subprocess.run(
        [sys.executable, "-m", "rlft", "train", "examples/sums.toml", "--out", str(out), *flags], cwd=ROOT, check=True
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["eval/rewards/number/mean"] for line in lines if "eval/rewards/number/mean" in line]
    steps = [line for line in lines if "loss" in line]
    return {
        "before": accuracy[0],
        "after": accuracy[-1],
        "train": sum(line["step_time"] for line in steps),
        "whole": time.time() - start,
        "steps": len(steps),
        "rows": lines[0]["eval/rows"],
    }


def rows_of(work: str, note: str, found: dict[str, float]) -> list[dict]:
    """The rows of one run in the results file."""
    common = {"work": work, "stack": "rlft"}
    note = f"{note}; {found['steps']} steps, {found['rows']:.0f} held-out rows, greedy, last number in the text"
    return [
        {**common, "metric": "accuracy_before", "value": found["before"], "unit": "share", "note": note},
        {**common, "metric": "accuracy_after", "value": found["after"], "unit": "share", "note": note},
        {**common, "metric": "seconds", "value": round(found["train"], 1), "unit": "s", "note": f"{note}; training"},
        {
            **common,
            "metric": "seconds",
            "value": round(found["whole"], 1),
            "unit": "s",
            "note": f"{note}; whole command",
        },
    ]


def main() -> None:
    rows, gains = [], []
    for seed in SEEDS:
        found = run(f"sums-{seed}", ["--seed", str(seed)])
        rows += rows_of("demo/sums", f"seed {seed}", found)
        gains.append(found["after"] - found["before"])
    control = run("control", CONTROL)
    rows += rows_of("demo-control/sums", "seed 42, rewards shuffled over the step", control)
    print(f"gains {[round(g, 3) for g in gains]}, control {control['after'] - control['before']:+.3f}")
    print(write("demo", rows))


if __name__ == "__main__":
    main()
