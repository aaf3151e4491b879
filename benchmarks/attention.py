"""Attention back ends by length, and shared prefixes beside repeated rows (one H100, bf16, 32/8 heads of 128).

python benchmarks/attention.py      # prints the rows of a results file as JSON lines
"""

from __future__ import annotations

import json
from typing import Any

import torch
from timing import interleaved, row

from rlft.kernels.attention import Sequences, attention_backward, attention_forward
from rlft.kernels.attention_backends import fa4_version

HEADS, KEY_HEADS, DIM = 32, 8, 128
LENGTHS = ((512, 32), (1024, 16), (2048, 8), (4096, 4), (8192, 4), (16_384, 2), (32_768, 1), (65_536, 1))
"""Length and number of sequences."""


def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((tokens, HEADS, DIM), (tokens, KEY_HEADS, DIM), (tokens, KEY_HEADS, DIM), (tokens, HEADS, DIM))
    return tuple(torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=g) for shape in shapes)


def times(
    lengths: list[int], prefix: list[int], backends: list[str], copies: bool = False
) -> dict[str, dict[str, list[float]]]:
    """ "forward" and "backward" -> back end -> milliseconds."""
    q, k, v, dout = inputs(sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    layout, scale = Sequences.of(bounds, torch.tensor(prefix), "cuda", copies), DIM**-0.5
    saved = {b: attention_forward(q, k, v, layout, scale, b) for b in backends}
    repeats = 5 if max(lengths) > 20_000 else 11
    return {
        "forward": interleaved(
            {b: lambda b=b: attention_forward(q, k, v, layout, scale, b) for b in backends}, repeats, 2
        ),
        "backward": interleaved(
            {b: lambda b=b: attention_backward(dout, q, k, v, saved[b], layout, scale, b) for b in backends}, repeats, 2
        ),
    }


def rows() -> list[dict[str, Any]]:
    backends = ["fa2", *(["fa4"] if fa4_version() else [])]
    found = []
    for length, count in LENGTHS:
        flops = 4 * HEADS * DIM * length**2 / 2 * count
        for way, by_backend in times([length] * count, [-1] * count, backends).items():
            for backend, ms in by_backend.items():
                speed = [flops * (1 if way == "forward" else 2.5) / t / 1e9 for t in ms]
                found.append(row(f"attention/{length}", backend, f"TFLOPs_{way}", speed, "TFLOP/s"))
    for group in (8, 16):
        for completion, prompt in ((1024, 128), (1024, 512), (1024, 1024), (1024, 2048), (1024, 4096)):
            work = f"attention-shared/P{prompt}-R{completion}-G{group}"
            lengths, prefix = [prompt] + [completion] * group, [-1] + [0] * group
            ways = {
                "two calls": times(lengths, prefix, backends),
                "copies": times(lengths, prefix, backends, True),
                "repeated": times([prompt + completion] * group, [-1] * group, backends),
            }
            for name, both in ways.items():
                for backend in backends:
                    ms = [a + b for a, b in zip(both["forward"][backend], both["backward"][backend], strict=True)]
                    found.append(row(work, f"{backend} {name}", "ms", ms, "ms", "forward and backward"))
    return found


if __name__ == "__main__":
    for found_row in rows():
        print(json.dumps(found_row), flush=True)
