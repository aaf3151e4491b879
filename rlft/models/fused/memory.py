"""Estimate the memory of a training pass by closed formulae; `plan_search` chooses what each layer saves by them.

Every buffer of `rlft.models.fused.layer` and of the head is counted while it exists. With T rows, tiles of t rows:

    saved     per layer and level: what exists between forward and backward
    forward   of the layer in progress, beyond what it saves
    backward  of the layer in progress, beyond what it saved
    head      gathered rows, their norm and Jacobian (two with an entropy bonus), one chunk of logits
    scratch   what the frozen weights are decoded or copied into

The peak is the largest of: all saved + forward, all saved + head, and per layer, saved up to it + backward. Early
layers save less than late ones, since the backward frees the last layer first. The base, the adapter and its optimizer
exist before and after a pass and are not counted; nor are embedded tokens before their factor, which exist besides the
multiplied ones in the forward only, where the backward takes more.

In the formulae: s sizes of the decoder, e bytes of an activation, x [T, H] the input of a layer, n a norm's output, T
and t rows and rows of a tile, H bytes of a row of the residual stream, q columns of q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from rlft.kernels.logprobs import chunk_rows
from rlft.models import experts
from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.levels import Level
from rlft.models.fused.mixer_shape import Recurrent
from rlft.models.fused.offload import AHEAD, BEHIND
from rlft.models.fused.projection import Mode

TILES = (8192, 4096, 2048, 1024)
"""Rows that a layer runs at a time, except in attention."""
GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """What a pass saves, and how it runs."""

    levels: tuple[Level, ...]
    """The level of each layer."""
    tile: int
    store: Mode
    """Mode of `rlft.models.fused.projection.Store`."""
    chunk_bytes: int
    """Bytes of one chunk of logits in the head."""
    saved: int
    """Bytes on the device between forward and backward, in the layers."""
    work: int
    """Bytes at the peak beyond `saved`, scratch included."""
    host: int
    """Bytes in host memory."""
    padded: int = 0
    """Rows that a pass is padded to for a CUDA graph; 0: not padded."""

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak."""
        return self.saved + self.work

    def __str__(self) -> str:
        counts = [(level, self.levels.count(level)) for level in sorted(set(self.levels))]
        levels = ", ".join(f"{count} at {level}" for level, count in counts)
        host = f", {self.host / GIB:.2f} GiB on the host" if self.host else ""
        return (
            f"{levels}; {self.saved / GIB:.2f} GiB kept, {self.work / GIB:.2f} at work, tiles of {self.tile} rows{host}"
        )


class PassRecord(NamedTuple):
    """How a pass over the layers ran, for what runs after it."""

    plan: MemoryPlan
    workspace: Tensor | None
    """Memory of the weight buffers, flat, which may be overwritten until the next layer runs; None: there is none."""


def _movable(s: DecoderShape, level: Level) -> int:
    """Return the bytes per row of x and of attention's results, which a level keeps on the device or on the host."""
    return s.element * s.hidden + (s.element * s.q + s.lse if level.keep_attention else 0)


def saved(s: DecoderShape, level: Level) -> int:
    """Return the device bytes per row that a layer saves at `level`."""
    e = s.element
    s_down, movable = e * s.ranks[3], 0 if level.on_host else _movable(s, level)
    qkv = e * (s.qkv + s.ranks[0]) if level.keep_qkv else 0
    mlp = e * (s.hidden + s.gate_up) if level.keep_mlp else 0
    if s.experts is not None:
        mlp += s.experts.routing(e) + (s.experts.u(e) if level.keep_mlp else 0)
    shared = 4 * e * s.kv if s.shares_kv else 0  # k, v and the sums of their gradients
    return s_down + movable + qkv + mlp + shared


def host_bytes(s: DecoderShape, level: Level) -> int:
    """Return the host bytes per row of a layer at `level`."""
    return _movable(s, level) if level.on_host else 0


