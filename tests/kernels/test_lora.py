"""Grouped LoRA projections: K-concatenated forward and backward, and the function that stands alone in autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_rule import unread
from torch import Tensor

from rlft.kernels import lora
from rlft.kernels.lora import lora_linear, lora_reference
from rlft.kernels.lora_group import AdapterWriteTables, LoraGroup, Part, write_adapters
from rlft.kernels.low_rank import gradients_a, gradients_b
from rlft.kernels.nf4 import DecodeTables, Nf4Weight, decode_reference

# q, k, v of which k has no adapter; gate, up; one alone of odd width and rank; nothing adapted at all.
GROUPS = [
    LoraGroup(48, (32, 16, 16), (4, 0, 7), (2.0, 1.0, 0.7), align=16),
    LoraGroup(32, (40, 40), (8, 8), (0.5, 0.5)),
    LoraGroup(10, (7,), (3,), (1.5,), align=16),
    LoraGroup(10, (6, 5), (0, 0), (1.0, 1.0)),
]


class Layer:
    """A group's tensors, and what a layer that owns its buffers would hold; whatever is not to be read is NaN."""

    def __init__(self, group: LoraGroup, T: int, dtype: torch.dtype, device: str = "cpu") -> None:
        g = torch.Generator().manual_seed(2)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

        H = group.in_features
        self.group, self.x = group, randn(T, H)
        self.weights = [randn(o, H, scale=H**-0.5) for o in group.out_features]
        self.A = [randn(r, H, scale=H**-0.5) for r in group.ranks]
        self.B = [randn(o, r) for o, r in zip(group.out_features, group.ranks, strict=True)]
        self.bias, self.dy = randn(group.out), randn(T, group.out)
        nan = unread(self.x.dtype, self.x.device.type)
        self.rows_x, self.rows_dy = (F.pad(t, (0, group.tail), value=nan) for t in (self.x, self.dy))
        self.weight = lora.Weight.of(group, self.x.new_full(group.buffer, nan))
        self.weight.buffer[: group.out, :H] = torch.cat(self.weights)
        write_adapters(group, self.A, self.B, self.weight.b, self.weight.a)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """y, dx, gradients of A and of B by autograd through the reference in `dtype`."""
        x = self.x.to(dtype).requires_grad_()
        A, B = ([t.to(dtype).requires_grad_() for t in ts] for ts in (self.A, self.B))
        weights = [w.to(dtype) for w in self.weights]
        y = lora_reference(x, weights, A, B, self.group.scales, self.bias.to(dtype))
        dx, *grads = torch.autograd.grad(y, [x, *A, *B], self.dy.to(dtype))
        return y.detach(), dx, grads[: len(A)], grads[len(A) :]


def close(got: Tensor, truth: Tensor, plain: Tensor, factor: float, name: str) -> None:
    """err(got) <= factor * err(plain PyTorch in this dtype) + slack, worst element and whole."""
    slack = 1e-6 * (truth.abs().max().item() if truth.numel() else 0)
    for measure in (lambda t: t.abs().max() if t.numel() else t.sum(), torch.linalg.vector_norm):
        ours, theirs = measure(got.double() - truth).item(), measure(plain.double() - truth).item()
        assert ours <= factor * theirs + slack * max(1, truth.numel()) ** 0.5, f"{name}: {ours} against {theirs}"


