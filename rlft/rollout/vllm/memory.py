"""How much memory the vLLM engine takes beside the trainer, and which of its modes that leaves room for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlft.errors import EngineError
from rlft.models.fused import memory
from rlft.models.policy import Policy
from rlft.rollout.vllm.shared_weights import Weight, module_of, slot_rank

GIB = 2**30
BATCHED = 8192
"""Tokens that vLLM runs at a time at most, prompts included."""
BLOCK = 128
"""Tokens that a sequence's part of the cache is rounded up to: the largest block that vLLM uses (on a CPU)."""
STEP = GIB // 4
"""What the size of a cache that is limited by memory is a multiple of."""
GRAPHS = GIB
"""Kept free for vLLM's graphs, its kernels' workspaces and what its allocator loses between blocks: 0.5 to 0.9 GiB were
seen on an H100."""


@dataclass(frozen=True)
class EngineMemory:
    """What decides how much the engine takes."""

    linear: int
    """Bytes of all linear layers in the engine's dtype: what dequantized and merged weights take."""
    largest: int
    """Bytes of the largest group of them that is decoded at a time: what shared weights take."""
    slots: int
    """Bytes of the adapter's slots, and of its copies: what fills them, the one before, what they are compared with."""
    per_token: int
    """Bytes of the cache per token."""
    longest: int
    """Tokens of the longest sequence."""
    sequences: int
    """Sequences that there are at the same time."""
    work: int
    """Bytes at work in a forward pass of `batched` tokens and a draw of `sequences`."""
    batched: int
    pending: int
    """Bytes that the trainer has yet to take for good: the optimiser's moments."""

    @classmethod
    def of(
        cls,
        policy: Policy,
        weights: Mapping[str, Weight],
        dtype: torch.dtype,
        longest: int,
        sequences: int,
        max_seqs: int,
    ) -> EngineMemory:
        """weights: `shared_weights.frozen` of the base. longest: tokens. sequences: completions of a step."""
        config: Any = policy.base.config.get_text_config()  # type: ignore[operator,union-attr]
        e = dtype.itemsize
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        matrices = [w for w in weights.values() if len(w.shape) == 2 and w.shape[0] != config.vocab_size]
        linear = sum(w.shape[0] * w.shape[1] for w in matrices)
        together, batched = min(sequences, max_seqs), min(BATCHED, max(longest * max_seqs, 1024))
        adapter = policy.adapter_params.numel()
        slots = _slots({n: a.shape[0] for n, a in policy.adapter().items() if ".lora_A." in n}, weights)
        return cls(
            linear=linear * e,
            largest=2 * wide * config.hidden_size * e,
            slots=(3 * adapter + slots) * e,
            per_token=2 * config.num_hidden_layers * heads * size * e,
            longest=longest,
            sequences=together,
            work=batched * (3 * wide + 6 * config.hidden_size) * e + together * config.vocab_size * 16,
            batched=batched,
            pending=2 * adapter * policy.adapter_params.element_size(),
        )

    @property
    def wanted(self) -> int:
        """Bytes of a cache in which every sequence has room to its end."""
        return self.sequences * -(-self.longest // BLOCK) * BLOCK * self.per_token

    @property
    def least(self) -> int:
        """Bytes of a cache for one sequence, without which vLLM does not start."""
        return 2 * -(-self.longest // BLOCK) * BLOCK * self.per_token


@dataclass(frozen=True)
class EngineMode:
    """How the engine runs, and why."""

    mode: Literal["shared", "dequantized", "merged"]
    kv_bytes: int
    why: str

    def __str__(self) -> str:
        return f"{self.mode} weights ({self.why}), {self.kv_bytes / GIB:.2f} GiB of cache"


def choose_mode(sizes: EngineMemory, mode: str, kv_gib: float | None, device: torch.device) -> EngineMode:
    """The mode and the size of the cache for what is free on the device now.

    mode: "auto" or one of the three. kv_gib: size of the cache, None to choose it. Raises EngineError when not even
    one sequence fits.
    """
    if device.type != "cuda":
        # Nothing sleeps on a CPU, so weights of its own would be there twice at all times.
        if mode not in ("auto", "shared"):
            raise EngineError(
                f'engine.mode = "{mode}": on a CPU vLLM has no memory that sleeps; set "shared" or "auto"'
            )
        kv = int(kv_gib * GIB) if kv_gib is not None else min(sizes.wanted, 4 * GIB)
        return EngineMode("shared", max(kv, sizes.least), "nothing sleeps on a CPU")
    room = int(memory.free(device)) - sizes.pending - sizes.slots - sizes.work - GRAPHS
    left = {"shared": room - sizes.largest, "dequantized": room - sizes.linear, "merged": room - sizes.linear}
    asked = None if kv_gib is None else int(kv_gib * GIB)
    if mode == "auto":
        # A quarter of the step's sequences at a time keeps decoding busy; below that the cache is worth more.
        enough = asked if asked is not None else max(sizes.least, sizes.wanted // 4)
        mode = "dequantized" if left["dequantized"] >= enough else "shared"
        own = f"{sizes.linear / GIB:.2f} GiB of plain weights"
        why = f"{own} fit beside the cache while it is awake" if mode == "dequantized" else f"{own} would not fit"
    else:
        why = "engine.mode"
    # Rounded down, since vLLM compiles anew for another size of the cache, and what is free is never twice the same.
    wanted = max(sizes.wanted, sizes.least)
    kv = min(wanted, max(left[mode] // STEP * STEP, sizes.least)) if asked is None else asked
    if kv < sizes.least or kv > left[mode]:
        raise EngineError(
            f"{mode} weights leave {left[mode] / GIB:.2f} GiB for vLLM's cache, and it is to have "
            f"{max(kv, sizes.least) / GIB:.2f} (one sequence of {sizes.longest} tokens takes "
            f"{sizes.least / 2 / GIB:.2f}): lower engine.kv_gib, "
            f'sampling.max_tokens or engine.max_seqs, or set engine.mode = "shared"'
        )
    return EngineMode(mode, kv, why)  # type: ignore[arg-type]


def _slots(ranks: Mapping[str, int], weights: Mapping[str, Weight]) -> int:
    """Numbers in the slots of an adapter, at most. ranks: by PEFT's name of A. A layer of the engine that stands for
    several of the trainer's has room for all of them: those beside an adapted one count."""
    beside = {module_of(name).rpartition(".")[0] for name in ranks}
    matrices = [w for name, w in weights.items() if len(w.shape) == 2 and name.rsplit(".", 2)[0] in beside]
    return sum(w.shape[0] + w.shape[1] for w in matrices) * slot_rank(max(ranks.values()))
