"""Forward and backward of the experts of a fused layer, by themselves, against a loop over tokens in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlft.kernels import expert_choice, gather, grouped, grouped_gradient, route
from rlft.kernels.expert_choice import Scoring
from rlft.models.families import Experts
from rlft.models.fused import ops
from rlft.models.fused.expert_layer import Mixture, describe_scoring
from rlft.models.fused.expert_steps import ExpertSteps
from rlft.models.fused.expert_weights import StackAdapter, StackStore
from rlft.models.fused.gradients import Gradients

E, K, H, I, R = 8, 3, 5, 3, 2  # noqa: E741
"""Experts, those of a token, hidden and inner size, rank."""
SCALE = 1.5
CASES: dict[str, Experts] = {
    "softmax": Experts(),
    "softmax of all": Experts(renormalised=False),
    "sigmoid": Experts(scoring="sigmoid", scale="factor", groups=("groups", "kept"), wide_router=True),
    "biases": Experts(own_gate=True),
}
CONFIG = SimpleNamespace(factor=1.7, groups=4, kept=2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + seed))


class Stacks(nn.Module):
    """The weights of all experts, as a module of transformers has them."""

    def __init__(self, biases: bool) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = True, biases, False
        self.gate_up_proj, self.down_proj = nn.Parameter(random(E, 2 * I, H)), nn.Parameter(random(E, H, I))
        if biases:
            self.gate_up_proj_bias, self.down_proj_bias = nn.Parameter(random(E, 2 * I)), nn.Parameter(random(E, H))

    def _apply_gate(self, u: Tensor) -> Tensor:
        """Columns in turn, and a clamp of which some are cut."""
        return (u[..., 1::2] + 1) * torch.tanh(u[..., ::2].clamp(max=0.5))


def layer_of(experts: Experts) -> nn.Module:
    biases = experts.own_gate
    router = nn.Linear(H, E, bias=biases)
    router.weight.data = random(E, H)
    router.register_buffer("e_score_correction_bias", random(E, seed=1) if experts.scoring == "sigmoid" else None)
    router.top_k = K  # type: ignore[assignment]
    if biases:
        router.bias.data = random(E, seed=2)
    return nn.ModuleDict({"mlp": nn.ModuleDict({"gate": router, "experts": Stacks(biases)})})


def factors() -> list[Tensor]:
    """A and B of both stacks, as PEFT has them."""
    shapes = ((E * R, H), (2 * I, R * E), (E * R, I), (H, R * E))
    return [random(*shape).requires_grad_() for shape in shapes]


def mixture_of(experts: Experts, parameters: list[Tensor]) -> Mixture:
    mixture = Mixture(layer_of(experts).to(parameters[0].dtype), experts, ops.Activation("silu"), CONFIG)
    for stack, (a, b) in zip(mixture.stacks, (parameters[:2], parameters[2:]), strict=True):
        lora = {"lora_A": {"default": SimpleNamespace(weight=a)}, "lora_B": {"default": SimpleNamespace(weight=b)}}
        stack.modules = (SimpleNamespace(**lora, scaling={"default": SCALE}),)
    return mixture


def choices(logits: Tensor, experts: Experts, correction: Tensor | None) -> list[int]:
    """The experts of one token: of the kept groups, those that rank highest."""
    ranked = logits.sigmoid() + correction if correction is not None else logits
    open_to = list(range(E))
    if experts.groups is not None:
        size = E // CONFIG.groups
        groups = [range(g * size, (g + 1) * size) for g in range(CONFIG.groups)]
        best = sorted(groups, key=lambda group: -sum(sorted(float(ranked[e]) for e in group)[-2:]))
        open_to = [e for group in best[: CONFIG.kept] for e in group]
    return sorted(open_to, key=lambda e: -float(ranked[e]))[:K]


def loop(experts: Experts, n: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """A token and an expert after the other, with W + B A."""
    modules: Any = layer_of(experts)["mlp"]
    router, stacks, rows = modules["gate"], modules["experts"], []
    for token in n:
        logits = router.weight.detach() @ token + (router.bias.detach() if experts.own_gate else 0)
        chosen = choices(logits.detach(), experts, router.e_score_correction_bias)
        scores = logits.sigmoid() if experts.scoring == "sigmoid" else logits.softmax(0)
        weights = scores[chosen] / (scores[chosen].sum() if experts.renormalised else 1.0)
        weights = weights * (CONFIG.factor if experts.scale else 1.0)
        row = token * 0
        for weight, e in zip(weights, chosen, strict=True):
            w1 = stacks.gate_up_proj[e].detach() + SCALE * b1[:, e::E] @ a1[e * R : (e + 1) * R]
            w2 = stacks.down_proj[e].detach() + SCALE * b2[:, e::E] @ a2[e * R : (e + 1) * R]
            u = w1 @ token + (stacks.gate_up_proj_bias[e].detach() if experts.own_gate else 0)
            h = stacks._apply_gate(u) if experts.own_gate else nn.functional.silu(u[:I]) * u[I:]
            row = row + weight * (w2 @ h + (stacks.down_proj_bias[e].detach() if experts.own_gate else 0))
        rows.append(row)
    return torch.stack(rows) if rows else n * 0


def by_steps(
    experts: Experts, n: Tensor, parameters: list[Tensor], residual: Tensor, dout: Tensor, keep: bool, mode: Any
) -> list[Tensor]:
    """Out, and the gradients of n and of A and B; n has columns behind it, as in a layer."""
    mixture = mixture_of(experts, parameters)
    store = StackStore(mode)
    steps = ExpertSteps(mixture, store, 0, "default", n)
    wide = torch.cat([n.detach(), torch.full_like(n.detach()[:, :2], torch.nan)], dim=1)[:, :H]
    routing, out = steps.routing(wide, keep), residual.clone()
    with torch.no_grad():
        steps.forward(wide, routing, out, out)
        steps = ExpertSteps(mixture, store, 0, "default", n)  # as the backward of a layer has another
        grads = Gradients.of(steps.adapters, None, n)
        dn = steps.backward(dout, wide, routing, grads, None)
    return [out, dn, *(g for g in grads.returned if g is not None)]


@pytest.mark.parametrize("mode", ["layer", "group", "shadow"])
@pytest.mark.parametrize("T", [0, 1, 6])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_loop(name: str, T: int, mode: str) -> None:
    experts, n, parameters = CASES[name], random(T, H).requires_grad_(), factors()
    residual, dout = random(T, H, seed=3), random(T, H, seed=4)
    if T == 1 and mode == "layer":
        assert torch.autograd.gradcheck(lambda *tensors: loop(experts, *tensors), (n, *parameters), fast_mode=True)
    out = loop(experts, n, *parameters)
    want = torch.autograd.grad(out, (n, *parameters), dout, allow_unused=True, materialize_grads=True)
    for keep in (False, True):
        got = by_steps(experts, n, parameters, residual, dout, keep, mode)
        for what, mine, theirs in zip(("out", "n", "A1", "B1", "A2", "B2"), got, (out + residual, *want), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-11, rtol=0), what


@pytest.mark.parametrize("name", ["sigmoid", "biases"])
def test_the_kernels_give_what_plain_pytorch_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, on the views and strides that a GPU would be given; in fp32, as in the kernels."""
    experts, parameters = CASES[name], factors()
    n, residual, dout = random(5, H), random(5, H, seed=3), random(5, H, seed=4)
    want = by_steps(experts, n, parameters, residual, dout, False, "layer")
    for module in (route, expert_choice, gather, grouped, grouped_gradient):
        monkeypatch.setattr(module, "on_gpu", lambda *_, **__: True)
    monkeypatch.setattr(ops, "_uses_kernel", lambda x: True)
    fp32 = [p.detach().float() for p in parameters]
    got = by_steps(experts, n.float(), fp32, residual.float(), dout.float(), True, "layer")
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine.double() - theirs).abs().max()) <= 2e-6 * float(theirs.abs().max())


