"""SwiGLU at M 12288: ours beside Liger-Kernel and torch.compile.

    python benchmarks/swiglu.py             rows as JSON lines
    python benchmarks/swiglu.py --sweep     launch parameters, best first

Bytes of an element in bf16: forward 6; backward 10 without h (reads dh, gate, up; writes dgate, dup). Stack "rlft-raw"
of the backward writes h as well, 12 bytes, in place over its three inputs: its rate is of those 12.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from kernel_timing import Row, Stack, Thunk, compare, compiled, copy_of, device_ms, sweep, to_rows
from torch import Tensor

from rlft.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward, swiglu_reference

TOKENS, M = (1024, 4096, 8192, 32768), 12288


def tensors(t: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up as halves of one buffer, and dh."""
    both = torch.randn(t, 2 * m, device="cuda", dtype=torch.bfloat16)
    return both[:, :m], both[:, m:], torch.randn(t, m, device="cuda", dtype=torch.bfloat16)


def stacks(t: int) -> list[Stack]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def draw(own: bool) -> tuple[list[Any], list[Tensor]]:
        gate, up, dh = tensors(t, M)
        if not own:  # transformers has two projections: two tensors
            gate, up = gate.contiguous(), up.contiguous()
        return [gate.detach().requires_grad_(), up.detach().requires_grad_()], [dh]

    return [
        Stack("rlft", swiglu, lambda: draw(True), "halves of one buffer"),
        Stack("liger", LigerSiLUMulFunction.apply, lambda: draw(False), "backward in place"),
        Stack("torch", compiled(swiglu_reference), lambda: draw(False), "torch.compile"),
    ]


def raw(t: int, m: int, backward: bool, shape: tuple[int, int, int] | None = None, h: bool = False) -> Thunk:
    gate, up, dh = tensors(t, m)
    if not backward:
        return lambda: swiglu_forward(gate, up, shape=shape)
    if h:
        return lambda: swiglu_backward(dh, gate, up, h_out=dh, dgate=gate, dup=up, shape=shape)
    return lambda: swiglu_backward(dh, gate, up, keep_h=False, shape=shape)


def check(t: int) -> None:
    found = []
    for stack in stacks(t):
        torch.manual_seed(0)
        inputs, grads = stack.draw()
        out = stack.run(*inputs)
        found.append([out, *(g.clone() for g in torch.autograd.grad(out, inputs, grads))])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def rows() -> list[Row]:
    check(256)
    found: list[Row] = []
    for t in TOKENS:
        n = t * M
        found += compare(
            f"swiglu/{t}x{M}", stacks(t), 6 * n, 10 * n, lambda t=t: raw(t, M, False), lambda t=t: raw(t, M, True)
        )
        thunks = {"rlft-raw": raw(t, M, True, h=True), "copy": copy_of(12 * n)}
        found += to_rows(f"swiglu/{t}x{M}/backward-with-h/device", device_ms(thunks), 12 * n, {"rlft-raw": "in place"})
    return found


def sweep_rows() -> list[Row]:
    found: list[Row] = []
    for t, m in ((1024, 12288), (8192, 12288), (8192, 11008), (8192, 3072)):
        for backward in (False, True):
            candidates = {
                f"block {b}, warps {w}": lambda t=t, m=m, back=backward, s=(b, 1, w): raw(t, m, back, s)
                for b in (512, 1024, 2048, 4096)
                for w in (2, 4, 8)
                if 4 <= b // (32 * w) <= 32
            }
            work = f"sweep/swiglu/{t}x{m}/{'backward' if backward else 'forward'}"
            found += sweep(work, candidates, (10 if backward else 6) * t * m)
    return found


if __name__ == "__main__":
    for row in sweep_rows() if "--sweep" in sys.argv else rows():
        print(json.dumps(row))
