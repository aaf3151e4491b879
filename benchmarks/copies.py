"""Copies of shared prompts' keys and the sum of their gradients: ours beside PyTorch's, and a copy of the same bytes.

    python benchmarks/run_kernels.py --out DIR --commit HASH copies

Keys of a Qwen3-8B layer (8 heads of 128, views of qkv), bf16: 8 prompts of 256 before 64 completions of 1,024. Bytes:
forward 4 per copied element; backward 2 per copied element and 2 per row's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timing import interleaved, row

from rlft.kernels.copies import Copies, copied, summed

GROUPS, EACH, PROMPT, COMPLETION = 8, 8, 256, 1024


def layout() -> tuple[np.ndarray, int]:
    """The row of each copy, and how many rows there are."""
    prompts, index = GROUPS * PROMPT, []
    for group in range(GROUPS):
        index.append(np.arange(group * PROMPT, (group + 1) * PROMPT))
    for i in range(GROUPS * EACH):
        start = prompts + i * COMPLETION
        index += [np.arange(i // EACH * PROMPT, (i // EACH + 1) * PROMPT), np.arange(start, start + COMPLETION)]
    return np.concatenate(index), prompts + GROUPS * EACH * COMPLETION


def rows() -> list[dict[str, Any]]:
    index, count = layout()
    copies = Copies.of(index, count, torch.device("cuda"))
    qkv = torch.randn(count, 48, 128, device="cuda", dtype=torch.bfloat16)
    keys, at = qkv[:, 32:40], copies.index.long()
    d = torch.randn(index.size, 8, 128, device="cuda", dtype=torch.bfloat16)
    bytes_ = {"forward": 4 * d.numel(), "backward": 2 * d.numel() + 2 * keys.numel()}
    same = {name: torch.empty(size // 4, device="cuda", dtype=torch.bfloat16) for name, size in bytes_.items()}
    calls = {
        "forward": {
            "rlft": lambda: copied(keys, copies), "torch": lambda: keys[at], "copy": lambda: same["forward"].clone(),
        },
        "backward": {
            "rlft": lambda: summed(d, copies), "torch": lambda: torch.zeros_like(keys).index_add_(0, at, d),
            "copy": lambda: same["backward"].clone(),
        },
    }  # fmt: skip
    found = []
    for way, stacks in calls.items():
        for stack, ms in interleaved(stacks).items():
            rates = [bytes_[way] / t / 1e6 for t in ms]
            found.append(row(f"copies/{count}/{way}", stack, "GBs", rates, "GB/s"))
    return found
