"""Time and memory of the start of a run over a million short rows, on a CPU.

    python benchmarks/million_rows.py --out DIR --commit HASH [--rows 1000000]

Writes a JSON lines file of prompts with answers and a tiny random Llama, and runs one step of `rlft train` over them in
a process of its own. Its time is from the start of the process to its end, report and checkpoint included; its memory
is the peak resident size of the process. `PYTHONPATH` says whose rlft is measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results_file import arguments, write

CONFIG = """
model = "{folder}/model"
data = "{folder}/rows.jsonl"
rewards = ["number"]
steps = 1
prompts_per_step = 4
out = "{folder}/run"
device = "cpu"
[sampling]
group_size = 2
max_tokens = 8
[parity]
probe = false
"""


def prepare(folder: Path, rows: int) -> None:
    """Write the model, the rows and the config into a folder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny import tiny_model, tiny_tokenizer

    tiny_model().unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": f"say {i % 1000}", "answer": str(i)}) + "\n" for i in range(rows))
    (folder / "run.toml").write_text(CONFIG.format(folder=folder))


def measure(folder: Path) -> dict[str, float]:
    """Run one step and return seconds, processor seconds and the peak resident size in GiB."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "rlft", "train", str(folder / "run.toml")])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"rlft train ended with status {status}"
    return {
        "seconds": time.monotonic() - begin,
        "processor seconds": usage.ru_utime + usage.ru_stime,
        "peak GiB": usage.ru_maxrss / 2**20,
    }


def main() -> None:
    """Measure, print and write a results file."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.rows)
        values = measure(Path(name))
    load = f"load average {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores of {platform.machine()}"
    rows = [
        {"work": f"start/{args.rows}-rows", "stack": "rlft", "metric": metric, "value": value, "unit": "", "note": note}
        for metric, value in values.items()
        for note in (f"{load}; {args.note}".rstrip("; "),)
    ]
    print(json.dumps(rows, indent=1))
    print(write("million_rows", rows, args.out, args.commit))


if __name__ == "__main__":
    main()
