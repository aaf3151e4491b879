"""kill -9 at random moments of a small run, resumed until it ends: it must end equal to one that nobody disturbed.

    python benchmarks/kill_soak.py            # 30 runs, about twenty minutes on two cores
    python benchmarks/kill_soak.py --fork     # the same with forks of a loaded process, in a third of the time

Each run is `python -m rlft train run.toml` on a model of two layers: six steps with an evaluation and a checkpoint
after every second one, of one of KINDS. While it lives a second writer is refused. It is killed one to three times and
started again with --resume each time. The seed of the run draws when: a moment of MOMENTS, then a random delay. Equal
means: every byte of the checkpoints' tensors and states, every row of metrics.jsonl but for times and rates, every row
of the rollouts and the evaluations.
`tests/runs/test_kill.py` does the same with four kills.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlft.errors import ConfigError
from rlft.runs.claim import claim
from rlft.runs.lock import Busy, writer

ROOT = Path(__file__).parents[1]
RUNS, STEPS, EVERY = 30, 6, 2
UNEQUAL = ("time/", "perf/", "step_time", "memory/")
"""Metrics that no two runs share."""

REWARDS = """
import os, time

def mark(name):
    with open(os.path.join(os.environ["KILL_SOAK_MARKS"], name), "a") as file:
        file.write("x")

def digits(completions, **kwargs):
    mark("begins")
    time.sleep(0.02)  # a grader takes its time
    mark("ends")
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

def held(completions, **kwargs):
    mark("evaluation")
    return [float(len(set(text))) for text in completions]
"""
ALL = """
model = "{home}/model"
steps = {steps}
prompts_per_step = 3
out = "{out}"
lora = {{ rank = 4, alpha = 8 }}
eval = {{ rows = 4, every = {every}, rewards = ["{home}/rewards.py:held"] }}
checkpoint = {{ every = {every} }}
"""
SAMPLED = """
data = "{home}/prompts.jsonl"
rewards = ["{home}/rewards.py:digits"]
sampling = {{ group_size = 4, max_tokens = 6 }}
"""
RECORDED = """
data = "{home}/{algo}.jsonl"
sampling = {{ max_tokens = 6 }}
algo = "{algo}"
"""
KINDS = {
    "grpo": SAMPLED + "optim = {{ lr = 1e-2 }}\n",
    "updates": SAMPLED
    + "optim = {{ lr = 1e-2, minibatches = 3, passes = 2, warmup = 2 }}\nalgo = {{ name = 'grpo', kl_coef = 0.05 }}\n",
    "refill": SAMPLED
    + "optim = {{ lr = 1e-2, minibatches = 2 }}\ndynamic_sampling = {{ rounds = 2 }}\n"
    + "curriculum = {{ solved_share = 0.9, threshold = 0.9 }}\n",
    "dpo": RECORDED + "optim = {{ lr = 1e-2, minibatches = 2 }}\n",
    "kto": RECORDED + "optim = {{ lr = 1e-2, passes = 2 }}\n",
    "sft": RECORDED + "optim = {{ lr = 1e-2 }}\n",
}
"""Name -> its settings besides those that all share."""
RUN = ALL + KINDS["grpo"]


class Process(Protocol):
    """What is killed: subprocess.Popen, or anything with its `pid` and these three methods."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def kill(self) -> None:
        """SIGKILL."""
        ...

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        ...


