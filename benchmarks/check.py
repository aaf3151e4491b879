"""The newest results file of each benchmark beside the targets below: what falls short, and by how much.

python benchmarks/check.py      # exit code 1 when something falls short; benchmarks not yet made are listed
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Target(NamedTuple):
    """`metric` of `stack` at `work` should be at most, or at least, `value`."""

    name: str
    """Results file: NAME_gpu_DATE.json or NAME_cpu_DATE.json."""
    work: str
    metric: str
    bound: str
    """"<=" or ">="."""
    value: float
    stack: str = "rlft"
    beside: tuple[str, str] | None = None
    """Work and stack whose value of the same metric and file `value` is a multiple of."""


def at_copy(name: str, work: str, share: float, stack: str = "rlft") -> Target:
    """Bandwidth of at least `share` of a copy of the same bytes, measured in the same run."""
    return Target(name, work, "GBs", ">=", share, stack, (work, "copy"))


def faster(name: str, work: str, times: float, other_work: str, other: str) -> Target:
    """At least `times` the tokens/s of another stack, measured in the same run."""
    return Target(name, work, "tokens_per_s", ">=", times, "rlft", (other_work, other))


def beside(name: str, work: str, times: float, other: str) -> list[Target]:
    """Another stack's seconds at least `times` ours while ours is held to its memory, measured in the same run."""
    held = f"rlft-at-{other}-memory"
    return [
        Target(name, work, "seconds", "<=", round(1 / times, 4), held, (work, other)),
        Target(name, work, "peak_GiB", "<=", 1.0, held, (work, other)),
    ]