def check(layer: Layer, tail_on_x: bool) -> None:
    """Raw forward and backward against float64; the gradients are added to what is there."""
    group, H, dtype = layer.group, layer.group.in_features, layer.x.dtype
    y_true, dx_true, A_true, B_true = layer.plain(torch.float64)
    y_plain, dx_plain, A_plain, B_plain = layer.plain(dtype)
    out = torch.full((layer.x.shape[0], group.out + 3), 7.0, dtype=dtype, device=layer.x.device)
    s = layer.rows_x[:, H:]
    if tail_on_x:
        y = lora.forward(layer.weight, layer.rows_x, layer.bias, out=out[:, : group.out])
    else:
        y = lora.forward(layer.weight, layer.rows_x[:, :H], layer.bias, out=out[:, : group.out], s=s)
    assert y.data_ptr() == out.data_ptr() and (out[:, group.out :] == 7).all()
    close(y, y_true, y_plain, 2, "y")
    wide = torch.promote_types(dtype, torch.float32)
    grad_A, grad_B = ([torch.ones_like(t, dtype=wide) for t in ts] for ts in (layer.A, layer.B))
    dy, saved = layer.rows_dy, s.clone()
    dx = lora.backward(layer.weight, dy, layer.x, s, grad_A, grad_B)
    assert dx is not None and torch.equal(s, saved) and torch.equal(dy[:, : group.out], layer.dy)
    close(dx, dx_true, dx_plain, 3, "dx")
    for i in group.adapted:
        close(grad_A[i] - 1, A_true[i], A_plain[i], 3, f"dA {i}")
        close(grad_B[i] - 1, B_true[i], B_plain[i], 3, f"dB {i}")


# None, one, odd.
@pytest.mark.parametrize("T", [0, 1, 37])
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_concatenated_products(group, T, dtype) -> None:
    check(Layer(group, T, dtype), tail_on_x=True)
    check(Layer(group, T, dtype), tail_on_x=False)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_adapter_off_is_the_plain_product(group) -> None:
    layer = Layer(group, 9, torch.bfloat16)
    tail = layer.rows_x[:, group.in_features :]
    before = tail.clone()
    y = lora.forward(layer.weight, layer.rows_x, layer.bias, adapter=False)
    assert torch.equal(y, F.linear(layer.x, torch.cat(layer.weights), layer.bias))
    assert torch.equal(tail.view(torch.int16), before.view(torch.int16))
    y = lora.forward(layer.weight, layer.rows_x, adapter=False)
    assert torch.equal(y, F.linear(layer.x, torch.cat(layer.weights)))


@pytest.mark.parametrize("in_place", [False, True])
def test_the_residual_is_added_before_the_one_rounding(in_place: bool) -> None:
    layer = Layer(GROUPS[1], 9, torch.float64)
    residual = torch.randn(9, layer.group.out, dtype=torch.float64)
    want = layer.plain(torch.float64)[0] + residual
    out = residual.clone() if in_place else None
    y = lora.forward(layer.weight, layer.rows_x, layer.bias, out=out, residual=residual if out is None else out)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert out is None or y.data_ptr() == out.data_ptr()


def test_the_gradients_one_by_one_are_those_of_backward() -> None:
    """As a layer takes them whose x is known only after dx; a narrow s is enough."""
    layer = Layer(GROUPS[1], 5, torch.float64)
    group, H, Y = layer.group, layer.group.in_features, layer.group.out
    lora.forward(layer.weight, layer.rows_x)
    s = layer.rows_x[:, H:]
    both = [[[torch.zeros_like(t) for t in ts] for ts in (layer.A, layer.B)] for _ in range(2)]
    dx = lora.backward(layer.weight, layer.rows_dy, layer.x, s, *both[0])
    dy = layer.rows_dy.clone()
    gradients_b(group, dy[:, :Y], s[:, : group.rank], layer.weight.b, dy[:, Y:], both[1][1])
    assert torch.equal(lora.input_gradient(layer.weight, dy), dx)
    gradients_a(group, dy[:, Y:], layer.x, both[1][0])
    torch.testing.assert_close(both[1], both[0], rtol=0, atol=0)


