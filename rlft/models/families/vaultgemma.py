"""VaultGemma: Gemma 2's layer without norms behind attention and MLP."""

from rlft.models.families import Family

FAMILY = Family(
    "VaultGemmaModel",
    mlp_norm="pre_feedforward_layernorm",
    norm_style="gemma",
    activation="hidden_activation",
    reads=(
        *("head_dim", "attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"),
        *("sliding_window", "layer_types", "attn_logit_softcapping"),
    ),
)
