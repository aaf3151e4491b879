"""What happens when something is wrong: faults put into real runs of rlft, TRL and Unsloth.

    python benchmarks/faults.py                                                      # rlft and TRL, on a CPU or a GPU
    python benchmarks/faults.py --stacks rlft trl unsloth --unsloth PATHS --out DIR --commit HASH
    python benchmarks/faults.py --table                                              # the table of docs/faults.md

Each fault of each stack runs in a separate process with a time limit, so that a crash or a hang is a result. The
models are small and random (`injected/material.py`); the faults themselves are in `injected/rlft_faults.py` and
`injected/trl_faults.py`, whose trainers run Unsloth's models too. `--unsloth` is put before PYTHONPATH for Unsloth.
Steps count from 1, 0 is before the first; most faults come in step 3 of 6. "finished" is a run that ended with exit
code 0, whatever it had computed: the note says how wrong that is. Warnings that a run without a fault gives too are
left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "injected"))

from results_file import RESULTS, commit_now, write
from timing import row

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]
LIMIT = 300.0
"""Seconds of one fault, imports included."""
CONTROL = "none"
"""The run without a fault."""
STACKS = ("rlft", "trl", "unsloth")
HEADS = {"rlft": "rlft", "trl": "TRL 1.16", "unsloth": "Unsloth"}

FAULTS: dict[str, str] = {
    CONTROL: "nothing is wrong",
    "stale_adapter": "the sampler keeps an old adapter: the write is lost",
    "stale_adapter_unseen": "the sampler keeps an old adapter and says it has the new one",
    "scaled_twice": "LoRA's alpha / rank applied twice in the sampler",
    "sampler_temperature": "sampled at 0.6, trained at 1",
    "sampler_weight": "one wrong base weight in the sampler",
    "few_sequences_off": "1 of 20 sequences is 2 nat off in the sampler",
    "no_sinks": "the sampler drops gpt_oss's attention sinks",
    "two_bos": "a prompt begins with two BOS",
    "rendered_twice": "a prompt goes through the chat template twice",
    "packed_hybrid": "rows of lfm2 are packed (SFT)",
    "packed_sinks": "the trainer's attention has no sinks (gpt_oss)",
    "recorded_temperature": "temperature 0.6 left in the settings of SFT",
    "dropout": "LoRA dropout 0.05 in GRPO",
    "update_before_backward": "an optimiser update between forward and backward",
    "buffer_left": "an adapter tensor leaves the buffer that CUDA graphs read",
    "other_tile": "old log-probs by another plan than those trained",
    "nan_adapter": "the adapter turns nan in GRPO",
    "nan_adapter_recorded": "the adapter turns nan in SFT",
    "nan_weight": "the checkpoint has a nan weight (SFT)",
    "nan_loss": "the loss of one micro-batch is nan",
    "nan_rewards": "all rewards of a step are nan",
    "reward_raises": "the reward function raises",
    "infinite_reward": "one reward is inf",
    "reward_hangs": "the reward function hangs",
    "reward_dies": "the reward function kills its process",
    "empty_completions": "every completion is empty",
}
"""Fault -> its words in the table."""


def one(stack: str, fault: str, answer: Path) -> None:
    """Run a fault of a stack in this process and write its outcome."""
    if stack == "unsloth":
        importlib.import_module("unsloth")
    module = importlib.import_module("rlft_faults" if stack == "rlft" else "trl_faults")
    if stack == "unsloth":
        module.UNSLOTH = True
    with tempfile.TemporaryDirectory() as folder:
        answer.write_text(module.RUNS[fault](Path(folder)).to_json())


def outcome(stack: str, fault: str, limit: float, before: str = "") -> dict[str, Any]:
    """The same in another process. before: paths that are put before PYTHONPATH."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        paths = os.pathsep.join(p for p in (before, str(HERE.parent), os.environ.get("PYTHONPATH", "")) if p)
        command = [sys.executable, __file__, "--one", stack, fault, str(answer)]
        with log.open("w") as shown:
            process = subprocess.Popen(
                command, stdout=shown, stderr=shown, start_new_session=True, env=os.environ | {"PYTHONPATH": paths}
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return {"metric": "hung", "value": limit, "note": f"hangs; stopped by this benchmark after {limit:g} s"}
        if code == 0:
            return json.loads(answer.read_text())
        last = ([line for line in log.read_text().splitlines() if line.strip()] or [""])[-1]
        return {"metric": "crashed", "value": code, "note": f"the process ended with code {code}; {last[:300]}"}


UNITS = {"stopped_at_step": "step", "finished": "steps", "hung": "s", "crashed": "exit code", "not_injected": ""}


def measured(stacks: list[str], faults: list[str], limit: float, unsloth: str, jobs: int) -> Rows:
    """A row for each fault and stack; what a stack warns of in the run without a fault too is left out."""
    asked = [(stack, fault) for stack in stacks for fault in dict.fromkeys([CONTROL, *faults])]

    def ask(stack: str, fault: str) -> dict[str, Any]:
        found = outcome(stack, fault, limit, unsloth if stack == "unsloth" else "")
        print(fault, stack, found["metric"], found["value"], found["note"], flush=True)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = dict(zip(asked, pool.map(lambda a: ask(*a), asked), strict=True))
    rows: Rows = []
    for (stack, fault), found in outcomes.items():
        usual = outcomes[stack, CONTROL].get("warned", []) if fault != CONTROL else []
        warned = "".join(f"; WARNED: {text}" for text in found.get("warned", []) if text not in usual)
        metric, note = found["metric"], found["note"] + warned
        rows.append(row(fault, stack, metric, float(found["value"]), UNITS[metric], note))
    return rows


def onto(path: Path, rows: Rows, commit: str) -> Rows:
    """The rows of a results file that were not run again, with their commit where it is another one, and these."""
    old = json.loads(path.read_text())
    again = {(r["work"], r["stack"]) for r in rows}
    kept = [r for r in old["rows"] if (r["work"], r["stack"]) not in again]
    for r in kept if old["commit"] != commit else ():
        r["note"] += "" if "; at commit " in r["note"] else f"; at commit {old['commit']}"
    return kept + rows


# ---- the table -------------------------------------------------------------------------------------------------------


def newest(folder: Path) -> list[Path]:
    """The newest results of a CPU and of a GPU."""
    found = [sorted(folder.glob(f"faults_{device}_*.json")) for device in ("cpu", "gpu")]
    return [paths[-1] for paths in found if paths]


def known(paths: list[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """(fault, stack) -> its row; that of a GPU where both have one."""
    rows = [r for path in paths for r in json.loads(path.read_text())["rows"]]
    return {(r["work"], r["stack"]): r for r in rows}


def cell(found: dict[str, Any] | None) -> str:
    """An outcome in a few words."""
    if found is None:
        return "not run yet"
    note, value = found["note"].split(";")[0], int(found["value"])
    if found["metric"] == "finished":
        return f"{note}: {found['note'].split(';')[1].strip().removesuffix(', adapter finite')}"
    if found["metric"] == "stopped_at_step":
        where = f"at step {value}" if value else "before step 1"
        return f"**stops** {where}: {note.split(':')[0]}"
    return note


def table(folder: Path, faults: tuple[str, ...] = tuple(fault for fault in FAULTS if fault != CONTROL)) -> str:
    """The markdown of these faults."""
    paths = newest(folder)
    rows = known(paths)
    lines = ["| fault | " + " | ".join(HEADS.values()) + " |", "| --- " * (1 + len(STACKS)) + "|"]
    for fault in faults:
        cells = [cell(rows.get((fault, stack))) for stack in STACKS]
        lines.append(f"| {FAULTS[fault]} | " + " | ".join(cells) + " |")
    links = ", ".join(f"[{p.stem.split('_')[1].upper()}](benchmarks/results/{p.name})" for p in paths)
    return "\n".join([*lines, "", f"Results: {links}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=["rlft", "trl"])
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one fault")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--unsloth", default="", help="paths put before PYTHONPATH for Unsloth")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--onto", type=Path, help="a results file whose other rows are kept")
    parser.add_argument("--commit")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", nargs=3, metavar=("STACK", "FAULT", "ANSWER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], args.one[1], Path(args.one[2]))
    elif args.table:
        print(table(args.out))
    else:
        rows = measured(args.stacks, args.faults, args.limit, args.unsloth, args.jobs)
        rows = onto(args.onto, rows, args.commit or commit_now()) if args.onto else rows
        print(write("faults", rows, args.out, args.commit))


if __name__ == "__main__":
    main()
