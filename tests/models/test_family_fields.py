"""Every field of every family's config: read exactly, or refused by its name, or without effect on the layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import KINDS, QUICK, compare, tiny
from test_families import fused, model_of

import rlft.models.families
from rlft.models import families
from rlft.models.families import fields_of, neutral

NAMES = sorted(path.stem for path in Path(rlft.models.families.__file__).parent.glob("*.py") if path.stem[0] != "_")
OTHER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 107,
    "rms_norm_eps": 0.1,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": 7,
    "initializer_range": 0.09,
    "pretraining_tp": 2,
    "head_dim": 8,
    "hidden_act": "gelu",
    "hidden_activation": "silu",
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "sliding_window": 3,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
    "no_rope_layers": [0, 1],
    "no_rope_layer_interval": 1,
    "layer_rope_theta": [0, 500.0],
    "eod_token_id": 4,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.1,
    "logits_scaling": 3.0,
    "sliding_window_pattern": 2,
    "original_max_position_embeddings": 256,
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
    "norm_eps": 0.1,
    "full_attn_idxs": [0],
    "conv_L_cache": 4,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 9.0,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 6,
    "linear_a_log_min": 0.5,
    "linear_a_log_max": 8.0,
    "linear_dt_min": 0.002,
    "linear_dt_max": 0.2,
    "linear_dt_init_floor": 0.0002,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 107,
    "num_kv_shared_layers": 1,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 4,
    "top_k_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 0.7,
    "first_k_dense_replace": 0,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 2,
    "router_aux_loss_coef": 0.2,
    "router_jitter_noise": 0.2,
    "clip_qkv": 0.1,
    "num_mtp_layers": 2,
    "swiglu_alpha": 0.9,
    "swiglu_limit": 0.2,
}
"""Field -> a value that the rows of `KINDS` do not have. Fields that are not here are flags, which are flipped."""
TOGETHER: dict[str, dict[str, Any]] = {
    # Helium's heads have to fill its hidden size.
    "hidden_size": {"num_attention_heads": 2},
    "num_attention_heads": {"head_dim": 8},
    "head_dim": {"num_attention_heads": 8},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 4, "layer_types": None},
    "use_sliding_window": {"sliding_window": 4, "max_window_layers": 1, "layer_types": None},
    "sliding_window": {"use_sliding_window": True, "max_window_layers": 1},
    "layer_types": {"sliding_window": 4, "use_sliding_window": True},
    "num_hidden_layers": {
        **{"layer_types": None, "no_rope_layers": None, "layer_rope_theta": None},
        "num_kv_shared_layers": 0,
    },
    "enable_moe_block": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "rope_parameters": {"layer_rope_theta": None},
    "no_rope_layer_interval": {"no_rope_layers": None},
    "full_attn_idxs": {"layer_types": None},
    "topk_group": {"n_group": 4},
}
"""Fields with an effect only, or a valid value only, beside others."""
OWN: dict[tuple[str, str], Any] = {
    ("gemma4_text", "use_bidirectional_attention"): "all",
    ("gemma4_text", "layer_types"): ["full_attention", *["sliding_attention"] * 2, "full_attention"],
}
"""Values for fields that mean something else in one type of model."""
SCALED = OTHER["rope_parameters"] | {"llama_4_scaling_beta": 0.9, "original_max_position_embeddings": 3}
BY_TYPE = {"sliding_attention": OTHER["rope_parameters"], "full_attention": {"rope_type": "default", "rope_theta": 7e2}}


def changed(kind: str, name: str) -> dict[str, Any]:
    """Config fields with another value for `name`."""
    family = families.find(kind)
    assert family is not None
    config = tiny(kind).base.get_decoder().config  # type: ignore[operator]
    if name == "rope_parameters" and family.rope_by_type:
        return {name: BY_TYPE}
    if name == "rope_parameters" and kind == "ministral3":
        return {name: SCALED}
    if (kind, name) in OWN:
        return {name: OWN[kind, name]}
    value = OTHER[name] if name in OTHER else not getattr(config, name)
    if name == "layer_types" and family.by_type:
        value = config.layer_types[::-1]
    known = fields_of(config)
    return {name: value} | {key: other for key, other in TOGETHER.get(name, {}).items() if key in known}


DENSE = [n for n in QUICK if n in NAMES and families.find(n).experts is None]  # type: ignore[union-attr]
"""Families whose walk takes seconds; transformers' loop over experts takes a minute."""


@pytest.mark.parametrize("kind", [pytest.param(n, marks=[] if n in DENSE else pytest.mark.slow) for n in NAMES])
def test_every_field_is_read_or_refused_or_neutral(kind: str) -> None:
    assert [kinds for kinds in KINDS.values() if kind in kinds], "a row of test_architectures.py"
    for name in fields_of(tiny(kind).base.get_decoder().config):  # type: ignore[operator]
        fields = changed(kind, name)
        policy = tiny(kind, **fields)
        try:
            if policy.fused is None:
                assert f"{name} is " in policy.path, policy.path
            else:
                compare(policy)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"{fields}: {error}") from error


def test_a_field_that_no_layer_reads_is_refused_by_name_and_value() -> None:
    path = tiny("gemma2", use_bidirectional_attention=True).path
    assert "use_bidirectional_attention is True, which no fused layer of gemma2 reads" in path


def test_a_dropout_of_the_base_runs_transformers_layers_in_training_mode_only() -> None:
    model = model_of("llama", torch.float32)
    decoder = fused(model).decoder
    decoder.config.attention_dropout = 0.1  # type: ignore[union-attr]
    ids = torch.arange(3, 14)[None]
    for training in (False, True):
        decoder.train(training)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            decoder(input_ids=ids, use_cache=False)
        told = [str(warning.message) for warning in found]
        assert any("attention_dropout is 0.1 and the model is in training mode" in text for text in told) == training


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("residual_multiplier", 1.0, True),
        ("residual_multiplier", 0.22, False),
        ("residual_multiplier", None, True),
        ("use_scale", True, False),
        ("use_bias", False, True),
        ("clip_qkv", 0, True),
        ("no_rope_layers", [1, 0], False),
    ],
)
def test_what_is_neutral(name: str, value: Any, expected: bool) -> None:
    assert neutral(name, value) == expected
