"""The kernels' benchmarks on a GPU, one results file each.

    python benchmarks/run_kernels.py --out DIR --commit HASH nf4 lora rms_norm qk_rope swiglu attention copies logprobs

The GPU machine has no checkout, so the commit is told; the files are put into benchmarks/results/ by hand.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from results_file import write

NAMES = ("nf4", "lora", "rms_norm", "qk_rope", "swiglu", "attention", "copies", "logprobs")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("names", nargs="*", default=NAMES)
    args = parser.parse_args()
    for name in args.names:
        start = time.time()
        rows = importlib.import_module(name).rows()
        path = write(name, rows, args.out, args.commit)
        print(f"{path.name}: {len(rows)} rows, {time.time() - start:.0f} s", flush=True)
