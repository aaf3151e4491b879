"""The longest completion that fits on a GPU, by the memory plan: model x memory. Computed, not measured.

    python benchmarks/memory_plan.py [--commit X]      # writes results/memory_plan_cpu_DATE.json, in seconds

A GRPO step in NF4 with LoRA rank 16 on all linear layers and AdamW, prompts of 1,024 tokens. On the card are the base,
the adapter with its gradient and moments, a reserve for what is not planned (CUDA, the allocator, the sleeping engine),
and the larger of two: a training pass over one prompt and completion, or vLLM in mode "shared" with a cache for two
such sequences. Layers may keep activations in host memory of `HOST`. How near the plan is to a real step is in the
results of longest.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

from results_file import write
from timing import row

from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.plan_search import choose_plan

GIB = 2**30
CARDS = (16, 24, 48, 80, 141)
"""GB of a card, as it is sold."""
USABLE = 0.985
"""Share of that many GiB which the driver has free: 79.1 GiB of an H100, 139 of an H200."""
HOST = 48 * GIB
RESERVE = 1.5 * GIB
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a parameter in NF4 with double quantisation: 4 bits, a byte per block of 64, 4 bytes per 256 blocks."""
PROMPT = 1024
RANK = 16


class Model(NamedTuple):
    """Sizes of a decoder in its config.json on the hub."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qk_norm: bool


MODELS = (
    Model("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151936, True, True),
    Model("Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, 151936, True, True),
    Model("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151936, True, True),
    Model("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, False, True),
    Model("Qwen3-14B", 40, 5120, 17408, 40, 8, 128, 151936, False, True),
    Model("Qwen3-32B", 64, 5120, 25600, 64, 8, 128, 151936, False, True),
    Model("Llama-3.3-70B", 80, 8192, 28672, 64, 8, 128, 128256, False, False),
)


def shape_of(model: Model) -> DecoderShape:
    """Return what the memory plan needs to know of a model."""
    return DecoderShape(
        layers=model.layers,
        hidden=model.hidden,
        q=model.heads * model.head_dim,
        kv=model.kv_heads * model.head_dim,
        q_heads=model.heads,
        intermediate=model.intermediate,
        vocab=model.vocab,
        dtype=torch.bfloat16,
        tails=(64, 64, 64, 64),
        ranks=(3 * RANK, RANK, 2 * RANK, RANK),
        qk_norm=model.qk_norm,
        post_norm=False,
        attention="fa2",
    )


def kept_bytes(model: Model, shape: DecoderShape) -> float:
    """Return the bytes that stay from step to step: base, adapter in fp32 with gradient and two moments."""
    projections = model.layers * (
        3 * (model.hidden + shape.q) + (shape.q + model.hidden) + 3 * (model.hidden + model.intermediate)
    )
    embedding = 2 * model.vocab * model.hidden * (1 if model.tied else 2)
    return model.layers * shape.weights * NF4_BYTES + embedding + 4 * 4 * RANK * projections


def needed_bytes(model: Model, shape: DecoderShape, tokens: int, room: float) -> float:
    """Return the bytes of a training pass over a completion of `tokens`, or of the awake engine if that is more."""
    rows = PROMPT + tokens
    training = choose_plan(shape, rows, tokens, room, float(HOST)).peak
    cache = 2 * rows * 2 * model.layers * shape.kv * 2
    batched = 8192 * (3 * model.intermediate + 6 * model.hidden) * 2
    return max(training, cache + 2 * model.intermediate * model.hidden * 2 + batched + GIB)


def longest(model: Model, card: int) -> int:
    """Return the longest completion in tokens, in steps of 1,024; 0 if none fits."""
    shape = shape_of(model)
    room = card * USABLE * GIB - RESERVE - kept_bytes(model, shape)
    low, high = 0, 1024
    while high * 1024 <= 2**20 and needed_bytes(model, shape, high * 1024, room) <= room:
        low, high = high, high * 2
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if needed_bytes(model, shape, middle * 1024, room) <= room else (low, middle)
    return low * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit")
    commit = parser.parse_args().commit
    rows = []
    for model in MODELS:
        for card in CARDS:
            tokens = longest(model, card)
            print(f"{model.name} on {card} GB: {tokens:,}")
            rows.append(
                row(f"memory-plan/{model.name}", f"{card} GB", "longest_completion", tokens, "tokens", "planned")
            )
    print(write("memory_plan", rows, commit=commit))


if __name__ == "__main__":
    main()
