"""LoRA over the seven linears of a Qwen3-8B layer, forward and backward, beside the frozen products alone and PEFT.

    python benchmarks/lora.py [--sweep]      # prints the rows of a results file as JSON lines

Weights are bf16 and decoded already: decoding costs every stack the same. "frozen" is one product per group each way
(q, k, v and gate, up side by side). "rlft" is fill, K-concatenated forward, backward with gradients into fp32 buffers.
"peft" is PEFT's sequence per projection with bf16 adapters, W x + scale B(A(x)), by autograd; its frozen products are
seven. "torch" is our grouping by plain PyTorch: cuBLAS for S, dS, dA, dB, and second products for the updates of y, dx.
Work ".../graph" is device time alone, from a CUDA graph; without it launches that the host makes too late count too.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kernel_timing import copy_of, device_ms, graph_ms, host_ms, to_rows
from torch import Tensor

from rlft.kernels import lora
from rlft.kernels.lora_group import AdapterWriteTables, LoraGroup, Part
from rlft.kernels.low_rank import GRAD_A, GRAD_B, Launch, gradients_launch

H, M = 4096, 12288
SHAPES = {"qkv": (H, (4096, 1024, 1024)), "o": (4096, (H,)), "gate_up": (H, (M, M)), "down": (M, (H,))}


def groups(rank: int, align: int) -> list[LoraGroup]:
    return [LoraGroup(i, o, (rank,) * len(o), (2.0,) * len(o), align) for i, o in SHAPES.values()]


class Buffers:
    """Of one group at T tokens: rows with tails, the weight with its operands, masters and fp32 gradients."""

    def __init__(self, group: LoraGroup, T: int) -> None:
        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale

        self.group, width = group, group.in_features
        self.x, self.dy = randn(T, width + group.tail), randn(T, group.out + group.tail, scale=0.01)
        self.weight = lora.Weight.of(group, randn(group.out + group.tail, width + group.tail, scale=0.02))
        self.A = [randn(r, width, scale=0.02) for r in group.ranks]
        self.B = [randn(o, r, scale=0.02) for o, r in zip(group.out_features, group.ranks, strict=True)]
        self.grad_A, self.grad_B = ([torch.zeros_like(t, dtype=torch.float32) for t in ts] for ts in (self.A, self.B))
        self.dense_x, self.dense_dy = self.x[:, :width].contiguous(), self.dy[:, : group.out].contiguous()
        self.dense_w = self.weight.buffer[: group.out, :width].contiguous()
        self.y, self.dx = torch.empty_like(self.dense_dy), torch.empty_like(self.dense_x)
        self.part = Part(group, self.A, self.B, self.weight.b, self.weight.a)


def rlft_step(layer: list[Buffers]) -> Callable[[], None]:
    """Forward and backward. Filled again in between: the scratch of W was another layer's then."""
    plan = AdapterWriteTables([n.part for n in layer])

    def step() -> None:
        plan.run()
        for n in layer:
            rlft_forward(n)
        plan.run()
        for n in layer:
            rlft_backward(n)

    return step


def rlft_forward(n: Buffers) -> None:
    lora.forward(n.weight, n.x, out=n.y)


def rlft_backward(n: Buffers) -> None:
    x, s = n.x.split([n.group.in_features, n.group.tail], dim=1)
    lora.backward(n.weight, n.dy, x, s, n.grad_A, n.grad_B, out=n.dx)


def frozen_forward(n: Buffers) -> None:
    torch.mm(n.dense_x, n.dense_w.T, out=n.y)


def frozen_backward(n: Buffers) -> None:
    torch.mm(n.dense_dy, n.dense_w, out=n.dx)


def torch_forward(n: Buffers) -> Tensor:
    s = n.dense_x @ torch.cat(n.A).T
    torch.mm(n.dense_x, n.dense_w.T, out=n.y)
    for i, B in enumerate(n.B):
        n.y[:, n.group.rows(i)].addmm_(s[:, n.group.columns(i)], B.T, alpha=2.0)
    return s