def test_lora_linear_has_the_gradients_of_its_reference() -> None:
    group = LoraGroup(6, (3, 2, 4), (2, 0, 3), (2.0, 1.0, 0.7), align=16)
    layer = Layer(group, 3, torch.float64)
    x, A, B = layer.x.requires_grad_(), *([t.requires_grad_() for t in ts] for ts in (layer.A, layer.B))
    n = len(A)
    args = (layer.weights, group.scales, layer.bias)

    def ours(x: Tensor, *adapters: Tensor) -> Tensor:
        return lora_linear(x, args[0], adapters[:n], adapters[n:], *args[1:])

    def reference(x: Tensor, *adapters: Tensor) -> Tensor:
        return lora_reference(x, args[0], adapters[:n], adapters[n:], *args[1:])

    inputs = (x, *A, *B)
    torch.testing.assert_close(ours(*inputs), reference(*inputs), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(reference, inputs)
    assert torch.autograd.gradcheck(ours, inputs)


def test_lora_linear_is_pefts_result() -> None:
    """Outputs and gradients of a peft LoRA layer, with an alpha that is no multiple of the rank."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    base = torch.nn.Linear(24, 20, bias=True)
    layer = Linear(base, "default", LoraConfig(), r=5, lora_alpha=7, lora_dropout=0.0, init_lora_weights=False)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B)
    x = torch.randn(2, 3, 24, requires_grad=True)
    w = torch.randn(2, 3, 20)
    assert layer.scaling["default"] == 7 / 5
    theirs = torch.autograd.grad((layer(x) * w).sum(), [x, A, B])
    y = lora_linear(x, base.weight.detach(), A, B, 7 / 5, base.bias.detach())
    torch.testing.assert_close(y, layer(x))
    ours = torch.autograd.grad((y * w).sum(), [x, A, B])
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def nf4(shape: tuple[int, int], device: str = "cpu") -> Nf4Weight:
    g = torch.Generator().manual_seed(3)
    packed = torch.randint(256, (shape[0] * shape[1] // 2,), dtype=torch.uint8, generator=g)
    return Nf4Weight(packed.to(device), torch.rand(shape[0] * shape[1] // 64, generator=g).to(device) * 0.1, shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lora_linear_over_nf4_and_dense_weights(dtype) -> None:
    """Two packed projections around a dense one; masters in fp32 whatever x is."""
    packed = [nf4((32, 64)), nf4((16, 64))]
    dense = torch.randn(8, 64, dtype=dtype)
    weights = [packed[0], dense, packed[1]]
    decoded = [decode_reference(w, dtype) if isinstance(w, Nf4Weight) else w for w in weights]
    A = [torch.randn(4, 64, requires_grad=True) for _ in weights]
    B = [torch.randn(w.shape[0], 4, requires_grad=True) for w in weights]
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    y = lora_linear(x, weights, A, B, [1.0, 2.0, 3.0])
    want = lora_reference(x, decoded, [a.to(dtype) for a in A], [b.to(dtype) for b in B], [1.0, 2.0, 3.0])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)
    dy = torch.randn_like(y)
    for got, right in zip(
        torch.autograd.grad(y, [x, *A, *B], dy), torch.autograd.grad(want, [x, *A, *B], dy), strict=True
    ):
        assert got.dtype == right.dtype
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_lora_linear_takes_strided_inputs_and_a_second_backward() -> None:
    layer = Layer(GROUPS[2], 12, torch.float64)
    A, B = layer.A[0].requires_grad_(), layer.B[0].requires_grad_()
    x = layer.x.T.contiguous().T.requires_grad_()
    y = lora_linear(x, layer.weights, [A], [B], 1.5)
    torch.testing.assert_close(y, lora_reference(x, layer.weights, [A], [B], [1.5]))
    dy = layer.dy.T.contiguous().T
    first = torch.autograd.grad(y, [x, A, B], dy, retain_graph=True)
    second = torch.autograd.grad(y, [x, A, B], dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    y = lora_linear(x, layer.weights, [A], [B], 1.5)
    (dx,) = torch.autograd.grad(y, [x], dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_bad_input_says_what_it_wants() -> None:
    layer = Layer(GROUPS[1], 5, torch.float32)
    group, x, w, A, B = layer.group, layer.x, layer.weights, layer.A, layer.B
    with pytest.raises(ValueError, match=r"lora.forward: want x \[T, 96\].*got x \(5, 32\)"):
        lora.forward(layer.weight, x)
    with pytest.raises(ValueError, match=r"lora.backward: want dy \[T, 144\]"):
        lora.backward(layer.weight, layer.dy[:, 1:], x, layer.rows_x[:, 32:], A, B)
    with pytest.raises(ValueError, match=r"Weight: want a buffer \[144, 96\]; got buffer \(144, 95\)"):
        lora.Weight.of(group, layer.weight.buffer[:, 1:])
    with pytest.raises(ValueError, match="A, B and scale per weight, got 2 weights, 1 A"):
        lora_linear(x, w, A[:1], B, 1.0)
    with pytest.raises(ValueError, match="of x's dtype"):
        lora_linear(x.half(), w, A, B, 1.0)
    with pytest.raises(ValueError, match="a frozen weight"):
        lora_linear(x, [w[0].requires_grad_(), w[1]], A, B, 1.0)
    w[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"A \[r, 32\] and B \[out, r\]"):
        lora_linear(x, w, A, [B[0], B[1][:, 1:]], 1.0)
    with pytest.raises(ValueError, match=r"a frozen bias \[80\]"):
        lora_linear(x, w, A, B, 1.0, bias=torch.zeros(79))


GPU_GROUPS = [
    LoraGroup(4096, (4096, 1024, 1024), (16, 16, 16), (2.0, 2.0, 2.0)),
    LoraGroup(2560, (9728, 9728), (64, 64), (0.5, 0.5)),
    LoraGroup(4096, (4096,), (8,), (2.0,), align=16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("group", GPU_GROUPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu(group, dtype) -> None:
    for T in (0, 1, 1025):
        check(Layer(group, T, dtype, "cuda"), tail_on_x=True)
        check(Layer(group, T, dtype, "cuda"), tail_on_x=False)


@pytest.mark.gpu
def test_gpu_adapter_off_is_the_plain_product() -> None:
    group = GPU_GROUPS[0]
    layer = Layer(group, 1025, torch.bfloat16, "cuda")
    y = lora.forward(layer.weight, layer.rows_x, adapter=False)
    assert torch.equal(y, layer.rows_x[:, :4096] @ layer.weight.buffer[:6144, :4096].T)


@pytest.mark.gpu
def test_gpu_decode_fill_forward_backward_in_one_graph() -> None:
    """What a layer does, captured; replayed with other inputs in the same buffers."""
    group = LoraGroup(1024, (1024, 256, 256), (16, 16, 16), (2.0, 2.0, 2.0))
    layer = Layer(group, 300, torch.bfloat16, "cuda")
    weights = [nf4((o, 1024), "cuda") for o in group.out_features]
    plan = DecodeTables(weights, layer.weight.buffer[: group.out, :1024])
    layer.weights = [decode_reference(w, torch.bfloat16) for w in weights]
    adapter = AdapterWriteTables([Part(group, layer.A, layer.B, layer.weight.b, layer.weight.a)])
    grad_A, grad_B = ([torch.zeros_like(t, dtype=torch.float32) for t in ts] for ts in (layer.A, layer.B))

    def step() -> tuple[Tensor, Tensor]:
        plan.run()
        adapter.run()
        y = lora.forward(layer.weight, layer.rows_x, layer.bias)
        s = layer.rows_x[:, 1024:]
        dx = lora.backward(layer.weight, layer.rows_dy, layer.rows_x[:, :1024], s, grad_A, grad_B)
        assert dx is not None
        return y, dx

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    layer.x.copy_(torch.randn_like(layer.x))
    layer.rows_x[:, :1024] = layer.x
    for g in (*grad_A, *grad_B):
        g.zero_()
    graph.replay()
    y_true, dx_true, A_true, B_true = layer.plain(torch.float64)
    y_plain, dx_plain, A_plain, B_plain = layer.plain(torch.bfloat16)
    close(y, y_true, y_plain, 2, "y")
    close(dx, dx_true, dx_plain, 3, "dx")
    for i in range(3):
        close(grad_A[i], A_true[i], A_plain[i], 3, "dA")
        close(grad_B[i], B_true[i], B_plain[i], 3, "dB")
