"""Write word problems of one or two steps, with their numbers, as a dataset: the same rows for the same arguments.

python examples/gsm_style/make_data.py runs/data/gsm_style.jsonl --rows 4000
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

NAMES = ("Anna", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas")
THINGS = ("apples", "books", "coins", "marbles", "pens", "shells", "stamps", "tickets")


def problem(draw: random.Random) -> dict[str, str]:
    """One problem and its answer."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    start, more, boxes = draw.randint(5, 40), draw.randint(2, 20), draw.randint(2, 6)
    less = draw.randint(1, start - 1)
    text, answer = draw.choice(
        (
            (f"{name} has {start} {thing} and gets {more} more.", start + more),
            (f"{name} has {start} {thing} and gives {less} away.", start - less),
            (f"{name} has {boxes} boxes with {more} {thing} in each.", boxes * more),
            (f"{name} has {start} {thing}, gives {less} away and gets {more} more.", start - less + more),
            (f"{name} has {boxes} boxes with {more} {thing} in each, and {start} other {thing}.", boxes * more + start),
        )
    )
    return {"prompt": f"{text} How many {thing} does {name} have now?", "answer": str(answer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(problem(draw)) + "\n" for _ in range(args.rows)))
    print(f"{args.out}: {args.rows} rows")


if __name__ == "__main__":
    main()
