"""Mixtures of experts in fused layers on a GPU: against float64 beside transformers' loop, levels, the memory plan.

Where rounding changes the experts of a token its result is another one, in transformers too. So a comparison with
float64 has every token go to all experts, which no rounding changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from test_families import SIZES, fused, run
from test_fused_gpu import BIG_LINEAR, batch_of, data, error, gradient_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from rlft.config.run import Lora
from rlft.kernels.attention import Sequences
from rlft.kernels.logprobs import CHUNK_BYTES
from rlft.models import experts
from rlft.models.experts_nf4 import quantized
from rlft.models.fused import memory
from rlft.models.fused.levels import L0, L2, LEVELS, Level
from rlft.models.fused.mixer_shape import Recurrent
from rlft.models.load import attach_lora
from rlft.models.policy import Policy

quiet = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]
pytestmark = [pytest.mark.gpu, *quiet]
SIZED = SIZES | {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.05,
    "max_position_embeddings": 4096,
}
LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "mixtral": {},
    "olmoe": {"head_dim": None},
    "qwen2_moe": {},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_oss": {},
    "qwen3_5_moe_text": LINEAR,
}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def model_of(kind: str, dtype: torch.dtype, count: int = 4, k: int = 4, **more: Any) -> PeftModel:
    """A model on the GPU with `count` experts, k of a token; float64 has the weights of bfloat16."""
    fields = {**SIZED, **dict.fromkeys(COUNTS, count), "num_experts_per_tok": k, **KINDS[kind], **more}
    if kind in ("qwen3_moe", "qwen2_moe", "olmoe", "qwen3_5_moe_text"):
        del fields["num_local_experts"], fields["n_routed_experts"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if value is not None})
    base: Any = AutoModelForCausalLM.from_config(config).bfloat16()
    for parameter in base.parameters():
        if parameter.dim() < 2 or not parameter.any():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model = attach_lora(base.to(dtype).cuda().eval().requires_grad_(False), Lora(rank=8, alpha=16, expert_rank=4), 1)
    g = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
    return model


def by_transformers(kind: str, dtype: torch.dtype, upstream: Tensor, ids: Tensor) -> Any:
    model = model_of(kind, dtype)
    model.get_base_model().set_experts_implementation("eager")  # type: ignore[operator]
    return run(model, ids, None, upstream.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_near_to_fp64_as_transformers(kind: str) -> None:
    ids, _, upstream = data(torch.float64)
    truth = by_transformers(kind, torch.float64, upstream, ids)
    plain = error(by_transformers(kind, torch.bfloat16, upstream, ids), truth)
    model = model_of(kind, torch.bfloat16)
    decoder = fused(model)
    ours = error(run(model, ids, None, upstream.bfloat16()), truth)
    assert decoder.last_plan is not None
    for what, value in ours.items():
        assert value <= 1.5 * plain[what], f"{what}: {value:.2e} against transformers' {plain[what]:.2e}"


def batches(model: PeftModel, level: Level, mode: Any, ids: Tensor, upstream: Tensor) -> Any:
    fused(model, level, mode)
    return run(model, ids, None, upstream)


@pytest.mark.parametrize("mode", ["layer", "group", "shadow"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_levels_agree_within_rounding(kind: str, mode: str) -> None:
    """8 experts of which a token goes to 2: the choices of a level are those that were kept."""
    ids, _, upstream = data(torch.bfloat16)
    want = batches(model_of(kind, torch.bfloat16, 8, 2), L0, "layer", ids, upstream)
    for level in LEVELS:
        got = batches(model_of(kind, torch.bfloat16, 8, 2), level, mode, ids, upstream)
        assert torch.equal(want[0], got[0])
        for name, gradient in want[1].items():
            # dQ is summed by atomics: two runs of one level differ as much.
            off = float((got[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6))
            assert off < 5e-3, (level, name, off)


def test_nf4_experts_give_the_bits_of_their_decoded_weights() -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.uint8
    )
    ids, _, upstream = data(torch.bfloat16)
    found = []
    for plain in (False, True):
        model = model_of("qwen3_moe", torch.bfloat16, 8, 2)
        for stack in experts.stacks(model).values():
            setattr(stack.module, stack.leaf, quantized(stack.weight.data, settings))
            if plain:
                values = experts.decoded(stack.module, stack.leaf, torch.bfloat16)
                setattr(stack.module, stack.leaf, torch.nn.Parameter(values, requires_grad=False))
        found.append(batches(model, L2, "layer", ids, upstream))
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "glm4_moe", "gpt_oss", "qwen3_5_moe_text"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_plan_is_within_5_percent_of_the_measured_peak(kind: str, level: Level) -> None:
    big: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_hidden_layers": 6,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    }
    if kind == "qwen3_5_moe_text":
        big |= {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2, **BIG_LINEAR}
    policy = Policy(model_of(kind, torch.bfloat16, 16, 4, **big))
    decoder = policy.fused
    assert decoder is not None and policy.path.startswith("fused layers, without CUDA graphs: ")
    batch = batch_of([9000, 7000], torch.Generator().manual_seed(1))
    rows = int(batch.cu_seqlens[-1])
    how = memory.PassOptions(4096, "layer", CHUNK_BYTES)
    recurrent = Recurrent.of(Sequences.of(batch.cu_seqlens, batch.prefix, "cpu")) if decoder.mixers else None
    decoder.plan = memory.evaluate(decoder.shape, rows, rows - 6, (6, level, level), how, 0, recurrent)
    gradient_of(policy, batch)
    decoder.store.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient_of(policy, batch)
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    # `gradient_of` returns a copy of the gradient, made when the layers' memory is free again.
    assert abs(measured - decoder.plan.peak) <= 0.05 * measured, (
        f"{measured / 2**20:.0f} MiB, planned {decoder.plan.peak / 2**20:.0f}"
    )


def test_the_host_never_waits_for_the_gpu_within_a_micro_batch() -> None:
    """Where rows of experts begin is known to the device alone."""
    policy = Policy(model_of("qwen2_moe", torch.bfloat16, 8, 2))
    batch = batch_of([90, 83, 76], torch.Generator().manual_seed(10))
    for _ in range(2):
        gradient_of(policy, batch)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        logprobs, _ = policy.logprobs(batch)
        (logprobs * batch.to("cuda").weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
