"""S, dS and the gradients of A and B: against float64, with plain PyTorch in the same dtype as the yardstick."""

from __future__ import annotations

import pytest
import torch
from kernel_rule import unread
from torch import Tensor

from rlft.kernels.lora_group import LoraGroup, write_adapters_reference
from rlft.kernels.low_rank import gradients, gradients_a_reference, gradients_b_reference, gradients_launch, shrink

# q, k, v with one width each, k not adapted; gate, up of one width; one alone of odd width and odd rank.
GROUPS = [
    LoraGroup(96, (80, 32, 48), (16, 0, 16), (2.0, 1.0, 0.7), align=16),
    LoraGroup(64, (272, 272), (8, 8), (0.5, 0.5)),
    LoraGroup(70, (33,), (3,), (1.5,), align=16),
    # Rank beyond one block of 64 columns.
    LoraGroup(130, (24,), (80,), (1.0,), align=16),
    # More than one launch adds up: q, k, v, the gate, beta and the decay of a gated DeltaNet; one not adapted.
    LoraGroup(64, (48, 40, 32, 32, 4, 4), (16, 8, 3, 16, 0, 16), (2.0, 1.0, 0.7, 0.5, 1.0, 3.0), align=16),
    LoraGroup(64, (48, 24, 4, 4), (40, 8, 8, 8), (2.0, 1.0, 0.7, 0.5), align=16),
]


