"""kill -9 of a rank at a random moment, 20 times: torchrun starts all ranks again, and the run ends as if undisturbed.

    python benchmarks/ranks_kill.py        # a quarter of an hour on two cores

Runs of GRPO on a tiny model in float64, two ranks over gloo, a checkpoint after every step. Each is killed once: rank
and moment are drawn by its number, from its start to a second after its expected end. It must end with exit code 0, the
completions and rewards of the undisturbed run, and its adapter to 1e-5.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from results_file import write
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import save_tiny

RUNS, STEPS, SECONDS = 20, 4, 12.0
"""SECONDS: about the time from the start of an undisturbed run to its end."""
REWARD = """
import time

def digits(completions, **_):
    time.sleep(0.5)
    return [len(set(text)) / 6 for text in completions]
"""
CONFIG = """
model = "{home}/model"
data = "{home}/prompts.jsonl"
out = "{out}"
rewards = ["{home}/rewards.py:digits"]
dtype = "float64"
steps = {steps}
prompts_per_step = 5
sampling = {{ group_size = 4, max_tokens = 6 }}
lora = {{ rank = 4 }}
optim = {{ lr = 1e-2 }}
checkpoint = {{ every = 1 }}
"""


def start(home: Path, name: str) -> subprocess.Popen[bytes]:
    """Start two ranks of a run."""
    config = home / f"{name}.toml"
    config.write_text(CONFIG.format(home=home, out=home / name, steps=STEPS))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "rlft", "train", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (home / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, "--resume", "auto"], env=environment, stdout=log, stderr=log
        )


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes of the ranks, by number."""
    found = {}
    for child in psutil.Process(process.pid).children():
        number = child.environ().get("RANK")
        if number is not None:
            found[int(number)] = child
    return found


def result(home: Path, name: str) -> tuple[list[Any], dict[str, Any]]:
    """Completions and rewards of every step, and the adapter."""
    folder = home / name
    rows = [
        [(row["completion"], row["reward"]) for row in pq.read_table(file).to_pylist()]
        for file in sorted((folder / "rollouts").iterdir())
    ]
    return rows, load_file(folder / "checkpoints" / f"step-{STEPS:06d}" / "adapter_model.safetensors")


def killed(home: Path, number: int) -> tuple[str, int]:
    """Kill one rank of a run; return what was killed and when, and the exit code."""
    draw = random.Random(number)
    rank, delay, process = draw.randrange(2), draw.uniform(0.5, SECONDS + 1), start(home, f"run-{number}")
    time.sleep(delay)
    what = f"rank {rank} after {delay:.1f} s"
    try:
        ranks_of(process)[rank].send_signal(signal.SIGKILL)
    except (KeyError, psutil.NoSuchProcess):
        what = f"nothing: no rank {rank} after {delay:.1f} s"
    return what, process.wait(300)


def main() -> None:
    """Run all and write the file."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        save_tiny(home / "model")
        (home / "prompts.jsonl").write_text("\n".join(f'{{"prompt": "say {i}"}}' for i in range(24)))
        (home / "rewards.py").write_text(REWARD)
        assert start(home, "undisturbed").wait(300) == 0, (home / "undisturbed.log").read_text()
        rollouts, adapter = result(home, "undisturbed")
        for number in range(RUNS):
            what, code = killed(home, number)
            equal, note = False, f"killed {what}; exit code {code}"
            if code == 0:
                others, weights = result(home, f"run-{number}")
                difference = max(float((weights[name] - adapter[name]).abs().max()) for name in adapter)
                equal = others == rollouts and difference < 1e-5
                note += f"; adapter differs by {difference:.1e}"
            else:
                print((home / f"run-{number}.log").read_text()[-3000:])
            print(number, equal, note, flush=True)
            work = {"work": f"ranks-kill/{number}", "stack": "rlft", "metric": "equal", "unit": "yes or no"}
            rows.append(work | {"value": int(equal), "note": note})
    ended = sum(row["value"] for row in rows)
    total = {
        "work": "ranks-kill/all",
        "stack": "rlft",
        "metric": "runs",
        "value": ended,
        "unit": "runs that ended equal",
    }
    print(write("ranks_kill", [total | {"note": f"of {RUNS}; two ranks, one killed by kill -9"}, *rows]))


if __name__ == "__main__":
    main()
