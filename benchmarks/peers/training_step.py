"""One training step of several stacks side by side: each in a separate process, steps interleaved on one GPU.

    python benchmarks/peers/training_step.py --out DIR --commit HASH slab small

`slab`: tokens/s and GiB above the loaded model at 2,048, 8,192 and 32,768 tokens, also with rlft held to Unsloth's
memory and to the least it can do. `small`: 512 and 1,024 tokens on the 0.6B and 1.7B shapes, in NF4 and in bf16.
`--fa4 PATHS` is put before PYTHONPATH for the stacks that may use flash-attn-4, `--unsloth PATH` for Unsloth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from results_file import arguments, write
from timing import row
from workers import GIB, Worker

ROUNDS, WARM = 5, 2


def started(stack: str, shape: str, nf4: bool, path: str) -> Worker:
    return Worker(stack, [__file__, "--worker", stack.split("-")[0], shape, str(int(nf4))], path)


def worker(stack: str, shape: str, nf4: bool) -> None:
    """Answer questions {"T", "budget"} with {"ms", "peak"}."""
    import stacks
    import torch

    _model, step = getattr(stacks, stack)(shape, nf4)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    ids: dict[int, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        T, budget = question["T"], question.get("budget")
        try:
            if T not in ids:
                ids.clear()
                torch.cuda.empty_cache()
                ids[T] = torch.randint(10, 90000, (T,), device="cuda")
            policy = getattr(step, "policy", None)
            extra = 0
            if policy is not None and policy.fused is not None:
                if policy.fused.budget != budget and policy.fused.graphs is not None:
                    policy.fused.graphs.clear()
                policy.fused.budget = budget
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step(ids[T])
            torch.cuda.synchronize()
            ms = (time.perf_counter() - start) * 1e3
            policy = getattr(step, "policy", None)
            plan = ""
            if policy is not None and policy.fused is not None:
                # What graphs hold lies in a separate pool, which the allocator's peak does not count.
                extra = policy.fused.graphs.bytes if policy.fused.graphs is not None else 0
                plan = f"{policy.fused.last_plan}, {policy.fused.last_plan.store}, {policy.fused.shape.attention}"
            peak = (torch.cuda.max_memory_allocated() - base + extra) / GIB
            answer: dict[str, Any] = {"ms": ms, "peak": peak, "plan": plan, "model": base / GIB}
        except torch.OutOfMemoryError:
            answer = {"error": "out of memory"}
        print("@" + json.dumps(answer), flush=True)


def side_by_side(workers: list[Worker], T: int, budgets: dict[str, float | None]) -> dict[str, dict[str, Any]]:
    """ms of ROUNDS interleaved steps after WARM, and the last peak, of each stack."""
    found: dict[str, dict[str, Any]] = {w.stack: {"ms": [], "peak": 0.0, "plan": ""} for w in workers}
    live = list(workers)
    for turn in range(WARM + ROUNDS):
        for w in list(live):
            answer = w.ask(T=T, budget=budgets.get(w.stack))
            if "error" in answer:
                found[w.stack]["error"] = answer["error"]
                live.remove(w)
            elif turn >= WARM:
                found[w.stack]["ms"].append(answer["ms"])
                found[w.stack] |= {"peak": answer["peak"], "plan": answer["plan"]}
    return found


def rows_of(work: str, T: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for stack, got in found.items():
        if not got["ms"]:
            print(work, stack, got.get("error"), flush=True)
            continue
        made.append(row(work, stack, "tokens_per_s", [T / ms * 1e3 for ms in got["ms"]], "tokens/s", got["plan"]))
        made.append(row(work, stack, "peak_GiB", got["peak"], "GiB", "above the loaded model"))
        print(work, stack, made[-2]["value"], f"{got['peak']:.3f} GiB", got["plan"], flush=True)
    return made


def slab(paths: dict[str, str]) -> list[dict[str, Any]]:
    made = []
    order = ["trl", "unsloth", "rlft", "rlft-fa2"]
    workers = [started(s, "slab", True, paths.get(s, "")) for s in order]
    for T, tight in ((2048, 0.5), (8192, 1.4), (32768, 4.6)):
        found = side_by_side(workers, T, {})
        made += rows_of(f"slab/{T}", T, found)
        ours = [w for w in workers if w.stack in ("rlft", "rlft-fa2")]
        theirs = found["unsloth"]["peak"] or {2048: 0.55, 8192: 1.97, 32768: 7.75}[T]
        # The adapter's gradient buffer is ours from the start, and counted; a budget is for what comes on top.
        budget = (theirs - 0.05) * GIB
        capped = side_by_side(ours, T, dict.fromkeys(("rlft", "rlft-fa2"), budget))
        made += rows_of(f"slab-at-unsloths-memory/{T}", T, capped)
        least = side_by_side(ours, T, dict.fromkeys(("rlft", "rlft-fa2"), tight * GIB))
        made += rows_of(f"slab-tight/{T}", T, least)
    for w in workers:
        w.close()
    return made


def small(paths: dict[str, str]) -> list[dict[str, Any]]:
    made = []
    for shape in ("0.6b", "1.7b"):
        for nf4 in (True, False):
            workers = [started(s, shape, nf4, paths.get(s, "")) for s in ("peft", "unsloth", "rlft")]
            for T in (512, 1024):
                kind = "nf4" if nf4 else "bf16"
                made += rows_of(f"small/{shape}-{kind}/{T}", T, side_by_side(workers, T, {}))
            for w in workers:
                w.close()
    return made


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        worker(sys.argv[2], sys.argv[3], sys.argv[4] == "1")
        sys.exit()
    parser = arguments(__doc__)
    parser.add_argument("--fa4", default="")
    parser.add_argument("--unsloth", default="")
    parser.add_argument("names", nargs="+", choices=("slab", "small"))
    args = parser.parse_args()

    for name in args.names:
        for shape in {"slab": ("slab",), "small": ("0.6b", "1.7b")}[name]:
            subprocess.run(
                [
                    sys.executable,
                    "-c",
                    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
                    f"import stacks; stacks.make({shape!r})",
                ],
                check=True,
            )
        measure = {"slab": slab, "small": small}[name]
        print(write(name, measure({"rlft": args.fa4, "unsloth": args.unsloth}), args.out, args.commit))
