"""Every Triton kernel compiles for every card that rlft serves, within 99 KiB of shared memory, without a GPU.

`python tests/test_cross_compile.py` is what the test runs, in a process of its own: the interpreter, which the other
tests use, replaces the kernels. It compiles ROWS for ARCHS and prints one JSON line each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ARCHS = (80, 86, 89, 90)
"""A100; A10, A40 and 3090; 4090; H100."""

SHARED_BYTES = 99 * 1024
"""What one program may use on sm_86 and sm_89."""

Row = tuple[Any, dict[str, str], dict[str, Any], int]
"""Kernel, type of each run-time argument, value of each constexpr (None for an absent pointer), num_warps."""


def arguments(kernel: Any, constants: dict[str, Any], element: str = "bf16", **types: str) -> dict[str, str]:
    """Types by name: NAME_ptr is a pointer to `element`, eps fp32, everything else i32; `types` says otherwise."""
    found = {}
    for name in kernel.arg_names:
        if name not in constants:
            default = f"*{element}" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32"
            found[name] = types.get(name, default)
    return found


def rms_norm_rows() -> list[Row]:
    from rlft.kernels import rms_norm as m

    found = []
    # Many rows a program; a usual row; no power of two; the longest, in fp32. With and without the residual.
    for h, element, alone in ((128, "bf16", 0), (4096, "bf16", 1), (5120, "fp16", 0), (m.MAX_H, "fp32", 0)):
        rows, warps = m.launch_shape(h)
        shape = {"H": h, "BLOCK": m.power_of_2(h), "ROWS": rows, "GEMMA": bool(alone)}
        for kernel, extra in ((m.forward_kernel, "delta_ptr"), (m.backward_kernel, "dres_ptr")):
            constants = shape | ({extra: None} if alone else {})
            found.append((kernel, arguments(kernel, constants, element, rstd_ptr="*fp32"), constants, warps))
    return found


def qk_rope_rows() -> list[Row]:
    from rlft.kernels import qk_rope as m

    found = []
    for d, r, norm in ((128, 128, True), (96, 72, True), (m.MAX_D, m.MAX_D, False)):
        block, tail, rows, warps = m.launch_shape(d, r)
        shape = {"HQ": 28, "HK": 4, "D": d, "R": r, "BLOCK": block, "TAIL": tail, "ROWS": rows, "GEMMA": False}
        constants = shape | ({} if norm else {"qw_ptr": None, "kw_ptr": None, "pos_ptr": None})
        for kernel in (m.forward_kernel, m.backward_kernel):
            found.append((kernel, arguments(kernel, constants, pos_ptr="*i64"), constants, warps))
    return found


def swiglu_rows() -> list[Row]:
    from rlft.kernels import swiglu as m

    found = []
    for width, activation in ((12288, "silu"), (11008, "gelu"), (48, "gelu_pytorch_tanh")):
        block, rows, warps = m.launch_shape(width)
        constants = {"M": width, "BLOCK": block, "ROWS": rows, "ACT": activation}
        for kernel in (m.forward_kernel, m.backward_kernel):
            found.append((kernel, arguments(kernel, constants), constants, warps))
    return found


ROWS = (rms_norm_rows, qk_rope_rows, swiglu_rows)
"""A new kernel file adds its function here."""


def compile_row(row: Row, arch: int) -> dict[str, Any]:
    """Compile to machine code; pointers and strides divisible by 16, as the launches of whole tensors have them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, warps = row
    names = list(kernel.arg_names)
    aligned = [n for n in types if types[n].startswith("*") or n.startswith("stride")]
    source = ASTSource(
        kernel,
        {n: types.get(n, "constexpr") for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    name = f"{kernel.__module__}.{kernel.__name__}"
    return {"kernel": name, "arch": arch, "shared": built.metadata.shared, "cubin": len(built.asm["cubin"])}


def test_every_kernel_compiles_for_every_card() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-4000:]
    built = [json.loads(line) for line in run.stdout.splitlines()]
    assert {b["arch"] for b in built} == set(ARCHS)
    assert [b for b in built if b["shared"] > SHARED_BYTES or not b["cubin"]] == []


if __name__ == "__main__":
    for rows in ROWS:
        for row in rows():
            for arch in ARCHS:
                print(json.dumps(compile_row(row, arch)), flush=True)
