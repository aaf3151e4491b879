"""Rollouts of vLLM on the trainer's own base: tokens per second, hand-over, memory asleep. Qwen3-8B's shape, LoRA r 16.

    python benchmarks/rollout.py --out DIR --commit HASH --extra dequantized -- dequantized shared merged bnb

Random weights in NF4, random prompts of 128 tokens, 256 tokens each (128 where there are 16 sequences), sampler
log-probs and detokenising on; one engine after the other in one process. "bnb" is the shared mode with bitsandbytes'
own sequence of operators in its linear layers, one product per matrix.

"prompts cached": the prompts are in vLLM's prefix cache, so that decoding alone is measured. Extra rows of a mode at
the most sequences: without log-probs and text, and without seeds per request.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))

from longest import policy_of
from results_file import arguments, write
from stacks import tokenizer_of
from timing import row

from rlft.config.data import Sampling
from rlft.config.run import Engine
from rlft.models.fused import memory
from rlft.models.policy import Policy
from rlft.rollout.vllm import requests as vllm_requests
from rlft.rollout.vllm import shared_weights
from rlft.rollout.vllm.engine import VllmEngine
from rlft.rollout.vllm.start import version
from rlft.types import Prompt

GIB = 2**30
PROMPT = 128
SHARED = shared_weights.SharedLinear
WORKS = {"dequantized": "expanded", "shared": "lent"}
"""Names of the modes in results, older than the modes' own."""
MODES = ("dequantized", "shared", "merged", "bnb")


class BnbLinear(shared_weights.SharedLinear):
    """bitsandbytes' own sequence: a product per matrix, decoded by its kernel."""

    quantised: dict[int, Any] = {}  # noqa: RUF012 (address of the packed bytes -> bitsandbytes' parameter)

    def __init__(self, weights: Any, scratch: Any) -> None:
        super().__init__(weights, scratch)
        self._params = [self.quantised[w.packed.data_ptr()] for w in weights]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import matmul_4bit

        rows = x.reshape(-1, x.shape[-1])
        made, at = rows.new_empty(rows.shape[0], self.out), 0
        for p in self._params:
            out = p.quant_state.shape[0]
            made[:, at : at + out] = matmul_4bit(rows, p.t(), p.quant_state)
            at += out
        return made.view(*x.shape[:-1], self.out)


def prompts_of(count: int, seed: int, length: int = PROMPT) -> list[Prompt]:
    g = torch.Generator().manual_seed(seed)
    return [
        Prompt(tuple(torch.randint(10, 150_000, (length,), generator=g).tolist()), {}, i, None) for i in range(count)
    ]


def tokens_of(rollouts: list[Any]) -> int:
    return sum(len(r.completion_ids) for r in rollouts)


