"""Mixtures of experts in vLLM on the trainer's weights: plain, in NF4 and in MXFP4, in every mode.

Layers are built by vLLM and compared with the trainer's; engines sample in the mode that there is on a CPU. What runs
on a GPU alone, vLLM's own kernel among it: test_vllm_experts_gpu.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import base_of
from mixtures import FAMILIES, mixture, save_mixture
from test_architectures import tiny
from test_engines import mismatch_of
from test_experts_mxfp4 import release
from test_vllm_families import MIXTURES
from test_vllm_weights import filled, scaled
from tiny import prompts, tiny_policy, tiny_tokenizer
from torch import Tensor, nn
from vllm_models import build, parallel_state, register

from rlft.config.data import Sampling
from rlft.config.run import Engine, Lora
from rlft.errors import EngineError, UnsupportedModel
from rlft.kernels.nf4 import DecodeTables
from rlft.models import experts as model_experts
from rlft.models.load import attach_lora, pad_rows
from rlft.models.policy import Policy
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.engine import VllmEngine
from rlft.rollout.vllm.memory import EngineMemory
from rlft.rollout.vllm.names import Naming, partners
from rlft.rollout.vllm.shared_weights import frozen_weights

pytestmark = [pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
SIZES = {"hidden_size": 128, "head_dim": 32}
"""Of the sizes that vLLM's CPU build has."""
IN_16_BITS = ("qwen3_5_moe_text", "qwen3_next")
"""As vLLM's CPU build has their gated delta rule."""
BUILT = [("qwen3_moe", "none"), ("qwen3_moe", "nf4"), ("mixtral", "nf4"), ("gpt_oss", "none"), ("gpt_oss", "mxfp4")]
SAMPLED = [("qwen3_moe", "nf4"), ("mixtral", "none"), ("gpt_oss", "mxfp4")]
MORE = [pytest.param(kind, "none", marks=pytest.mark.slow) for kind in MIXTURES if kind not in dict(SAMPLED)]
SAMPLING = Sampling(group_size=2, max_tokens=6)


def policy_of(kind: str, form: str, folder: Path, lora: Lora = Lora(rank=4, alpha=6), **fields: Any) -> Policy:  # noqa: B008
    """A random mixture with an adapter that counts. form: what its experts are held in."""
    if kind not in FAMILIES or kind in IN_16_BITS:
        in_bf16 = {"linear_key_head_dim": 64, "linear_value_head_dim": 64} if kind in IN_16_BITS else {}
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        policy = tiny(kind, dtype, **SIZES, **in_bf16, moe_intermediate_size=64)
        pad_rows(*(module.weight for module in heads(policy.base)))
        return policy
    fields = SIZES | ({"shared_expert_intermediate_size": 64} if kind == "qwen2_moe" else {}) | fields
    if form == "none":
        base = mixture(kind, **fields)
        pad_rows(*(module.weight for module in heads(base)))
    elif form == "mxfp4":
        release(folder, **fields)
        base = base_of(folder)
    else:
        base = base_of(save_mixture(folder, kind, **fields), form)
    policy = Policy(attach_lora(base, lora, 0))
    trained(policy)
    return policy


def heads(base: Any) -> tuple[nn.Module, nn.Module]:
    return base.get_input_embeddings(), base.get_output_embeddings()


def trained(policy: Policy, experts: float = 0.2) -> None:
    """Noise in the adapter's B. experts: its size in experts."""
    g = torch.Generator().manual_seed(7)
    for name, tensor in policy.adapter().items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=g) * (experts if ".experts" in name else 0.2))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of vLLM's layers of experts."""
    for name, module in model.named_modules():
        if hasattr(module, "w13_weight"):
            yield name, module


def compare(policy: Policy, model: nn.Module) -> int:
    """Compare what the layers of experts compute, adapter included; return their number."""
    count, g = 0, torch.Generator().manual_seed(3)
    for name, module in layers(model):
        index = re.search(r"layers\.(\d+)\.", name)
        assert index is not None
        theirs = policy.base.get_submodule(f"model.layers.{index[1]}.mlp.experts")
        x = torch.randn(7, SIZES["hidden_size"], generator=g)
        chosen = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(7)])  # some experts have no rows
        weights = torch.rand(7, 2, generator=g)
        for rows in (7, 1, 0):
            with torch.no_grad():
                want = theirs(x[:rows], chosen[:rows], weights[:rows])
                got = module.quant_method.apply(module, x[:rows], weights[:rows], chosen[:rows].int())
            assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()) if rows else 0, rtol=0), name
        count += 1
    return count


