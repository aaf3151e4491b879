"""One optimiser step over the same recorded rollouts by several stacks side by side, on one GPU.

    python benchmarks/peers/recorded_step.py grpo-step/lognormal grpo-step/lognormal-p1024 --out DIR --commit HASH

`recorded.py` says what each stack runs and what is measured.

First trl, unsloth and rlft in turn, a process each, all kept alive; then rlft again, in turn, a few minutes later: held
to the memory that each of the others took, and slowed down a part at a time, so that its ratio can be told apart:

    rlft-no-prefix   every row has its own prompt
    rlft-one-row     and every row is a micro-batch
    rlft-padded      instead of that: rows as long as the longest, in micro-batches of 8, as TRL has them

`--stacks` may also name trl-tuned and unsloth-rows. Each stack gives its cached memory back before another one works;
steps under 10 s are therefore run three times and the third is measured. `--fa4 PATHS` is put before PYTHONPATH for
rlft and trl-tuned, `--unsloth PATH` for Unsloth. A stack that fails is a row "failed" with what it said. One results
file per work, written after every round.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from results_file import arguments, write
from timing import row
from workers import Desk, Worker

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]
SHORT = 10.0
"""Seconds; a longer step is not held up by getting its memory back."""
TIMEOUT = 240.0
"""Seconds for one answer, loading included; also what ends a trainer that samples by itself."""
FEW = {"grpo-step/outlier": 2}
"""Repeats where three would take too long."""
TRIES = 4
"""Budgets that are tried until a peak is as high as it may be."""


def worker(stack: str, kind: str, shape: str) -> None:
    """Run a stack until there are no more questions; what it raises is its answer."""
    import recorded

    desk = Desk()
    with desk.failures():
        recorded.STACKS[stack](kind, shape, desk)


class Found:
    """What a stack answered for a work."""

    def __init__(self, stack: str) -> None:
        self.stack = stack
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.note = self.error = ""
        self.limit: float | None = None
        """GiB that the peak is not to be above."""
        self.base = 0.0
        """GiB of the loaded model with its adapter."""

    def add(self, answer: dict[str, Any]) -> None:
        self.seconds.append(answer["seconds"])
        self.peaks.append(answer["peak"])
        self.base = answer["base"]
        last = "".join(f"; {name} {value:.4g}" for name, value in answer["last"].items())
        self.note = answer.get("note", "") + (f"{last} in the step before" if last else "")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> float:
        return max(self.peaks)

    @property
    def held(self) -> bool:
        """Whether the peak is no higher than it may be."""
        return self.limit is None or self.peak <= self.limit

    def rows(self, work: str, tokens: int) -> Rows:
        if not self.seconds:
            return [row(work, self.stack, "failed", 1.0, "", self.error[:400])]
        over = "" if self.held else f"; ABOVE the {self.limit:.2f} GiB that it was to be held to"
        failed = f"; failed later: {self.error[:200]}" if self.error else ""
        where = f"above the loaded model with its adapter, {self.base:.2f} GiB{over}"
        real = "real tokens, a prompt counted with each of its completions"
        made = [
            row(work, self.stack, "seconds", self.seconds, "s", f"{self.note.strip('; ')}{failed}"),
            row(work, self.stack, "peak_GiB", self.peak, "GiB", where),
            row(work, self.stack, "tokens_per_s", [tokens / s for s in self.seconds], "tokens/s", real),
        ]
        return made


def measured(worker: Worker, **question: Any) -> dict[str, Any]:
    """The answer for a step; for short ones, that of the third: the first gets its memory back, and rlft captures in
    the second what it runs in CUDA graphs after another budget."""
    for _ in range(3):
        answer = worker.ask(TIMEOUT, **question)
        if "error" in answer or answer["seconds"] >= SHORT:
            break
    worker.ask(release=True)
    return answer


Asked = tuple[Found, Worker, dict[str, Any]]


def in_turn(asked: list[Asked], repeats: int, save: Callable[[], Rows]) -> None:
    """One answer of each that is not kept, and then `repeats` rounds; `save` after each."""
    for turn in range(1 + repeats):
        for found, worker, question in asked:
            if found.error:
                continue
            answer = measured(worker, **question)
            found.error = answer.get("error", "")
            print(
                f"  round {turn}: {found.stack}",
                *(f"{answer[k]:.3f}" for k in ("seconds", "peak") if k in answer),
                found.error or answer.get("note", ""),
                flush=True,
            )
            if turn and not found.error:
                found.add(answer)
        if turn:
            save()


def budgeted(found: Found, worker: Worker, work: str, limit: float) -> Asked:
    """The question that keeps rlft's peak within `limit` GiB and next to it: plans leave a margin, and foresee a little
    more or less than is taken."""
    found.limit = asked = limit
    good = before = 0.0
    for _ in range(TRIES):
        answer = worker.ask(TIMEOUT, work=work, peak=asked)
        if answer.get("error"):
            break
        left = limit - answer["peak"]
        if left >= 0:
            good = max(good, asked)
            if left < limit / 32 or answer["peak"] == before:
                break
        before = answer["peak"]
        asked += 0.9 * left if left >= 0 else left - 64 / 1024
    return found, worker, {"work": work, "peak": good or asked}


def variants(work: str, worker: Worker, peers: list[Found], tokens: int, skip: list[str]) -> list[Asked]:
    """rlft at the others' memory, and with a part of it switched off; the one that takes most memory last. skip: names
    that no budget is looked for."""
    asked = [
        budgeted(Found(f"rlft-at-{peer.stack}-memory"), worker, work, peer.peak)
        for peer in peers
        if peer.seconds and peer.peak and f"rlft-at-{peer.stack}-memory" not in skip
    ]
    if not work.startswith("sft"):
        asked.append((Found("rlft-no-prefix"), worker, {"work": work, "share": False}))
    if work.startswith("dpo"):
        return asked  # a pair stays in one micro-batch
    asked.append((Found("rlft-one-row"), worker, {"work": work, "share": False, "tokens": 1}))
    if work.startswith("grpo"):
        padded = {"work": work, "share": False, "padded": True, "tokens": tokens}
        asked.append((Found("rlft-padded"), worker, padded))
    return asked


def split(work: str, found: dict[str, Found]) -> Rows:
    """How many times faster rlft is than each of the others, at the others' memory and at its own choice; and what of
    the ratio to TRL is the same padded rows ("kernels": with attention, recomputing and the host's part), packing, and
    prefix."""
    parts = {
        "times_kernels": ("trl", "rlft-padded"),
        "times_packing": ("rlft-padded", "rlft-no-prefix"),
        "times_prefix": ("rlft-no-prefix", "rlft"),
    }
    for peer in (name for name in found if not name.startswith("rlft")):
        parts |= {f"times_{peer}": (peer, "rlft"), f"times_{peer}_at_its_memory": (peer, f"rlft-at-{peer}-memory")}
    made = []
    for metric, (slow, fast) in parts.items():
        if all(name in found and found[name].seconds and found[name].held for name in (slow, fast)):
            ratio = found[slow].median / found[fast].median
            made.append(row(work, "rlft", metric, ratio, "times", f"seconds of {slow} / seconds of {fast}"))
    return made


def measure(
    work: str, shape: str, workers: dict[str, Worker], repeats: int, skip: list[str], save: Callable[[Rows], None]
) -> None:
    """save: called with the rows that there are."""
    import recorded

    data = recorded.recorded(recorded.WORKS[work], shape)
    longest = max(map(len, data.completions))
    note = f"{len(data.completions)} rollouts, longest completion {longest}; padded to that {data.padded}"
    about = [row(work, "data", "tokens", float(data.tokens), "tokens", note)]
    print(work, about[0]["value"], note, flush=True)
    asked: list[Asked] = [(Found(stack), worker, {"work": work}) for stack, worker in workers.items()]

    def saved() -> Rows:
        all_ = [found for found, *_ in asked if found.seconds or found.error]
        rows = about + [r for found in all_ for r in found.rows(work, data.tokens)]
        rows += split(work, {found.stack: found for found in all_})
        save(rows)
        return rows

    in_turn(asked, repeats, saved)
    if "rlft" in workers and not workers["rlft"].error:
        peers = [found for found, *_ in asked if found.stack != "rlft"]
        micro = recorded.MICRO["grpo"] * data.padded // len(data.completions)
        more = [each for each in variants(work, workers["rlft"], peers, micro, skip) if each[0].stack not in skip]
        asked += more
        # Padded rows apart, and once: they may run out of memory, and the process with them.
        in_turn([each for each in more if each[0].stack != "rlft-padded"], repeats, saved)
        in_turn([each for each in more if each[0].stack == "rlft-padded"], 1, saved)
    for r in saved():
        print(work, r["stack"], r["metric"], r["value"], r["note"], flush=True)


def main() -> None:
    import recorded

    parser = arguments(__doc__)
    parser.add_argument("--fa4", default="")
    parser.add_argument("--unsloth", default="")
    parser.add_argument("--stacks", nargs="+", choices=recorded.STACKS, default=["trl", "unsloth", "rlft"])
    parser.add_argument("--repeats", type=int, help="3 by default, 2 for the outlier")
    parser.add_argument("--skip", nargs="+", default=[], help="of rlft's further runs, such as rlft-padded")
    parser.add_argument("--shape", default="slab", help="tiny to try it on a CPU; lfm2, qwen3_5 are hybrids")
    parser.add_argument("works", nargs="+", choices=recorded.WORKS)
    args = parser.parse_args()
    make = f"import sys; sys.path.insert(0, {str(HERE)!r}); import stacks; stacks.make({args.shape!r})"
    subprocess.run([sys.executable, "-c", make], check=True)
    paths = {"rlft": args.fa4, "trl-tuned": args.fa4, "unsloth": args.unsloth, "unsloth-rows": args.unsloth}
    for kind in dict.fromkeys(recorded.WORKS[work].kind for work in args.works):
        workers = {
            stack: Worker(stack, [__file__, "--worker", stack, kind, args.shape], paths.get(stack, ""))
            for stack in args.stacks
        }
        for work in (work for work in args.works if recorded.WORKS[work].kind == kind):
            of = "" if args.shape == "slab" else f"_{args.shape}"

            def save(rows: Rows, name: str = work.replace("/", "_").replace("-", "_") + of) -> None:
                write(name, rows, args.out, args.commit)

            measure(work, args.shape, workers, args.repeats or FEW.get(work, 3), args.skip, save)
        for each in workers.values():
            each.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:5])
    else:
        main()
