"""Small random mixtures of experts of several families, as models and as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 32},
    "glm4_moe": {
        **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
        **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    },
    "gpt_oss": {"num_local_experts": 8},
    "qwen3_next": {
        **{"num_experts": 8, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
        **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
        **{"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24},
    },
}
"""Families -> their fields: plain ones, shared experts, sigmoid scores with groups, biases and clamps, a hybrid."""


def mixture(kind: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A frozen model whose biases, norms and sinks are away from 0 and 1, where a fault would not show."""
    config = AutoConfig.for_model(kind, **{**BASE, **FAMILIES[kind], **fields})
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.any():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.to(dtype).eval().requires_grad_(False)


def save_mixture(folder: Path, kind: str = "qwen3_moe", original: bool = True, **fields: Any) -> Path:
    """A checkpoint with its tokenizer. original: a weight per expert, as families' files have; else stacks."""
    mixture(kind, **fields).save_pretrained(folder, save_original_format=original)
    tiny_tokenizer().save_pretrained(folder)
    return folder
