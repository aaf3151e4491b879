"""How many files one GRPO step enters, and how often it goes from one file to another: before and after a change.

    python benchmarks/crossings.py --before /path/to/another/checkout

A profile of `loop` in a run of one step on the CPU: a random model of two layers, the eager engine, the fused layers'
reference path. "files" and "functions" of rlft are those that are entered. "crossings" are the distinct pairs of a
calling and a called function that lie in different files, of rlft both; "calls" counts every such call. "..._of_step"
leaves out what is called in models/ and kernels/, the two layers forward and backward.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = """
model = "{home}/model"
data = "{home}/prompts.jsonl"
rewards = ["{home}/rewards.py:digits"]
out = "{out}"
steps = 1
prompts_per_step = 4
lora = {{ rank = 4, alpha = 8 }}
sampling = {{ group_size = 4, max_tokens = 6 }}
optim = {{ lr = 1e-2 }}
"""
REWARD = "def digits(completions, **columns): return [float(sum(map(str.isdigit, text))) for text in completions]"


def profiled(config: str, answer: str) -> None:
    """Train in this process, and write what `loop` enters to `answer`."""
    entered: dict[CodeType, None] = {}
    pairs: dict[tuple[CodeType, CodeType], int] = {}
    depth = [0]

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or "/rlft/" not in code.co_filename:
            return
        if code.co_name == "loop":
            depth[0] += 1 if event == "call" else -1
        elif code.co_name == "check_end":  # another pass after the last step, since version 0.1
            depth[0] += -1 if event == "call" else 1
        if event == "return" or not depth[0]:
            return
        entered[code] = None
        caller = frame.f_back
        while caller is not None and "/rlft/" not in caller.f_code.co_filename:
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != code.co_filename:
            pair = caller.f_code, code
            pairs[pair] = pairs.get(pair, 0) + 1

    sys.argv = ["rlft", "train", config]
    sys.setprofile(watch)
    try:
        runpy.run_module("rlft", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end
    finally:
        sys.setprofile(None)
    numbers: dict[str, int] = {}
    for suffix, left_out in (("", ()), ("_of_step", ("/rlft/models/", "/rlft/kernels/"))):
        codes = [code for code in entered if not any(part in code.co_filename for part in left_out)]
        counts = [n for (_, code), n in pairs.items() if not any(part in code.co_filename for part in left_out)]
        files = {code.co_filename for code in codes}
        values = {"files": len(files), "functions": len(codes), "crossings": len(counts), "calls": sum(counts)}
        numbers |= {f"{name}{suffix}": value for name, value in values.items()}
    Path(answer).write_text(json.dumps(numbers))


def measured(checkout: Path) -> dict[str, int]:
    """The numbers of a checkout."""
    from kill_soak import make_home

    with tempfile.TemporaryDirectory() as folder:
        home, config, answer = Path(folder, "home"), Path(folder, "run.toml"), Path(folder, "answer.json")
        make_home(home)
        (home / "rewards.py").write_text(REWARD)
        config.write_text(CONFIG.format(home=home, out=Path(folder, "run")))
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import crossings; "
        code += f"crossings.profiled({str(config)!r}, {str(answer)!r})"
        env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "2"}
        subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=folder, stdout=subprocess.DEVNULL)
        return json.loads(answer.read_text())


def main() -> None:
    from results_file import commit_now, write
    from timing import row

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for stack, checkout in (("before", args.before), ("rlft", ROOT)):
        for name, value in measured(checkout).items():
            rows.append(row("crossings/grpo-step", stack, name, float(value), "", f"commit {commit_now(checkout)}"))
            print(stack, name, value, flush=True)
    print(write("crossings", rows))


if __name__ == "__main__":
    main()
