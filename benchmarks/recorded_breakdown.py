"""Where the time of rlft's step over recorded rollouts goes: device time by kind of kernel, each floor, what is idle.

    python benchmarks/recorded_breakdown.py --out DIR --commit HASH grpo-step/lognormal

The step is that of `peers/recorded_step.py`: `rlft.trainer.loop.loop` from the return of `engine.generate` to the
hand-over, on 8 of Qwen3-8B's 36 layers. `slab_breakdown.py` says where the floors are from. "ends" is from the
rollouts' arrival to the first kernel and from the last one to the hand-over, "gaps" are pauses of the device between
two kernels of more than 0.1 ms; both are part of "idle".
`--peaks` and `--tokens` hold the step to memory and to sizes of micro-batches, in all combinations; `--trace` writes
the steps as Chrome traces, with the host's side.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

import recorded
import stacks
from results_file import arguments, write
from slab_breakdown import floors, parts
from timing import row
from workers import Desk

WARMUP, REPEATS = 3, 5
GAP = 100.0
"""Microseconds."""


class Finished(Exception):
    """All that was asked for is measured."""


class Profiled(Desk):
    """A desk that asks itself: each work is run to warm up, then timed, then profiled."""

    def __init__(self, questions: list[dict[str, Any]], trace: Path | None) -> None:
        super().__init__()
        self._asked = [(q, turn) for q in questions for turn in range(WARMUP + REPEATS + 1)]
        self._trace = trace
        self._turn, self._profile, self._times = 0, None, [0.0]
        self.rows: list[dict[str, Any]] = []

    def wait(self) -> dict[str, Any]:
        if not self._asked:
            raise Finished
        self.question, self._turn = self._asked.pop(0)
        return self.question

    def start(self) -> None:
        torch.cuda.synchronize()
        if self._turn < WARMUP:
            self._times = []
        if self._turn == WARMUP + REPEATS:
            kinds = [ProfilerActivity.CUDA] + [ProfilerActivity.CPU] * bool(self._trace)
            self._profile = profile(activities=kinds)
            self._profile.start()
        super().start()

    def answer(self, **answer: Any) -> None:
        """What `stop` hands in is kept here."""
        ms, peak, note = answer["seconds"] * 1e3, answer["peak"], answer["note"]
        if self._turn < WARMUP + REPEATS:
            self._times += [ms] * (self._turn >= WARMUP)
            return
        assert self._profile is not None
        self._profile.stop()
        limits = (("GiB", self.question["peak"]), ("tokens", self.question["tokens"]))
        name = "/".join([self.question["work"], *(f"{n:g}-{unit}" for unit, n in limits if n is not None)])
        self.rows += parts(name, self._times, self._profile, f"{note}; peak {peak:.2f} GiB", self._floors(note))
        self.rows += self._pauses(name, ms)
        if self._trace:
            self._profile.export_chrome_trace(str(self._trace / f"{name.replace('/', '_')}.json.gz"))

    def _floors(self, note: str) -> dict[str, float]:
        """Every prompt once, however the step ran them."""
        work = recorded.WORKS[self.question["work"]]
        data = recorded.recorded(work, "slab")
        prompts, completions = [len(ids) for ids in data.prompts], [len(ids) for ids in data.completions]
        pairs = sum(p * p / 2 for p in prompts)
        pairs += sum(n * prompts[i // work.group] + n * n / 2 for i, n in enumerate(completions))
        return floors(sum(prompts) + sum(completions), pairs, sum(completions), "shadow" in note)

    def _pauses(self, name: str, ms: float) -> list[dict[str, Any]]:
        assert self._profile is not None
        device = torch.autograd.DeviceType.CUDA
        events = (e for e in self._profile.events() if e.device_type == device and not e.is_user_annotation)
        ran = sorted((e.time_range.start, e.time_range.end) for e in events)
        gaps, end = [], ran[0][1]
        for begin, until in ran[1:]:
            gaps += [begin - end] * (begin - end > GAP)
            end = max(end, until)
        ends = ms - (end - ran[0][0]) / 1e3
        made = [
            row(f"{name}/ends", "rlft", "ms", ends, "ms", f"of {ms:.1f} under the profiler; {len(ran)} launches"),
            row(
                f"{name}/gaps",
                "rlft",
                "ms",
                sum(gaps) / 1e3,
                "ms",
                f"{len(gaps)} of more than {GAP / 1e3} ms, the longest {max(gaps, default=0.0) / 1e3:.2f}",
            ),
        ]
        for r in made:
            print(r["work"], r["value"], r["note"], flush=True)
        return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peaks", type=float, nargs="*", default=[None], help="GiB above the model")
    parser.add_argument("--tokens", type=int, nargs="*", default=[None], help="tokens per micro-batch")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("works", nargs="+", choices=recorded.WORKS)
    args = parser.parse_args()
    kinds = {recorded.WORKS[work].kind for work in args.works}
    if len(kinds) > 1:
        parser.error(f"works of one kind, not of {kinds}: the model is loaded for it")
    stacks.make("slab")
    asked = itertools.product(args.works, args.peaks, args.tokens)
    questions = [{"work": work, "peak": peak, "tokens": tokens} for work, peak, tokens in asked]
    desk = Profiled(questions, args.out if args.trace else None)
    with contextlib.suppress(Finished):
        recorded.rlft(*kinds, "slab", desk)
    print(write("recorded_breakdown", desk.rows, args.out, args.commit), flush=True)
    os._exit(0)  # the run was left in the middle of a step, with its threads


if __name__ == "__main__":
    main()
