"""The kernels' benchmarks on a GPU, one results file each.

    python benchmarks/run_kernels.py --out DIR --commit HASH nf4 lora rms_norm qk_rope swiglu attention copies logprobs

The GPU machine has no checkout, so the commit is told; the files are put into benchmarks/results/ by hand.
"""

from __future__ import annotations

import importlib
import time

from results_file import arguments, write

NAMES = ("nf4", "lora", "rms_norm", "qk_rope", "swiglu", "attention", "copies", "logprobs", "kernels_experts")

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    args = parser.parse_args()
    for name in args.names:
        start = time.time()
        rows = importlib.import_module(name).rows()
        path = write(name, rows, args.out, args.commit)
        print(f"{path.name}: {len(rows)} rows, {time.time() - start:.0f} s", flush=True)
