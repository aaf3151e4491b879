"""A base in host memory, or divided over the GPUs of a machine, beside one on the device: seconds of one micro-batch.

    python benchmarks/place.py --out DIR --commit HASH 8b 70b
    torchrun --nproc-per-node 2 benchmarks/place.py --out DIR --commit HASH --place sharded 70b
    python benchmarks/place.py --out DIR --commit HASH --cap 24 --tokens 4096 70b

Forward and backward of one sequence over the whole shape, random NF4 weights, LoRA r 16, interleaved; the log-probs of
both are compared to the bit under one plan. `GB_per_s` is the rate at which the ring copies layers with nothing beside
it. With ranks all of them run at the same time, and the numbers are the lead's. `--cap GIB` trains from the other place
alone while all but so many GiB of the card are taken, one update included. `--budget GIB` is what a pass may take
beside the weights, for both: without it the device keeps decoded weights where it has the memory.
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
from longest import GIB, in_use, policy_of, sft
from results_file import arguments, write
from timing import row

from rlft import dist
from rlft.config.run import Optim
from rlft.models.allocator import segments
from rlft.models.policy import Policy
from rlft.trainer.optim import Optimizer

TOKENS, REPEATS = (1024, 4096, 8192, 16384), 3
Rows = list[dict[str, Any]]


def synchronize() -> None:
    if stacks.DEVICE == "cuda":
        torch.cuda.synchronize()


def policy_at(shape: str, place: Any) -> Policy:
    """The same policy for every place."""
    torch.manual_seed(0)
    return policy_of(shape, place)


def batch_of(policy: Policy, tokens: int) -> Any:
    vocab: int = policy.base.config.vocab_size  # type: ignore[operator,union-attr,assignment]
    draw = torch.Generator().manual_seed(tokens)
    return stacks.batch_of([torch.randint(10, vocab - 10, (tokens,), generator=draw).tolist()])


def step(policy: Policy, batch: Any) -> tuple[float, torch.Tensor]:
    """Seconds of forward and backward, and the log-probs."""
    policy.flat.zero_grad()
    synchronize()
    dist.gather(None)
    begin = time.perf_counter()
    logprobs, _ = policy.logprobs(batch)
    sft(logprobs, batch.to(stacks.DEVICE)).backward()
    synchronize()
    return time.perf_counter() - begin, logprobs.detach()


def rate(policy: Policy) -> float:
    """GB/s of the ring's copies from the first layer to the last, nothing beside them."""
    assert policy.fused is not None and policy.fused.placement is not None
    ring = policy.fused.placement.ring
    ring.need(0)
    synchronize()
    dist.gather(None)
    begin = time.perf_counter()
    layers = len(ring._layouts)
    for layer in range(layers):
        ring.need(layer)
    synchronize()
    copied = sum(layout.bytes for layout in ring._layouts[3:])  # three were there
    return copied / (time.perf_counter() - begin) / 1e9


def beside(shape: str, place: str, lengths: list[int], budget: float) -> Rows:
    """Rows of a shape on the device and at `place`, interleaved."""
    begin = time.perf_counter()
    policies = {name: policy_at(shape, name) for name in ("device", place)}
    for policy in policies.values():
        assert policy.fused is not None
        policy.fused.budget = budget * GIB if budget else None
    print(f"{shape} is there after {time.perf_counter() - begin:.0f} s", flush=True)
    speed = [rate(policies[place]) for _ in range(3)]
    work = f"place/{shape}/{dist.world()}-ranks" if dist.world() > 1 else f"place/{shape}"
    rows = [row(work, place, "GB_per_s", speed, "GB/s", "copies of all layers into the ring, nothing beside them")]
    placement = policies[place].fused.placement  # type: ignore[union-attr]
    rows.append(row(work, place, "ring_GiB", placement.ring.bytes / GIB, "GiB", "three slots on the device"))
    rows.append(row(work, place, "elsewhere_GiB", placement.elsewhere / GIB, "GiB", "not in this device's memory"))
    for tokens in lengths:
        seconds: dict[str, list[float]] = {name: [] for name in policies}
        for turn in range(1 + REPEATS):
            for name, policy in policies.items():
                seconds[name] += [step(policy, batch_of(policy, tokens))[0]] * bool(turn)
        for name, policy in policies.items():
            note = f"forward and backward; {policy.fused.last_plan}"  # type: ignore[union-attr]
            rows.append(row(f"{work}/{tokens}", name, "seconds", seconds[name], "s", note))
        times = [there / here for here, there in zip(*seconds.values(), strict=True)]
        rows.append(row(f"{work}/{tokens}", place, "times_device", times, "1", "of the device's seconds"))
        print(*(f"{r['work']} {r['stack']} {r['metric']} {r['value']}" for r in rows[-3:]), sep="\n", flush=True)
    equal = same_bits(list(policies.values()))
    note = "log-probs of 1,024 tokens under one plan, of the least memory"
    rows.append(row(work, place, "equal_to_the_bit", float(equal), "1", note))
    print(work, "equal to the bit:", equal, flush=True)
    return rows


def same_bits(policies: list[Policy]) -> bool:
    """Whether the policies compute the same log-probs. The gradient of the 8B shape differs between two runs of one."""
    found = []
    for policy in policies:
        assert policy.fused is not None
        policy.fused.release()
        policy.fused.budget = 1.0
        found.append(step(policy, batch_of(policy, TOKENS[0]))[1])
    return torch.equal(*found)


def capped(shape: str, place: str, lengths: list[int], cap: int) -> Rows:
    """Rows of training steps while all but `cap` GiB of the card are taken."""
    policy = policy_at(shape, place)
    optimizer = Optimizer(policy.adapter_params, Optim(lr=1e-5), 1)
    policy.flat.zero_grad()
    torch.cuda.empty_cache()
    ballast = torch.empty(torch.cuda.mem_get_info()[1] - cap * GIB, dtype=torch.uint8, device="cuda")
    rows = []
    for tokens in lengths:
        batch, seconds, most = batch_of(policy, tokens), 0.0, 0
        for turn in range(2):
            torch.cuda.empty_cache()
            begin = time.perf_counter()
            step(policy, batch)
            most = max(most, in_use() - ballast.numel())
            assert not optimizer.step(turn, 0).skipped
            synchronize()
            seconds = time.perf_counter() - begin
        work = f"place/{shape}/{cap}-GiB/{tokens}"
        note = f"the second step, its update included; {policy.fused.last_plan}"  # type: ignore[union-attr]
        rows.append(row(work, place, "seconds", seconds, "s", note))
        rows.append(row(work, place, "driver_GiB", most / GIB, "GiB", "in use on the card less the ballast"))
        print(*(f"{r['work']} {r['metric']} {r['value']} {r['note']}" for r in rows[-2:]), sep="\n", flush=True)
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("shapes", nargs="+", choices=stacks.SHAPES)
    parser.add_argument("--place", choices=("host", "sharded"), default="host")
    parser.add_argument("--cap", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.0)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    args = parser.parse_args()
    rows: Rows = []
    with segments(growing=True), dist.started(300.0):
        for shape in args.shapes:
            if args.cap:
                rows += capped(shape, args.place, args.tokens, args.cap)
            else:
                rows += beside(shape, args.place, args.tokens, args.budget)
            torch.cuda.empty_cache()
            if dist.lead():
                name = f"place_{args.place}" + (f"_{args.cap}gib" if args.cap else "")
                print(write(name, rows, args.out, args.commit), flush=True)
