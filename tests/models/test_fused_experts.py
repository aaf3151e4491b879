"""Mixtures of experts in fused layers: against transformers' loop over experts and PEFT's sum, at every level, packed
and behind shared prompts, in 4 bits, and what is refused. Rows alone: test_architectures.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mixtures import mixture as plain_mixture
from peft import LoraConfig, PeftModel, get_peft_model
from test_experts import adapted
from test_families import close, run
from test_graphs import groups_of
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from rlft.config.run import Lora
from rlft.errors import ConfigError
from rlft.models import experts
from rlft.models.experts_mxfp4 import StackMxfp4
from rlft.models.experts_nf4 import quantized
from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.expert_steps import ExpertSteps
from rlft.models.fused.fuse import fuse
from rlft.models.fused.levels import L0, L2, L3, LEVELS, Level
from rlft.models.fused.memory import MemoryPlan
from rlft.models.load import attach_lora
from rlft.models.policy import Policy

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 61, "moe_intermediate_size": 32, "sliding_window": 5}
KINDS = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "glm4_moe", "gpt_oss")
"""The hybrids, whose states transformers has in fp32, are in test_architectures.py."""
SPREAD = ("qwen3_moe", "qwen2_moe", "glm4_moe", "gpt_oss", "qwen3_next")
"""Plain experts; a shared one with a gate; a dense layer and groups; biases and a gate of the module; a hybrid."""
GROUPS = [(70, [30, 9, 1]), (2, [25, 0]), (3, [80])]
"""Prompt and completions, in more rows than a tile has."""


def fused(model: PeftModel, level: Level | None = None, mode: Any = "layer", tile: int = 64) -> FusedDecoder:
    decoder = fuse(model)
    assert isinstance(decoder, FusedDecoder), decoder
    if level is not None:
        decoder.plan = MemoryPlan((level,) * len(decoder.layers), tile, mode, 2**20, 0, 0, 0)
    return decoder


def batch(padding: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids [3, 11], a mask with the given side padded, and an upstream gradient."""
    g = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(3, 61, (3, 11), generator=g), torch.ones(3, 11, dtype=torch.int64)
    if padding == "left":
        mask[1, :4] = mask[2, :7] = 0
    elif padding == "right":
        mask[0, 9:] = mask[2, 5:] = 0
    return ids, None if padding == "none" else mask, torch.randn(3, 11, 64, generator=g, dtype=torch.float64)


def both(kind: str, padding: str = "none", change: Callable[[Any], None] = lambda base: None, **fields: Any) -> Any:
    """States and gradients by fused layers, and by transformers' loop with PEFT's sum."""
    found = []
    for ours in (True, False):
        model = adapted(kind, **(SMALL | fields))
        base: Any = model.get_base_model()
        change(base)
        if ours:
            decoder = fused(model)
        else:
            base.set_experts_implementation("eager")
        found.append(run(model, *batch(padding)))
    assert decoder.last_plan is not None  # type: ignore[possibly-undefined]
    return found


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_equals_transformers(kind: str, padding: str) -> None:
    """In float64: the states, and every A and B, of the experts too."""
    got, want = both(kind, padding)
    assert sum(".experts." in name for name in want[1]) >= 4
    close(got, want, 1e-6)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=4, experts=False),
        Lora(rank=4, targets=("q_proj", "down_proj")),
        Lora(rank=4, targets=("gate_up_proj",)),
    ],
    ids=["no experts", "one half", "experts alone"],
)
def test_adapters_on_parts_of_a_layer(lora: Lora) -> None:
    close(*both("qwen2_moe", lora=lora), 1e-6)


def test_without_the_gradient_through_the_routing_weights_the_comparison_fails(monkeypatch: Any) -> None:
    monkeypatch.setattr(ExpertSteps, "_through_router", lambda self, dn, *_: dn)
    got, want = both("qwen3_moe")
    close((got[0], {n: g for n, g in got[1].items() if "layers.1" in n and "mlp" in n}), last(want), 1e-6)
    with pytest.raises(AssertionError, match="q_proj"):
        close(got, want, 1e-3)


