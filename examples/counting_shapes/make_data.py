"""Draw pictures of coloured shapes with Pillow, and write rows that ask how many there are: worked examples for SFT,
and others for RL. They are the same for the same arguments.

python examples/counting_shapes/make_data.py runs/data/counting_shapes --sft 2500 --rl 1500
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "orange": (240, 150, 30)}
SHAPES = ("square", "circle", "triangle")
CELL = 16
"""Pixels to a side of the field that a shape stands in."""
MOST = 5
"""Largest answer."""


def picture(draw: random.Random, side: int, answer: int, others: int, colour: str) -> Image.Image:
    """`answer` shapes of a colour and `others` of other colours, in fields of a grid of side x side."""
    canvas = Image.new("RGB", (side * CELL, side * CELL), "white")
    pen = ImageDraw.Draw(canvas)
    fields = draw.sample(range(side * side), answer + others)
    for i, field in enumerate(fields):
        name = colour if i < answer else draw.choice([other for other in COLOURS if other != colour])
        size = draw.randint(8, 12)
        x, y = field % side * CELL + draw.randint(1, 15 - size), field // side * CELL + draw.randint(1, 15 - size)
        corners = (x, y, x + size, y + size)
        shape = draw.choice(SHAPES)
        if shape == "square":
            pen.rectangle(corners, fill=COLOURS[name])
        elif shape == "circle":
            pen.ellipse(corners, fill=COLOURS[name])
        else:
            pen.polygon(((x, y + size), (x + size // 2, y), (x + size, y + size)), fill=COLOURS[name])
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sft", type=int, default=2500, help="worked examples")
    parser.add_argument("--rl", type=int, default=1500, help="other rows, with the answer in a column")
    parser.add_argument("--side", type=int, default=4, help="fields to a side of the picture")
    parser.add_argument("--others", type=int, default=0, help="most shapes of other colours in a picture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    for name, rows, column in (("sft", args.sft, "completion"), ("rl", args.rl, "answer")):
        with (args.out / f"{name}.jsonl").open("w") as file:
            for i in range(rows):
                answer, colour = draw.randint(1, MOST), draw.choice(list(COLOURS))
                path = f"pictures/{name}-{i}.png"
                picture(draw, args.side, answer, draw.randint(0, args.others), colour).save(args.out / path)
                asked = f" {colour}" if args.others else ""
                row = {"prompt": f"How many{asked} shapes?", "image": path, column: str(answer)}
                file.write(json.dumps(row) + "\n")
        print(f"{args.out / name}.jsonl: {rows} rows")


if __name__ == "__main__":
    main()
