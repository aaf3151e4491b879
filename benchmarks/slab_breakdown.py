"""Where the time of the slab step goes: device time by kind of kernel, each floor, and what the host leaves idle.

    python benchmarks/slab_breakdown.py --out DIR --commit HASH 2048 8192 32768

Floors: products at 787 TFLOP/s, attention at 600 forward and 480 backward, memory at 3.03 TB/s; the base
is not decoded where it lies decoded in memory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

import stacks
from results_file import arguments, write
from timing import row

KINDS = {
    "attention": ("flash", "Flash", "_sum_rows", "_merge_kernel"),
    "decode": ("_decode_",),
    "lora": ("_columns", "_fold", "_fill", "64x64"),
    "head": ("_tss_", "_rows_kernel", "_jacobian", "_scale_rows", "index", "Index", "sort", "Sort", "radix"),
    "products": ("nvjet", "gemm", "cublas", "splitK"),
    "elementwise": ("forward_kernel", "backward_kernel", "elementwise", "Memcpy", "fill", "reduce", "copy"),
}
LAYERS, LINEAR, HEAD = 8, 192.94e6, 151936 * 4096


def kind_of(name: str) -> str:
    return next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "other")


def floors(T: int, pairs: float, trained: int, decoded: bool) -> dict[str, float]:
    """Milliseconds at the least. T: tokens that run. pairs: of a query and a key that it sees. trained: tokens whose
    log-prob is taken."""
    attention = 4 * 32 * 128 * pairs * LAYERS
    return {
        "products": 4 * LINEAR * LAYERS * T / 787e12 * 1e3,
        "attention": (attention / 600e12 + 2.5 * attention / 480e12) * 1e3,
        "head": 4 * HEAD * trained / 787e12 * 1e3,
        "decode": 0.0 if decoded else 2 * LINEAR * LAYERS * 2.5159 / 3.03e12 * 1e3,
        "elementwise": (1.8e-6 + 4e-6) * LAYERS / 36 * T * 1e3,
    }


def rows(T: int, step: Any) -> list[dict[str, Any]]:
    ids = torch.randint(10, 90000, (T,), device="cuda")
    for _ in range(3):
        step(ids)
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step(ids)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        step(ids)
        torch.cuda.synchronize()
    plan = step.policy.fused.last_plan
    return parts(f"slab/{T}", times, p, str(plan), floors(T, T * T / 2, T, plan.store == "shadow"))


def parts(work: str, times: list[float], p: profile, plan: str, least: dict[str, float]) -> list[dict[str, Any]]:
    """Rows: the whole, device time by kind of kernel beside its floor, and the rest. times: ms of whole steps."""
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    other: dict[str, float] = {}
    for event in p.key_averages():
        # A trace of the host has its calls with the device's time too.
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kind = kind_of(event.key)
            found[kind] += event.self_device_time_total / 1e3
            if kind == "other":
                other[event.key] = event.self_device_time_total / 1e3
    made = [row(f"{work}/whole", "rlft", "ms", times, "ms", plan)]
    for kind, ms in found.items():
        largest = ", ".join(sorted(other, key=other.get)[-3:])[:160] if kind == "other" else ""  # type: ignore[arg-type]
        floor = f"floor {least[kind]:.2f} ms" if kind in least else largest
        made.append(row(f"{work}/{kind}", "rlft", "ms", ms, "ms", floor))
    idle = sorted(times)[len(times) // 2] - sum(found.values())
    made.append(row(f"{work}/idle", "rlft", "ms", idle, "ms", "the whole less the device time of all kernels"))
    for r in made:
        print(r["work"], r["value"], r["note"], flush=True)
    return made


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("lengths", type=int, nargs="+")
    args = parser.parse_args()
    stacks.make("slab")
    _, one_step = stacks.rlft("slab", True)
    made = [r for T in args.lengths for r in rows(T, one_step)]
    print(write("slab_breakdown", made, args.out, args.commit))