def forward_work(
    s: DecoderShape, rows: int, tile: int, level: Level, keys: int = 0, recurrent: Recurrent | None = None
) -> int:
    """Return the bytes of a layer's forward beyond its input and what it saves at `level`. keys: keys that are copied
    for sequences behind shared prefixes. recurrent: None: one sequence of whole chunks."""
    e, t = s.element, min(rows, tile)
    qkv = 0 if level.keep_qkv else e * s.qkv
    attended = 0 if level.attention_on_device else e * s.q + s.lse
    finished = e * s.q if s.finishes else 0
    n = e * (s.hidden + max(s.tails))
    gates = 0 if level.keep_mlp else e * s.gates
    post = e * 2 * s.hidden if s.post_norm else 0
    if s.residual_factor and level.keep_mlp and not s.post_norm:
        post = e * s.hidden  # the down projection's output, which is otherwise added as it is computed
    post += e * (2 * s.per_layer + sum(s.tails[4:]))
    mlp = max(e * s.hidden + n, gates + max(n, e * (s.intermediate + s.tails[3])) + post)
    if s.experts is not None:
        mlp = max(mlp, n + s.experts.forward(e, level.keep_mlp))
    # Layers that do not save x still hold it while they run, and copies to the host are in flight.
    x = e * s.hidden + BEHIND * host_bytes(s, level) if level.on_host else 0
    if s.mixer is not None:
        mix = s.mixer.work(rows, recurrent, backward=False)
    else:
        repeated = 2 * s.q if s.attention == "sdpa" else 0  # of heads too wide to share k and v
        mix = rows * e * (s.rotated + repeated) + keys * 2 * e * s.kv
    attention = rows * (qkv + attended) + max(mix, rows * finished)
    if s.finishes and not level.keep_attention:
        attended = 0  # finished, and freed
    return rows * x + max(attention, rows * (attended + finished + e * s.hidden) + t * mlp)


