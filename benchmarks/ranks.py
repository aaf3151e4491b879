"""A step of the whole Qwen3-8B shape on the ranks that torchrun starts: the same global batch on 1, 2, ... GPUs.

    torchrun --nproc-per-node 2 benchmarks/ranks.py --out DIR --commit HASH train
    torchrun --nproc-per-node 2 benchmarks/ranks.py --out DIR --commit HASH iteration

`train`: the training phase (advantages, packing, passes, the sum of gradients, the update) over 128 recorded rollouts
of a mean of 1,113 tokens, in 16 groups; and the sum of the gradient alone. `iteration`: 32 prompts of 256 tokens, 8
completions of 512 each, sampled by a vLLM engine per rank, trained and handed over; the first is not counted. Random
NF4 weights, LoRA r 16, `rlft.trainer.loop.loop`. Times are the lead's; the file has the number of ranks in its name.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

import stacks
from place import policy_at, synchronize
from recorded import Work, rollouts_of, session_of
from results_file import arguments, write
from timing import row

from rlft import dist
from rlft.config.data import Data, Sampling
from rlft.config.run import Algo, Config, Engine, Lora, Optim
from rlft.rewards.score import build_rewards
from rlft.trainer.loop import loop
from rlft.types import Prompt, Rollout

GROUP, SEEDS, STEPS = 8, (0, 1), 4
PROMPTS, PROMPT, COMPLETION = 32, 256, 512


class Replayed:
    """An engine that returns the recorded rollouts of the prompts that it is given."""

    SAMPLES = True
    memory: dict[str, int] = {}  # noqa: RUF012 (nobody writes to it)

    def __init__(self, groups: list[list[Rollout]]) -> None:
        self._groups, self._version = groups, 0

    def generate(self, prompts: list[Prompt], *args: Any, **kwargs: Any) -> list[Rollout]:
        return [
            replace(rollout, prompt=prompt, policy_version=self._version)
            for prompt in prompts
            for rollout in self._groups[prompt.index]
        ]

    def load_adapter(self, tensors: Any, version: int) -> None:
        self._version = version

    def sleep(self) -> None:
        """Wait for all ranks, so that the training phase begins on all of them at once."""
        synchronize()
        dist.gather(None)

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to free."""


def config(shape: str, prompts: int, **more: Any) -> Config:
    return Config(
        shape,
        Data("recorded"),
        tempfile.mkdtemp(),
        prompts_per_step=prompts,
        lora=Lora(rank=16, alpha=32),
        optim=Optim(lr=1e-6),
        **more,
    )


def recorded_groups(shape: str) -> list[list[Rollout]]:
    """Groups of recorded rollouts; each prompt has the number of its group."""
    groups = []
    for seed in SEEDS:
        found = rollouts_of(Work("grpo", 256, GROUP, seed=seed), shape)
        for i in range(0, len(found), GROUP):
            prompt = replace(found[i].prompt, index=len(groups))
            groups.append([replace(rollout, prompt=prompt) for rollout in found[i : i + GROUP]])
    return groups


def train(shape: str) -> list[dict[str, Any]]:
    """Rows of the training phase."""
    groups = recorded_groups(shape)
    cfg = config(
        shape,
        len(groups),
        steps=STEPS,
        algo=Algo("grpo", {"correction": "none"}),
        sampling=Sampling(group_size=GROUP, max_tokens=32_768),
    )
    seconds: list[float] = []
    norms: list[float] = []

    def logged(state: Any, values: dict[str, float]) -> None:
        seconds.append(values["time/train"])
        norms.append(values["grad_norm"])

    policy, prompts = policy_at(shape, "device"), [group[0].prompt for group in groups]
    session = session_of(cfg, prompts, policy, Replayed(groups), stacks.tokenizer_of(shape), callbacks=[logged])
    loop(session)
    tokens = sum(len(r.completion_ids) + len(r.prompt.ids) / GROUP for group in groups for r in group)
    work = f"ranks/{shape}/{dist.world()}"
    plan = policy.fused.last_plan if policy.fused is not None else "not planned"
    note = f"{len(groups) * GROUP} rollouts, {tokens:.0f} tokens, a prompt counted once; gradient norm {norms[0]:.5g}"
    rows = [row(work, "rlft", "train_seconds", seconds[1:], "s", f"{note}; {plan}")]
    gradient = torch.zeros_like(policy.flat.gradient)
    times = []
    for _ in range(20):
        synchronize()
        dist.gather(None)
        begin = time.perf_counter()
        dist.sum_tensor(gradient)
        synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    size = gradient.numel() * gradient.element_size() / 2**20
    rows.append(row(work, "rlft", "sum_ms", times[2:], "ms", f"of {size:.0f} MiB"))
    return rows


def iteration(shape: str) -> list[dict[str, Any]]:
    """Rows of the whole iteration with vLLM."""
    from iteration import POSITIONS, alternate

    from rlft.rollout.vllm.engine import VllmEngine

    length = COMPLETION if shape != "tiny" else 16
    cfg = config(
        shape,
        PROMPTS,
        steps=STEPS,
        sampling=Sampling(group_size=GROUP, max_tokens=length),
        engine=Engine("vllm", max_seqs=PROMPTS * GROUP // dist.world()),
    )
    policy, tokenizer = policy_at(shape, "device"), stacks.tokenizer_of(shape)
    policy.base.config.max_position_embeddings = POSITIONS  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(0)
    most = min(150_000, stacks.SHAPES[shape]["vocab_size"])
    ids = [tuple(torch.randint(10, most, (PROMPT,), generator=draw).tolist()) for _ in range(PROMPTS)]
    begin = time.perf_counter()
    engine = VllmEngine(
        policy, tokenizer, cfg.engine, PROMPT + length, cfg.engine.max_seqs, note=lambda text: print(text, flush=True)
    )
    started = time.perf_counter() - begin
    print(f"engine of rank {dist.rank()} up in {started:.0f} s", flush=True)
    found: dict[str, list[float]] = {}

    def logged(state: Any, values: dict[str, float]) -> None:
        for name, value in values.items():
            if name.startswith("time/") or name == "step_time":
                found.setdefault(name, []).append(value)
        print({name: round(values[0], 2) for name, values in found.items()}, flush=True)

    prompts = [Prompt(own, {}, i) for i, own in enumerate(ids)]
    session = session_of(
        cfg, prompts, policy, engine, tokenizer, functions=build_rewards([alternate]), callbacks=[logged]
    )
    loop(session)
    work = f"ranks-iteration/{shape}/{dist.world()}"
    note = f"{PROMPTS * GROUP} completions of {length} tokens; {engine.choice}"
    rows = [row(work, "rlft", "start_seconds", started, "s", "vLLM's start")]
    for name, values in found.items():
        metric = name.removeprefix("time/").removesuffix("_time") + "_seconds"
        rows.append(row(work, "rlft", metric, values[1:], "s", note))
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("works", nargs="+", choices=("train", "iteration"))
    parser.add_argument("--shape", choices=stacks.SHAPES, default="8b")
    args = parser.parse_args()
    with dist.started(300.0):
        for work in args.works:
            rows = {"train": train, "iteration": iteration}[work](args.shape)
            if dist.lead():
                print(*(f"{r['work']} {r['metric']} {r['value']} {r['note']}" for r in rows), sep="\n")
                print(write(f"ranks_{work}_{dist.world()}", rows, args.out, args.commit), flush=True)
        dist.gather(None)
        if "iteration" in args.works:
            os._exit(0)  # threads of vLLM
