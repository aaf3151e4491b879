"""q/k norm and rotary embedding at 32 + 8 heads of 128: ours beside Liger-Kernel and torch.compile.

    python benchmarks/qk_rope.py             rows as JSON lines
    python benchmarks/qk_rope.py --sweep     launch parameters, best first

Works: `qk_rope` is Qwen3's norm and rotation (Liger: two norms, then its rotation in place), `rope` the rotation alone
(Liger in place). Bytes per token in bf16, 40 heads of 128: forward 4 x 5,120 and backward with norm 6 x 5,120; the
tables come from the cache. Ours reads q and k as slices of one qkv buffer of 48 heads; the peers get tensors of their
own, as transformers' projections give them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from kernel_timing import Row, Stack, Thunk, compare, compiled, sweep
from torch import Tensor

from rlft.kernels.qk_rope import qk_rope, qk_rope_backward, qk_rope_forward, qk_rope_reference

TOKENS, HQ, HK, D, EPS = (1024, 4096, 8192, 32768), 32, 8, 128, 1e-6


def tensors(t: int) -> dict[str, Tensor]:
    qkv = torch.randn(t, (HQ + 2 * HK) * D, device="cuda", dtype=torch.bfloat16)
    angles = torch.arange(t, device="cuda")[:, None] * 1e6 ** -(torch.arange(0, D, 2, device="cuda") / D)
    angles = torch.cat([angles, angles], dim=-1)
    drawn = {
        "q": qkv[:, : HQ * D].unflatten(1, (HQ, D)),
        "k": qkv[:, HQ * D : (HQ + HK) * D].unflatten(1, (HK, D)),
        "cos": angles.cos().bfloat16(),
        "sin": angles.sin().bfloat16(),
    }
    drawn |= {name: torch.randn(t, h, D, device="cuda", dtype=torch.bfloat16) for name, h in (("dq", HQ), ("dk", HK))}
    return drawn | {name: torch.randn(D, device="cuda", dtype=torch.bfloat16) for name in ("wq", "wk")}


def stacks(t: int, norm: bool) -> list[Stack]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def draw(own: bool) -> tuple[list[Any], list[Tensor]]:
        v = tensors(t)
        q, k = (v["q"], v["k"]) if own else (v["q"].contiguous(), v["k"].contiguous())
        weights = [v["wq"], v["wk"]] if norm else [None, None]
        heads = [q.detach().requires_grad_(), k.detach().requires_grad_()]
        return [*heads, v["cos"], v["sin"], None, *weights, EPS], [v["dq"], v["dk"]]

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, _: None, wq: Any, wk: Any, eps: float) -> Any:
        if norm:
            q = LigerRMSNormFunction.apply(q, wq, eps, 0.0, "llama", True)
            k = LigerRMSNormFunction.apply(k, wk, eps, 0.0, "llama", True)
        q, k = LigerRopeFunction.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return [
        Stack("rlft", qk_rope, lambda: draw(True), "slices of one qkv buffer"),
        Stack("liger", liger, lambda: draw(False), "norms, then rotation in place" if norm else "in place"),
        Stack("torch", compiled(qk_rope_reference), lambda: draw(False), "torch.compile"),
    ]


def raw(t: int, norm: bool, backward: bool, shape: tuple[int, int] | None = None) -> Thunk:
    v = tensors(t)
    weights = [v["wq"], v["wk"]] if norm else [None, None]
    rest = [v["cos"], v["sin"], None, *weights, EPS]
    if not backward:
        return lambda: qk_rope_forward(v["q"], v["k"], *rest, shape=shape)
    kept = [v["q"], v["k"]] if norm else [None, None]
    return lambda: qk_rope_backward(v["dq"], v["dk"], *kept, *rest, shape=shape)


def check(t: int) -> None:
    for norm in (False, True):
        found = []
        for stack in stacks(t, norm):
            torch.manual_seed(0)
            inputs, grads = stack.draw()
            outs = stack.run(*inputs)
            kept = [o.clone() for o in outs]
            found.append([*kept, *torch.autograd.grad(outs, inputs[:2], [g.clone() for g in grads])])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)


def rows() -> list[Row]:
    check(256)
    found: list[Row] = []
    for norm in (True, False):
        for t in TOKENS:
            n = t * (HQ + HK) * D
            found += compare(
                f"{'qk_rope' if norm else 'rope'}/{t}x{HQ}+{HK}x{D}",
                stacks(t, norm),
                4 * n,
                (6 if norm else 4) * n,
                lambda t=t, norm=norm: raw(t, norm, False),
                lambda t=t, norm=norm: raw(t, norm, True),
            )
    return found


def sweep_rows() -> list[Row]:
    found: list[Row] = []
    for t in (1024, 8192):
        for norm in (True, False):
            for backward in (False, True):
                candidates = {
                    f"rows {r}, warps {w}": lambda t=t, n=norm, b=backward, s=(r, w): raw(t, n, b, s)
                    for r in (4, 8, 16, 32, 64)
                    for w in (1, 2, 4, 8)
                    if 4 <= r * D // 2 // (32 * w) <= 32
                }
                size = (6 if norm and backward else 4) * t * (HQ + HK) * D
                work = f"sweep/{'qk_rope' if norm else 'rope'}/{t}/{'backward' if backward else 'forward'}"
                found += sweep(work, candidates, size)
    return found


if __name__ == "__main__":
    for row in sweep_rows() if "--sweep" in sys.argv else rows():
        print(json.dumps(row))