def torch_backward(n: Buffers, s: Tensor) -> None:
    torch.mm(n.dense_dy, n.dense_w, out=n.dx)
    parts = [n.dense_dy[:, n.group.rows(i)] for i in range(len(n.B))]
    ds = torch.cat([(p @ B) * 2.0 for p, B in zip(parts, n.B, strict=True)], dim=1)
    n.dx.addmm_(ds, torch.cat(n.A))
    for i, p in enumerate(parts):
        n.grad_B[i] += (p.T @ s[:, n.group.columns(i)]) * 2.0
    for i, g in enumerate((ds.T @ n.dense_x).split(n.group.ranks)):
        n.grad_A[i] += g


def peft_step(n: Buffers) -> Callable[[], Any]:
    x = n.dense_x.detach().requires_grad_()
    A, B = ([t.detach().clone().requires_grad_() for t in ts] for ts in (n.A, n.B))
    weights = [w.contiguous() for w in n.dense_w.split(n.group.out_features)]
    dys = [d.contiguous() for d in n.dense_dy.split(n.group.out_features, dim=1)]

    def step() -> None:
        outs = [F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0 for w, a, b in zip(weights, A, B, strict=True)]
        torch.autograd.grad(outs, [x, *A, *B], dys)

    return step


def with_share(work: str, samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Milliseconds, and what each stack takes over the frozen products, which come first."""
    found, base = to_rows(work, samples, None, {}), statistics.median(samples["frozen"])
    for stack, ms in list(samples.items())[1:]:
        row = {"work": work, "stack": stack, "metric": "percent_over_frozen", "unit": "%", "note": "forward + backward"}
        found.append(row | {"value": round(100 * (statistics.median(ms) / base - 1), 2)})
    return found


def rows() -> list[dict[str, Any]]:
    found = []
    for T, rank, align in ((4096, 16, 64), (4096, 16, 16), (1024, 16, 64), (16384, 16, 64), (4096, 64, 64)):
        layer = [Buffers(group, T) for group in groups(rank, align)]
        peft = [peft_step(n) for n in layer]
        saved = [torch_forward(n) for n in layer]
        stacks: dict[str, Callable[[], Any]] = {
            "frozen": lambda layer=layer: [f(n) for f in (frozen_forward, frozen_backward) for n in layer],
            "rlft": rlft_step(layer),
            "torch": lambda layer=layer: [torch_backward(n, torch_forward(n)) for n in layer],
            "peft": lambda peft=peft: [step() for step in peft],
        }
        work = f"lora/layer/T{T}-r{rank}-align{align}"
        found += with_share(work, device_ms(stacks, rounds=20))
        found += with_share(f"{work}/graph", graph_ms({k: [v] for k, v in stacks.items() if k != "peft"}, rounds=20))
        found += to_rows(f"{work}/host", host_ms(stacks, rounds=5, calls=10), None, {})
        if T == 4096:
            for name, n, s in zip(SHAPES, layer, saved, strict=True):
                plan = AdapterWriteTables([n.part])
                found += to_rows(
                    f"lora/{name}/T{T}-r{rank}-align{align}/forward",
                    device_ms(
                        {
                            "frozen": lambda n=n: frozen_forward(n),
                            "rlft": lambda n=n, p=plan: (p.run(), rlft_forward(n)),
                            "torch": lambda n=n: torch_forward(n),
                        },
                        rounds=15,
                    ),
                    None,
                    {},
                )
                found += to_rows(
                    f"lora/{name}/T{T}-r{rank}-align{align}/backward",
                    device_ms(
                        {
                            "frozen": lambda n=n: frozen_backward(n),
                            "rlft": lambda n=n, p=plan: (p.run(), rlft_backward(n)),
                            "torch": lambda n=n, s=s: torch_backward(n, s),
                        },
                        rounds=15,
                    ),
                    None,
                    {},
                )
        del layer, peft, saved, stacks
        torch.cuda.empty_cache()
    return found


def parts(n: Buffers) -> dict[str, Callable[[], Any]]:
    """The thin products at the default launches beside cuBLAS."""
    group, b, a = n.group, n.weight.b, n.weight.a
    x, s = n.x.split([group.in_features, group.tail], dim=1)
    dy, ds = n.dy.split([group.out, group.tail], dim=1)
    return {
        "fill": AdapterWriteTables([n.part]).run,
        "S cublas": lambda: torch.mm(x, a.T, out=s),
        "gradients rlft": lambda: gradients_launch(group, dy, x, s, b, ds, n.grad_A, n.grad_B),
        "dS cublas": lambda: torch.mm(dy, b, out=ds),
        "dB cublas": lambda: [dy[:, group.rows(i)].T @ s[:, group.columns(i)] for i in range(len(n.B))],
        "dA cublas": lambda: ds.T @ x,
        "y cublas K+tail": lambda: torch.mm(n.x, n.weight.extended, out=n.y),
        "y cublas": lambda: frozen_forward(n),
        "dx cublas K+tail": lambda: torch.mm(n.dy, n.weight.stacked, out=n.dx),
        "dx cublas": lambda: frozen_backward(n),
    }


GRADS_B = [
    Launch(32, 256, 132, 4, 4),
    Launch(32, 256, 528, 4, 3),
    Launch(32, 256, 264, 8, 3),
    Launch(32, 512, 132, 8, 3),
    Launch(32, 512, 264, 8, 2),
    Launch(64, 128, 264, 4, 4),
    Launch(64, 256, 264, 4, 3),
    Launch(64, 256, 264, 8, 3),
    Launch(64, 256, 528, 8, 2),
    Launch(128, 128, 264, 8, 3),
]
GRADS_A = [
    Launch(32, 128, 132, 4, 4),
    Launch(32, 128, 528, 4, 4),
    Launch(64, 64, 264, 4, 4),
    Launch(64, 128, 264, 4, 3),
    Launch(64, 128, 528, 4, 3),
    Launch(64, 128, 264, 8, 3),
    Launch(128, 64, 264, 4, 3),
    Launch(128, 128, 264, 8, 3),
]


def launches(n: Buffers) -> dict[str, dict[str, Callable[[], Any]]]:
    """kernel -> launch -> the call; the first launch is today's."""
    group, b = n.group, n.weight.b
    x, s = n.x.split([group.in_features, group.tail], dim=1)
    dy, ds = n.dy.split([group.out, group.tail], dim=1)
    args = (group, dy, x, s, b, ds, n.grad_A, n.grad_B)
    return {
        "grad_B": {str(tuple(c)): lambda c=c: gradients_launch(*args, c, GRAD_A) for c in [GRAD_B, *GRADS_B]}
        | {"dS by cublas": lambda: gradients_launch(*args, fused_rank=0)},
        "grad_A": {str(tuple(c)): lambda c=c: gradients_launch(*args, GRAD_B, c) for c in [GRAD_A, *GRADS_A]},
    }


def sweep() -> list[dict[str, Any]]:
    """Parts of each group at T 4,096, r 16, then launches of each kernel, in milliseconds, best first."""
    found = []
    for name, group in zip(SHAPES, groups(16, 64), strict=True):
        n = Buffers(group, 4096)
        read = {"copy of x": copy_of(2 * 4096 * group.in_features), "copy of dy": copy_of(2 * 4096 * group.out)}
        found += to_rows(f"lora-parts/{name}", device_ms(parts(n) | read, rounds=15), None, {})
        # o is between qkv and down, and every geometry compiles again.
        for kernel, candidates in launches(n).items() if name != "o" else ():
            measured = to_rows(f"lora-sweep/{name}/{kernel}", device_ms(candidates, rounds=15), None, {})
            found += sorted(measured, key=lambda r: r["value"])
        del n
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    for found_row in sweep() if "--sweep" in sys.argv else rows():
        print(json.dumps(found_row), flush=True)
