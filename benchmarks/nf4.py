"""NF4 decode to bf16 beside bitsandbytes' dequantize_4bit and a copy of the same bytes (one GPU).

    python benchmarks/nf4.py [--sweep]      # prints the rows of a results file as JSON lines

bitsandbytes is measured where it is installed, on the same bytes, after its result was compared bit for bit. The sweep
takes launch parameters and three more ways of looking the 16 values up.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from kernel_timing import copy_of, device_ms, graph_ms, host_ms, sets_for, to_rows
from torch import Tensor

from rlft.kernels.launch import table_entry
from rlft.kernels.nf4 import FIELDS, NF4_CODE, DecodeTables, Nf4Weight, _scales, decode_reference

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


@triton.jit
def pair_kernel(
    table,
    pairs,
    COUNT: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
):
    """A byte is looked up whole: 256 pairs of fp32 as int64. In-features are multiples of TILE."""
    m, tile = table_entry(table, tl.program_id(0), COUNT, FIELDS)
    row = table + m * FIELDS
    packed = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int32)), 16)
    out = tl.multiple_of(tl.load(row + 5).to(tl.pointer_type(tl.bfloat16)), 16)
    NB: tl.constexpr = TILE // BLOCK
    WORDS: tl.constexpr = BLOCK // 8
    block = tile.to(tl.int64) * NB + tl.arange(0, NB)
    word = tl.arange(0, NB)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(packed + tile.to(tl.int64) * (TILE // 8) + word)
    byte = (words[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 255
    if GATHER:
        pair = tl.reshape(
            tl.gather(tl.load(pairs + tl.arange(0, 256)), tl.reshape(byte, [TILE // 2]), 0), [NB, WORDS, 4]
        )
    else:
        pair = tl.load(pairs + byte)
    first = pair.to(tl.int32).to(tl.float32, bitcast=True)
    second = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    value = tl.reshape(tl.join(first, second), [NB, WORDS, 8])
    value = (value * _scales(row, block, block >= 0, 256)[:, None, None]).to(tl.bfloat16)
    columns, stride = tl.multiple_of(tl.load(row + 7).to(tl.int32), 8), tl.multiple_of(tl.load(row + 8), 8)
    per_row = (columns // TILE).to(tl.uint32)
    r = tile.to(tl.uint32) // per_row
    place = r.to(tl.int64) * stride + ((tile.to(tl.uint32) - r * per_row) * TILE).to(tl.int64) + word * 8
    tl.store(out + place[:, :, None] + tl.arange(0, 8)[None, None, :], value)


def by_pairs(plan: DecodeTables, gather: bool) -> Callable[[], None]:
    code = torch.tensor(NF4_CODE, device="cuda")
    byte = torch.arange(256, device="cuda")
    pairs = torch.stack([code[byte >> 4], code[byte & 15]], 1).contiguous().view(torch.int64)[:, 0].contiguous()
    ((blocksize, _, _, members, table, programs, tile),) = plan.launches

    def run() -> None:
        pair_kernel[(programs,)](
            table,
            pairs,
            COUNT=len(members),
            FIELDS=FIELDS,
            BLOCK=blocksize,
            TILE=tile,
            GATHER=gather,
            num_warps=plan.warps,
            enable_fp_fusion=False,
        )

    return run


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
        if name != "qwen3-4b-gate":
            for tile, warps, gather in itertools.product((2048, 4096), (2, 4), (True, False)):
                plans = [DecodeTables(*s, tile=tile, warps=warps) for s in sets]
                by_pairs(plans[0], gather)()
                assert torch.equal(sets[0][1][0], decode_reference(sets[0][0][0], torch.bfloat16))
                thunks[f"{tile}-{warps}-pair-{'gather' if gather else 'load'}"] = [by_pairs(p, gather) for p in plans]
        measured = to_rows(f"nf4-sweep/{name}", graph_ms(thunks, rounds=15), size(WORKS[name]), {})
        found += sorted((r for r in measured if r["metric"] == "GBs"), key=lambda r: -r["value"])
        del sets, thunks
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    for found_row in sweep() if "--sweep" in sys.argv else rows():
        print(json.dumps(found_row), flush=True)
