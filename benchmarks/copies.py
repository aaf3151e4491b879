"""Copies of shared prompts' keys, which PyTorch makes, and the sum of their gradients: ours beside PyTorch's, and a
copy of the same bytes.

    python benchmarks/run_kernels.py --out DIR --commit HASH copies

Keys of a Qwen3-8B layer (8 heads of 128, views of qkv), bf16: 8 prompts of 256 before 64 completions of 1,024. Bytes:
forward 4 per copied element; backward 2 per copied element and 2 per row's.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from timing import interleaved, row

from rlft.kernels.attention import Keys, Sequences
from rlft.kernels.copies import Copies, gather_copies, sum_copies

GROUPS, EACH, PROMPT, COMPLETION = 8, 8, 256, 1024


def rows() -> list[dict[str, Any]]:
    lengths = [PROMPT] * GROUPS + [COMPLETION] * GROUPS * EACH
    prefix = [-1] * GROUPS + [i // EACH for i in range(GROUPS * EACH)]
    bounds = torch.tensor([0, *accumulate(lengths)])
    index, _ = Keys.seen(Sequences.of(bounds, torch.tensor(prefix)), None)
    count = int(bounds[-1])
    copies = Copies.of(index, count, torch.device("cuda"))
    qkv = torch.randn(count, 48, 128, device="cuda", dtype=torch.bfloat16)
    keys = qkv[:, 32:40]
    d = torch.randn(index.size, 8, 128, device="cuda", dtype=torch.bfloat16)
    bytes_ = {"forward": 4 * d.numel(), "backward": 2 * d.numel() + 2 * keys.numel()}
    same = {name: torch.empty(size // 4, device="cuda", dtype=torch.bfloat16) for name, size in bytes_.items()}
    calls = {
        "forward": {"rlft": lambda: gather_copies(keys, copies), "copy": lambda: same["forward"].clone()},
        "backward": {
            "rlft": lambda: sum_copies(d, copies),
            "torch": lambda: torch.zeros_like(keys).index_add_(0, copies.index, d),
            "copy": lambda: same["backward"].clone(),
        },
    }
    found = []
    for way, stacks in calls.items():
        for stack, ms in interleaved(stacks).items():
            rates = [bytes_[way] / t / 1e6 for t in ms]
            found.append(row(f"copies/{count}/{way}", stack, "GBs", rates, "GB/s"))
    return found
