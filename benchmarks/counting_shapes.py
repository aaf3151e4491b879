"""examples/counting_shapes on a CPU: SFT of a model made from nothing, GRPO from there, and the control.

    python benchmarks/counting_shapes.py --folder /tmp/counting_shapes

Runs of the folder that are there already are read, not run again. Rows of the file: accuracy on 200 held-out pictures
before and after each run and at each evaluation between, of the most likely answers in SFT and of sampled ones in RL.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from results_file import write
from timing import row

ROOT = Path(__file__).parents[1]
EXAMPLE = "examples/counting_shapes"
RUNS: dict[str, list[str]] = {
    "sft_tiny": [f"{EXAMPLE}/sft_tiny.toml"],
    "rl_tiny": [f"{EXAMPLE}/rl_tiny.toml"],
    "control": [
        *(f"{EXAMPLE}/rl_tiny.toml", "--out", "runs/counting_shapes/control"),
        *("--rewards.0.args", "{ shuffled = true }"),
    ],
}
"""Run -> arguments of `rlft train`, in the order in which they follow each other."""


def results(name: str, run: Path) -> list[dict[str, Any]]:
    """Rows of a finished run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: (line["eval/reward"], line["eval/reward_stderr"]) for line in lines if "eval/reward" in line}
    steps, work = sorted(found), f"counting_shapes/{name}"
    curve = ", ".join(f"{step}: {found[step][0]:.3f}" for step in steps)
    return [
        row(work, "rlft", metric, value, "share", f"standard error {error:.3f}; by step {curve}")
        for metric, (value, error) in (("accuracy_before", found[steps[0]]), ("accuracy_after", found[steps[-1]]))
    ]


def main() -> None:
    """Run what is not there yet, and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder: Path = parser.parse_args().folder
    data, env = "runs/data/counting_shapes", {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = {
        f"{data}/rl.jsonl": [f"{EXAMPLE}/make_data.py", data],
        f"{data}/model/config.json": [f"{EXAMPLE}/make_model.py", f"{data}/model"],
        **{
            f"runs/counting_shapes/{name}/report.html": ["-m", "rlft", "train", *arguments]
            for name, arguments in RUNS.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    for made, command in commands.items():
        if not (folder / made).exists():
            subprocess.run([sys.executable, *command], cwd=folder, env=env, check=True)
    rows = [each for name in RUNS for each in results(name, folder / "runs/counting_shapes" / name)]
    print(write("counting_shapes", rows))


if __name__ == "__main__":
    main()
