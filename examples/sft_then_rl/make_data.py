"""Write worked examples for SFT and problems alone for RL, of other numbers: the same rows for the same arguments.

python examples/sft_then_rl/make_data.py runs/data/sft_then_rl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def problem(draw: random.Random) -> dict[str, str]:
    """Three numbers to add and subtract, worked out in tags as SFT teaches it."""
    first, second = draw.randint(10, 49), draw.randint(10, 49)
    third = draw.randint(1, first + second)
    middle, answer = first + second, first + second - third
    thought = f"{first} + {second} = {middle}, {middle} - {third} = {answer}"
    return {
        "prompt": f"Work out {first} + {second} - {third}.",
        "completion": f"<think>{thought}</think> <answer>{answer}</answer>",
        "answer": str(answer),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sft", type=int, default=200, help="worked examples")
    parser.add_argument("--rl", type=int, default=4000, help="problems without a solution")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    # Each problem once, so that nothing that RL samples or measures was learned by heart.
    rows = list({row["prompt"]: row for row in (problem(draw) for _ in range(2 * (args.sft + args.rl)))}.values())
    args.folder.mkdir(parents=True, exist_ok=True)
    taught, left = rows[: args.sft], rows[args.sft : args.sft + args.rl]
    (args.folder / "sft.jsonl").write_text(
        "".join(json.dumps({name: row[name] for name in ("prompt", "completion")}) + "\n" for row in taught)
    )
    (args.folder / "rl.jsonl").write_text(
        "".join(json.dumps({name: row[name] for name in ("prompt", "answer")}) + "\n" for row in left)
    )
    print(f"{args.folder}: sft.jsonl with {len(taught)} rows, rl.jsonl with {len(left)}")


if __name__ == "__main__":
    main()
