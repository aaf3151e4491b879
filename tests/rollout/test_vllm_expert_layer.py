"""A layer of experts as vLLM's engine computes it, against a loop over tokens and choices in float64.

On a CPU by plain PyTorch, on a GPU by the kernels, which CUDA graphs capture.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_rule import assert_rule, assert_survives_stream_and_graph
from torch import Tensor

from rlft.kernels.mxfp4 import Mxfp4Weight, decode_mxfp4_reference
from rlft.kernels.nf4 import Nf4Weight, decode_reference
from rlft.models.experts_nf4 import quantized
from rlft.rollout.vllm.expert_layer import ExpertLayer, Product
from rlft.rollout.vllm.names import Weight
from rlft.rollout.vllm.slots import StackSlot, put

E, K, H, I = 5, 2, 128, 64  # noqa: E741
"""Experts, choices, hidden size and the width of an expert: rows of whole blocks."""
FORMS = ("plain", "transposed", "nf4", "mxfp4")
NF4 = SimpleNamespace(bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.uint8)


def gate(u: Tensor) -> Tensor:
    """Interleaved and clamped, as gpt-oss has it."""
    return u[:, ::2].clamp(max=1.0) * (u[:, 1::2] + 1)


def weight_of(form: str, rows: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Weight, Tensor]:
    """A stack [E, rows, columns], and its values in float64."""
    plain = torch.randn(E, rows, columns, generator=torch.Generator().manual_seed(rows)) / columns**0.5
    weight: Any = plain.to(device, dtype)
    if form == "transposed":
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif form == "nf4":
        weight = Nf4Weight.from_bnb(quantized(plain.to(device), NF4))
        return weight, decode_reference(weight, dtype).view(E, rows, columns).double()
    elif form == "mxfp4":
        g, blocks = torch.Generator().manual_seed(columns), (E, rows, columns // 32)
        packed = torch.randint(256, (*blocks, 16), dtype=torch.uint8, generator=g)
        e8m0 = torch.randint(121, 123, blocks, dtype=torch.uint8, generator=g)
        weight = Mxfp4Weight(packed.to(device), e8m0.to(device), (E, rows, columns))
        return weight, decode_mxfp4_reference(weight, dtype).double()
    return weight, weight.double()


def product(
    form: str, rows: int, columns: int, rank: int, dtype: torch.dtype, device: str, bias: bool
) -> tuple[Product, list[Tensor]]:
    """A product with an adapter, and W + B A and the bias in float64."""
    weight, values = weight_of(form, rows, columns, dtype, device)
    g = torch.Generator().manual_seed(rank)
    sizes = ((E, rank, columns), (E, rows, rank), (E, rows))
    a, b, c = (torch.randn(size, generator=g).to(device, dtype) for size in sizes)
    slot = StackSlot("w", (E, rows, columns), rank, a)
    if rank:
        put([slot], {"w": (a / columns**0.5, b)})
    update = b.double() @ slot.a.double()
    return Product(weight, c if bias else None, slot if rank else None), [values + update, c.double() * bias]


def drawn(
    form: str, rank: int, tokens: int, dtype: torch.dtype, device: str, bias: bool = True
) -> tuple[ExpertLayer, tuple[Tensor, Tensor, Tensor], Tensor]:
    """A layer, what it is called with, and what comes out in float64."""
    up, (w1, c1) = product(form, 2 * I, H, rank, dtype, device, bias)
    down, (w2, c2) = product(form, H, I, rank, dtype, device, bias)
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, H, generator=g).to(device, dtype)
    chosen = torch.stack([torch.randperm(E - 1, generator=g)[:K] for _ in range(tokens)] or [torch.zeros(0)]).int()
    chosen = chosen.view(tokens, K).to(device)  # the last expert has no rows
    weights = torch.rand(tokens, K, generator=g).to(device)
    truth = torch.zeros(tokens, H, dtype=torch.float64, device=device)
    for t, experts in enumerate(chosen.tolist()):
        for j, e in enumerate(experts):
            hidden = gate((w1[e] @ x[t].double() + c1[e])[None])[0]
            truth[t] += weights[t, j].double() * (w2[e] @ hidden + c2[e])
    return ExpertLayer(up, down, gate), (x, weights, chosen), truth


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_layer_equals_the_loop(form: str, rank: int) -> None:
    for tokens, bias in ((0, True), (1, True), (9, True), (9, False)):
        layer, inputs, truth = drawn(form, rank, tokens, torch.float32, "cpu", bias)
        got = layer(*inputs)
        assert got.shape == truth.shape and got.dtype == torch.float32
        assert torch.allclose(got.double(), truth, atol=1e-5 * float(truth.abs().max()) if tokens else 0, rtol=0)


def test_rows_that_fill_up_a_graph_change_no_other() -> None:
    layer, (x, weights, chosen), truth = drawn("nf4", 2, 9, torch.float32, "cpu")
    chosen[5:] = -1
    assert torch.allclose(layer(x, weights, chosen)[:5].double(), truth[:5], atol=1e-5 * float(truth.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 1, 2, 8])
def test_gpu_the_kernels_obey_the_rule_and_are_captured(form: str, rank: int) -> None:
    for tokens in (1, 33, 300):
        layer, inputs, truth = drawn(form, rank, tokens, torch.bfloat16, "cuda")
        plain, on_cpu, _ = drawn(form, rank, tokens, torch.bfloat16, "cpu")
        assert_rule(f"{form} {rank} {tokens}", layer(*inputs), plain(*on_cpu).cuda(), truth, 2)
        assert_survives_stream_and_graph(lambda layer=layer, inputs=inputs: [layer(*inputs)])