def test_without_an_adapter_buffers_have_no_tail_and_the_results_are_those_of_the_base() -> None:
    n, residual, zeros = random(4, H), random(4, H, seed=3), [torch.zeros_like(f) for f in factors()]
    mixture = mixture_of(Experts(), factors())
    store = StackStore("shadow")
    outs = []
    # On, off, on: the buffer that has room for an adapter is read without it.
    for adapter in (None, "default", None, "other"):
        steps = ExpertSteps(mixture, store, 0, adapter, n)
        routing, out = steps.routing(n, False), torch.empty_like(residual)
        steps.forward(n, routing, residual, out)
        outs.append(out)
        assert [each.tail for each in steps.adapters] == ([16, 16] if adapter == "default" else [0, 0])
    wanted = loop(Experts(), n, *zeros) + residual
    assert all(torch.allclose(outs[i], wanted, atol=1e-12) for i in (0, 2, 3))
    assert not torch.allclose(outs[1], wanted, atol=1e-2)
    assert store.bytes == sum(8 * E * (out + 16) * (inner + 16) for out, inner in ((2 * I, H), (H, I)))


def test_a_weight_of_0_has_a_gradient() -> None:
    """It is found without a division by it."""
    experts, n, parameters = CASES["softmax of all"], random(2, H), factors()
    steps = ExpertSteps(mixture_of(experts, parameters), StackStore(), 0, "default", n)
    routing, out = steps.routing(n, False), torch.empty(2, H, dtype=torch.float64)
    steps.forward(n, routing, n, out)
    dn = []
    for weight in (routing.weights.clone(), torch.zeros_like(routing.weights)):
        routing.weights.copy_(weight)
        dn.append(steps.backward(random(2, H, seed=4), n, routing, Gradients.of(steps.adapters, None, n), None))
    assert dn[1].isfinite().all() and dn[1].abs().max() > 1e-2, "through the router alone"
    assert not torch.allclose(*dn)


def test_scorings_that_no_kernel_computes_are_refused() -> None:
    assert describe_scoring(CASES["sigmoid"], CONFIG) == Scoring("sigmoid", True, 1.7, 4, 2)
    with pytest.raises(ValueError, match="groups, a power of two"):
        describe_scoring(CASES["sigmoid"], SimpleNamespace(factor=1.0, groups=3, kept=1))
    wrapped = layer_of(Experts())
    wrapped["mlp"]["gate"].lora_A = {}  # type: ignore[index]
    with pytest.raises(ValueError, match=r"an adapter on mlp\.gate"):
        Mixture(wrapped, Experts(), ops.Activation("silu"), CONFIG)


def test_an_adapter_is_viewed_by_expert_as_peft_lays_it_out() -> None:
    adapter = StackAdapter((), (), E, R, 1.0)
    a, b = random(E * R, H), random(H, R * E)
    for e in range(E):
        assert torch.equal(adapter.a(a)[e], a[e * R : (e + 1) * R]) and torch.equal(adapter.b(b)[e], b[:, e::E])