def last(found: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of the last layer's experts, which no router is between."""
    return found[0], {n: g for n, g in found[1].items() if "layers.1" in n and "mlp" in n}


@pytest.mark.parametrize("k", [1, 2])
def test_all_rows_in_one_or_two_experts_and_none_in_the_others(k: int) -> None:
    """gpt-oss' router has a bias, by which every token goes to experts 1 and 5."""

    def change(base: Any) -> None:
        for layer in base.model.layers:
            layer.mlp.router.bias.data[[5, 1]] += torch.tensor([200.0, 100.0], dtype=torch.float64)

    got, want = both("gpt_oss", change=change, num_experts_per_tok=k)
    for name, truth in want[1].items():
        off = float((got[1][name] - truth).abs().max())
        assert off <= 1e-6 * max(1.0, float(truth.abs().max())), name
    a = next(g for n, g in got[1].items() if ".experts." in n and "lora_A" in n).view(8, -1)
    assert [bool(rows.any()) for rows in a] == [e == 5 or (e == 1 and k == 2) for e in range(8)]


# ---- levels, tiles, shared prompts -------------------------------------------------------------------------------


def results(kind: str, level: Level, mode: Any = "layer", tile: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    """Log-probs and gradient behind shared prompts, and log-probs of a pass without gradient."""
    policy = Policy(adapted(kind, dtype, **SMALL), dtype)
    assert policy.fused is not None and policy.path == "fused layers"
    policy.fused.plan = MemoryPlan((level,) * len(policy.fused.layers), tile, mode, 2**20, 0, 0, 0)
    made = groups_of(GROUPS, torch.Generator().manual_seed(4), 61)
    assert (made.prefix >= 0).any()
    logprobs, _ = policy.logprobs(made)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return [logprobs.detach(), policy.flat.gradient, policy.score(made)]


@pytest.mark.parametrize("kind", SPREAD)
def test_every_level_is_the_same_bit_for_bit_behind_shared_prompts(kind: str) -> None:
    want = results(kind, L0)
    assert torch.equal(want[0], want[2]) and all(one.abs().max() > 0 for one in want)
    more = [(L0, "group"), (L2, "group"), (L3, "shadow")] if kind == "qwen2_moe" else []
    for level, mode in [*((level, "layer") for level in LEVELS[1:]), *more]:
        for one, other in zip(results(kind, level, mode), want, strict=True):
            assert torch.equal(one, other), (level, mode)


@pytest.mark.parametrize("kind", SPREAD)
def test_tiles_sum_to_the_same_gradient(kind: str) -> None:
    """Rows are sorted within a tile, so that an expert has its rows in several."""
    one, many = (results(kind, L2, tile=tile, dtype=torch.float64) for tile in (8192, 64))
    assert all(torch.allclose(a, b, atol=1e-12, rtol=1e-12) for a, b in zip(one, many, strict=True))


# ---- in 4 bits ---------------------------------------------------------------------------------------------------


def in_nf4(base: Any) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.uint8
    )
    for stack in experts.stacks(base).values():
        setattr(stack.module, stack.leaf, quantized(stack.weight.data, settings))


def in_mxfp4(base: Any) -> None:
    g = torch.Generator().manual_seed(3)
    for stack in experts.stacks(base).values():
        count, columns, rows = stack.shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=g, dtype=torch.uint8)
        scales = torch.randint(121, 125, (count, rows, columns // 32), generator=g, dtype=torch.uint8)
        setattr(stack.module, stack.leaf, StackMxfp4(blocks, requires_grad=False))
        stack.module.register_buffer(f"{stack.leaf}_scales", scales)


def decoded(base: Any) -> None:
    """Give the stacks their decoded values."""
    for stack in experts.stacks(base).values():
        values = experts.decoded(stack.module, stack.leaf, torch.float32)
        values = values.transpose(1, 2).contiguous() if stack.module.is_transposed else values
        setattr(stack.module, stack.leaf, nn.Parameter(values, requires_grad=False))
        if hasattr(stack.module, f"{stack.leaf}_scales"):
            delattr(stack.module, f"{stack.leaf}_scales")


@pytest.mark.parametrize(("kind", "pack"), [("qwen3_moe", in_nf4), ("glm4_moe", in_nf4), ("gpt_oss", in_mxfp4)])
@pytest.mark.parametrize("mode", ["layer", "shadow"])
def test_4_bit_experts_give_the_bits_of_their_decoded_weights(kind: str, pack: Any, mode: str) -> None:
    found = []
    for changes in ([pack], [pack, decoded]):
        base = plain_mixture(kind, **(SMALL | {"moe_intermediate_size": 64}))
        for change in changes:
            change(base)
        model = attach_lora(base, Lora(rank=4, alpha=8), 0)
        g = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=g))
        fused(model, L2, mode)
        ids, _, upstream = batch("none")
        found.append(run(model, ids, None, upstream.float()))
    close(found[0], found[1], 0.0)


# ---- what transformers' callers ask for, and what is refused ------------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[PeftModel, FusedDecoder]]:
    """A fused model that tests leave as it was."""
    model = adapted("qwen2_moe", torch.float32, **SMALL)
    yield model, fused(model)


IDS = torch.arange(3, 14)[None]


