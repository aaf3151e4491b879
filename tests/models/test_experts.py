"""rlft's function of experts against transformers' own loops and PEFT's own sums, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import records
import torch
from mixtures import FAMILIES, mixture
from peft import PeftModel
from random_base import in_float64
from test_policy import plan, rollouts
from torch import Tensor, nn

import rlft
from rlft.config.run import Lora
from rlft.errors import ConfigError
from rlft.models import experts, targets
from rlft.models.experts_function import Factors, Frozen, Layer
from rlft.models.experts_function import experts as compute
from rlft.models.load import attach_lora
from rlft.models.policy import Policy

E, H, INNER, R = 4, 4, 3, 2
CHOICES = {
    "spread": torch.tensor([[2, 0], [0, 2], [2, 1]]),
    "all in one": torch.full((3, 1), 3),
    "one token": torch.tensor([[1, 3]]),
    "no token": torch.zeros(0, 2, dtype=torch.int64),
}


def gate(u: Tensor) -> Tensor:
    left, right = u.chunk(2, -1)
    return nn.functional.silu(left) * right


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


W1, W2, BIAS1, BIAS2 = random(E, 2 * INNER, H), random(E, H, INNER), random(E, 2 * INNER), random(E, H)


def plain(weight: Tensor) -> Callable[[torch.dtype, Tensor], Tensor]:
    """Weights in 16 bits or more, which need no decoding."""
    return lambda dtype, offsets: weight.to(dtype)


def reference(x: Tensor, weights: Tensor, *factors: Tensor, chosen: Tensor) -> Tensor:
    """The layer token by token, W + B A formed."""
    a1, b1, a2, b2 = factors
    out = [x * 0]
    for t, j in ((t, j) for t in range(len(x)) for j in range(chosen.shape[1])):
        e = chosen[t, j]
        h = gate((W1[e] + b1[e] @ a1[e]) @ x[t] + BIAS1[e])
        row = weights[t, j] * ((W2[e] + b2[e] @ a2[e]) @ h + BIAS2[e])
        out.append(torch.zeros_like(x).index_add(0, torch.tensor([t]), row[None]))
    return torch.stack(out).sum(0)


def inputs(chosen: Tensor) -> list[Tensor]:
    tokens, k = chosen.shape
    made = [random(tokens, H), random(tokens, k), random(E, R, H), random(E, 2 * INNER, R), random(E, R, INNER)]
    return [tensor.requires_grad_() for tensor in (*made, random(E, H, R))]


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases and transposed weights"])
@pytest.mark.parametrize("tokens", [1, 40, 2048])
def test_gpu_is_as_near_as_plain_pytorch(tokens: int, bias: bool) -> None:
    """bf16 by the kernels, of few and of many rows per expert, beside bf16 expert by expert; errors against float64."""
    hidden, inner, count, rank, k = 512, 384, 16, 8, 4
    g = torch.Generator().manual_seed(tokens)
    shapes = (tokens, hidden), (count, 2 * inner, hidden), (count, hidden, inner), (count, rank, hidden)
    shapes += (count, 2 * inner, rank), (count, rank, inner), (count, hidden, rank), (count, 2 * inner), (count, hidden)
    drawn = [(torch.randn(shape, generator=g) / shape[-1] ** 0.5).bfloat16() for shape in shapes]
    weights, chosen = torch.rand(tokens, count, generator=g).softmax(-1).topk(k)

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        x, w1, w2, a1, b1, a2, b2, bias1, bias2 = (tensor.to(device, dtype) for tensor in drawn)
        routing = weights.to(device, torch.promote_types(dtype, torch.float32))
        inputs = [tensor.detach().requires_grad_() for tensor in (x, routing, a1, b1, a2, b2)]
        frozen = [plain(w.mT.contiguous().mT if bias else w) for w in (w1, w2)]
        biases = (bias1, bias2) if bias else (None, None)
        layer = Layer(count, Frozen(frozen[0], biases[0]), Frozen(frozen[1], biases[1]), gate, dtype)
        factors = Factors(inputs[2], inputs[3]), Factors(inputs[4], inputs[5])
        out = compute(inputs[0], chosen.to(device), inputs[1], layer, *factors)
        out.backward(torch.linspace(-1, 1, hidden, device=device, dtype=dtype).expand_as(out))
        return [out.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]

    names = "out", "x", "weights", "A1", "B1", "A2", "B2"
    exact = run("cpu", torch.float64)
    for name, got, plainly, true in zip(
        names, run("cuda", torch.bfloat16), run("cpu", torch.bfloat16), exact, strict=True
    ):
        error, allowed = ((value.cpu().double() - true).norm() / true.norm() for value in (got, plainly))
        assert error <= 2 * allowed, (name, float(error), float(allowed))


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_values_and_gradients_are_those_of_a_loop(chosen: Tensor) -> None:
    """x, routing weights and every A and B; experts 3, or 0 to 2, have no rows."""
    arguments = inputs(chosen)
    layer = Layer(E, Frozen(plain(W1), BIAS1), Frozen(plain(W2), BIAS2), gate, torch.float64)

    def ours(x: Tensor, weights: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        return compute(x, chosen, weights, layer, Factors(a1, b1), Factors(a2, b2))

    def loop(*tensors: Tensor) -> Tensor:
        return reference(*tensors, chosen=chosen)

    assert torch.autograd.gradcheck(loop, arguments) if len(chosen) else True
    mine, theirs = ours(*arguments), loop(*arguments)
    assert torch.allclose(mine, theirs, atol=1e-12, rtol=0)
    down = random(*mine.shape)
    for name, got, wanted in zip(
        ("x", "weights", "A1", "B1", "A2", "B2"),
        torch.autograd.grad(mine, arguments, down),
        torch.autograd.grad(theirs, arguments, down, allow_unused=True),
        strict=True,
    ):
        assert got.dtype == torch.float64
        assert torch.allclose(got, torch.zeros_like(got) if wanted is None else wanted, atol=1e-11, rtol=0), name


def test_one_half_without_an_adapter_and_a_weight_of_0() -> None:
    """The gradient of a routing weight is found without a division by it."""
    chosen = CHOICES["spread"]
    x, weights, a1, b1, a2, b2 = inputs(chosen)
    weights.data[1] = 0
    layer = Layer(E, Frozen(plain(W1), BIAS1), Frozen(plain(W2), BIAS2), gate, torch.float64)
    for up, down in ((Factors(a1, b1), None), (None, Factors(a2, b2)), (None, None)):
        zeros = [torch.zeros_like(tensor) for tensor in (a1, b1, a2, b2)]
        used = [*((up.a, up.b) if up else zeros[:2]), *((down.a, down.b) if down else zeros[2:])]
        mine = torch.autograd.grad(compute(x, chosen, weights, layer, up, down).sum(), (x, weights))
        theirs = torch.autograd.grad(reference(x, weights, *used, chosen=chosen).sum(), (x, weights))
        assert all(torch.allclose(a, b, atol=1e-11, rtol=0) for a, b in zip(mine, theirs, strict=True))
        assert mine[1][1].abs().min() > 1e-3


# ---- models of transformers --------------------------------------------------------------------------------------


def adapted(kind: str, dtype: torch.dtype = torch.float64, lora: Lora = Lora(rank=4, alpha=8), **fields: Any) -> Any:  # noqa: B008
    """A mixture with an adapter away from its start; its parameters of LoRA in `dtype`."""
    model, generator = attach_lora(mixture(kind, dtype, **fields), lora, 0), torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def passes(model: PeftModel, implementation: str, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probs, and the gradients of the embedded ids and of the adapter."""
    base: Any = model.get_base_model()
    base.set_experts_implementation(implementation)
    embedded = base.get_input_embeddings()(ids).requires_grad_()
    logprobs = model(inputs_embeds=embedded).logits.log_softmax(-1)
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    return logprobs.detach(), list(torch.autograd.grad(logprobs[..., 5].sum(), [embedded, *factors]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_and_its_adapter_are_those_of_transformers_and_peft(kind: str) -> None:
    model, ids = adapted(kind), torch.arange(10, 44).view(2, 17)
    assert model.config._experts_implementation == experts.NAME
    mine, gradients = passes(model, experts.NAME, ids)
    theirs, wanted = passes(model, "eager", ids)
    assert torch.allclose(mine, theirs, atol=1e-6, rtol=0)
    for got, expected in zip(gradients, wanted, strict=True):
        assert torch.allclose(got, expected, atol=1e-6 * max(1.0, float(expected.abs().max())), rtol=0)
    assert sum(g.abs().max() > 1e-3 for g in gradients) >= len(gradients) - 1
    off = []
    for implementation in (experts.NAME, "eager"):
        model.get_base_model().set_experts_implementation(implementation)
        with model.disable_adapter(), torch.no_grad():
            off.append(model(ids).logits.log_softmax(-1))
    assert torch.allclose(*off, atol=1e-6, rtol=0) and not torch.allclose(off[0], mine, atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_two_active_adapters_are_added(kind: str) -> None:
    model, ids = adapted(kind), torch.arange(10, 27)[None]
    with pytest.warns(RuntimeWarning, match="rank_pattern"):
        model.add_adapter("second", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.1
    model.base_model.set_adapter(["default", "second"])
    mine, gradients = passes(model, experts.NAME, ids)
    theirs, wanted = passes(model, "eager", ids)
    assert torch.allclose(mine, theirs, atol=1e-9, rtol=0)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(gradients, wanted, strict=True))


def test_any_split_into_micro_batches_gives_the_same_gradient() -> None:
    policy = Policy(adapted("qwen3_moe", num_hidden_layers=1), dtype=torch.float64)
    made = rollouts(2)
    weights, found = torch.linspace(-1, 1, len(made)) + 0.05, []
    # transformers rounds norms and routing weights to fp32, in float64 models too.
    with in_float64(policy.base.get_decoder()):  # type: ignore[operator]
        for budget, share in ((10_000, True), (10_000, False), (20, False), (1, True)):
            policy.flat.zero_grad()
            for batch in records.packed(made, plan(len(made), budget, share), weights):
                (policy.logprobs(batch)[0] * batch.advantages * batch.weight).sum().backward()
            found.append(policy.flat.gradient.clone())
    assert found[0].abs().max() > 1e-4
    assert all(torch.allclose(gradient, found[0], atol=1e-12, rtol=0) for gradient in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_near_to_float64_as_transformers_is(dtype: torch.dtype) -> None:
    ids, exact = torch.arange(10, 44).view(2, 17), adapted("qwen3_moe")
    wanted, gradient = passes(exact, "eager", ids)
    near = adapted("qwen3_moe", dtype)
    for n, parameter in near.named_parameters():
        if ".lora_" in n:
            parameter.data = parameter.data.float()
    for (_, a), (_, b) in zip(exact.named_parameters(), near.named_parameters(), strict=True):
        b.data.copy_(a.data)
    errors = []
    for implementation in (experts.NAME, "eager"):
        values, gradients = passes(near, implementation, ids)
        off = [(a.double() - b).norm() / b.norm() for a, b in zip(gradients, gradient, strict=True)]
        errors.append(((values.double() - wanted).abs().mean(), torch.stack(off[1:]).mean()))
    (value, grad), (their_value, their_grad) = errors
    assert value < 2 * their_value and grad < 3 * their_grad


def test_under_autocast_products_are_in_its_type() -> None:
    model, ids = adapted("qwen3_moe", torch.float32), torch.arange(10, 27)[None]
    seen: list[torch.dtype] = []
    layer: Any = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    layer._apply_gate = lambda u: (seen.append(u.dtype), gate(u))[1]
    with torch.autocast("cpu", torch.bfloat16):
        model(ids).logits.sum().backward()
    assert seen == [torch.bfloat16] * 2, "once forward, once again backward"
    gradients = [p.grad for n, p in model.named_parameters() if "experts" in n and ".lora_" in n]
    assert all(g is not None and g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients)


# ---- settings ----------------------------------------------------------------------------------------------------


def ranks(lora: Lora, **fields: Any) -> tuple[int, int]:
    """Ranks of q_proj and of the experts."""
    model = adapted("qwen3_moe", torch.float32, lora, **fields)
    (rank,) = targets.expert_ranks(model)
    return model.base_model.model.model.layers[0].self_attn.q_proj.r["default"], rank


def test_the_rank_of_experts_is_divided_by_the_experts_of_a_token() -> None:
    assert ranks(Lora(rank=16)) == (16, 8)
    assert ranks(Lora(rank=16), num_experts_per_tok=8) == (16, 2)
    assert ranks(Lora(rank=4), num_experts_per_tok=8) == (4, 1), "at least 1"
    assert ranks(Lora(rank=4, expert_rank=3)) == (4, 3)
    model = adapted("qwen3_moe", torch.float32, Lora(rank=16, alpha=32))
    assert targets.expert_parameters(model) == 2 * 8 * 8 * ((64 + 128) + (64 + 64)), "layers, experts, rank"
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "parameter_name")}
    assert scales == {4.0}, "alpha / the experts' rank"
    assert targets.expert_parameters(adapted("qwen3_moe", torch.float32, Lora(rank=4, experts=False))) == 0


def refused(make: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(rank=4, dropout=0.1), "lora.dropout = 0.1: PEFT has no dropout for an adapter on a parameter"),
        (Lora(rank=4, targets=("gate",)), "gate is a router, which is not trained"),
        (Lora(rank=4, experts=False, expert_rank=2), "lora.expert_rank = 2: no experts get an adapter"),
    ],
)
def test_what_experts_cannot_have_is_refused(lora: Lora, message: str) -> None:
    assert message in refused(lambda: attach_lora(mixture(), lora, 0))


