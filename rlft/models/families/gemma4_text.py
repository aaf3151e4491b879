"""Gemma 4, text only: Gemma 3's layer with heads of two sizes, k and v shared across layers, and inputs per layer."""

from rlft.models.families import Family, PerLayerInput

FAMILY = Family(
    "Gemma4TextModel",
    attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    down_norm="post_feedforward_layernorm",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    value_norm="self_attn.v_norm",
    key_is_value="attention_k_eq_v",
    shared_kv="num_kv_shared_layers",
    per_layer_input=PerLayerInput(),
    layer_scale="layer_scalar",
    norm_style="olmo",
    activation="hidden_activation",
    rope_by_type=True,
    reads=(
        *("head_dim", "attention_bias", "final_logit_softcapping", "sliding_window", "layer_types"),
        *("vocab_size_per_layer_input", "use_double_wide_mlp"),
    ),
    without_effect={"use_bidirectional_attention": "vision"},  # of the tokens of images
)
