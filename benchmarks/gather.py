"""What ranks cost the host: gathering a step's rollouts, and packing the whole step on every rank.

    python benchmarks/gather.py            # half a minute

A step of 256 completions of 1,113 tokens in 32 groups, on 1, 2 and 4 ranks of this machine over gloo. `gather_ms` is
the time of `rlft.trainer.sample.gathered` with nothing to sample, `gather_bytes` what one rank sends, `pack_ms` the
time to choose its micro-batches and pack all of it, which every rank does. Medians of rank 0.
"""

from __future__ import annotations

import pickle
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results_file import write

from rlft import dist
from rlft.batch import count, groups_of, pack
from rlft.rewards.parts import FunctionScores, RewardBreakdown
from rlft.trainer.sample import NO_PROMPT, gathered
from rlft.trainer.step import dealt_plan
from rlft.trainer.step_metrics import Clock
from rlft.types import FinishReason, PackPlan, Prompt, Rollout

GROUPS, SIZE, TOKENS, PROMPT, REPEATS = 32, 8, 1113, 256, 7
WORLDS = (1, 2, 4)


def step() -> list[Rollout]:
    """The completions of a step, with log-probs, in order."""
    draw = random.Random(0)
    rollouts = []
    for i in range(GROUPS):
        prompt = Prompt(tuple(range(PROMPT)), {"prompt": "x" * 800}, i)
        for sample in range(SIZE):
            ids = tuple(draw.randrange(128_000) for _ in range(TOKENS))
            logprobs = tuple(-draw.expovariate(2.0) for _ in range(TOKENS))
            text = "a word and " * 400
            rollouts.append(
                Rollout(prompt, ids, (True,) * TOKENS, logprobs, text, FinishReason.STOP, sample, 0, sample)
            )
    return rollouts


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(rank: int, world: int, folder: str) -> None:
    """One rank; the first writes its rows."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/s", rank=rank, world_size=world)
    rollouts = step()
    prompts = list({id(rollout.prompt): rollout.prompt for rollout in rollouts}.values())
    own = rollouts[dist.share(GROUPS).start * SIZE : dist.share(GROUPS).stop * SIZE]
    rewards = torch.ones(len(own))

    def sampled() -> tuple[list[Rollout], RewardBreakdown]:
        scores = {"correct": FunctionScores(rewards.tolist(), [False] * len(own))}
        return own, RewardBreakdown(rewards, rewards, scores)

    gather_ms = milliseconds(lambda: gathered(sampled, prompts, Clock()))
    sent = len(pickle.dumps([replace(rollout, prompt=NO_PROMPT) for rollout in own]))
    plan = PackPlan("token_mean", 16_384, TOKENS, 1.0)
    groups = groups_of(rollouts, [1.0] * len(rollouts))
    pack_ms = milliseconds(lambda: pack(groups, dealt_plan(plan, groups), count(groups)))
    if rank == 0:
        values = {"gather_ms": (gather_ms, "ms"), "gather_bytes": (sent, "bytes"), "pack_ms": (pack_ms, "ms")}
        rows = [
            {"work": f"ranks/{world}", "stack": "rlft", "metric": name, "value": round(value, 2), "unit": unit}
            for name, (value, unit) in values.items()
        ]
        torch.save(rows, f"{folder}/rows")


def main() -> None:
    """Measure each number of ranks in turn."""
    rows: list[dict[str, Any]] = []
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(measure, (world, folder), nprocs=world, start_method="spawn")
            rows += torch.load(Path(folder) / "rows")
    note = f"{GROUPS} groups of {SIZE} completions of {TOKENS} tokens; median of {REPEATS}; a thread per rank"
    for row in rows:
        print(row)
    print(write("gather", [row | {"note": note} for row in rows]))


if __name__ == "__main__":
    main()
