"""The memory plan of layers with experts: its formulae against the tensors that are alive, and what a plan counts.

Its agreement with what a GPU really takes is in test_fused_experts_gpu.py.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_experts import adapted
from test_memory import QWEN3_8B
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlft.kernels.logprobs import CHUNK_BYTES
from rlft.models.fused import expert_steps, expert_weights, ops
from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.expert_shape import ExpertShape
from rlft.models.fused.expert_steps import ExpertSteps
from rlft.models.fused.fuse import fuse
from rlft.models.fused.gradients import Gradients
from rlft.models.fused.levels import L0, L1, L2, LEVELS
from rlft.models.fused.memory import GIB, PassOptions, backward_work, evaluate, forward_work, saved, stack_scratch
from rlft.models.fused.plan_search import choose_plan, cost_of

A3B = ExpertShape(experts=128, k=8, hidden=2048, width=768, tails=(16, 16), ranks=(2, 2))
"""Qwen3-30B-A3B."""
QWEN3_A3B = replace(
    QWEN3_8B, layers=48, hidden=2048, kv=512, intermediate=0, tails=(64, 64, 0, 0), ranks=(48, 16, 0, 0), experts=A3B
)


TAIL = 16


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that still exist, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count([args, kwargs], made=False)
        out = func(*args, **kwargs or {})
        self._count(out, made=True)
        return out

    def _count(self, tensors: Any, made: bool) -> None:
        """made: by an operation; else they were there before, unless they are known."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._seen:
                size = storage.nbytes() if made else 0
                self._seen.add(storage._cdata)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def like_kernels(monkeypatch: Any) -> None:
    """What the kernels allocate on a GPU in place of what plain PyTorch does: grouped_mm writes into no tensor."""

    def product(x: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        made = x.new_zeros(x.shape[0], w.shape[1]) if out is None or w.shape[1] > TAIL else out.zero_()
        return made if out is None or out is made else out.copy_(made)

    def transposed(dy: Tensor, w: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
        return product(dy, w.transpose(1, 2), offsets, out)

    def combined(y: Tensor, inverse: Tensor, weights: Any, k: Any = None, residual: Any = None, out: Any = None) -> Any:
        return y.new_zeros(y.shape[0] // (k or weights.shape[1]), y.shape[1]) if out is None else out.zero_()

    monkeypatch.setattr(expert_weights, "grouped", product)
    monkeypatch.setattr(expert_weights, "grouped_transposed", transposed)
    monkeypatch.setattr(expert_weights, "grouped_gradient", lambda *_, **__: None)
    monkeypatch.setattr(expert_steps, "combine", combined)
    monkeypatch.setattr(expert_steps, "gather", lambda x, order, k, out: out.zero_())
    monkeypatch.setattr(expert_steps, "row_dots", lambda a, b: a.new_zeros(a.shape[0]))
    monkeypatch.setattr(ops, "gate_forward", lambda gate, up, activation, out: out.zero_())
    monkeypatch.setattr(ops, "gate_backward", lambda *_: None)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_formulae_are_the_tensors_that_are_alive(kind: str, keep: bool, monkeypatch: Any) -> None:
    decoder: Any = fuse(adapted(kind, torch.float32, num_hidden_layers=1, num_experts_per_tok=4))
    (layer,), shape = decoder.layers, decoder.shape.experts
    like_kernels(monkeypatch)
    t, n = 512, torch.randn(512, 64)
    steps = ExpertSteps(layer.experts, decoder.store.stacks, 0, "default", n)
    steps.weights(0), steps.weights(1)
    routing, out = steps.routing(n, keep), torch.empty_like(n)
    kept = [routing.experts, routing.weights, *([routing.u] if keep else [])]
    assert shape.routing(4) + (shape.u(4) if keep else 0) == sum(x.numel() * x.element_size() for x in kept) / t  # type: ignore[union-attr]
    grads = Gradients.of(steps.adapters, None, n)
    with torch.no_grad():
        with Alive() as forward:
            steps.forward(n, routing, n, out)
        with Alive() as backward:
            result = steps.backward(out, n, routing, grads, None)
    assert forward.now == 0 and backward.now == result.numel() * 4, "nothing is left"
    for found, planned in ((forward.most, shape.forward(4, keep)), (backward.most, shape.backward(4, keep))):
        assert abs(found / t - planned) <= 0.05 * planned, (found / t, planned)


def test_bytes_per_token_are_those_of_the_arithmetic() -> None:
    """Qwen3-30B-A3B in bf16: choices and weights of 8 experts at every level; at L0 gate and up of 8 rows too."""
    assert [saved(QWEN3_A3B, level) - saved(replace(QWEN3_A3B, experts=None), level) for level in LEVELS] == [
        64 + 2 * 8 * (1536 + 16),
        *[64] * 5,
    ]
    assert A3B.active == 2048 * (3 * 8 * 768 + 128)
    assert stack_scratch(QWEN3_A3B, "layer") == 2 * 128 * (1552 * 2064 + 2064 * 784)
    assert stack_scratch(QWEN3_A3B, "group") == 2 * 128 * 1552 * 2064
    assert stack_scratch(QWEN3_A3B, "shadow") == 48 * stack_scratch(QWEN3_A3B, "layer")
    assert stack_scratch(QWEN3_8B, "shadow") == 0
    assert QWEN3_A3B.weights == A3B.active + 2048 * (4096 + 2 * 512 + 4096)


def test_experts_are_in_the_peak() -> None:
    rows, tile = 8192, 2048
    narrow = replace(QWEN3_A3B, q=64, kv=64)
    for level in (L0, L1):
        keeps = level.keep_mlp
        more = forward_work(narrow, rows, tile, level) - forward_work(replace(narrow, experts=None), rows, tile, level)
        assert more > tile * (A3B.forward(2, keeps) - 2 * 2 * 2048)
        more = backward_work(narrow, rows, tile, level)
        assert more >= rows * 2 * 2 * 2048 + tile * A3B.backward(2, keeps) + A3B.sums(tile)
    how = PassOptions(tile, "layer", CHUNK_BYTES)
    wider = replace(QWEN3_A3B, experts=A3B._replace(experts=256))
    peaks = [evaluate(shape, rows, 1, (48, L2, L2), how).peak for shape in (QWEN3_A3B, wider)]
    assert peaks[1] - peaks[0] >= stack_scratch(wider, "layer") - stack_scratch(QWEN3_A3B, "layer")


def test_decoding_all_experts_for_the_few_of_a_token_costs_time() -> None:
    """The share of a step that decoding takes is as many times larger as more weights are decoded."""
    assert QWEN3_8B.decoded == 1 and 10 < QWEN3_A3B.decoded < 16
    how = PassOptions(8192, "layer", CHUNK_BYTES)
    decode = [cost_of(shape, how, (L0,), 8192) for shape in (QWEN3_8B, QWEN3_A3B)]
    assert decode[1] == pytest.approx(QWEN3_A3B.decoded * decode[0])
    for budget in (8.0, 20.0, 120.0):
        plan = choose_plan(QWEN3_A3B, 8192, 8192, budget * GIB, 0.0)
        assert plan.peak <= budget * GIB and (plan.store == "shadow") == (budget == 120.0)


def test_the_plan_knows_dense_layers_from_layers_of_experts() -> None:
    decoder: Any = fuse(adapted("glm4_moe", torch.float32))
    shape: DecoderShape = decoder.shape
    dense, sparse = shape.layer_kinds
    assert shape.order == (0, 1) and dense.experts is None and dense.intermediate == 64
    assert sparse.experts == ExpertShape(8, 2, 64, 64, (16, 16), (2, 2), shared=True) and sparse.intermediate == 64
    alone: Any = fuse(adapted("mixtral", torch.float32))
    (mixture,) = alone.shape.layer_kinds
    assert (mixture.intermediate, mixture.tails[2:], mixture.ranks[2:]) == (0, (0, 0), (0, 0))
    assert alone.graphless == "experts" and alone.graphs is None
