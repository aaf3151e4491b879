"""From the completions that a run has kept to pairs for DPO: the best and the worst one of each prompt.

    python examples/dpo_from_samples/make_pairs.py runs/dpo_from_samples/sample_gpu runs/data/pairs.jsonl

Prompts whose completions all have one reward give no pair. With --shuffled the sides of each pair are drawn by lot: the
control, from which nothing can be learned.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def groups(run: Path) -> Iterator[list[dict[str, Any]]]:
    """The completions of each prompt of a run, step by step."""
    for file in sorted((run / "rollouts").glob("*.parquet")):
        together: dict[int, list[dict[str, Any]]] = {}
        for row in pq.read_table(file, columns=["group", "prompt", "completion", "reward"]).to_pylist():
            together.setdefault(row["group"], []).append(row)
        yield from together.values()


def pairs(run: Path, shuffled: bool) -> Iterator[dict[str, str]]:
    """A pair for each prompt with unequal rewards; a reward that is missing (an invalid row) is left out."""
    draw = random.Random(0)
    for group in groups(run):
        scored = sorted((row for row in group if row["reward"] is not None), key=lambda row: row["reward"])
        if scored and scored[-1]["reward"] > scored[0]["reward"]:
            sides = [scored[-1]["completion"], scored[0]["completion"]]
            if shuffled:
                draw.shuffle(sides)
            yield {"prompt": scored[0]["prompt"], "chosen": sides[0], "rejected": sides[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, help="file to write, .jsonl")
    parser.add_argument("--shuffled", action="store_true", help="the control")
    args = parser.parse_args()
    made = list(pairs(args.run, args.shuffled))
    if not made:
        raise SystemExit(f"{args.run}: no prompt has completions of unequal reward; sample more, or easier prompts")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(pair) + "\n" for pair in made))
    print(f"{args.out}: {len(made)} pairs")


if __name__ == "__main__":
    main()
