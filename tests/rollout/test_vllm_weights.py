"""Every family of rlft's on vLLM's model of it: each of the trainer's weights has its place, and each linear layer
computes what the trainer's do, adapter included. What vLLM has no place for is refused by name.

Models are built and not run: of vLLM's CPU build, gated DeltaNets run in bf16 alone and OLMo hybrid's not at all.
test_vllm_families.py compares log-probs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import FAMILIES, HYBRIDS
from test_vllm_families import MIXTURES, OTHERWISE, REFUSED, UNNAMED, policy_of
from torch import Tensor, nn
from vllm_models import build, parallel_state

from rlft.errors import UnsupportedModel
from rlft.models import families
from rlft.models.policy import Policy
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.slots import adapted, module_of

pytestmark = [pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
MODES = [(name, mode, torch.float32) for name in HYBRIDS for mode in ("shared", "dequantized", "merged")]
ONCE = {kind: name for name, (kind, _) in reversed(FAMILIES.items()) if name not in REFUSED}
"""A row of every family, and those with biases."""
ROWS = [name for name in FAMILIES if name in ONCE.values() or (name.endswith("biases") and name not in REFUSED)]


@pytest.fixture(scope="module", autouse=True)
def around(vllm_visible: None) -> Iterator[None]:
    vllm_start.environment()
    with vllm_start.quiet(), vllm_start.defaults_restored():
        import vllm  # noqa: F401

    with parallel_state():
        yield


def scaled(policy: Policy) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight -> A and scaled B, as the engine takes them."""
    adapter, places, pairs = policy.adapter(), adapted(policy.model), {}
    dtype = policy.base.get_input_embeddings().weight.dtype  # type: ignore[operator,union-attr]
    for name, scale in policy.scales.items():
        a, b = adapter[name.replace(".lora_B.", ".lora_A.")], adapter[name]
        place = places[module_of(name)]
        pairs[place.weight] = place.pair(a.to(dtype), (scale * b).to(dtype))
    return pairs


def filled(policy: Policy, mode: str) -> tuple[nn.Module, Any]:
    """vLLM's model with the adapter handed over."""
    model, provider = build(policy, mode)
    provider.weight_copy.run()
    if mode == "merged":
        provider.weight_copy.merge(scaled(policy))
    else:
        provider.put(scaled(policy))
    return model, provider


def compare(policy: Policy, model: nn.Module) -> int:
    """Compare the parameters of two models, and outputs of linear layers; return the number of those."""
    from rlft.rollout.vllm.names import Naming, partners
    from rlft.rollout.vllm.shared_weights import frozen_weights

    weights, parameters = frozen_weights(policy.base), dict(model.named_parameters())
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name in weights}
    own = {name: parameter for name, parameter in parameters.items() if "rlft_" not in name}
    matches, count = partners(own, Naming.of(model), weights), 0
    theirs = dict(policy.base.named_modules())
    for name, parts in matches.items():
        module, kind = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        method: Any = getattr(module, "quant_method", None)
        if kind != "weight" or type(method).__name__ not in ("SharedMethod", "DequantizedMethod"):
            want = torch.cat([weights[part].reshape(-1) for part in parts])  # type: ignore[union-attr]
            assert torch.equal(parameters[name].data.reshape(-1)[: want.numel()], want.to(parameters[name].dtype)), name
            continue
        module.cpu_linear = nn.functional.linear  # type: ignore[assignment]  # vLLM's CPU build calls it
        modules = [theirs[part.removesuffix(".weight")] for part in parts]
        x = torch.randn(5, modules[0].in_features).to(next(policy.base.parameters()).dtype)  # type: ignore[arg-type]
        with torch.no_grad():
            want = torch.cat([linear(x) for linear in modules], dim=-1)
            got = method.apply(module, x, getattr(module, "bias", None))
        small = 1e-4 if x.dtype == torch.float32 else 0.05
        assert torch.allclose(got, want, atol=small * float(want.abs().max()), rtol=0), name
        count += 1
    return count


@pytest.mark.parametrize("name", ROWS)
def test_vllm_has_a_place_for_every_weight_of_a_family(name: str) -> None:
    policy = policy_of(name, torch.bfloat16 if name == "apertus" else torch.float32)  # vLLM's xIELU is in 16 bits
    for buffer_name, buffer in policy.base.named_buffers():
        if buffer_name.endswith("layer_scalar"):
            buffer.fill_(0.3)
    model, _ = filled(policy, "shared")
    assert compare(policy, model) >= 8