def test_a_call_for_router_logits_runs_transformers_layers(shared: Any) -> None:
    model, decoder = shared
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    assert decoder.last_plan is not None and out.aux_loss is None and out.router_logits is None
    decoder._last_plan = None
    out = model(input_ids=IDS, labels=IDS, use_cache=False, output_router_logits=True)
    assert decoder.last_plan is None and len(out.router_logits) == 2 and out.aux_loss > 0


def test_transformers_loop_is_put_back_and_says_so(shared: Any) -> None:
    model, _ = shared
    in_layers = model(IDS, use_cache=False).logits
    base: Any = model.get_base_model()
    base.set_experts_implementation("eager")
    try:
        with pytest.warns(UserWarning, match='not the fused ones: experts_implementation is "eager"'):
            by_loop = model(IDS, use_cache=False).logits
    finally:
        base.set_experts_implementation(experts.NAME)
    assert torch.allclose(by_loop, in_layers, atol=1e-4) and not torch.equal(by_loop, in_layers)


def test_a_single_token(shared: Any) -> None:
    model, decoder = shared
    with torch.no_grad():
        one, want = (model(IDS[:, :1], use_cache=False, output_hidden_states=asked).logits for asked in (False, True))
    assert decoder.last_plan is not None and torch.allclose(one, want, atol=1e-5)


def test_a_hook_on_the_experts_runs_transformers_layers(shared: Any) -> None:
    _, decoder = shared
    assert decoder.problem() is None
    mlp = decoder.decoder.layers[1].mlp
    wrapper = mlp.experts
    for module in (mlp.gate, wrapper, wrapper.base_layer, wrapper.get_base_layer(), mlp.shared_expert_gate):
        handle = module.register_forward_hook(lambda *_: None)
        assert "has a hook" in str(decoder.problem())
        handle.remove()
        assert decoder.problem() is None


def test_weights_of_experts_and_router_that_change_are_read_again() -> None:
    model = adapted("qwen3_moe", torch.float32, **SMALL)
    decoder = fused(model, L2, "shadow")
    layer: Any = decoder.decoder.layers[0].mlp  # type: ignore[union-attr,index]
    states = []
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.experts.get_base_layer().down_proj.mul_(2),
            lambda: layer.gate.weight.neg_(),
        ):
            change()
            states.append(decoder.decoder(IDS, use_cache=False).last_hidden_state)  # type: ignore[operator]
            want = decoder.decoder(IDS, use_cache=False, output_hidden_states=True).last_hidden_state  # type: ignore[operator]
            assert torch.allclose(states[-1], want, atol=1e-5)
    assert not torch.allclose(states[0], states[1], atol=1e-3) and not torch.allclose(states[1], states[2], atol=1e-3)


def test_the_starting_policy_is_that_of_the_base_and_of_transformers(shared: Any) -> None:
    model, decoder = shared
    with torch.no_grad(), model.disable_adapter():
        off = model(IDS, use_cache=False).logits
        assert decoder.last_plan is not None
        want = model(IDS, use_cache=False, output_hidden_states=True).logits
    assert torch.allclose(off, want, atol=1e-5)
    assert not torch.allclose(model(IDS, use_cache=False).logits, off, atol=1e-2)


def reason(kind: str, change: Callable[[Any], None] = lambda base: None, **fields: Any) -> str:
    base = plain_mixture(kind, **(SMALL | fields))
    change(base)
    fused = fuse(attach_lora(base, Lora(rank=4), 0))
    assert isinstance(fused, str)
    return fused


def test_what_fused_layers_of_experts_cannot_do_says_why() -> None:
    assert "with groups a power of two of experts" in reason("glm4_moe", n_routed_experts=6)
    assert 'want kind "softmax", or "sigmoid" with groups, a power of two' in reason("glm4_moe", n_group=3)
    assert reason("qwen3_moe", in_nf4) == (
        "down_proj of Qwen3MoeExperts in NF4 has rows of 32, not of whole blocks of 64"
    )
    assert reason("gpt_oss", in_nf4) == "gate_up_proj of GptOssExperts lies transposed in NF4"

    def half(base: Any) -> None:
        base.model.layers[0].mlp.experts.bfloat16()

    assert reason("qwen3_moe", half) == "experts of torch.bfloat16 under norms of torch.float32"


def test_experts_are_not_read_from_another_place_than_the_device() -> None:
    with pytest.raises(ConfigError, match=r'base\.place = "host".*the experts of "qwen3_moe" are read from the device'):
        Policy(adapted("qwen3_moe", torch.float32, **SMALL), place="host")


def test_a_router_with_an_adapter_runs_transformers_layers() -> None:
    base = plain_mixture("qwen2_moe", **SMALL)
    model: Any = get_peft_model(base, LoraConfig(target_modules=["shared_expert_gate", "q_proj"], r=2))
    assert fuse(model) == "an adapter on mlp.shared_expert_gate"