def speeds(runs: dict[str, Callable[[int], int]], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each, interleaved, after one of each that does not count. run: seed -> tokens sampled."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            tokens = run(seed)
            torch.cuda.synchronize()
            if seed:
                found[name].append(tokens / (time.perf_counter() - begin))
    return found


def rates(engine: VllmEngine, mode: str, sizes: list[int], extra: bool) -> list[dict[str, Any]]:
    rows, stack = [], "bnb" if mode == "bnb" else "rlft"

    def add(count: int, runs: dict[str, Callable[[int], int]], repeats: int, note: str = "") -> None:
        for name, values in speeds(runs, repeats).items():
            rows.append(row(f"rollout-{WORKS.get(mode, mode)}/{count}", name, "tokens_per_s", values, "tokens/s", note))
            print(mode, count, name, rows[-1]["value"], rows[-1]["note"], flush=True)

    def run(count: int, sampling: Sampling) -> Callable[[int], int]:
        return lambda seed: tokens_of(engine.generate(prompts_of(count, seed), sampling, (seed,)))

    def requests(count: int, sampling: Sampling, change: Callable[[Any], None], cached: bool = False) -> Any:
        """As the engine does it, with other sampling parameters, or over prompts that are in vLLM's cache."""
        from vllm.inputs import tokens_input

        def call(seed: int) -> int:
            made = []
            for i, prompt in enumerate(prompts_of(count, 77 if cached else seed)):
                params = vllm_requests.parameters(sampling, engine._eos, 1000 * seed + i)
                change(params)
                made.append((tokens_input(list(prompt.ids)), params))
            if not cached:
                engine._llm.reset_prefix_cache()
            outputs: list[Any] = []
            vllm_requests._run(
                engine._llm.llm_engine, made, engine._policy.device, 600.0, None, lambda _, out: outputs.append(out)
            )
            return sum(len(o.token_ids) for out in outputs for o in out.outputs)

        return call

    for count, repeats in zip(sizes, (4, 3, 2), strict=False):
        sampling = Sampling(group_size=1, max_tokens=256 if count > 16 else 128)
        add(count, {stack: run(count, sampling)}, repeats)
        add(count, {f"{stack}, prompts cached": requests(count, sampling, lambda _: None, True)}, repeats)
    if not extra:
        return rows
    count, sampling = max(sizes), Sampling(group_size=1, max_tokens=256)

    def bare(p: Any) -> None:
        p.logprobs, p.flat_logprobs = None, False

    def unseeded(p: Any) -> None:
        p.seed = None

    alone = {
        f"{stack}, log-probs, seeds and text": run(count, sampling),
        f"{stack}, no log-probs, no text": requests(count, sampling, bare),
        f"{stack}, no seeds per request, no text": requests(count, sampling, unseeded),
    }
    add(count, alone, 3, "interleaved")
    return rows


def used() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def handover(engine: VllmEngine, policy: Policy, mode: str, before: float, cycles: int = 8) -> list[dict[str, Any]]:
    """Sleep, wake (with weight_copy, adapter and read-back) and load_adapter (with read-back), and memory asleep.
    before: GiB in use on the card before the engine was started."""
    parts: dict[str, list[float]] = {"sleep": [], "wake": [], "load": []}
    asleep = unused = 0.0
    base = memory.weight_bytes(policy.base)["bytes"] / GIB

    def timed(name: str, call: Callable[[], None]) -> None:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        parts[name].append((time.perf_counter() - begin) * 1e3)

    for cycle in range(cycles):
        timed("sleep", engine.sleep)
        torch.cuda.empty_cache()
        asleep = max(asleep, used())
        unused = policy.device_memory.unused / GIB
        timed("wake", engine.wake)
        policy.adapter_params.data.mul_(1.01)
        timed("load", lambda v=cycle: engine.load_adapter(policy.adapter(), v + 1))
    work = "handover/8b" if mode == "dequantized" else f"handover-{WORKS.get(mode, mode)}/8b"
    rows = [row(work, "rlft", f"{name}_ms", ms, "ms") for name, ms in parts.items()]
    whole = [sum(ms) / 1e3 for ms in zip(*parts.values(), strict=True)]
    rows.append(row(work, "rlft", "seconds", whole, "s", "sleep + wake + load, weight_copy and read-backs included"))
    note = f"{asleep:.2f} in use on the card while it sleeps"
    rows += [
        row(work, "rlft", "asleep_above_base_GiB", asleep - base, "GiB", f"{note}, less the base's {base:.2f}"),
        row(work, "rlft", "asleep_above_trainer_GiB", asleep - before, "GiB", f"{note}, {before:.2f} before its start"),
        row(work, "rlft", "unused_GiB", unused, "GiB", "held by PyTorch and not in use while it sleeps"),
    ]
    for r in rows:
        print(mode, r["metric"], r["value"], r["note"], flush=True)
    return rows


def measure(policy: Policy, mode: str, sizes: list[int], extra: bool) -> list[dict[str, Any]]:
    shared_weights.SharedLinear = BnbLinear if mode == "bnb" else SHARED  # type: ignore[misc]  # before the hooks take it from there
    before, begin = used(), time.perf_counter()
    options = Engine("vllm", mode="shared" if mode == "bnb" else mode, max_seqs=max(sizes))  # type: ignore[arg-type]
    engine = VllmEngine(
        policy, tokenizer_of("8b"), options, PROMPT + 256, max(sizes), note=lambda t: print(t, flush=True)
    )
    start = time.perf_counter() - begin
    engine.load_adapter(policy.adapter(), 0)
    print("start", round(start, 1), "GiB before", round(before, 2), "awake", round(used(), 2), flush=True)
    rows = [
        row(
            f"rollout-{WORKS.get(mode, mode)}/start",
            "rlft",
            "seconds",
            start,
            "s",
            f"vLLM {version()}; its imports included",
        )
    ]
    rows += rates(engine, mode, sizes, extra)
    if mode != "bnb":
        rows += handover(engine, policy, mode, before)
    engine.close()
    print(mode, "closed", round(used(), 2), "GiB", flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--extra", choices=MODES, nargs="*", default=())
    parser.add_argument("modes", choices=MODES, nargs="+")
    args = parser.parse_args()
    policy = policy_of("8b")
    config: Any = policy.base.config
    # As published; the training benchmarks have more, and vLLM's table of rotations would be 25 times as large.
    config.max_position_embeddings = 40_960
    quantised = [p for p in policy.base.parameters() if getattr(p, "quant_state", None) is not None]
    BnbLinear.quantised = {p.data_ptr(): p for p in quantised}
    rows = []
    for mode in args.modes:
        rows += measure(policy, mode, args.sequences, mode in args.extra)
        print(write("rollout", rows, args.out, args.commit), flush=True)
    # vLLM's threads and graphs take seconds to go, and nothing is left to be done.
    os._exit(0)


if __name__ == "__main__":
    main()