def backward_work(
    s: DecoderShape, rows: int, tile: int, level: Level, keys: int = 0, recurrent: Recurrent | None = None
) -> int:
    """Return the bytes of a layer's backward beyond what it saved at `level`. keys, recurrent: as in `forward_work`."""
    e, t = s.element, min(rows, tile)
    H, T = e * s.hidden, e * s.tails[1]
    restored = (H if level.on_host else 0) + (0 if level.attention_on_device else e * s.q + s.lse)
    # Layers whose copies back from the host are in flight.
    restored += min(AHEAD, s.layers - 1) * host_bytes(s, level)
    qkv = 0 if level.keep_qkv else e * (s.qkv + s.ranks[0])
    gradients = H + H + T  # of the output and of mid
    # The MLP, tile by tile.
    mid, gate_up = (0, 0) if level.keep_mlp else (H + T, e * s.gate_up)
    n, post = H + e * s.tails[2], (e * (s.intermediate + 3 * s.hidden) if s.post_norm else 0)
    experts = n + mid + s.experts.backward(e, level.keep_mlp) if s.experts is not None else 0
    partial_sums = 4 * 16 * -(-s.gates // 256) if s.ranks[2] else 0
    tiled = n + mid + gate_up + post + max(H + e * (s.tails[3] + s.intermediate), H + partial_sums)
    tiled += e * s.q if s.finishes else 0
    # An input per layer: the residual stream before and after it, what is added, their gradients, and the gate's.
    tiled += e * (5 * s.hidden + 4 * s.per_layer + 2 * sum(s.tails[4:])) if s.per_layer else 0
    sums = s.experts.sums(t) if s.experts is not None else 0
    mlp = rows * (e * s.q + (0 if level.keep_attention and not s.finishes else qkv)) + t * max(tiled, experts) + sums
    freed = e * (s.hidden + s.gate_up + s.ranks[3]) if level.keep_mlp else 0
    freed += s.experts.u(e) if s.experts is not None and level.keep_mlp else 0
    mix = _attention_work(s, rows, keys) if s.mixer is None else s.mixer.work(rows, recurrent, backward=True)
    attention = rows * (e * s.q + qkv - freed) + mix
    inputs = rows * (qkv - freed) + t * (n + H)
    return rows * (restored + gradients) + max(mlp, attention, inputs)


def _attention_work(s: DecoderShape, rows: int, keys: int) -> int:
    """Return the bytes of attention's backward: rotated q and k, dq, dk, dv, and the back end's accumulators; mid, gate
    and up are freed."""
    e = s.element
    beside = e * s.q if s.output_gate else 0  # q without its gate
    beside += 2 * e * s.kv if s.value_norm else 0  # v before its norm, and its gradient
    accumulators = {"fa4": 4 * (s.q + 2 * s.q_heads), "fa2": 4 * (s.q + s.q_heads)}
    key_accumulators = {"fa4": 8 * s.kv, "fa2": 2 * e * s.q * (s.q > s.kv)}.get(s.attention, 0)
    work = rows * (e * s.rotated + beside + e * (s.q + 2 * s.kv) + accumulators.get(s.attention, 4 * e * s.q))
    # Copied keys and values, and their gradients in addition to those of the rows.
    return work + (keys * (4 * e * s.kv + key_accumulators) if keys else rows * key_accumulators)


def head_work(s: DecoderShape, rows: int, trained: int, how: PassOptions) -> int:
    """Return the bytes from the last layer's output to the log-probs of `trained` of the decoder's `rows`. A chunk's
    buffers use the scratch of the weights as far as they fit. An entropy bonus needs no further chunk."""
    e, wide = s.element, max(4, s.element)
    chunk = min(chunk_rows(s.vocab, s.dtype, how.chunk_bytes), max(1, trained))
    columns = -(-s.vocab // 64) * 64
    left = scratch(s, how.store) if how.store != "shadow" else 0
    new = 0
    for size in (chunk * columns * wide, chunk * columns * e, chunk * s.hidden * wide):
        if size <= left:
            left -= size
        else:
            new += size
    jacobians = 1 + s.entropy_grad
    return e * s.hidden * (rows + (2 + jacobians) * trained + chunk) + new


def per_layer_bytes(s: DecoderShape) -> int:
    """Return the bytes per row of what all layers read beside the residual stream, through a whole pass: values, with
    an adapter their gradients, and what its projection's norm reads."""
    return s.element * s.per_layer_total * (3 if s.per_layer_trained else 1)


def scratch(s: DecoderShape, mode: Mode) -> int:
    """Return the bytes of the buffers that hold the frozen weights in the dtype of activations."""
    buffers = [_buffers(kind, mode) for kind in s.layer_kinds]
    return sum(buffers[s.kind(layer)] for layer in range(s.layers)) if mode == "shadow" else max(buffers)


def stack_scratch(s: DecoderShape, mode: Mode) -> int:
    """Return the bytes of the buffers that hold the stacks of experts, beside those of `scratch`."""
    sizes = [(0, 0) if kind.experts is None else kind.experts.stacks for kind in s.layer_kinds]
    if mode == "shadow":
        return s.element * sum(sum(sizes[s.kind(layer)]) for layer in range(s.layers))
    return s.element * max(max(each) if mode == "group" else sum(each) for each in sizes)


def _buffers(s: DecoderShape, mode: Mode) -> int:
    """Return the bytes of one layer's buffers."""
    groups = [
        s.qkv * (s.hidden + s.tails[0]),
        (s.hidden + s.tails[1]) * (s.q + s.tails[1]),
        s.gate_up * (s.hidden + s.tails[2]),
        (s.hidden + s.tails[3]) * (s.intermediate + s.tails[3]),
    ]
    if s.per_layer:
        groups.append((s.per_layer + s.tails[4]) * (s.hidden + s.tails[4]))
        groups.append((s.hidden + s.tails[5]) * (s.per_layer + s.tails[5]))
    return s.element * (max(groups) if mode == "group" else sum(groups))


@dataclass(frozen=True)
class PassOptions:
    """How a pass runs, apart from the levels of its layers."""

    tile: int
    store: Mode
    chunk_bytes: int


def evaluate(
    s: DecoderShape,
    rows: int,
    trained: int,
    mixed: tuple[int, Level, Level],
    how: PassOptions,
    keys: int = 0,
    recurrent: Recurrent | None = None,
) -> MemoryPlan:
    """Return the plan with the first `count` layers at level `lower` and the others at `upper`. mixed: (count, lower,
    upper). keys, recurrent: as in `forward_work`."""
    count, lower, upper = mixed
    levels = (lower,) * count + (upper,) * (s.layers - count)
    kinds = s.layer_kinds

    def up_to(layers: int, each: Callable[[DecoderShape, Level], int] = saved) -> int:
        """Sum a number of bytes per row over the first layers."""
        below, all_of_them = s.count(min(layers, count)), s.count(layers)
        return rows * sum(
            number * each(kinds[kind], lower) + (all_of_them[kind] - number) * each(kinds[kind], upper)
            for kind, number in ((kind, below[kind]) for kind in all_of_them)
        )

    total = up_to(s.layers)
    weights = scratch(s, how.store) + stack_scratch(s, how.store) + rows * per_layer_bytes(s)
    # Made before anything is saved: a projection, its norm, the embedding and their sum.
    made = s.element * s.per_layer_total * (4 * rows + s.hidden)
    highest = max(total + head_work(s, rows, trained, how), made - rows * per_layer_bytes(s))
    work = (rows, how.tile)
    for level, first, last in ((lower, 0, count), (upper, count, s.layers)):
        # Copies to and from the host are of layers of another kind.
        widest = max(host_bytes(kind, level) for kind in kinds)
        for index in s.last_of_each_kind(first, last):
            kind, saved_here = kinds[s.kind(index)], up_to(index + 1)
            more = rows * (widest - host_bytes(kind, level))
            back = min(AHEAD, s.layers - 1) * more + backward_work(kind, *work, level, keys, recurrent)
            highest = max(highest, saved_here + back)
            highest = max(highest, saved_here + BEHIND * more + forward_work(kind, *work, level, keys, recurrent))
    # The layers right above those on the host run while copies back are in flight; where these layers are on the host
    # too, `backward_work` counts as many copies.
    for distance in range(0 if upper.on_host else min(AHEAD, s.layers - count)):
        index = count + distance
        below = range(max(0, index - AHEAD), count)
        in_flight = rows * sum(host_bytes(kinds[s.kind(layer)], lower) for layer in below)
        back = backward_work(kinds[s.kind(index)], *work, upper, keys, recurrent)
        highest = max(highest, up_to(index + 1) + in_flight + back)
    return MemoryPlan(
        levels, how.tile, how.store, how.chunk_bytes, total, highest + weights - total, up_to(s.layers, host_bytes)
    )


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Count the frozen weights of a model: {"bytes", "parameters"}, 4-bit weights with their scales."""
    size = count = 0
    for name, weight in model.named_parameters():
        if "lora_" in name:
            continue
        state: Any = getattr(weight, "quant_state", None)
        size += weight.numel() * weight.element_size()
        count += math.prod(experts.shape_of(weight) if state is None else state.shape)
        if state is not None:
            size += state.absmax.numel() * state.absmax.element_size()
            size += state.state2.absmax.numel() * state.state2.absmax.element_size() if state.nested else 0
    scales = [scale for name, scale in model.named_buffers() if name.endswith("_proj_scales")]  # of experts in MXFP4
    return {"bytes": size + sum(scale.numel() for scale in scales), "parameters": count}
