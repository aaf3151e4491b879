"""Every kind of decoder through the path that `Policy` chooses for it, against transformers' own forward of each row
alone: log-probs and every gradient of the adapter, packed, behind shared prompts, and sampled by the eager engine.

Tiny random models in float64. A small subset runs always, the others with `-m slow`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_policy import plan, rollouts
from tiny import prompts, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlft import selfcheck
from rlft.batch import count, pack
from rlft.config import Lora, Sampling
from rlft.models.kind import attention_of
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine

BASE: dict[str, Any] = {
    "vocab_size": 103, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1,
    "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "attention_dropout": 0.0,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
          "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
       "num_key_value_heads": 4, "head_dim": None}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2,
         "mamba_chunk_size": 8}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "fused": {
        "llama": {}, "mistral": WINDOW, "qwen2": {}, "qwen3": {}, "gemma2": MIXED, "gemma3_text": MIXED, "phi3": WINDOW,
    },
    "packed": {
        "smollm3": {"no_rope_layers": [1, 0]}, "olmo": {"clip_qkv": 2.0}, "olmo2": {}, "olmo3": MIXED,
        "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
        "cohere": {"logit_scale": 0.5}, "cohere2": {**MIXED, "logit_scale": 0.5}, "glm": {}, "glm4": {},
        "ministral": MIXED, "ministral3": {}, "seed_oss": {}, "hunyuan_v1_dense": {}, "ernie4_5": {}, "exaone4": MIXED,
        "apertus": {}, "arcee": {}, "helium": {}, "gemma": {}, "starcoder2": WINDOW, "nanochat": {}, "gpt2": GPT2,
        "cwm": MIXED, "vaultgemma": MIXED, "hyperclovax": {"logits_scaling": 2.0}, "phi": {},
        "qwen3_moe": EXPERTS, "qwen2_moe": EXPERTS, "mixtral": LOCAL, "glm4_moe": ROUTED, "olmoe": EXPERTS,
        "granitemoe": {**LOCAL, "logits_scaling": 2.0}, "dots1": ROUTED, "phimoe": LOCAL,
        "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
        "minimax_m2": LOCAL, "flex_olmo": EXPERTS, "gpt_neox": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
        "biogpt": {}, "persimmon": {}, "bitnet": {}, "solar_open": ROUTED, "hunyuan_v1_moe": EXPERTS,
    },
    "padded": {
        "qwen3_5_text": LINEAR, "qwen3_next": {**LINEAR, **EXPERTS}, "qwen3_5_moe_text": {**LINEAR, **EXPERTS},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "granitemoehybrid": {**MAMBA, "num_local_experts": 0, "layer_types": ["mamba", "attention"],
                             "shared_intermediate_size": 64, "logits_scaling": 2.0},
        "bamba": {**MAMBA, "attn_layer_indices": [1]},
        "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                  "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
        "olmo_hybrid": LINEAR, "minimax": {**LOCAL, "layer_types": ["linear_attention", "full_attention"]},
        "recurrent_gemma": {"lru_width": 64, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
        "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4, "lm_head_multiplier": 0.5},
        "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16,
                       "chunk_size": 8},
        "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 8, "expand": 2},
        "mamba": {"state_size": 8}, "falcon_mamba": {"state_size": 8},
        "deepseek_v2": {**ROUTED, **MLA}, "deepseek_v3": {**ROUTED, **MLA}, "glm4_moe_lite": {**ROUTED, **MLA},
        "minicpm3": {**MLA, "logits_scaling": 2.0}, "youtu": MLA, "gpt_oss": {**LOCAL, **WINDOW},
        "granite_swa": WINDOW, "llama4_text": {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 64,
                                               "attention_chunk_size": 4},
        "stablelm": {}, "nemotron": {}, "diffllama": {}, "gemma4_text": MIXED, "doge": {}, "falcon": {"alibi": False},
        "bloom": {"n_layer": 2, "n_head": 4}, "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
        "gptj": {**GPT2, "rotary_dim": 8}, "codegen": {**GPT2, "rotary_dim": 8}, "gpt_bigcode": GPT2,
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        "xglm": {"d_model": 64, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
        "jetmoe": {**LOCAL, "kv_channels": 16},
    },
}  # fmt: skip
ALL = [(path, kind) for path, kinds in KINDS.items() for kind in kinds]
QUICK = ("llama", "gemma2", "olmo2", "cohere2", "granite", "gpt2", "phi", "hyperclovax", "qwen3_moe", "glm4_moe",
         "qwen3_5_text", "lfm2", "granitemoehybrid", "recurrent_gemma", "falcon_h1", "minimax", "deepseek_v3", "gpt_oss",
         "llama4_text", "nemotron", "mamba2")  # fmt: skip


def tiny(kind: str, dtype: torch.dtype = torch.float64, lora: Lora = Lora(rank=4, alpha=8)) -> Policy:  # noqa: B008
    """A policy over a random model of two layers, with every weight and the adapter away from its starting value."""
    (fields,) = (kinds[kind] for kinds in KINDS.values() if kind in kinds)
    chosen = {name: value for name, value in {**BASE, **fields}.items() if value is not None}
    config = AutoConfig.for_model(kind, **chosen)
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config))
    base = base.to(dtype).eval().requires_grad_(False)
    for parameter in base.parameters():
        # Biases, norms and sinks start at 0 or 1, where a fault would not show.
        if parameter.dim() < 2 or not parameter.any():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    policy = Policy(attach_lora(base, lora, 0), dtype=dtype)
    policy.flat.flat.data.add_(0.05 * torch.randn(policy.flat.flat.shape, generator=generator, dtype=dtype))
    return policy


def row_alone(policy: Policy, ids: tuple[int, ...], start: int) -> Tensor:
    """Log-probs of ids[start:] by transformers' own forward, with gradient."""
    asked = {} if policy.fused is None else {"output_hidden_states": True}
    row = torch.tensor([ids])
    log_p = policy.model(input_ids=row, use_cache=False, **asked).logits[0].log_softmax(-1)
    return log_p[start - 1 : -1].gather(1, row[0, start:, None]).squeeze(1)


