"""RMSNorm, alone and with the residual, at H 4096: ours beside Liger-Kernel and torch.compile.

    python benchmarks/rms_norm.py             rows as JSON lines
    python benchmarks/rms_norm.py --sweep     launch parameters, best first

Bytes of a row in bf16: forward 4 H, with the residual 8 H; backward 6 H, with the residual 8 H.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from kernel_timing import Row, Stack, Thunk, compare, compiled, sweep
from torch import Tensor

from rlft.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_reference,
)

TOKENS, H, EPS = (1024, 4096, 8192, 32768), 4096, 1e-6
SWEEP_H = (1024, 2048, 4096, 5120, 8192, 16384)


def tensors(t: int, h: int) -> dict[str, Tensor]:
    drawn = {name: torch.randn(t, h, device="cuda", dtype=torch.bfloat16) for name in ("x", "delta", "dy", "dres")}
    return drawn | {"weight": torch.randn(h, device="cuda", dtype=torch.bfloat16)}


def stacks(t: int, add: bool) -> list[Stack]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def draw() -> tuple[list[Any], list[Tensor]]:
        v = tensors(t, H)
        x = v["x"].requires_grad_()
        if add:
            return [x, v["delta"].requires_grad_(), v["weight"], EPS], [v["dy"], v["dres"]]
        return [x, v["weight"], EPS], [v["dy"]]

    def liger(*args: Any) -> Any:
        function = LigerFusedAddRMSNormFunction if add else LigerRMSNormFunction
        return function.apply(*args, 0.0, "llama", True)

    ours, plain = (add_rms_norm, add_rms_norm_reference) if add else (rms_norm, rms_norm_reference)
    return [
        Stack("rlft", ours, draw),
        Stack("liger", liger, draw, "in_place backward"),
        Stack("torch", compiled(plain), draw, "torch.compile"),
    ]


def raw(t: int, h: int, add: bool, backward: bool, shape: tuple[int, int] | None = None) -> Thunk:
    v = tensors(t, h)
    if not backward:
        delta = v["delta"] if add else None
        return lambda: rms_norm_forward(v["x"], v["weight"], EPS, delta=delta, shape=shape)
    _, rstd, _ = rms_norm_forward(v["x"], v["weight"], EPS)
    dres = v["dres"] if add else None
    return lambda: rms_norm_backward(v["dy"], v["x"], v["weight"], rstd, dres=dres, shape=shape)


def check(t: int) -> None:
    """Both sides compute the same thing before either is timed."""
    for add in (False, True):
        found = []
        for stack in stacks(t, add):
            torch.manual_seed(0)
            inputs, grads = stack.draw()
            outs = stack.run(*inputs)
            outs = list(outs) if isinstance(outs, tuple) else [outs]
            found.append([*outs, *torch.autograd.grad(outs, inputs[0], [g.clone() for g in grads])])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)


def rows() -> list[Row]:
    check(256)
    found: list[Row] = []
    for add in (False, True):
        for t in TOKENS:
            name = f"{'add_rms_norm' if add else 'rms_norm'}/{t}x{H}"
            n = t * H
            found += compare(
                name,
                stacks(t, add),
                (8 if add else 4) * n,
                (8 if add else 6) * n,
                lambda t=t, add=add: raw(t, H, add, False),
                lambda t=t, add=add: raw(t, H, add, True),
            )
    return found


def sweep_rows() -> list[Row]:
    found: list[Row] = []
    for h in SWEEP_H:
        t = 8192 * 4096 // h
        for add in (False, True):
            for backward in (False, True):
                candidates = {
                    f"rows {r}, warps {w}": lambda h=h, t=t, a=add, b=backward, s=(r, w): raw(t, h, a, b, s)
                    for r in (1, 2, 4)
                    for w in (2, 4, 8, 16)
                    if 256 <= r * h // w <= 2048  # 8 to 64 elements a thread
                }
                size = t * h * ((8 if add else 6) if backward else (8 if add else 4))
                work = f"sweep/{'add_' if add else ''}rms_norm/{t}x{h}/{'backward' if backward else 'forward'}"
                found += sweep(work, candidates, size)
    return found


if __name__ == "__main__":
    for row in sweep_rows() if "--sweep" in sys.argv else rows():
        print(json.dumps(row))
