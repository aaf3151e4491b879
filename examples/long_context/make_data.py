"""Write long texts with one fact to find, as a dataset: the same rows for the same arguments.

    python examples/long_context/make_data.py runs/data/long_context.jsonl --sentences 3000 --rows 400

The fact is one sentence among as many as asked for, at a random place in each row; the question is at the
end. With SmolLM2's and Qwen's tokenizers a sentence is about 13 tokens; rlft says how long the prompts are when a run
starts.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

PLACES = ("harbour", "station", "library", "market", "museum", "school", "garden", "bridge", "tower", "mill")
COLOURS = ("red", "green", "blue", "white", "black", "grey", "brown", "yellow")
TIMES = ("morning", "noon", "evening", "night")
DOINGS = ("was quiet", "was full of people", "was closed", "was being painted", "had a new roof", "had a visitor")


def haystack(draw: random.Random, sentences: int) -> dict[str, str]:
    """One text, its question and the code to find."""
    place, code = f"{draw.choice(COLOURS)} {draw.choice(PLACES)}", str(draw.randint(1000, 9999))
    lines = [
        f"In the {draw.choice(TIMES)} the {draw.choice(COLOURS)} {draw.choice(PLACES)} {draw.choice(DOINGS)}."
        for _ in range(sentences)
    ]
    lines[draw.randrange(sentences)] = f"The code of the {place} is {code}."
    question = f"What is the code of the {place}? Answer with the number alone."
    return {"prompt": f"{' '.join(lines)}\n\n{question}", "answer": code}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sentences", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as file:
        for _ in range(args.rows):
            file.write(json.dumps(haystack(draw, args.sentences)) + "\n")
    print(f"{args.out}: {args.rows} rows of {args.sentences} sentences")


if __name__ == "__main__":
    main()