class TestLayers:
    """vLLM's layers, built and filled."""

    @pytest.fixture(scope="class", autouse=True)
    def around(self, vllm_visible: None) -> Iterator[None]:
        vllm_start.environment()
        with vllm_start.quiet(), vllm_start.defaults_restored():
            import vllm  # noqa: F401

        with parallel_state():
            yield

    @pytest.mark.parametrize(("kind", "form"), BUILT)
    def test_layers_compute_what_the_trainers_do_in_every_mode(self, kind: str, form: str, tmp_path: Path) -> None:
        policy = policy_of(kind, form, tmp_path)
        trainers = {parameter.data_ptr() for parameter in policy.base.parameters()}
        for mode in ("shared", "dequantized", "merged"):
            model, provider = filled(policy, mode)
            assert compare(policy, model) == 2
            names = [name for name, _ in model.named_parameters()]
            as_they_lie = [name for name in names if name.endswith(("gate.weight", "router.weight", "_bias", "sinks"))]
            assert len(as_they_lie) == (2 if kind != "gpt_oss" else 8)
            assert all(model.get_parameter(name).data_ptr() in trainers for name in as_they_lie)
            sizes = {module.w13_weight.numel() for _, module in layers(model)}
            assert sizes == ({0} if mode == "shared" else {8 * 128 * 128})
            pairs = scaled(policy) if mode == "merged" else {}
            assert provider.weight_copy.differs(pairs) is None
            if mode != "merged":
                held = {weight: (a, b) for weight, a, b in provider.slots()}
                stacks = {name: pair for name, pair in scaled(policy).items() if ".experts." in name}
                assert len(stacks) == 4
                assert all(torch.equal(x, y) for name in stacks for x, y in zip(held[name], stacks[name], strict=True))

    def test_merged_weights_are_rounded_once(self, tmp_path: Path) -> None:
        policy = policy_of("qwen3_moe", "nf4", tmp_path)
        model, _ = filled(policy, "merged")
        (a, b), weight = (
            scaled(policy)["model.layers.0.mlp.experts.down_proj"],
            next(iter(dict(layers(model)).values())),
        )
        plain, _ = filled(policy, "dequantized")
        want = next(iter(dict(layers(plain)).values())).w2_weight.double() + b.double() @ a.double()
        assert float((weight.w2_weight - want).abs().max()) < 1e-6

    def test_what_vllms_cpu_build_packs_is_filled_before(self, tmp_path: Path) -> None:
        """The gate of shared experts is in NF4 in the trainer, and has vLLM's own method in vLLM."""
        policy = policy_of("qwen2_moe", "nf4", tmp_path)
        model, provider = build(policy, "shared")
        name = "model.layers.1.mlp.shared_expert_gate.weight"
        want = torch.empty(1, SIZES["hidden_size"])
        DecodeTables([provider.weights[name]], [want]).run()
        assert torch.equal(model.get_parameter(name), want)

    @pytest.mark.parametrize("leaf", ["w13_weight", "w2_weight"])
    def test_a_changed_element_is_found(self, leaf: str, tmp_path: Path) -> None:
        """Fault injection: of merged weights, and of a slot."""
        policy = policy_of("qwen3_moe", "nf4", tmp_path)
        model, provider = filled(policy, "merged")
        _, module = list(layers(model))[1]
        getattr(module, leaf).data[-1, -1, -1].mul_(1.5).add_(0.01)
        ours = {"w13_weight": "gate_up_proj", "w2_weight": "down_proj"}[leaf]
        assert provider.weight_copy.differs(scaled(policy)) == f"model.layers.1.mlp.experts.{ours}"
        provider.weight_copy.run()
        provider.weight_copy.merge(scaled(policy))
        assert provider.weight_copy.differs(scaled(policy)) is None

    def test_gate_and_up_in_another_order_are_seen(self, tmp_path: Path) -> None:
        """Fault injection: both halves have one shape."""
        policy = policy_of("mixtral", "none", tmp_path)
        model, _ = filled(policy, "shared")
        stack: Any = policy.base.get_submodule("model.layers.1.mlp.experts").get_base_layer()  # type: ignore[operator]
        stack.gate_up_proj = nn.Parameter(torch.cat(stack.gate_up_proj.data.chunk(2, 1)[::-1], 1), requires_grad=False)
        with pytest.raises(AssertionError, match=r"layers.1"):
            compare(policy, model)

    def test_vllms_kernel_is_taken_where_no_adapter_is_beside_experts_and_must_keep_their_layout(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel of vLLM's CPU build packs weights."""
        from rlft.rollout.vllm import experts

        monkeypatch.setattr(experts, "current_platform", SimpleNamespace(is_cpu=lambda: False))  # as on a GPU
        lora = Lora(rank=4, targets=("q_proj", "v_proj"))
        wanted = {"merged": experts.FilledExperts, "dequantized": experts.ExpertsMethod}
        for mode, kind in wanted.items():
            model, _ = build(policy_of("mixtral", "none", tmp_path), mode)
            assert {type(module.quant_method) for _, module in layers(model)} == {kind}
        model, provider = build(policy_of("mixtral", "none", tmp_path, lora), "dequantized")
        provider.weight_copy.run()
        _, module = next(layers(model))
        assert type(module.quant_method) is experts.FilledExperts
        with pytest.raises(EngineError, match=r"vLLM's CPU kernel of experts has rearranged their weights"):
            module.quant_method.process_weights_after_loading(module)

    @pytest.mark.parametrize(
        ("kind", "form", "fields", "why"),
        [
            ("gpt_oss", "nf4", {}, r"gate_up_proj is in NF4 by rows of inputs"),
            ("qwen3_moe", "nf4", {"moe_intermediate_size": 96}, r"w2_weight: .* in NF4 blocks of 64: .* whole blocks"),
            ("deepseek_v2", "none", {}, r"vLLM multiplies .*kv_b_proj.weight into the weights beside it"),
            ("llama4_text", "none", {}, r"weights the input of .* by the router and not the output"),
        ],
    )
    def test_what_cannot_be_computed_in_place_is_refused(
        self, kind: str, form: str, fields: dict[str, Any], why: str, tmp_path: Path
    ) -> None:
        policy = policy_of(kind, form, tmp_path, **fields) if kind in FAMILIES else tiny(kind, torch.float32)
        with pytest.raises(UnsupportedModel, match=why):
            build(policy, "shared")


def test_memory_counts_experts_and_their_slots(tmp_path: Path) -> None:
    policy = policy_of("qwen3_moe", "nf4", tmp_path)
    weights = frozen_weights(policy.base)
    sizes = EngineMemory.of(policy, weights, torch.bfloat16, 64, 8, 8)
    stack = 8 * 128 * 128
    attention = 128 * 128 * 2 + 2 * 64 * 128
    assert sizes.stack == 2 * stack
    assert sizes.linear == 2 * 2 * (stack + stack // 2 + attention + 8 * 128)
    assert sizes.largest < sizes.stack, "stacks are not dequantized in mode shared"
    rank = 2
    experts = 2 * 8 * rank * ((128 + 128) + (64 + 128))
    # Of attention, where every slot has the smallest rank of the kernel.
    linear = 2 * 16 * (2 * (128 + 128) + 2 * (64 + 128))
    assert sizes.slots == 2 * (3 * policy.adapter_params.numel() + experts + linear)


@pytest.mark.parametrize(("field", "value", "only"), [("norm_topk_prob", True, False), ("clip_qkv", 0.3, None)])
def test_what_vllm_does_not_read_of_olmoe_is_refused(field: str, value: Any, only: Any) -> None:
    """vLLM's weights match and its log-probs would not: 0.23 and 1.3 nat."""
    base = mixture("olmoe", **{field: value})
    with pytest.raises(UnsupportedModel, match=f"computes olmoe as if {field} were {only}, and it is {value}"):
        vllm_start.model_folder(base, tiny_tokenizer())


@pytest.mark.parametrize(
    ("kind", "fields", "name", "fits"),
    [
        ("qwen3_moe", {}, "silu", True),
        ("qwen3_moe", {"hidden_act": "gelu"}, "silu", False),
        ("gpt_oss", {}, "swigluoai", True),
        ("gpt_oss", {"swiglu_limit": 3.0}, "swigluoai", False),
        ("gpt_oss", {}, "silu", False),
        ("qwen3_moe", {}, "relu2", False),
    ],
)
def test_vllms_activation_serves_where_it_is_the_trainers(kind: str, fields: Any, name: str, fits: bool) -> None:
    with vllm_start.quiet(), vllm_start.defaults_restored():
        from rlft.rollout.vllm.experts import is_gate
    gate = next(iter(model_experts.gates(mixture(kind, **fields)).values()))
    assert is_gate(name, gate) == fits
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as while vLLM builds a model
    try:
        assert is_gate(name, gate) == fits
    finally:
        torch.set_default_dtype(before)


def test_a_mixture_starts_after_a_dense_model_that_vllm_could_not_build(
    vllm_visible: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of processes that vLLM made for the first would serve the second, without one for experts."""
    vllm_start.environment()
    with vllm_start.quiet(), vllm_start.defaults_restored():
        from rlft.rollout.vllm.provider import WeightProvider
    options = Engine("vllm", max_seqs=8)

    def refuse(*_: Any) -> None:
        raise UnsupportedModel("not this one")

    with monkeypatch.context() as patch:
        patch.setattr(WeightProvider, "give", refuse)
        with pytest.raises(UnsupportedModel, match="not this one"):
            VllmEngine(tiny_policy(), tiny_tokenizer(), options, 40, 8)
    VllmEngine(policy_of("qwen3_moe", "none", tmp_path), tiny_tokenizer(), options, 40, 8).close()


def test_what_a_language_model_stacks_is_read_where_the_model_around_it_does_not_say() -> None:
    """Qwen2-VL in vLLM 0.23."""
    inner: Any = torch.nn.Linear(1, 1)
    outer: Any = torch.nn.Sequential()
    inner.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "qkv": ["q", "kv"]}
    outer.add_module("language_model", inner)
    assert Naming.of(outer).stacked == inner.packed_modules_mapping
    outer.packed_modules_mapping = {"qkv": ["qkv"]}
    assert Naming.of(outer).stacked == {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "qkv": ["qkv"]}


def test_names_of_experts_are_found_in_both_versions_of_vllm() -> None:
    weights: dict[str, Any] = {
        f"m.0.mlp.{name}": torch.zeros(i + 1)
        for i, name in enumerate(["experts.gate_up_proj", "experts.down_proj", "gate.weight", "experts.down_proj_bias"])
    }
    for block, inside in (("mlp", "routed_experts."), ("block_sparse_moe", "")):
        stacks = [f"m.0.{block}.experts.{inside}{leaf}" for leaf in ("w13_weight", "w2_weight", "w2_bias")]
        router = f"m.0.{block}.{'experts.' if inside else ''}gate.weight"
        found = partners([*stacks, router], Naming(), weights)
        assert [parts for name in (stacks[0], stacks[1], router, stacks[2]) for parts in found[name]] == list(weights)


@pytest.mark.parametrize(("kind", "form"), [*SAMPLED, *MORE])
def test_engine_and_trainer_agree_on_adapters_of_experts(kind: str, form: str, tmp_path: Path) -> None:
    policy, lines = policy_of(kind, form, tmp_path), []
    vllm_start.environment()
    with vllm_start.quiet(), vllm_start.defaults_restored():
        register(type(policy.base).__name__)
    noise = 0.06 if kind in IN_16_BITS else 1e-5
    engine = VllmEngine(policy, tiny_tokenizer(), Engine("vllm", max_seqs=8), 40, 8, detail=lines.append)
    try:
        assert "up in" in lines[-1] and "shared weights (nothing sleeps on a CPU)" in lines[-1]
        engine.load_adapter(policy.adapter(), 0)
        rollouts = engine.generate(prompts(4), SAMPLING, (1, 0))
        found = mismatch_of(policy, rollouts)
        assert found.tokens > 30 and found.mean < noise
        engine.sleep()
        engine.wake()
        assert engine.generate(prompts(4), SAMPLING, (1, 0)) == rollouts
        _read_back_finds_a_changed_slot(policy, engine)
        trained(policy, experts=0.0)
        assert mismatch_of(policy, rollouts).mean > 10 * noise, "experts' adapters count"
        engine.load_adapter(policy.adapter(), 1)
        assert mismatch_of(policy, engine.generate(prompts(4), SAMPLING, (1, 0))).mean < noise
    finally:
        engine.close()


def _read_back_finds_a_changed_slot(policy: Policy, engine: VllmEngine) -> None:
    """Fault injection, in A and B of a stack."""
    for side in (1, 2):
        slot = next(slot for slot in engine._provider.slots() if ".experts." in slot[0])
        matrix: Tensor = slot[side]
        matrix[-1, -1, -1] += 0.5
        with pytest.raises(
            EngineError, match=rf"experts\.gate_up_proj\.lora_{'AB'[side - 1]}.weight differs by up to 0.5"
        ):
            engine._check(engine._held, 0)
        engine.load_adapter(policy.adapter(), 0)