class Inputs:
    """x and dY in rows with a tail, the operands, zeroed gradients; everything not to be read is NaN."""

    def __init__(self, group: LoraGroup, T: int, dtype: torch.dtype, device: str = "cpu", hard: bool = False) -> None:
        g = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        H, tail = group.in_features, group.tail
        A = [randn(r, H) / H**0.5 for r in group.ranks]
        B = [randn(o, r) for o, r in zip(group.out_features, group.ranks, strict=True)]
        self.b, self.a = torch.empty(group.out, tail, dtype=dtype), torch.empty(tail, H, dtype=dtype)
        write_adapters_reference(group, A, B, self.b, self.a)
        x, dy = randn(T, H), randn(T, group.out)
        if hard:
            # Sums over T that cancel: the second half is minus the first, but for one row.
            x[T // 2 :], dy[1::2] = -x[: T - T // 2], dy[: T // 2]
            x *= 30
        nan = unread(dtype, device)
        self.rows_x = torch.cat([x, torch.full((T, tail), nan)], 1).to(device, dtype)
        self.rows_dy = torch.cat([dy, torch.full((T, tail), nan)], 1).to(device, dtype)
        self.x, self.s = self.rows_x[:, :H], self.rows_x[:, H:]
        self.dy, self.ds = self.rows_dy[:, : group.out], self.rows_dy[:, group.out :]
        self.b, self.a = self.b.to(device), self.a.to(device)
        wide = torch.promote_types(dtype, torch.float32)
        self.grad_A = [torch.ones(r, H, dtype=wide, device=device) for r in group.ranks]
        self.grad_B = [
            torch.ones(o, r, dtype=wide, device=device) for o, r in zip(group.out_features, group.ranks, strict=True)
        ]

    def double(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """dy, x, b and gradients of one, in float64."""
        ones = [[torch.ones_like(t, dtype=torch.float64) for t in ts] for ts in (self.grad_A, self.grad_B)]
        return self.dy.double(), self.x.double(), self.b.double(), ones[0], ones[1]


def close(got: Tensor, truth: Tensor, plain: Tensor, factor: float, name: str) -> None:
    """err(got) <= factor * err(plain PyTorch in this dtype) + slack, worst element and whole."""
    slack = 1e-6 * (truth.abs().max().item() if truth.numel() else 0)
    for measure in (lambda t: t.abs().max() if t.numel() else t.sum(), torch.linalg.vector_norm):
        ours, theirs = measure(got.double() - truth).item(), measure(plain.double() - truth).item()
        assert ours <= factor * theirs + slack * max(1, truth.numel()) ** 0.5, f"{name}: {ours} against {theirs}"


def check(group: LoraGroup, inputs: Inputs, launches: bool) -> None:
    """shrink, then gradients with what shrink left, each against float64 of the same inputs."""
    shrink(group, inputs.x, inputs.a, inputs.s)
    close(inputs.s, inputs.x.double() @ inputs.a.double().T, inputs.x @ inputs.a.T, 2, "S")
    dy, x, b, true_A, true_B = inputs.double()
    true_ds = torch.empty_like(inputs.ds, dtype=torch.float64)
    # dA takes the rounded dS, as it must when dS is stored.
    gradients_b_reference(group, dy, inputs.s.double(), b, true_ds, true_B)
    gradients_a_reference(group, true_ds, x, true_A)
    plain_ds = inputs.dy @ inputs.b
    write = gradients_launch if launches else gradients
    write(group, inputs.dy, inputs.x, inputs.s, inputs.b, inputs.ds, inputs.grad_A, inputs.grad_B)
    close(inputs.ds, true_ds, plain_ds, 2, "dS")
    for i in group.adapted:
        plain_A = 1 + plain_ds[:, group.columns(i)].T @ inputs.x
        plain_B = 1 + group.scales[i] * (inputs.dy[:, group.rows(i)].T @ inputs.s[:, group.columns(i)])
        close(inputs.grad_A[i], true_A[i], plain_A, 3, f"dA {i}")
        close(inputs.grad_B[i], true_B[i], plain_B, 3, f"dB {i}")
    assert all((t == 1).all() for i, t in enumerate(inputs.grad_A) if i not in group.adapted)


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_interpreted(group, dtype) -> None:
    # One, odd, more than two blocks of T.
    for T, hard in ((1, False), (7, True), (65, False)):
        check(group, Inputs(group, T, dtype, hard=hard), launches=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cpu_path(dtype) -> None:
    for group in GROUPS:
        for T in (0, 1, 33):
            check(group, Inputs(group, T, dtype), launches=False)


def test_reference_is_the_derivative() -> None:
    """L = sum(w * (s (x A^T) B^T)): autograd's gradients of A and B are `gradients` of dY = w."""
    group = GROUPS[0]
    inputs = Inputs(group, 9, torch.float64)
    shrink(group, inputs.x, inputs.a, inputs.s)
    gradients(group, inputs.dy, inputs.x, inputs.s, inputs.b, inputs.ds, inputs.grad_A, inputs.grad_B)
    for i in group.adapted:
        B = (inputs.b[group.rows(i), group.columns(i)] / group.scales[i]).requires_grad_()
        A = inputs.a[group.columns(i)].clone().requires_grad_()
        (inputs.dy[:, group.rows(i)] * (group.scales[i] * (inputs.x @ A.T) @ B.T)).sum().backward()
        torch.testing.assert_close(inputs.grad_A[i] - 1, A.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(inputs.grad_B[i] - 1, B.grad, rtol=1e-10, atol=1e-12)


def test_bad_input_says_what_it_wants() -> None:
    group = GROUPS[0]
    i = Inputs(group, 4, torch.float32)
    with pytest.raises(ValueError, match=r"shrink: want x \[T, 96\].*got x \(4, 95\)"):
        shrink(group, i.x[:, :95], i.a, i.s)
    with pytest.raises(ValueError, match="of one dtype"):
        shrink(group, i.x.half(), i.a, i.s)
    with pytest.raises(ValueError, match="unit column stride"):
        shrink(group, i.x, i.a.T.contiguous().T, i.s)
    with pytest.raises(ValueError, match=r"gradients_b: want dy \[T, 160\]"):
        gradients(group, i.dy[:, 1:], i.x, i.s, i.b, i.ds, i.grad_A, i.grad_B)
    with pytest.raises(ValueError, match=r"gradient \[80, 16\], contiguous"):
        gradients(group, i.dy, i.x, i.s, i.b, i.ds, i.grad_A, [i.grad_B[0].T.contiguous().T, *i.grad_B[1:]])
    with pytest.raises(ValueError, match=r"gradients_a: want .* on cpu, for projection 0, not on meta"):
        gradients(group, i.dy, i.x, i.s, i.b, i.ds, [i.grad_A[0].to("meta"), *i.grad_A[1:]], i.grad_B)


# Of Qwen3-8B, and what is no multiple of anything.
GPU_GROUPS = [
    LoraGroup(4096, (4096, 1024, 1024), (16, 16, 16), (2.0, 2.0, 2.0)),
    LoraGroup(4096, (12288, 12288), (64, 64), (0.5, 0.5)),
    LoraGroup(12288, (4096,), (16,), (2.0,)),
    LoraGroup(1000, (1111, 72), (5, 0), (2.0, 1.0), align=16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("group", GPU_GROUPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hard", [False, True])
def test_gpu(group, dtype, hard, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    for T in (1, 129, 4097):
        check(group, Inputs(group, T, dtype, "cuda", hard), launches=False)


@pytest.mark.gpu
def test_gpu_two_runs_are_equal_and_can_be_captured() -> None:
    group = GPU_GROUPS[0]
    runs = []
    for capture in (False, False, True):
        i = Inputs(group, 1000, torch.bfloat16, "cuda")

        def run(i: Inputs = i) -> None:
            shrink(group, i.x, i.a, i.s)
            gradients(group, i.dy, i.x, i.s, i.b, i.ds, i.grad_A, i.grad_B)

        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graph.replay()
        else:
            run()
        runs.append([i.s, i.ds, *i.grad_A, *i.grad_B])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_gpu_more_than_2_31_elements() -> None:
    """T * (H + tail) beyond int32: the last rows count."""
    group = LoraGroup(4096, (4096,), (16,), (1.0,))
    T = 2**31 // 4096 + 100
    x = torch.zeros(T, 4096 + 64, dtype=torch.bfloat16, device="cuda")
    dy = torch.zeros_like(x)
    x[-3:, :4096] = torch.randn(3, 4096, device="cuda")
    dy[-3:, :4096] = torch.randn(3, 4096, device="cuda")
    small = Inputs(group, 3, torch.bfloat16, "cuda")
    small.x.copy_(x[-3:, :4096])
    small.dy.copy_(dy[-3:, :4096])
    check(group, small, launches=False)
    grad_A, grad_B = [torch.ones_like(small.grad_A[0])], [torch.ones_like(small.grad_B[0])]
    shrink(group, x[:, :4096], small.a, x[:, 4096:])
    gradients(group, dy[:, :4096], x[:, :4096], x[:, 4096:], small.b, dy[:, 4096:], grad_A, grad_B)
    torch.testing.assert_close(x[-3:, 4096:], small.s, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(grad_A[0], small.grad_A[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(grad_B[0], small.grad_B[0], rtol=1e-2, atol=1e-3)