TARGETS = [
    *(Target("logprobs", f"head/{t}", "ms", "<=", ms) for t, ms in ((1024, 4.8), (8192, 33.0), (32768, 122.0))),
    at_copy("nf4", "nf4/layer/device", 0.85),
    at_copy("nf4", "nf4/12288x4096/device", 0.85),
    at_copy("nf4", "nf4/4096x4096/device", 0.65),
    *(at_copy("kernels_experts", f"experts/qwen3-30b-a3b/{w}", 0.85) for w in ("decode", "decode-mxfp4")),
    *(at_copy("kernels_experts", f"experts/qwen3-30b-a3b/T8192/{w}", 0.8) for w in ("gather", "combine")),
    *(
        Target("kernels_experts", work, "TFLOPs", ">=", share, "rlft", (work, "dense"))
        for T, share in ((2048, 0.55), (8192, 0.7))
        for work in (
            f"experts/qwen3-30b-a3b/T{T}/{part}/{way}" for part in ("gate_up", "down") for way in ("forward", "dx")
        )
    ),
    Target("lora", "lora/layer/T4096-r16-align64", "percent_over_frozen", "<=", 12.0),
    Target("lora", "lora/layer/T4096-r16-align64/graph", "percent_over_frozen", "<=", 12.0),
    *(
        at_copy("rms_norm", f"{n}/8192x4096/{w}/device", 0.8)
        for n in ("rms_norm", "add_rms_norm")
        for w in ("forward", "backward")
    ),
    *(at_copy("qk_rope", f"qk_rope/8192x32+8x128/{w}/device", 0.75) for w in ("forward", "backward")),
    *(at_copy("swiglu", f"swiglu/8192x12288/{w}/device", 0.85) for w in ("forward", "backward")),
    Target("logging_overhead", "logging/everything, no tracker", "hot_cpu_ms", "<=", 2.0),
    Target("logging_overhead", "logging/everything, no tracker", "loop_cpu_ms", "<=", 2.0),
    *(Target("slab", f"slab/{t}", "tokens_per_s", ">=", v) for t, v in ((2048, 42e3), (8192, 46e3), (32768, 32e3))),
    *(
        Target("slab", f"slab/{t}", "tokens_per_s", ">=", v, "rlft-fa2")
        for t, v in ((2048, 40e3), (8192, 39e3), (32768, 23e3))
    ),
    *(Target("slab", f"slab-tight/{t}", "peak_GiB", "<=", v) for t, v in ((2048, 0.55), (8192, 1.5), (32768, 5.0))),
    *(faster("slab", f"slab-at-unsloths-memory/{t}", 1.0, f"slab/{t}", "unsloth") for t in (2048, 8192, 32768)),
    *(
        faster("small", f"small/{s}-{k}/{t}", times, f"small/{s}-{k}/{t}", other)
        for s in ("0.6b", "1.7b")
        for t in (512, 1024)
        for k, other, times in (
            ("nf4", "peft", 2.5),
            ("bf16", "peft", 1.3),
            ("nf4", "unsloth", 1.2),
            ("bf16", "unsloth", 1.2),
        )
    ),
    Target("longest", "longest/sft", "tokens", ">=", 400e3),
    Target("longest", "longest/grpo", "tokens", ">=", 200e3),
    # What the targets were measured from had its prompts in the cache.
    *(
        Target("rollout", f"rollout-expanded/{n}", "tokens_per_s", ">=", v, "rlft, prompts cached")
        for n, v in ((256, 13.5e3), (64, 5.7e3), (16, 1.7e3))
    ),
    *(
        Target("rollout", f"rollout-lent/{n}", "tokens_per_s", ">=", v, "rlft, prompts cached")
        for n, v in ((256, 9.8e3), (64, 3.6e3), (16, 1.0e3))
    ),
    Target("rollout", "rollout-merged/256", "tokens_per_s", ">=", 16.5e3, "rlft, prompts cached"),
    *(
        Target("rollout", f"{w}/8b", metric, "<=", value)
        for w in ("handover", "handover-lent", "handover-merged")
        for metric, value in (("seconds", 0.5), ("asleep_above_base_GiB", 1.2), ("asleep_above_trainer_GiB", 1.2))
    ),
    # Merged weights are written again at each hand-over.
    *(Target("rollout", f"{w}/8b", "load_ms", "<=", 50.0) for w in ("handover", "handover-lent")),
    # With the ballast 24 GiB of the card are left, the driver's part included.
    *(
        Target("ballast24_grpo", "ballast24/grpo", f"{phase}_GiB", "<=", 24.0)
        for phase in ("start", "generate", "train")
    ),
    Target("rollout_110k", "rollout-110k", "train_GiB", "<=", 80.0),
    *(
        Target("grpo_run", f"grpo-run/{mode}", metric, "<=", value)
        for mode in ("dequantized", "shared", "merged")
        for metric, value in (("mismatch_sd", 0.05), ("mismatch_outside", 0.075))
    ),
    Target("grpo_step_lognormal", "grpo-step/lognormal", "seconds", "<=", 2.3),
    Target("grpo_step_outlier", "grpo-step/outlier", "seconds", "<=", 3.4),
    *(
        target
        for work, times in (("lognormal", 10), ("lognormal-median", 10), ("lognormal-p1024", 10), ("outlier", 20))
        for other, at_least in (("trl", times), ("unsloth", 2))
        for target in beside(f"grpo_step_{work}".replace("-", "_"), f"grpo-step/{work}", at_least, other)
    ),
    *(
        target
        for work in ("dpo-step/lognormal", "sft-step/packed")
        for other in ("trl", "unsloth")
        for target in beside(work.replace("-", "_").replace("/", "_"), work, 1.0, other)
    ),
    Target("grpo_iteration_8b", "grpo-iteration/8b", "seconds", "<=", 0.5, "rlft", ("grpo-iteration/8b", "trl")),
]


def newest(name: str) -> tuple[Path, list[dict]] | None:
    """The rows of the newest file of a benchmark: a GPU's before a CPU's."""
    files = sorted(RESULTS.glob(f"{name}_gpu_*.json")) or sorted(RESULTS.glob(f"{name}_cpu_*.json"))
    return (files[-1], json.loads(files[-1].read_text())["rows"]) if files else None


def found(rows: list[dict], target: Target, stack: str) -> float | None:
    same = [r for r in rows if (r["work"], r["metric"], r["stack"]) == (target.work, target.metric, stack)]
    return same[-1]["value"] if same else None


def main() -> int:
    short, missing = 0, set()
    for target in TARGETS:
        file = newest(target.name)
        value = None if file is None else found(file[1], target, target.stack)
        if file is None or value is None:
            missing.add(target.name if file is None else f"{target.name}: {target.work}")
            continue
        bound, against = target.bound, target.value
        if target.beside is not None:
            work, stack = target.beside
            other = found(file[1], target._replace(work=work), stack)
            if other is None:
                missing.add(f"{target.name}: {work} of {stack}")
                continue
            value /= other
        good = value <= against if bound == "<=" else value >= against
        short += not good
        where = f"{target.work} {target.stack}"
        print(f"{'  ' if good else '! '}{where:<58} {target.metric:<20} {value:>10.4g}  want {bound} {against:g}")
    for name in sorted(missing):
        print(f"  not measured yet: {name}")
    return int(short > 0)


if __name__ == "__main__":
    sys.exit(main())
