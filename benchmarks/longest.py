"""The longest single training step of the whole Qwen3-8B shape in NF4 on one GPU, and the 20B shape under 24 GiB.

    python benchmarks/longest.py --out DIR --commit HASH sft:430000 grpo:200000 ballast24:4096

One step each, no warm-up, random weights made on the spot: attention alone takes minutes at these lengths. `sft:T` is
one sequence of T tokens; `grpo:R` two completions of R tokens behind a prompt of 1,024, with 1.2 GiB set aside for a
sleeping engine; `ballast24:T` is T tokens of the 20B shape while all but 24 GiB of the card is taken; `sft70b:T` and
`ballast48:T` are T tokens of the 70B shape on the whole card and while all but 48 GiB is taken, two steps each below
65,536 tokens: the first registers host memory and compiles. `--engine` puts a sleeping vLLM engine on the base beside
the training.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

import stacks
from results_file import arguments, write
from timing import row

from rlft.algos.algorithm import build_algorithm
from rlft.config.run import Algo, Lora, Optim
from rlft.models.allocator import segments
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.trainer.optim import Optimizer

GIB = 2**30
ASLEEP = 1.2
SHAPES = {"ballast24": ("20b", 24), "sft70b": ("70b", None), "ballast48": ("70b", 48)}
"""Shape of a work, and GiB of the card that are left to it; the 8B shape on all of it for the others."""


def step(policy: Policy, batch: Any, loss: Any) -> dict[str, Any]:
    """Seconds, peak and host memory of one step with its update."""
    optimizer = Optimizer(policy.adapter_params, Optim(lr=1e-5), 1)
    fused = policy.fused
    assert fused is not None
    fused.store.release()  # it is in the plan
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved, start = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), time.perf_counter()
    policy.flat.zero_grad()
    logprobs, _ = policy.logprobs(batch)
    loss(logprobs, batch.to("cuda")).backward()
    update = optimizer.step(0, 0)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert not update.skipped, update
    return {
        "seconds": seconds,
        "peak": (torch.cuda.max_memory_allocated() - before) / GIB,
        "norm": update.grad_norm,
        "model": before / GIB,
        "plan": str(fused.last_plan),
        "planned": fused.last_plan.peak / GIB if fused.last_plan else 0,
        "host": fused.offload.bytes / GIB,
        "driver": in_use() / GIB,
        "driver_step": (torch.cuda.max_memory_reserved() - reserved) / GIB,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def in_use() -> int:
    """Bytes of the card that are in use, as the driver says."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def policy_of(shape: str, place: Any = "device") -> Policy:
    """A policy over random weights at `place`, with an adapter that is not zero."""
    model = attach_lora(stacks.random_nf4(shape), Lora(rank=16, alpha=32), seed=1)
    policy = Policy(model, place=place)
    with torch.no_grad():
        for name, tensor in policy.adapter().items():
            if ".lora_B." in name:
                tensor.normal_(std=1e-3)
    torch.cuda.empty_cache()
    return policy


def sft(logprobs: torch.Tensor, batch: Any) -> torch.Tensor:
    return -(logprobs * batch.weight).sum()


def asleep_engine(policy: Policy, shape: str) -> Any:
    """A vLLM engine that computes from the policy's base, woken once and put to sleep."""
    from stacks import tokenizer_of

    from rlft.config.run import Engine
    from rlft.rollout.vllm.engine import VllmEngine

    options = Engine("vllm", mode="shared", max_seqs=2, graphs=False, kv_gib=2.0)
    engine = VllmEngine(policy, tokenizer_of(shape), options, 2048, 2, note=lambda text: print(text, flush=True))
    engine.load_adapter(policy.adapter(), 0)
    engine.sleep()
    engine.wake()
    engine.sleep()
    return engine


def measure(work: str, tokens: int, policy: Policy) -> list[dict[str, Any]]:
    vocab = policy.base.config.vocab_size - 10  # type: ignore[operator,union-attr]
    if work == "grpo":
        algorithm = build_algorithm(Algo("grpo"), 1)
        prompt = torch.randint(10, vocab, (1024,)).tolist()
        sequences = [prompt + torch.randint(10, vocab, (tokens,)).tolist() for _ in range(2)]
        batch, kept = stacks.batch_of(sequences, 1024, [1.0, -1.0], sampled=True), int(ASLEEP * GIB)

        def loss(logprobs: torch.Tensor, batch: Any) -> torch.Tensor:
            return algorithm.loss(logprobs, batch)[0]
    else:
        batch, kept, loss = stacks.batch_of([torch.randint(10, vocab, (tokens,)).tolist()]), 0, sft
    aside = torch.empty(kept, dtype=torch.uint8, device="cuda")
    first = step(policy, batch, loss) if SHAPES.get(work, ("",))[0] == "70b" and tokens < 65536 else None
    got = step(policy, batch, loss)
    del aside
    print(work, tokens, first and first["seconds"], got, flush=True)
    name = f"longest/{work}" if work in ("sft", "grpo") else f"{work}/sft"
    note = f"{got['seconds']:.1f} s for the step; {got['plan']}; gradient norm {got['norm']:.3g}"
    if work == "grpo":
        note += f"; two completions of so many tokens, {ASLEEP} GiB set aside for an engine"
    return [
        row(name, "rlft", "tokens", float(tokens), "tokens", note),
        row(name, "rlft", "seconds", got["seconds"], "s"),
        row(name, "rlft", "peak_GiB", got["peak"], "GiB", f"above {got['model']:.2f} GiB of model, adapter, optimiser"),
        row(name, "rlft", "planned_GiB", got["planned"], "GiB"),
        row(name, "rlft", "host_GiB", got["host"], "GiB"),
        row(name, "rlft", "driver_GiB", got["driver"], "GiB", "in use on the card, as the driver says"),
        row(
            name, "rlft", "driver_step_GiB", got["driver_step"], "GiB", "most that PyTorch took from the driver for it"
        ),
        *([row(name, "rlft", "first_seconds", first["seconds"], "s")] if first else []),
    ]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("works", nargs="+")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    policies: dict[Any, Policy] = {}
    with segments(growing=True):
        for work, tokens in (text.split(":") for text in args.works):
            shape, cap = SHAPES.get(work, ("8b", None))
            if (shape, cap) not in policies:
                policies.clear()
                torch.cuda.empty_cache()
                total = torch.cuda.get_device_properties(0).total_memory
                ballast = torch.empty(total - cap * GIB if cap else 0, dtype=torch.uint8, device="cuda")
                policies[shape, cap] = policy_of(shape)
                engine = asleep_engine(policies[shape, cap], shape) if args.engine else None
            got = measure(work, int(tokens), policies[shape, cap])
            if engine is not None:
                got = [r | {"work": f"{r['work']}/beside-engine"} for r in got]
            rows += [r | {"name": {"8b": "longest", "20b": "ballast24", "70b": "longest_70b"}[shape]} for r in got]
            for name in {r["name"] for r in rows}:
                mine = [{k: v for k, v in r.items() if k != "name"} for r in rows if r["name"] == name]
                write(name, mine, args.out, args.commit)
