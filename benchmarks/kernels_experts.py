"""The kernels of mixture-of-experts layers beside their floors and beside PyTorch, for two models' layers (one GPU).

    python benchmarks/kernels_experts.py          # prints the rows of a results file as JSON lines
    python benchmarks/kernels_experts.py --try    # small shapes on a CPU, once: every stack gives the same numbers

Floors: what moves bytes is beside a copy of the same bytes; products are beside one dense product of the same number of
operations ("dense", cuBLAS). "grouped_mm" is torch.nn.functional.grouped_mm,
"triton" our kernel, "rlft" what the public function takes. Products have K-concatenated LoRA, as the layer has them;
"grouped_mm" and "dense" too. "torch" is plain PyTorch on the GPU, "matrix" the decoding of a stack as one matrix,
"decoded" decoding and a product, "bf16" a product with what is decoded already. Routers are even.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kernel_timing import copy_of, device_ms, to_rows
from torch import Tensor

from rlft.kernels.expert_choice import Scoring, choose_experts, choose_reference
from rlft.kernels.gather import combine, combine_reference, gather, gather_reference, row_dots, row_dots_reference
from rlft.kernels.grouped import by_grouped_mm, grouped, grouped_launch, grouped_transposed
from rlft.kernels.grouped_gradient import grouped_gradient
from rlft.kernels.mxfp4 import Mxfp4Weight, decode_mxfp4, decode_mxfp4_reference, mxfp4_grouped
from rlft.kernels.nf4 import DecodeTables, Nf4Weight
from rlft.kernels.nf4_grouped import nf4_grouped
from rlft.kernels.nf4_stack import decode_stack
from rlft.kernels.route import Sorted, sort_by_expert, sort_reference

Thunk = Callable[[], Any]


class Model(NamedTuple):
    """The shape of a layer of experts, and the rank of its adapters."""

    name: str
    experts: int
    k: int
    hidden: int
    inner: int
    rank: int = 16


class Work(NamedTuple):
    """One operation by several stacks. size: bytes moved, or None; operations: of a product, or None."""

    name: str
    thunks: dict[str, Thunk]
    size: int | None = None
    operations: int | None = None


MODELS = (Model("qwen3-30b-a3b", 128, 8, 2048, 768), Model("gpt-oss-20b", 32, 4, 2880, 2880))
TOKENS = (64, 2048, 8192, 32768)
SAMPLED = (1, 16, 64, 256)
"""Sequences of an engine that samples a token of each."""
SMALL = Model("small", 4, 2, 128, 64)


def randn(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32) * scale


def routed(model: Model, T: int, device: str) -> tuple[Tensor, Tensor, Sorted]:
    """Choices and weights [T, k] of an even router, and the choices sorted."""
    logits = torch.randn(T, model.experts, device=device)
    chosen, weights = choose_experts(logits, model.k, Scoring())
    return chosen, weights, sort_by_expert(chosen, model.experts)


def routing(model: Model, T: int, device: str) -> Iterator[Work]:
    logits = torch.randn(T, model.experts, device=device)
    chosen = choose_experts(logits, model.k, Scoring()).experts
    stacks = {"rlft": lambda: choose_experts(logits, model.k, Scoring()).weights}
    stacks["torch"] = lambda: choose_reference(logits, model.k, Scoring()).weights
    yield Work("choose", stacks, 4 * logits.numel() + 8 * chosen.numel())
    stacks = {"rlft": lambda: sort_by_expert(chosen, model.experts).order}
    stacks["torch"] = lambda: sort_reference(chosen, model.experts).order
    yield Work("sort", stacks, 12 * chosen.numel())


def moving(model: Model, T: int, device: str) -> Iterator[Work]:
    _, weights, (order, inverse, _) = routed(model, T, device)
    k, H = model.k, model.hidden
    x, y = randn(T, H, device=device), randn(T * k, H, device=device)
    size = 2 * H * (T + T * k)
    stacks = {"rlft": lambda: gather(x, order, k), "torch": lambda: gather_reference(x, order, k)}
    yield Work("gather", stacks, size)
    stacks = {"rlft": lambda: combine(y, inverse, weights), "torch": lambda: combine_reference(y, inverse, weights, k)}
    yield Work("combine", stacks, size)
    h, dh = (randn(T * k, model.inner, device=device) for _ in range(2))
    stacks = {"rlft": lambda: row_dots(dh, h), "torch": lambda: row_dots_reference(dh, h)}
    yield Work("row_dots", stacks, 4 * h.numel())


def products(model: Model, T: int, device: str) -> Iterator[Work]:
    """gate_up and down with their adapters, each way, and the thin products and gradients of the adapters."""
    _, _, (_, _, offsets) = routed(model, T, device)
    M, r = T * model.k, model.rank
    for name, N, K in (("gate_up", 2 * model.inner, model.hidden), ("down", model.hidden, model.inner)):
        buffer = randn(model.experts, N + r, K + r, device=device, scale=K**-0.5)
        x, dy = randn(M, K + r, device=device), randn(M, N + r, device=device)
        w, stacked = buffer[:, :N].mT, buffer[:, :, :K]
        for way, rows, matrix in (("forward", x, w), ("dx", dy, stacked)):
            public = grouped if way == "forward" else grouped_transposed
            yield Work(f"{name}/{way}", by_all(public, rows, matrix, offsets), None, 2 * M * matrix[0].numel())
        plain_x, plain_dy = x[:, :K], dy[:, :N]
        s, ds = x[:, K:], dy[:, N:]
        for way, rows, matrix in (("S", plain_x, buffer[:, N:, :K].mT), ("dS", plain_dy, buffer[:, :N, K:])):
            public = grouped if way == "S" else grouped_transposed
            stacks = by_all(public, rows, matrix, offsets)
            yield Work(f"{name}/{way}", stacks, 2 * rows.numel() + 2 * matrix.numel(), 2 * M * matrix[0].numel())
        for way, a, b in (("dA", ds, plain_x), ("dB", plain_dy, s)):
            out = torch.zeros(model.experts, a.shape[1], b.shape[1], device=device)
            size = 2 * (a.numel() + b.numel()) + 8 * out.numel()
            yield Work(f"{name}/{way}", by_both(a, b, offsets, out), size, 2 * a.numel() * b.shape[1])


def by_all(public: Callable[..., Tensor], x: Tensor, matrix: Tensor, offsets: Tensor) -> dict[str, Thunk]:
    """A product by every stack; matrix [E, inner, outer]."""
    w = matrix.mT if public is grouped else matrix
    stacks = {"rlft": lambda: public(x, w, offsets), "grouped_mm": lambda: by_grouped_mm(x, matrix, offsets, None)}
    if x.is_cuda:
        out = x.new_empty(x.shape[0], matrix.shape[2])
        dense = matrix[0].contiguous()
        stacks["triton"] = lambda: grouped_launch(x, matrix, offsets, None, out)
        stacks["dense"] = lambda: x @ dense
    return stacks


def by_both(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> dict[str, Thunk]:
    """A gradient that is overwritten, so that every stack gives the same."""
    ours = partial(grouped_gradient, a, b, offsets, out)
    return {"rlft": ours, "grouped_mm": lambda: F.grouped_mm(a.mT, b, offs=offsets[1:])}


def nf4_stack_of(experts: int, N: int, K: int, device: str) -> Nf4Weight:
    n = experts * N * K
    draw = lambda size: torch.randint(256, (size,), dtype=torch.uint8, device=device)  # noqa: E731
    nested, code = torch.rand(-(-n // 64 // 256), device=device) * 1e-4, torch.linspace(-1, 1, 256, device=device)
    return Nf4Weight(draw(n // 2), draw(n // 64), (experts * N, K), 64, code, nested, torch.full((1,), 0.02).to(device))


def decoding(model: Model, sampled: tuple[int, ...], device: str) -> Iterator[Work]:
    """gate_up of a layer: all experts, those with rows, and products of sampled tokens."""
    E, N, K = model.experts, 2 * model.inner, model.hidden
    weight, out = nf4_stack_of(E, N, K, device), randn(E, N + 16, K + 16, device=device)[:, :N, :K]
    flat = randn(E * N, K, device=device)

    tables = DecodeTables([weight], [flat])

    def some(offsets: Tensor | None = None, rows: int | None = None) -> Tensor:
        decode_stack(weight, out, offsets, rows)
        return out

    def one_matrix() -> Tensor:
        tables.run()
        return flat.view(E, N, K)

    packed = weight.numel // 2 + weight.numel // 64
    yield Work("decode", {"rlft": some, "matrix": one_matrix}, packed + 2 * weight.numel)
    for tokens in sampled:
        _, _, (_, _, offsets) = routed(model, tokens, device)
        rows = tokens * model.k
        active = int((offsets[1:] > offsets[:-1]).sum())
        x, share = randn(rows, K, device=device), active / E
        moved = int((packed + 2 * weight.numel) * share)
        yield Work(f"decode-active/{tokens}", {"rlft": partial(some, offsets, rows)}, moved)
        stacks: dict[str, Thunk] = {"rlft": partial(nf4_grouped, x, weight, offsets)}
        stacks["decoded"] = lambda x=x, offsets=offsets, rows=rows: grouped(x, some(offsets, rows), offsets)
        stacks["bf16"] = partial(grouped, x, out, offsets)
        yield Work(f"packed-product/{tokens}", stacks, int(packed * share))


def mxfp4(model: Model, sampled: tuple[int, ...], device: str) -> Iterator[Work]:
    E, N, K = model.experts, 2 * model.inner, model.hidden
    blocks = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8, device=device)
    scales = torch.randint(110, 130, (E, N, K // 32), dtype=torch.uint8, device=device)
    weight, out = Mxfp4Weight(blocks, scales, (E, N, K)), randn(E, N, K, device=device)

    def ours() -> Tensor:
        decode_mxfp4(weight, out)
        return out

    size = weight.numel // 2 + weight.numel // 32 + 2 * weight.numel
    stacks = {"rlft": ours, "torch": lambda: decode_mxfp4_reference(weight, out.dtype)}
    yield Work("decode-mxfp4", stacks, size)
    decode_mxfp4(weight, out)
    for tokens in sampled:
        _, _, (_, _, offsets) = routed(model, tokens, device)
        x, active = randn(tokens * model.k, K, device=device), int((offsets[1:] > offsets[:-1]).sum())
        stacks = {"rlft": partial(mxfp4_grouped, x, weight, offsets), "bf16": partial(grouped, x, out, offsets)}
        yield Work(f"packed-product-mxfp4/{tokens}", stacks, (weight.numel // 2 + weight.numel // 32) * active // E)


def works(model: Model, tokens: tuple[int, ...], sampled: tuple[int, ...], device: str) -> Iterator[tuple[str, Work]]:
    for T in tokens:
        for part in (routing, moving, products):
            for work in part(model, T, device):
                yield f"experts/{model.name}/T{T}/{work.name}", work
    for work in (*decoding(model, sampled, device), *mxfp4(model, sampled, device)):
        yield f"experts/{model.name}/{work.name}", work


def measured(name: str, work: Work) -> list[dict[str, Any]]:
    """Milliseconds, GB/s beside a copy, and TFLOP/s of products with their share of the dense one."""
    thunks = work.thunks | ({"copy": copy_of(work.size)} if work.size else {})
    samples = device_ms(thunks, rounds=20)
    found = to_rows(name, samples, work.size, {})
    if work.operations:
        middle = {stack: statistics.median(values) for stack, values in samples.items() if stack != "copy"}
        for stack, ms in middle.items():
            row = {"work": name, "stack": stack, "metric": "TFLOPs", "value": round(work.operations / ms / 1e9, 1)}
            note = f"{middle['dense'] / ms:.3f} of a dense product" if "dense" in middle else ""
            found.append(row | {"unit": "TFLOP/s", "note": note})
    return found


def rows() -> list[dict[str, Any]]:
    found = []
    for model in MODELS:
        for name, work in works(model, TOKENS, SAMPLED, "cuda"):
            found += measured(name, work)
            torch.cuda.empty_cache()
    return found


def try_small() -> None:
    """Run every stack once on a CPU and compare their results."""
    for name, work in works(SMALL, (5,), (1, 3), "cpu"):
        results = {stack: thunk() for stack, thunk in work.thunks.items()}
        for result in results.values():
            torch.testing.assert_close(result, results["rlft"], rtol=1e-4, atol=1e-4, check_dtype=False)
        print(name, *results)


if __name__ == "__main__":
    if "--try" in sys.argv:
        try_small()
    else:
        for found_row in rows():
            print(json.dumps(found_row), flush=True)
