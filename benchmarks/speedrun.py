"""One command, one result: two-digit sums with a fixed seed, compared with what the results file of the task has.

    python benchmarks/speedrun.py            # minutes on two CPU cores

It trains examples/sums.toml as benchmarks/demo_sums.py does, and exits with 1 when held-out accuracy at the end
is below the lowest seed of the newest results file minus two standard errors. `--steps 2` tries the command itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo_sums import ROOT, run
from results_file import RESULTS

SEED = 42


class Expected(NamedTuple):
    """What the seeds of a results file reached."""

    file: str
    accuracy: float
    """Mean over its seeds."""
    lowest: float
    """Of a seed, minus two standard errors on `ROWS` rows."""
    seconds: float
    """Of the slowest whole command."""


ROWS = 200
"""Held-out rows of examples/sums.toml."""


def expected(folder: Path = RESULTS) -> Expected:
    """Read the newest results file of benchmarks/demo_sums.py on a CPU."""
    newest = max(folder.glob("demo_cpu_*.json"), key=lambda path: path.stem.rpartition("_")[2])
    rows = [row for row in json.loads(newest.read_text())["rows"] if row["work"] == "demo/sums"]
    after = [row["value"] for row in rows if row["metric"] == "accuracy_after"]
    lowest = min(after)
    return Expected(
        newest.name,
        sum(after) / len(after),
        lowest - 2 * math.sqrt(lowest * (1 - lowest) / ROWS),
        max(row["value"] for row in rows if row["note"].endswith("whole command")),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", help="a folder of the model, where it is unpacked already")
    args = parser.parse_args()
    want = expected()
    print(
        f"expected: accuracy {want.accuracy:.3f} on {ROWS} held-out sums, at least {want.lowest:.3f}; it took up to "
        f"{want.seconds / 60:.1f} minutes ({want.file})",
        flush=True,
    )
    start = time.time()
    flags = ["--seed", str(SEED), "--device", "cpu", "--steps", str(args.steps)]
    found = run("speedrun", [*flags, *(["--model", args.model] if args.model else [])])
    good = found["after"] >= want.lowest
    print(
        f"{'reached' if good else 'NOT REACHED'}: accuracy {found['before']:.3f} before, {found['after']:.3f} after "
        f"{found['steps']} steps, {(time.time() - start) / 60:.1f} minutes; report in "
        f"{ROOT / 'runs' / 'benchmark-speedrun' / 'report.html'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
