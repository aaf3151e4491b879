"""gpt-oss: sinks in the softmax of attention, windows by layer, and experts with biases and a clamped gate."""

from rlft.models.families import Experts, Family

FAMILY = Family(
    "GptOssModel",
    norm_style="olmo",
    sinks=True,
    half_tables=True,
    experts=Experts(router="mlp.router", own_gate=True, count="num_local_experts"),
    reads=(
        *("head_dim", "attention_bias", "sliding_window", "layer_types"),
        *("num_local_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit"),
    ),
)
