"""Estimate the memory of the vLLM engine next to the trainer, and choose its mode and KV cache size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlft.errors import EngineError, UnsupportedModel
from rlft.models import experts
from rlft.models.adapter import without_wrappers
from rlft.models.device_memory import DeviceMemory
from rlft.models.kind import seeing_of
from rlft.models.policy import Policy
from rlft.models.targets import TOP_K
from rlft.rollout.vllm.caches import Caches, delta_work
from rlft.rollout.vllm.names import Weight
from rlft.rollout.vllm.slots import ranks_of, slot_rank

GIB = 2**30
BATCHED = 8192
"""Largest number of tokens that vLLM runs at a time, prompts included."""
STEP = GIB // 4
"""Granularity of the size of a KV cache that is limited by memory."""
GRAPHS = GIB
"""Reserve for vLLM's CUDA graphs, kernel workspaces and allocator fragmentation. Measured on an H100: 0.5 to 0.9
GiB."""


@dataclass(frozen=True)
class EngineMemory:
    """Sizes that determine the memory of the engine."""

    linear: int
    """Bytes of all linear layers and experts in the engine's dtype: the memory of dequantized or merged weights."""
    largest: int
    """Bytes of the largest group of linear layers dequantized at a time: the memory of shared weights."""
    slots: int
    """Bytes of the adapter's slots and of three copies: the source, the previous source and the read-back reference."""
    caches: Caches
    longest: int
    """Tokens of the longest sequence."""
    sequences: int
    """Sequences decoded at the same time."""
    work: int
    """Bytes of temporaries in a forward of `batched` tokens and in sampling for `sequences`."""
    batched: int
    pending: int
    """Bytes that the trainer will still allocate: the optimiser's moments."""
    stack: int = 0
    """Bytes of the largest stack of experts in the engine's dtype; 0 without any."""
    features: int | None = None
    """Bytes of what vLLM keeps of images while it runs their prompts: 0 where it gets none; None: a model of text."""

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
        """Compute the sizes. weights: `shared_weights.frozen_weights` of the base. sequences: completions of a step."""
        if policy.vision is not None and policy.vision.trained:
            raise UnsupportedModel("vLLM has no vision tower for an adapter (lora.vision = true)")
        config: Any = policy.base.config.get_text_config()  # type: ignore[operator,union-attr]
        item = dtype.itemsize
        shapes = {name: weight.shape for name, weight in weights.items()}
        stacks = {name: shapes[name] for name in map(without_wrappers, experts.stacks(policy.base))}
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and shape[0] != config.vocab_size}
        sizes = [math.prod(shape) for shape in stacks.values()]
        concurrent, batched = min(sequences, max_seqs), min(BATCHED, max(longest * max_seqs, 1024))
        adapter = policy.adapter_params.numel()
        slots = _slots(ranks_of(policy.model, policy.adapter()), shapes)
        features = _features(policy.base.config, max(batched, longest), batched, item)
        work = batched * (_layer_work(config, stacks) * item + delta_work(config, item))
        work += concurrent * config.vocab_size * 16
        tower = 0 if policy.vision is None else policy.vision.peak  # before vLLM's first forward
        return cls(
            linear=sum(rows * columns for rows, columns in matrices.values()) * item + sum(sizes) * item,
            largest=_largest(matrices) * item,
            slots=(3 * adapter + slots) * item,
            caches=Caches.of(config, item),
            longest=longest,
            sequences=concurrent,
            work=max(work, tower) + (features or 0),
            batched=batched,
            pending=2 * adapter * policy.adapter_params.element_size(),
            stack=max(sizes, default=0) * item,
            features=features,
        )

    @property
    def full_cache(self) -> int:
        """Bytes of a KV cache in which every sequence fits completely."""
        return self.sequences * self.caches.of_sequence(self.longest)

    @property
    def min_cache(self) -> int:
        """Smallest size of the KV cache in bytes, for one sequence; vLLM does not start with less."""
        return 2 * self.caches.of_sequence(self.longest)

    def most_sequences(self, kv_bytes: int) -> int:
        """Return how many sequences can start in a KV cache of this size: vLLM refuses to allow more where each has
        states."""
        return max(1, kv_bytes // self.caches.of_sequence(1))


@dataclass(frozen=True)
class EngineMode:
    """The mode of the engine, its KV cache size, and the reason."""

    mode: Literal["shared", "dequantized", "merged"]
    kv_bytes: int
    why: str

    def __str__(self) -> str:
        return f"{self.mode} weights ({self.why}), {self.kv_bytes / GIB:.2f} GiB of cache"


def choose_mode(sizes: EngineMemory, mode: str, kv_gib: float | None, device_memory: DeviceMemory) -> EngineMode:
    """Choose the mode and the size of the KV cache from the free memory of the device.

    mode: "auto" or one of the three modes. kv_gib: size of the cache, None to choose it. Raises EngineError when not
    even one sequence fits.
    """
    if device_memory.device.type != "cuda":
        # On a CPU nothing sleeps, so separate weights would be in memory twice at all times.
        if mode not in ("auto", "shared"):
            raise EngineError(
                f'engine.mode = "{mode}": on a CPU vLLM has no memory that sleeps; set "shared" or "auto"'
            )
        kv = int(kv_gib * GIB) if kv_gib is not None else min(sizes.full_cache, 4 * GIB)
        return EngineMode("shared", max(kv, sizes.min_cache), "nothing sleeps on a CPU")
    room = int(device_memory.free()) - sizes.pending - sizes.slots - sizes.work - GRAPHS
    available = {
        "shared": room - sizes.largest,
        "dequantized": room - sizes.linear,
        # Merged weights are checked by computing each again: a copy, and a byte per element that says where it differs.
        "merged": room - sizes.linear - sizes.stack * 3 // 2,
    }
    requested = None if kv_gib is None else int(kv_gib * GIB)
    if mode == "auto":
        # A quarter of the step's sequences at a time keeps decoding busy; below that, more cache is worth more.
        enough = requested if requested is not None else max(sizes.min_cache, sizes.full_cache // 4)
        mode = "dequantized" if available["dequantized"] >= enough else "shared"
        weights_text = f"{sizes.linear / GIB:.2f} GiB of plain weights"
        why = (
            f"{weights_text} fit beside the cache while it is awake"
            if mode == "dequantized"
            else f"{weights_text} would not fit"
        )
    else:
        why = "engine.mode"
    # Rounded down, since vLLM recompiles for another cache size, and the free memory varies between runs.
    target = max(sizes.full_cache, sizes.min_cache)
    kv = min(target, max(available[mode] // STEP * STEP, sizes.min_cache)) if requested is None else requested
    if kv < sizes.min_cache or kv > available[mode]:
        raise EngineError(
            f"{mode} weights leave {available[mode] / GIB:.2f} GiB for vLLM's cache, which needs "
            f"{max(kv, sizes.min_cache) / GIB:.2f} (one sequence of {sizes.longest} tokens takes "
            f"{sizes.min_cache / 2 / GIB:.2f}): lower engine.kv_gib, "
            f'sampling.max_tokens or engine.max_seqs, or set engine.mode = "shared"'
        )
    return EngineMode(mode, kv, why)  # type: ignore[arg-type]


def _largest(matrices: Mapping[str, Any]) -> int:
    """Return an upper bound of the elements of the largest layer of the engine.

    matrices: name -> (rows, columns). Layers that the engine combines have the same input and the same parent module.
    """
    sizes: dict[tuple[str, int], int] = {}
    for name, (rows, columns) in matrices.items():
        layer = (name.rsplit(".", 2)[0], columns)
        sizes[layer] = sizes.get(layer, 0) + rows * columns
    return max(sizes.values(), default=0)


def _features(config: Any, kept: int, batched: int, item: int) -> int | None:
    """Return the bytes of the features of images in vLLM: 0 where it gets none, None for a model of text.

    kept: rows of its cache of features. batched: rows of its buffers, for embedded tokens and for what is added behind
    layers. item: bytes of an element.
    """
    seeing = seeing_of(config)
    if seeing is None or not seeing.vllm:
        return None if seeing is None else 0
    levels = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    return (1 + levels) * (kept + batched) * config.get_text_config().hidden_size * item


def _layer_work(config: Any, stacks: Mapping[str, Sequence[int]]) -> int:
    """Return an upper bound of the elements per token that the temporaries of a layer take.

    stacks: name of a stack of experts -> (E, out, in).
    """
    hidden = config.hidden_size
    dense = 3 * (getattr(config, "intermediate_size", None) or 4 * hidden) + 6 * hidden
    if not stacks:
        return dense
    found = next((getattr(config, name) for name in TOP_K if getattr(config, name, None)), 1)
    choices = max(found) if isinstance(found, list | tuple) else found
    width = max(columns for name, (_, _, columns) in stacks.items() if name.endswith("down_proj"))
    # Of each row what goes out, and at most four times both halves of the first product, as the gate is computed.
    return dense + choices * (hidden + 8 * width)


def _slots(ranks: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> int:
    """Return an upper bound of the number of elements in the slots of an adapter.

    ranks: by the names of weights, of each expert in a stack. A layer of the engine that combines several of the
    trainer's has slots for all of them, so weights next to an adapted one count too.
    """
    stacks = [(rank, *shapes[name]) for name, rank in ranks.items() if len(shapes[name]) == 3]
    plain = {name: rank for name, rank in ranks.items() if len(shapes[name]) == 2}
    parents = {name.rsplit(".", 2)[0] for name in plain}
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and name.rsplit(".", 2)[0] in parents]
    return sum(rank * experts * (rows + columns) for rank, experts, rows, columns in stacks) + sum(
        rows + columns for rows, columns in matrices
    ) * slot_rank(max(plain.values(), default=1))