@pytest.mark.parametrize(("name", "mode", "dtype"), [*MODES, ("qwen3_5", "dequantized", torch.bfloat16)])
def test_a_hybrid_has_its_weights_in_every_mode(name: str, mode: str, dtype: torch.dtype) -> None:
    policy = policy_of(name, dtype)
    model, provider = filled(policy, mode)
    assert compare(policy, model) >= 8
    trainers = {parameter.data_ptr() for parameter in policy.base.parameters()}
    states = [n for n, _ in model.named_parameters() if "conv.weight" in n or "conv1d" in n or "dt_bias" in n]
    assert states and all(model.get_parameter(n).data_ptr() in trainers for n in states), "shared as they lie"
    decay = [parameter for n, parameter in model.named_parameters() if n.endswith("A_log")]
    assert all(parameter.dtype == torch.float32 for parameter in decay if name == "qwen3_5")
    pairs = scaled(policy) if mode == "merged" else {}
    assert provider.weight_copy.differs(pairs) is None
    if mode != "shared":
        methods = {module: getattr(module, "quant_method", None) for module in model.modules()}
        linear = next(module for module, method in methods.items() if type(method).__name__ == "DequantizedMethod")
        linear.weight.data[-1].add_(1)  # type: ignore[union-attr,operator]
        assert provider.weight_copy.differs(pairs) is not None
    if mode != "merged":
        want = scaled(policy)
        held = {weight: (a, b) for weight, a, b in provider.slots()}
        assert want.keys() <= held.keys()
        for weight, (a, b) in want.items():
            assert torch.equal(held[weight][0][: len(a)], a) and torch.equal(held[weight][1][:, : len(a)], b)


def test_vllm_scales_queries_by_position_as_the_trainer_does() -> None:
    """It reads the scale of Ministral 3 elsewhere than transformers has it."""
    model, _ = build(policy_of("ministral3"), "shared")
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    scale = attention._get_llama_4_attn_scale(torch.tensor([3, 4, 9]))
    assert torch.allclose(scale.squeeze(-1), 1 + 0.5 * torch.tensor([1.0, 2.0, 3.0]).log())


def test_fields_that_vllm_reads_reach_the_text_of_a_model_with_images() -> None:
    from transformers import Gemma3Config, Ministral3Config, Mistral3Config

    rope = {"rope_type": "default", "rope_theta": 1e4}
    scaled = {**rope, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}
    want = {"beta": 0.5, "original_max_position_embeddings": 4}
    text = Ministral3Config(rope_parameters=scaled)
    assert vllm_start._more_fields(text) == {"llama_4_scaling": want}
    fields = vllm_start._more_fields(Mistral3Config(text_config=text))
    assert fields["text_config"].llama_4_scaling == want
    assert vllm_start._more_fields(Gemma3Config())["is_mm_prefix_lm"] is False


@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid"])
def test_projections_in_another_order_are_seen(name: str) -> None:
    """Fault injection: beta's and the decay's projection have one shape."""
    policy = policy_of(name)
    model, _ = filled(policy, "shared")
    mixer: Any = policy.base.get_submodule("model.layers.0.linear_attn")
    names = ("in_proj_b", "in_proj_a") if name == "qwen3_5" else ("b_proj", "a_proj")
    first, second = (getattr(mixer, projection) for projection in names)
    first.base_layer.weight, second.base_layer.weight = second.base_layer.weight, first.base_layer.weight  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match=r"linear_attn"):
        compare(policy, model)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "gpt_neo"])
def test_what_vllm_has_no_place_for_is_named(name: str) -> None:
    policy = policy_of(name)
    with pytest.raises((UnsupportedModel, ValueError), match=re.escape(REFUSED[name])):
        build(policy, "shared")


@pytest.mark.slow
@pytest.mark.parametrize("name", UNNAMED)
def test_a_weight_that_the_trainer_has_under_no_such_name_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"vLLM's model has a parameter .*, and the trainer's has none of that"):
        build(policy_of(name), "shared")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERWISE)
def test_what_vllm_computes_in_another_way_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=OTHERWISE[name]):
        build(policy_of(name), "shared")


def test_every_family_is_looked_at() -> None:
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert {kind for kind, _ in FAMILIES.values()} == files - set(MIXTURES), "test_vllm_experts.py has mixtures"
