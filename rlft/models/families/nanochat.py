"""nanochat: norms without weights, of the embeddings too and of rotated q and k, and an MLP of ReLU squared."""

from rlft.models.families import Family

FAMILY = Family(
    "NanoChatModel",
    gate_up=("mlp.fc1",),
    gated=False,
    down="mlp.fc2",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    qk_norm_after=True,
    embedding_norm=True,
    turns_back=True,
    window="none",
    reads=("attention_bias", "final_logit_softcapping"),
)