def launch(args: list[str], marks: Path) -> Process:
    """`rlft ARGS...` in a separate process, as a user starts it; what it prints is added to marks/output."""
    env = {**os.environ, "KILL_SOAK_MARKS": str(marks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (marks / "output").open("ab") as output:
        command = [sys.executable, "-m", "rlft", *args]
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


SERVER = multiprocessing.get_context("forkserver")
"""Forks come from a process that has loaded everything."""


def command(args: list[str], marks: str) -> None:
    """`rlft ARGS...` in a fork: no ten seconds of imports per start."""
    os.environ |= {"KILL_SOAK_MARKS": marks}
    output = os.open(f"{marks}/output", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    from rlft.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(args))


class Fork:
    """A process of the fork server as `Run` wants it."""

    def __init__(self, args: list[str], marks: Path) -> None:
        SERVER.set_forkserver_preload(["rlft.cli.main", "rlft.trainer.loop"])
        self._process = SERVER.Process(target=command, args=(args, str(marks)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


class Run:
    """One run in a separate folder, with the marks that its rewards leave."""

    def __init__(
        self, home: Path, name: str, start: Callable[[list[str], Path], Process] = launch, kind: str = "grpo"
    ) -> None:
        """home: from `make_home`. start: how to start `rlft`. kind: one of KINDS."""
        self.out, self.marks, self._start = home / name, home / f"{name}-marks", start
        self._left: set[tuple[str, int]] = set()
        """Temporary files and folders that an earlier kill left."""
        self.marks.mkdir(exist_ok=True)
        self.file = home / f"{name}.toml"
        text = ALL + KINDS[kind]
        self.file.write_text(text.format(home=home, out=self.out, steps=STEPS, every=EVERY, algo=kind))
        self.hits: list[str] = []
        """What each kill that came in time hit."""

    def start(self, *flags: str) -> Any:
        """Start it, with --resume where there is something to resume; returns the process."""
        for mark in ("begins", "ends", "evaluation"):
            (self.marks / mark).unlink(missing_ok=True)
        self._left = self._temporary()
        return self._start(["train", str(self.file), *(["--resume"] if self.out.is_dir() else []), *flags], self.marks)

    def kill(self, moment: str, n: int, delay: float) -> bool:
        """Start it and kill it `delay` seconds after the n-th time that `moment` comes; False when it ended first."""
        process = self.start()
        while process.poll() is None and not MOMENTS[moment][0](self, n):
            time.sleep(0.001)
        time.sleep(delay)
        if process.poll() is not None:
            assert process.wait() == 0, self.output()
            return False
        if writer(self.out).startswith(f"process {process.pid} "):
            assert self.is_claimed() or process.poll() is not None
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not self.is_claimed()
        self.hits.append(self._hit(moment))
        return True

    def is_claimed(self) -> bool:
        """True while a process writes the folder."""
        try:
            with claim(self.out, if_exists="overwrite"):
                return False
        except Busy:
            return True
        except ConfigError:  # no run is there yet
            return False

    def rows(self) -> int:
        """How many rows of metrics there are."""
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def finish(self) -> None:
        """Start it and let it end."""
        code = self.start().wait()
        assert code == 0, f"exit code {code}\n{self.output()}"

    def output(self) -> str:
        """Everything its processes printed."""
        return (self.marks / "output").read_text()

    def count(self, mark: str) -> int:
        """How often the rewards of the process in question left a mark."""
        path = self.marks / mark
        return path.stat().st_size if path.exists() else 0

    def saving(self) -> bool:
        """True while a checkpoint is written, or an old one removed."""
        return any("checkpoints/" in name for name, _ in self._temporary() - self._left)

    def _temporary(self) -> set[tuple[str, int]]:
        found = set()
        for path in (*self.out.glob(".*"), *self.out.glob("*/.*")):
            with contextlib.suppress(FileNotFoundError):
                found.add((str(path), path.stat().st_ino))
        return found

    def done(self) -> bool:
        """True once the last checkpoint is complete."""
        return (self.out / "checkpoints" / f"step-{STEPS:06d}").exists()

    def orphans(self) -> list[str]:
        """Commands of processes of this run that are still alive two seconds from now."""
        until = time.monotonic() + 2
        while (found := _with_variable(f"KILL_SOAK_MARKS={self.marks}")) and time.monotonic() < until:
            time.sleep(0.02)
        return found

    def _hit(self, moment: str) -> str:
        """What the kill hit, from what it left: the moment asked for is only near where it fell."""
        if not (self.out / "config.toml").exists():
            return "loading, before there is a run"
        if self.saving():
            return "a checkpoint being written"
        if self._temporary() - self._left:
            return "another file being written"
        if self.count("begins") > self.count("ends"):
            return "a reward being computed"
        if self.done():
            return "after the last checkpoint"
        return f"{moment}{'' if any(self.out.glob('checkpoints/step-*')) else ', before the first checkpoint'}"


MOMENTS: dict[str, tuple[Callable[[Run, int], bool], float]] = {
    "start-up": (lambda run, n: True, 6.0),
    "first evaluation": (lambda run, n: run.count("evaluation") > 0, 0.05),
    "reward": (lambda run, n: run.count("begins") >= n, 0.022),
    "row": (lambda run, n: run.rows() > n, 0.03),
    "step": (lambda run, n: run.count("ends") >= n, 0.12),
    "evaluation": (lambda run, n: run.count("evaluation") > 1, 0.03),
    "checkpoint": (lambda run, n: run.saving(), 0.015),
    "end": (lambda run, n: run.done(), 0.06),
}
"""Name -> when its clock begins, and the longest delay after that, in seconds."""


SAMPLING = ("reward", "step")
"""Moments that only a run that samples has."""


def make_home(home: Path) -> None:
    """The model, the data and the rewards of all runs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_model, tiny_tokenizer

    tiny_model(seed=3).unload().save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    rows = [{"prompt": f"say {i}"} for i in range(24)]
    (home / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"say {i}", "chosen": f"{i} yes", "rejected": f"no {i} no"} for i in range(24)]
    (home / "dpo.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"say {i}", "completion": f"{i} yes {i * 7}", "label": i % 2 == 0} for i in range(24)]
    (home / "kto.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"say {i}", "completion": f"{i} yes {i * 7}"} for i in range(24)]
    (home / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "rewards.py").write_text(REWARDS)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished run folders besides times and rates; [] when they are equal."""
    import pyarrow.parquet as pq

    found = []
    rows, others = _metrics(one), _metrics(other)
    if rows != others:
        found.append(f"metrics.jsonl: {len(rows)} and {len(others)} rows")
    for pattern in ("checkpoints/*.json", "checkpoints/*/*", "rollouts/*", "evaluations/*"):
        names = [sorted(str(p.relative_to(out)) for p in out.glob(pattern)) for out in (one, other)]
        if names[0] != names[1]:
            found.append(f"{pattern}: {names[0]} and {names[1]}")
            continue
        for name in names[0]:
            if name.endswith("README.md"):
                same = _card(one / name) == _card(other / name)
            elif name.endswith(".parquet"):
                same = pq.ParquetFile(one / name).read().equals(pq.ParquetFile(other / name).read())
            else:
                same = (one / name).read_bytes() == (other / name).read_bytes()
            found += [] if same else [name]
    found += [f"{out}: no report" for out in (one, other) if not (out / "report.html").is_file()]
    return found


def _card(path: Path) -> str:
    """The model card without the name of its run, which is another one's where a run was copied from it."""
    text = re.sub(r'"[^"\n]+(?=/checkpoints/step-)', '"RUN', path.read_text())
    return re.sub(r"^# [\w.-]+$", "# RUN", text, count=1, flags=re.MULTILINE)


def _metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(UNEQUAL)} for row in rows]


def _with_variable(variable: str) -> list[str]:
    """Command lines of living processes that have this environment variable."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it ended while we looked
            continue
    return found


def soak(home: Path, seed: int, kind: str, undisturbed: Path, start: Callable[[list[str], Path], Process]) -> Run:
    """One run with one to three kills drawn by the seed. Raises AssertionError where it does not end equal."""
    rng = random.Random(seed)
    run = Run(home, f"run-{seed}", start, kind)
    # The first kill goes round all moments, the others are drawn.
    possible = [moment for moment in MOMENTS if moment not in SAMPLING or KINDS[kind].startswith(SAMPLED)]
    moments = [possible[seed % len(possible)], *rng.choices(possible, k=rng.randint(0, 2))]
    for moment in moments:
        if not run.kill(moment, rng.randint(1, STEPS), rng.uniform(0, MOMENTS[moment][1])):
            break
        assert not run.orphans(), run.orphans()
    run.finish()
    assert not run.orphans(), run.orphans()
    assert differences(undisturbed, run.out) == [], f"seed {seed}, killed at {run.hits}"
    return run


def main() -> None:
    from results_file import write

    start = Fork if "--fork" in sys.argv else launch
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_home(home)
        undisturbed = {kind: Run(home, f"undisturbed-{kind}", start, kind) for kind in KINDS}
        for run in undisturbed.values():
            run.finish()
        rows, hits = [], Counter()
        for seed in range(RUNS):
            began, kind = time.monotonic(), [*KINDS][seed % len(KINDS)]
            run = soak(home, seed, kind, undisturbed[kind].out, start)
            hits.update(run.hits)
            print(f"seed {seed}, {kind}: equal after {len(run.hits)} kills: {'; '.join(run.hits)}", flush=True)
            rows.append(
                {
                    "work": f"kill/{kind}/seed-{seed}",
                    "stack": "rlft",
                    "metric": "equal",
                    "value": 1,
                    "unit": "yes or no",
                    "note": f"killed {len(run.hits)} times: {'; '.join(run.hits) or 'it ended before the kill'}; "
                    f"{time.monotonic() - began:.0f} s",
                }
            )
        note = "kill -9, then --resume; equal in checkpoints, metrics but times, rollouts and evaluations; no orphans"
        total = [("runs", RUNS, "runs that ended equal", note), ("kills", sum(hits.values()), "kills", note)]
        total += [("kills", count, "kills", f"hit {what}") for what, count in hits.most_common()]
        summary = [
            {"work": "kill/all", "stack": "rlft", "metric": m, "value": v, "unit": u, "note": n} for m, v, u, n in total
        ]
        print(write("kill_soak", summary + rows))


if __name__ == "__main__":
    main()
