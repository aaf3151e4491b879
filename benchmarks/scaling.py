"""The time of a step on 1 to 1,024 ranks, computed from times that were measured on one GPU and on this host.

    python benchmarks/scaling.py           # seconds

An arithmetic, not a measurement: it says what limits a run before the machines are there. An 8B model, groups of 8,
lengths from a log-normal distribution that is cut at 4,096 tokens. `strong`: 256 prompts per step, whatever the ranks.
`weak`: 32 prompts per rank. Per step

    sampling   the slowest rank: at most 256 sequences decode together, n of them take what was measured for n
    gather     rollouts of all ranks over the network, from the bytes of benchmarks/gather.py
    packing    on every rank, the whole step, from the time of benchmarks/gather.py
    training   micro-batches of 16,384 tokens, dealt out; tokens/s of the slab of 8 of 36 layers
    sum        of the adapter's fp32 gradient, 2 (W - 1) / W of its bytes through each link

`idle_share` is the part of all ranks' time in which they wait for another. A row's note names the longest part.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import gather
import numpy as np
from page_cells import newest, value
from results_file import write

from rlft import dist
from rlft.trainer.step import even_budget

GROUP, MEDIAN, SIGMA, LONGEST = 8, 700, 0.9, 4096
BUDGET, SHARE_OF_LAYERS, ADAPTER_BYTES = 16_384, 8 / 36, 175 * 2**20
RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
NETWORKS = {"NVLink": 150e9, "100 GbE": 10e9, "10 GbE": 1.1e9}
"""Bytes per second that one rank sends and receives at once."""
LATENCY = 30e-6
"""Seconds per stage of a collective between machines."""
MOST = 256
"""Sequences that an engine decodes at a time."""
STEPS = 5
"""Steps that a row is the mean of."""


@dataclass(frozen=True)
class Measured:
    """Times of one GPU and one host."""

    sequences: tuple[float, ...]
    decode: tuple[float, ...]
    """Seconds per token of all of as many sequences."""
    train: float
    """Tokens per second."""
    handover: float
    """Seconds for sleep, wake and the adapter."""
    gather_bytes: float
    """Bytes per token."""
    pack: float
    """Seconds per token."""

    @classmethod
    def read(cls) -> Measured:
        """Read them from the results files."""

        def of(name: str, work: str, metric: str) -> float:
            found = value(name, work, "rlft", metric)
            assert found is not None, f"no {metric} of {work} in {name}"
            return found

        sequences = (16, 64, 256)
        decode = [n / of("rollout", f"rollout-expanded/{n}", "tokens_per_s") for n in sequences]
        tokens = gather.GROUPS * gather.SIZE * gather.TOKENS
        return cls(
            sequences,
            tuple(decode),
            of("slab", "slab/8192", "tokens_per_s") * SHARE_OF_LAYERS,
            of("rollout", "handover/8b", "seconds"),
            of("gather", "ranks/1", "gather_bytes") / tokens,
            of("gather", "ranks/1", "pack_ms") / 1e3 / tokens,
        )

    def sampling(self, lengths: np.ndarray) -> float:
        """Return the seconds in which one engine decodes sequences of these lengths, `MOST` of them at a time."""
        waiting, ends, clock, seconds = lengths.tolist()[::-1], [], 0, 0.0
        while waiting or ends:
            while waiting and len(ends) < MOST:
                heapq.heappush(ends, clock + waiting.pop())
            active, end = len(ends), heapq.heappop(ends)
            seconds += (end - clock) * float(np.interp(active, self.sequences, self.decode))
            clock = end
        return seconds


@dataclass(frozen=True)
class Times:
    """Seconds of a step by part, and the seconds that ranks wait, summed over ranks."""

    sampling: float
    gather: float
    packing: float
    training: float
    sum: float
    handover: float
    waited: float

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return self.sampling + self.gather + self.packing + self.training + self.sum + self.handover


def simulate(measured: Measured, ranks: int, prompts: int, bandwidth: float, draw: np.random.Generator) -> Times:
    """Return the times of one step of `prompts` groups."""
    lengths = np.minimum(np.exp(draw.normal(math.log(MEDIAN), SIGMA, (prompts, GROUP))), LONGEST).astype(int) + 1
    sampling = [measured.sampling(lengths[share].reshape(-1)) for share in dist.shares(prompts, ranks)]
    tokens = int(lengths.sum())
    micro_batches_of = functools.partial(packed, lengths.reshape(-1))
    budget = even_budget(tokens, ranks, BUDGET, micro_batches_of) if ranks > 1 else BUDGET
    loads = dist.loads(micro_batches_of(budget), ranks)
    training = [load / measured.train for load in loads]
    stages = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    part = (ranks - 1) / ranks
    return Times(
        sampling=max(sampling),
        gather=stages * LATENCY + part * tokens * measured.gather_bytes / bandwidth,
        packing=tokens * measured.pack,
        training=max(training),
        sum=2 * (stages * LATENCY + part * ADAPTER_BYTES / bandwidth),
        handover=measured.handover,
        waited=sum(max(sampling) - own for own in sampling) + sum(max(training) - own for own in training),
    )


def packed(lengths: np.ndarray, budget: int) -> list[float]:
    """Return the tokens of micro-batches of at most `budget` tokens, rows in order, none cut."""
    sizes, now = [], 0
    for length in lengths.tolist():
        if now and now + length > budget:
            sizes.append(float(now))
            now = 0
        now += length
    return [*sizes, float(now)]


def longest(times: Sequence[Times]) -> str:
    """Return the part that takes longest."""
    parts = ("sampling", "training", "packing", "gather", "sum", "handover")
    return max(parts, key=lambda part: sum(getattr(time, part) for time in times))


def main() -> None:
    """Compute all rows and write them."""
    measured, rows = Measured.read(), []
    sources = ", ".join(newest(name)[0] for name in ("rollout", "slab", "gather"))
    for law, prompts_of in (("strong", lambda ranks: 256), ("weak", lambda ranks: 32 * ranks)):
        for network, bandwidth in NETWORKS.items():
            for ranks in RANKS:
                prompts = prompts_of(ranks)
                if ranks > prompts:
                    continue
                draw = np.random.default_rng(0)
                times = [simulate(measured, ranks, prompts, bandwidth, draw) for _ in range(STEPS)]
                step = sum(time.step for time in times) / STEPS
                idle = sum(time.waited for time in times) / STEPS / (ranks * step)
                work = f"{law}/{network}/{ranks}"
                note = f"{prompts} prompts, most of it {longest(times)}; computed from {sources}"
                row = {"work": work, "stack": "rlft", "note": note}
                rows.append(row | {"metric": "step_seconds", "value": round(step, 3), "unit": "s"})
                rows.append(row | {"metric": "idle_share", "value": round(idle, 4), "unit": "1"})
                for part in ("sampling", "training", "packing", "gather", "sum"):
                    mean = sum(getattr(time, part) for time in times) / STEPS
                    rows.append(row | {"metric": f"{part}_seconds", "value": round(mean, 4), "unit": "s"})
                print(f"{work:24} {step:8.2f} s  idle {idle:5.1%}  {longest(times)}")
    print(write("scaling", rows))


if __name__ == "__main__":
    main()
