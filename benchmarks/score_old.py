"""What old log-probs cost: a GRPO step of two mini-batches, and its scoring alone, over the recorded rollouts.

    python benchmarks/score_old.py --out DIR --commit HASH [--stack NAME]

grpo-step/lognormal of `peers/recorded.py` on 8 of Qwen3-8B's 36 layers in NF4: the step is score, forward, loss,
backward and update of both mini-batches. Also runs on a checkout before `Policy.planned`, beside this one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

import stacks
from recorded import WORKS, rollouts_of
from results_file import arguments, write
from timing import row

from rlft.algos.algorithm import build_algorithm
from rlft.batch import count, groups_of, pack
from rlft.config.run import Algo, Lora, Optim
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.trainer.optim import Optimizer
from rlft.types import Batch, PackPlan

WORK, REPEATS = "grpo-step/lognormal", 7


def minibatches(policy: Policy) -> list[list[Batch]]:
    """The step's rollouts in two parts, packed as a run packs them."""
    rollouts, parts = rollouts_of(WORKS[WORK], "slab"), []
    half = len(rollouts) // 2
    for some in (rollouts[:half], rollouts[half:]):
        plan = PackPlan("token_mean", policy.token_budget(), 32_768, 1.0)
        groups = groups_of(some, [1.0 - 2.0 * rollout.recorded_reward for rollout in some])
        parts.append(pack(groups, plan, count(groups)))
    return parts


def measure(stack: str) -> list[dict[str, Any]]:
    """Rows of the step and of its scoring, in seconds by events over warm repeats."""
    policy = Policy(attach_lora(stacks.random_nf4("slab"), Lora(rank=16, alpha=32), seed=1))
    algorithm, optimizer = (
        build_algorithm(Algo("grpo"), 2),
        Optimizer(policy.adapter_params, Optim(lr=1e-9, minibatches=2), 1000),
    )
    parts = minibatches(policy)
    planned = getattr(policy, "planned", lambda batch: batch)
    seconds: dict[str, list[float]] = {"score": [], "step": []}
    for _ in range(REPEATS + 3):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        ready = [[replace(b, old_logprobs=policy.score(b)) for b in map(planned, part)] for part in parts]
        marks[1].record()
        for part in ready:
            policy.flat.zero_grad()
            for batch in part:
                logprobs, entropy = policy.logprobs(batch)
                here = replace(batch.to("cuda"), entropy=entropy)
                algorithm.loss(logprobs, here)[0].backward()
            assert not optimizer.step(0, 0).skipped
        marks[2].record()
        torch.cuda.synchronize()
        seconds["score"].append(marks[0].elapsed_time(marks[1]) / 1e3)
        seconds["step"].append(marks[0].elapsed_time(marks[2]) / 1e3)
    sizes = [len(b.input_ids) for part in parts for b in part]
    note = f"micro-batches of {', '.join(map(str, sizes))} tokens"
    rows = [row(f"{WORK}/2-minibatches", stack, name, times[3:], "s", note) for name, times in seconds.items()]
    for r in rows:
        print(r["stack"], r["metric"], r["value"], r["note"], flush=True)
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--stack", default="rlft")
    args = parser.parse_args()
    print(write(f"score_old_{args.stack}".replace("_rlft", ""), measure(args.stack), args.out, args.commit))