def compare(policy: Policy, whole_groups: bool = False) -> None:
    """Log-probs and gradients of packed batches, with and without shared prompts, against rows alone."""
    made = rollouts(3)
    weights = torch.linspace(-1, 1, len(made)) + 0.05
    wanted = [row_alone(policy, r.prompt.ids + r.completion_ids, len(r.prompt.ids)) for r in made]
    loss = sum((w * lp.sum() for w, lp in zip(weights.tolist(), wanted, strict=True)), torch.zeros(()))
    parameters = list(policy.flat.parameters.values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradient = torch.cat([torch.zeros(p.numel()) if g is None else g.reshape(-1) for p, g in zip(parameters, found)])  # noqa: B905
    size = float(gradient.abs().max())
    assert size > 1e-3, "the adapter learns"
    from dataclasses import replace

    for share in (False, True):
        the_plan = replace(plan(len(made), 40, share), whole_groups=whole_groups)
        policy.flat.zero_grad()
        for batch in pack(made, weights, the_plan, count(made, the_plan)):
            logprobs, _ = policy.logprobs(batch)
            own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
            for s, row in zip(own, batch.rows, strict=True):
                mine = logprobs[(batch.seq_ids == s) & batch.train_mask]
                assert torch.allclose(mine.detach(), wanted[row].detach(), atol=1e-6, rtol=0), (share, row)
            (logprobs * batch.advantages).sum().backward()
        off = (policy.flat.gradient - gradient).abs().max()
        assert off < 1e-6 * max(1.0, size), (share, float(off), size)


@pytest.mark.parametrize(
    ("path", "kind"),
    [pytest.param(p, k, id=k, marks=[] if k in QUICK else pytest.mark.slow) for p, k in ALL],
)
def test_every_row_trains_and_samples_as_if_it_were_alone(path: str, kind: str) -> None:
    policy = tiny(kind)
    assert policy.path.startswith("fused layers" if path == "fused" else f"transformers' own layers, {path}: ")
    compare(policy)
    assert selfcheck.check(policy) < selfcheck.LEAST
    engine = EagerEngine(policy, tiny_tokenizer())
    engine.load_adapter(policy.adapter(), 1)
    for r in engine.generate(prompts(3), Sampling(group_size=2, max_tokens=5), (1, 2)):
        with torch.no_grad():
            alone = row_alone(policy, r.prompt.ids + r.completion_ids, len(r.prompt.ids))
        assert r.sampler_logprobs == pytest.approx(alone.tolist(), abs=1e-6)
