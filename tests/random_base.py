"""Random causal models of a `model_type`, text decoders of vision-language models among them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from rlft.models.kind import attention_of

OUTSIDE = 10**6
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl_text": {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64},
    "qwen3_vl_text": {
        **{"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64},
        "deepstack_visual_indexes": [0],
    },
}
"""Text decoders without a causal class in transformers -> the vision tower of the model that has one."""
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def config_of(kind: str, **fields: Any) -> Any:
    """A config with which `base_of` makes a model."""
    if kind not in VISION:
        return AutoConfig.for_model(kind, **fields)
    ids = {name: OUTSIDE + i for i, name in enumerate(TOKENS)}
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    if kind == "qwen3_vl_text":
        head_dim = fields["head_dim"]
    third = head_dim // 6
    rope = {"mrope_section": [head_dim // 2 - 2 * third, third, third], "rope_type": "default", "rope_theta": 1e4}
    text = {**fields, "head_dim": head_dim, "rope_parameters": {**rope, **fields.get("rope_parameters", {})}}
    return AutoConfig.for_model(
        kind.removesuffix("_text"), text_config=text, vision_config=VISION[kind], tie_word_embeddings=False, **ids
    )


def base_of(config: Any) -> Any:
    """A model with random weights and the attention that is exact beside rlft's."""
    eager = attention_of(config.get_text_config()) == "eager"
    seeing = getattr(config, "vision_config", None) is not None
    make = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    return make.from_config(config, attn_implementation="eager" if eager and not seeing else "sdpa")


@contextmanager
def in_float64(decoder: Any) -> Iterator[None]:
    """transformers' own layers without their roundings to fp32."""

    class Torch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, "float64" if name in ("float32", "float") else name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[type(decoder).__module__], "torch", Torch("torch"))
        patch.setattr(Tensor, "float", Tensor.double)
        yield
