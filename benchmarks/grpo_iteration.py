"""One GRPO iteration of a large shape with its engine: sample with vLLM, train, hand over. Random NF4 weights, one GPU.

    python benchmarks/grpo_iteration.py --out DIR --commit HASH ballast24/grpo

`ballast24/grpo`: the 20B shape, 4 prompts of 512 tokens x 4 completions of 512, while all but 24 GiB of the card is
taken. `ballast48-70b/grpo`: the 70B shape, 2 sequences of 2,048 tokens behind one prompt of 1,536, all but 48 GiB
taken, `engine.mode` = "shared". `rollout-110k`: the whole 8B shape, one prompt of 102,400 tokens x 2 completions of
7,600, and the training step over the same sequences. Memory is read from the driver, since vLLM's does not go through
PyTorch's allocator.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

from longest import policy_of
from results_file import arguments, write
from rollout import prompts_of
from stacks import tokenizer_of
from timing import Watch, row

from rlft.algos.algorithm import build_algorithm
from rlft.batch import count, groups_of, pack
from rlft.config.data import Sampling
from rlft.config.run import Algo, Engine, Optim
from rlft.rollout.vllm.engine import VllmEngine
from rlft.trainer.optim import Optimizer
from rlft.trainer.parity import Mismatch
from rlft.types import PackPlan

GIB = 2**30
WORKS: dict[str, dict[str, Any]] = {
    "ballast24/grpo": {"shape": "20b", "prompts": 4, "group": 4, "prompt": 512, "completion": 512, "cap": 24},
    "ballast48-70b/grpo": {
        "shape": "70b",
        "prompts": 1,
        "group": 2,
        "prompt": 1536,
        "completion": 512,
        "cap": 48,
        "mode": "shared",
    },
    "rollout-110k": {"shape": "8b", "prompts": 1, "group": 2, "prompt": 102_400, "completion": 7_600, "cap": None},
}


def measure(work: str) -> list[dict[str, Any]]:
    how = WORKS[work]
    total = torch.cuda.get_device_properties(0).total_memory
    ballast = torch.empty(total - how["cap"] * GIB if how["cap"] else 0, dtype=torch.uint8, device="cuda")
    watch = Watch()
    seconds: dict[str, float] = {}
    policy = watch.phase("model", lambda: policy_of(how["shape"]), seconds)
    config: Any = policy.base.config
    config.max_position_embeddings = 131_072
    sequences = how["prompts"] * how["group"]
    longest = how["prompt"] + how["completion"]

    def start() -> VllmEngine:
        options = Engine("vllm", mode=how.get("mode", "auto"), max_seqs=sequences)
        return VllmEngine(
            policy, tokenizer_of(how["shape"]), options, longest, sequences, note=lambda t: print(t, flush=True)
        )

    engine = watch.phase("start", start, seconds)
    engine.load_adapter(policy.adapter(), 0)
    prompts = [
        replace(p, ids=tuple(i % (config.vocab_size - 10) + 5 for i in p.ids))
        for p in prompts_of(how["prompts"], 0, how["prompt"])
    ]
    sampling = Sampling(group_size=how["group"], max_tokens=how["completion"])
    rollouts = watch.phase("generate", lambda: engine.generate(prompts, sampling, (1, 0)), seconds)
    watch.phase("sleep", engine.sleep, seconds)
    algorithm, optimizer = build_algorithm(Algo("grpo"), 1), Optimizer(policy.adapter_params, Optim(lr=1e-5), 1)
    plan = PackPlan("token_mean", longest * how["group"], how["completion"], 1.0)
    groups = groups_of(rollouts, [1.0, -1.0] * (sequences // 2))
    mismatch = Mismatch()

    def train() -> None:
        policy.flat.zero_grad()
        for batch in pack(groups, plan, count(groups)):
            logprobs, _ = policy.logprobs(batch)
            mismatch.add(logprobs, batch)
            algorithm.loss(logprobs, batch.to(policy.device))[0].backward()
        assert not optimizer.step(0, 0).skipped

    watch.phase("train", train, seconds)
    ran = str(policy.fused.last_plan) if policy.fused else "not planned"
    watch.phase("wake", engine.wake, seconds)
    watch.phase("load", lambda: engine.load_adapter(policy.adapter(), 1), seconds)
    base = 0.0 if how["cap"] is None else ballast.numel() / GIB
    tokens = sum(len(r.completion_ids) for r in rollouts)
    note = f"{sequences} sequences of up to {longest} tokens, {tokens} sampled; {engine.choice}; training: {ran}"
    rows = [row(work, "rlft", f"{name}_seconds", value, "s", note) for name, value in seconds.items()]
    rows += [
        row(
            work, "rlft", f"{name}_GiB", value - base, "GiB", "in use on the card, as the driver says, less the ballast"
        )
        for name, value in watch.most.items()
    ]
    rows.append(row(work, "rlft", "mismatch_mean", mismatch.mean, "nat", f"over {mismatch.tokens} tokens"))
    for r in rows:
        print(r["work"], r["metric"], r["value"], r["note"], flush=True)
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("work", choices=WORKS)
    args = parser.parse_args()
    print(write(args.work.replace("/", "_").replace("-", "_"), measure(args.work), args.out, args.commit), flush=True)
    os._exit(0)  # threads that look at the card, and vLLM's
