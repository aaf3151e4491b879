"""What the self-check of a start costs, and how far rounding alone takes it on shapes of real models.

    python benchmarks/self_check.py --out DIR --commit HASH 8b lfm2

Random NF4 weights, without CUDA graphs: a run checks each layout once, and graphs are captured at the second pass.
"first" compiles kernels, which the run's first step would compile otherwise; "again" is the same check once more.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

import stacks
from longest import policy_of
from results_file import arguments, write
from timing import row

from rlft.trainer.selfcheck import check, limit_of


def measure(shape: str) -> list[dict[str, Any]]:
    """Rows of two checks of a shape: seconds and the largest difference, in units of the log-probs' spread."""
    policy = policy_of(shape)
    if policy.fused is not None:
        policy.fused.graphs = None
    rows = []
    for when in ("first", "again"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        difference = check(policy)
        seconds = time.perf_counter() - start
        rows.append(row(f"self-check/{shape}", "rlft", f"{when}_seconds", seconds, "s", f"path: {policy.path}"))
    note = f"limit {limit_of(policy):.3g}"
    rows.append(row(f"self-check/{shape}", "rlft", "difference", difference, "spread", note))
    for r in rows:
        print(r["work"], r["metric"], r["value"], r["note"], flush=True)
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("shapes", nargs="+", choices=stacks.SHAPES)
    args = parser.parse_args()
    print(write("self_check", [r for shape in args.shapes for r in measure(shape)], args.out, args.commit))
