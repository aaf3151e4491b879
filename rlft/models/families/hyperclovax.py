"""HyperCLOVA X: Granite's layer, with norms behind attention and MLP unless the config turns them off."""

from rlft.models.families import Family

FAMILY = Family(
    "HyperCLOVAXModel",
    attention_norm="post_norm1",
    down_norm="post_norm2",
    window="none",
    embedding_factor="embedding_multiplier",
    residual_factor="residual_multiplier",
    reads=("head_dim", "attention_bias", "mlp_bias", "attention_multiplier", "logits_scaling", "use_post_norm"),
)
