"""NF4 decode to bf16 beside bitsandbytes' dequantize_4bit and a copy of the same bytes (one GPU).

    python benchmarks/nf4.py [--sweep]      # prints the rows of a results file as JSON lines

bitsandbytes is measured where it is installed, on the same bytes, after its result was compared bit for bit. The sweep
takes launch parameters and both ways of looking the 16 values up.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from kernel_timing import copy_of, device_ms, graph_ms, host_ms, sets_for, to_rows
from torch import Tensor

from rlft.kernels.nf4 import NF4_CODE, DecodeTables, Nf4Weight, decode_reference

LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (12288, 4096), (12288, 4096), (4096, 12288))
"""The seven matrices of a Qwen3-8B layer."""
WORKS = {
    "layer": LAYER,
    "12288x4096": LAYER[4:5],
    "4096x4096": LAYER[:1],
    "1024x4096": LAYER[1:2],
    "qkv": LAYER[:3],
    # 2,560 is no multiple of a program's elements, so rows are found by division.
    "qwen3-4b-gate": ((9728, 2560),),
}


def size(shapes: tuple[tuple[int, int], ...]) -> int:
    """Bytes: packed, 8-bit scales, nested scales, and the bf16 result."""
    return sum(o * i // 2 + o * i // 64 + o * i // 64 // 64 + 2 * o * i for o, i in shapes)


def made(shape: tuple[int, int]) -> Nf4Weight:
    n = shape[0] * shape[1]
    draw = lambda m: torch.randint(256, (m,), dtype=torch.uint8, device="cuda")  # noqa: E731
    nested = torch.rand(-(-n // 64 // 256), device="cuda")
    code = torch.linspace(-1, 1, 256, device="cuda")
    return Nf4Weight(draw(n // 2), draw(n // 64), shape, 64, code, nested, torch.rand(1, device="cuda"))


def inputs(shapes: tuple[tuple[int, int], ...]) -> list[tuple[list[Nf4Weight], list[Tensor]]]:
    """Sets of weights and outputs that together exceed the L2 cache."""
    return [
        ([made(s) for s in shapes], [torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes])
        for _ in range(sets_for(size(shapes)))
    ]


def by_bitsandbytes(weights: list[Nf4Weight]) -> Callable[[], Any]:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    states = []
    for w in weights:
        nested = QuantState(w.nested_absmax, code=w.nested_code, blocksize=256, dtype=torch.float32)
        assert w.offset is not None
        state = QuantState(
            w.absmax,
            torch.Size(w.shape),
            torch.tensor(NF4_CODE, device="cuda"),
            64,
            "nf4",
            torch.bfloat16,
            w.offset[0],
            nested,
        )
        states.append((w.packed[:, None], state))
    return lambda: [dequantize_4bit(packed, state) for packed, state in states]


def rows() -> list[dict[str, Any]]:
    found = []
    for name, shapes in WORKS.items():
        sets = inputs(shapes)
        plans = [DecodeTables(*s) for s in sets]
        for plan in plans:
            plan.run()
        assert all(torch.equal(o, decode_reference(w, o.dtype)) for w, o in zip(*sets[0], strict=True)), name
        thunks: dict[str, Callable[[], Any]] = {"rlft": plans[0].run}
        if importlib.util.find_spec("bitsandbytes"):
            thunks["bnb"] = by_bitsandbytes(sets[0][0])
            assert all(torch.equal(o, t) for o, t in zip(sets[0][1], thunks["bnb"](), strict=True)), name
        bytes_moved, notes = size(shapes), {"rlft": f"{len(plans[0].launches)} launch"}
        found += to_rows(f"nf4/{name}/host", host_ms(thunks), None, notes)
        found += to_rows(f"nf4/{name}/device", device_ms(thunks | {"copy": copy_of(bytes_moved)}), bytes_moved, notes)
        graphs = {"rlft": [p.run for p in plans], "copy": [copy_of(bytes_moved) for _ in plans]}
        found += to_rows(f"nf4/{name}", graph_ms(graphs), bytes_moved, notes)
        del sets, plans, thunks, graphs
        torch.cuda.empty_cache()
    return found


def sweep() -> list[dict[str, Any]]:
    """Best first, per work: tile-warps-lookup."""
    found = []
    for name in ("layer", "4096x4096", "qwen3-4b-gate"):
        sets = inputs(WORKS[name])
        thunks: dict[str, list[Callable[[], Any]]] = {"copy": [copy_of(size(WORKS[name])) for _ in sets]}
        for tile, warps, gather in itertools.product((1024, 2048, 4096, 8192), (1, 2, 4, 8), (True, False)):
            if 8 <= tile // warps // 32 <= 128:
                plans = [DecodeTables(*s, tile=tile, warps=warps, gather=gather) for s in sets]
                thunks[f"{tile}-{warps}-{'gather' if gather else 'load'}"] = [p.run for p in plans]
        measured = to_rows(f"nf4-sweep/{name}", graph_ms(thunks, rounds=15), size(WORKS[name]), {})
        found += sorted((r for r in measured if r["metric"] == "GBs"), key=lambda r: -r["value"])
        del sets, thunks
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    for found_row in sweep() if "--sweep" in sys.argv else rows():
        print(json.dumps(found_row), flush=True)