def test_a_config_without_the_experts_of_a_token_wants_a_rank() -> None:
    base = mixture()
    base.config.num_experts_per_tok = 0
    assert "set lora.expert_rank, or lora.experts = false" in refused(lambda: attach_lora(base, Lora(rank=4), 0))


def test_a_continued_adapter_has_the_rank_of_experts_it_was_saved_with(tmp_path) -> None:
    attach_lora(mixture(), Lora(rank=4, expert_rank=1), 0).save_pretrained(str(tmp_path), save_embedding_layers=False)
    lora, path = Lora(rank=4, resume_from=str(tmp_path)), tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    # PEFT's own adapters name parameters by the ends of their names.
    ends = sorted({".".join(name.split(".")[-3:]) for name in written["target_parameters"]})
    for names in (ends, written["target_parameters"]):
        path.write_text(json.dumps({**written, "target_parameters": names}))
        assert refused(lambda: attach_lora(mixture(), lora, 0)) == (
            f"lora.expert_rank = 2 (lora.rank = 4 divided), but the experts of the adapter in {tmp_path} have 1: set "
            f"lora.expert_rank = 1"
        )
    again = attach_lora(mixture(), replace(lora, expert_rank=1), 0)
    assert targets.expert_ranks(again) == {1}
    assert torch.allclose(
        *(passes(m, i, torch.arange(10, 20)[None])[0] for m, i in ((again, "rlft"), (again, "eager")))
    )


def test_weights_that_are_to_be_trained_themselves_are_refused() -> None:
    base = mixture()
    experts.use(base)
    base.model.layers[0].mlp.experts.down_proj.requires_grad_(True)
    assert "down_proj requires a gradient, and rlft's function of experts" in refused(
        lambda: base(torch.ones(1, 3).long())
    )
    base.set_experts_implementation("eager")
    assert base(torch.ones(1, 3).long()).logits.requires_grad


def test_another_model_of_the_process_keeps_its_own_function() -> None:
    other = mixture()
    before = other.config._experts_implementation
    adapted("qwen3_moe", torch.float32)
    assert other.config._experts_implementation == before != experts.NAME
    assert rlft.Lora().expert_rank is None
