"""Every kind of decoder through the path that `Policy` chooses for it, against transformers' own forward of each row
alone: log-probs and every gradient of the adapter, packed, behind shared prompts, and sampled by the eager engine.

Tiny random models in float64. A small subset runs always, the others with `-m slow`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import records
import torch
from peft import PeftModel
from random_base import base_of, config_of, in_float64
from test_engines import mismatch_of
from test_policy import plan, rollouts
from tiny import prompts, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import rlft
from rlft.config.data import Sampling
from rlft.config.run import Lora
from rlft.errors import ConfigError, TrainError
from rlft.kernels.attention import Sequences
from rlft.models import families, padded, targets
from rlft.models.load import Base, attach_lora, load_base
from rlft.models.packed import packed_attention
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine
from rlft.trainer import selfcheck

BASE: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
WINDOW = {"sliding_window": 4}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
FACTORS = {"logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "embedding_multiplier": 3.0}
GEMMA4 = {
    **WINDOW,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 103,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "final_logit_softcapping": 5.0,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}

# A type with a file in rlft/models/families runs fused layers, wherever its row stands.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "packed": {
        "llama": {},
        "mistral": WINDOW,
        "qwen2": {},
        "qwen3": {},
        "gemma2": MIXED,
        "gemma3_text": MIXED,
        "phi3": WINDOW,
        "smollm3": {"no_rope_layers": [1, 0]},
        "olmo": {"clip_qkv": 2.0},
        "olmo2": {},
        "olmo3": MIXED,
        "granite": FACTORS,
        "cohere": {"logit_scale": 0.5},
        "cohere2": {**MIXED, "logit_scale": 0.5},
        "glm": {},
        "glm4": {},
        "ministral": MIXED,
        "ministral3": {
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
                **{"original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.5},
            }
        },
        "seed_oss": {},
        "hunyuan_v1_dense": {},
        "ernie4_5": {},
        "exaone4": MIXED,
        "apertus": {},
        "arcee": {},
        "helium": {},
        "gemma": {},
        "starcoder2": WINDOW,
        "nanochat": {},
        "gpt2": GPT2,
        "gpt_bigcode": GPT2,
        "cwm": MIXED,
        "vaultgemma": {**MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
        "qwen2_vl_text": {},
        "qwen2_5_vl_text": {},
        "qwen3_vl_text": {},
        "hyperclovax": FACTORS,
        "phi": {},
        "qwen3_moe": EXPERTS,
        "qwen2_moe": EXPERTS,
        "mixtral": LOCAL,
        "glm4_moe": ROUTED,
        "olmoe": {**EXPERTS, "head_dim": None},
        "granitemoe": {**LOCAL, "logits_scaling": 2.0},
        "dots1": ROUTED,
        "phimoe": LOCAL,
        "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
        "minimax_m2": LOCAL,
        "flex_olmo": EXPERTS,
        "gpt_neox": {},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
        "persimmon": {},
        "solar_open": ROUTED,
        "hunyuan_v1_moe": EXPERTS,
    },
    "padded": {
        "qwen3_5_text": LINEAR,
        "qwen3_next": {**LINEAR, **EXPERTS},
        "qwen3_5_moe_text": {**LINEAR, **EXPERTS},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "granitemoehybrid": {
            **MAMBA,
            "num_local_experts": 0,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 64,
            "logits_scaling": 2.0,
        },
        "bamba": {**MAMBA, "attn_layer_indices": [1]},
        "jamba": {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
        },
        "olmo_hybrid": LINEAR,
        "minimax": {**LOCAL, "layer_types": ["linear_attention", "full_attention"]},
        "recurrent_gemma": {"lru_width": 64, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
        "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4, "lm_head_multiplier": 0.5},
        "nemotron_h": {
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
            "chunk_size": 8,
        },
        "mamba2": {
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "state_size": 16,
            "chunk_size": 8,
            "expand": 2,
            "residual_in_fp32": False,
        },
        "mamba": {"state_size": 8, "residual_in_fp32": False},
        "falcon_mamba": {"state_size": 8, "residual_in_fp32": False},
        "deepseek_v2": {**ROUTED, **MLA},
        "deepseek_v3": {**ROUTED, **MLA},
        "glm4_moe_lite": {**ROUTED, **MLA},
        "minicpm3": {**MLA, "dim_model_base": 32},
        "youtu": MLA,
        "gpt_oss": {**LOCAL, **WINDOW},
        "granite_swa": {**FACTORS, **MIXED, "layer_rope_theta": [1e4, 0]},
        "stablelm": {},
        "nemotron": {},
        "diffllama": {},
        "gemma4_text": GEMMA4,
        "doge": {},
        "llama4_text": {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "attention_chunk_size": 4},
        "biogpt": {},
        "bitnet": {},
        "falcon": {"alibi": False, "head_dim": None},
        "bloom": {"n_layer": 2, "n_head": 4},
        "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
        "gptj": {**GPT2, "rotary_dim": 8},
        "codegen": {**GPT2, "rotary_dim": 8},
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        "jetmoe": {**LOCAL, "kv_channels": 16},
    },
}
ALL = [("fused" if families.find(kind) else path, kind) for path, kinds in KINDS.items() for kind in kinds]
QUICK = (
    "llama",
    "gemma2",
    "olmo2",
    "cohere2",
    "granite",
    "gpt2",
    "phi",
    "hyperclovax",
    "qwen3_moe",
    "glm4_moe",
    "qwen3_5_text",
    "qwen3_next",
    "lfm2",
    "granitemoehybrid",
    "recurrent_gemma",
    "falcon_h1",
    "minimax",
    "deepseek_v3",
    "gpt_oss",
    "gemma4_text",
    "llama4_text",
    "nemotron",
    "mamba2",
)


def tiny(kind: str, dtype: torch.dtype = torch.float64, lora: Lora = Lora(rank=4, alpha=8), **more: Any) -> Policy:  # noqa: B008
    """A policy over a random model of two layers, with every weight and the adapter away from its starting value.

    more: config fields beside those of the row.
    """
    (fields,) = (kinds[kind] for kinds in KINDS.values() if kind in kinds)
    chosen = {name: value for name, value in {**BASE, **fields, **more}.items() if value is not None}
    config = config_of(kind, **chosen)
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = base_of(config)
    base = base.to(dtype).eval().requires_grad_(False)
    for name, parameter in base.named_parameters():
        # Biases, norms and sinks start at 0 or 1, where a fault would not show.
        if parameter.dim() < 2 or not parameter.any():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        # A state that is forgotten within a row or two would not show whether it is handed on.
        if name.endswith("linear_attn.A_log"):
            parameter.data.sub_(4)
    policy = Policy(attach_lora(base, lora, 0), dtype=dtype)
    policy.adapter_params.data.add_(0.05 * torch.randn(policy.adapter_params.shape, generator=generator, dtype=dtype))
    return policy


def wide(policy: Policy) -> AbstractContextManager[None]:
    """transformers has the states of the gated delta rule, and Gemma 4's many norms, in fp32 in float64 models too."""
    decoder = policy.base.get_decoder()  # type: ignore[operator]
    rounds = policy.fused is not None and (policy.fused.mixers or policy.fused.inputs)
    return in_float64(decoder) if rounds and decoder.dtype == torch.float64 else nullcontext()


def row_alone(policy: Policy, ids: tuple[int, ...], start: int) -> Tensor:
    """Log-probs of ids[start:] by transformers' own forward, with gradient."""
    asked = {} if policy.fused is None else {"output_hidden_states": True}
    row = torch.tensor([ids])
    with wide(policy), transformers_experts(policy.base):
        log_p = policy.model(input_ids=row, use_cache=False, **asked).logits[0].log_softmax(-1)
    return log_p[start - 1 : -1].gather(1, row[0, start:, None]).squeeze(1).double()


@contextmanager
def transformers_experts(base: Any) -> Iterator[None]:
    """transformers' own loop over experts, and PEFT's own sum of weights and adapters."""
    before = base.get_experts_implementation()
    base.set_experts_implementation("eager")
    yield
    base.set_experts_implementation(before)


def precision(policy: Policy) -> float:
    """1e-6; transformers' eager attention has its softmax in fp32, in float64 models too."""
    config: Any = policy.base.config
    eager = config._attn_implementation == "eager" or getattr(config, "attn_logit_softcapping", None)
    return 1e-5 if eager else 1e-6


def compare(policy: Policy, whole_groups: bool = False) -> None:
    """Log-probs and gradients of packed batches, with and without shared prompts, against rows alone."""
    with wide(policy):
        _compare(policy, whole_groups)


def _compare(policy: Policy, whole_groups: bool) -> None:
    small = precision(policy)
    made = rollouts(3)
    weights = torch.linspace(-1, 1, len(made)) + 0.05
    wanted = [row_alone(policy, r.prompt.ids + r.completion_ids, len(r.prompt.ids)) for r in made]
    loss = sum((w * lp.sum() for w, lp in zip(weights.tolist(), wanted, strict=True)), torch.zeros(()))
    parameters = list(policy.flat.parameters.values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradient = torch.cat([torch.zeros(p.numel()) if g is None else g.reshape(-1) for p, g in zip(parameters, found)])  # noqa: B905
    size = float(gradient.abs().max())
    assert size > 1e-3, "the adapter learns"
    for share in (False, True):
        the_plan = replace(plan(len(made), 40, share), whole_groups=whole_groups)
        policy.flat.zero_grad()
        for batch in records.packed(made, the_plan, weights):
            logprobs, _ = policy.logprobs(batch)
            own = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0]
            for s, row in zip(own, records.rows(batch, made), strict=True):
                mine = logprobs[(batch.seq_ids == s) & batch.train_mask]
                assert torch.allclose(mine.detach(), wanted[row].detach(), atol=small, rtol=0), (share, row)
            (logprobs * batch.advantages).sum().backward()
        off = (policy.flat.gradient - gradient).abs().max()
        assert off < small * max(1.0, size), (share, float(off), size)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of GPT-BigCode's own file
@pytest.mark.parametrize(
    ("path", "kind"), [pytest.param(p, k, id=k, marks=[] if k in QUICK else pytest.mark.slow) for p, k in ALL]
)
def test_every_row_trains_and_samples_as_if_it_were_alone(path: str, kind: str) -> None:
    policy = tiny(kind)
    assert policy.path.startswith("fused layers" if path == "fused" else f"transformers' own layers, {path}: ")
    compare(policy)
    assert selfcheck.check(policy) < selfcheck.LEAST
    engine = EagerEngine(policy, tiny_tokenizer())
    engine.load_adapter(policy.adapter(), 1)
    with wide(policy):
        made = engine.generate(prompts(3), Sampling(group_size=2, max_tokens=5), (1, 2))
    for r in made:
        with torch.no_grad():
            alone = row_alone(policy, r.prompt.ids + r.completion_ids, len(r.prompt.ids))
        assert r.sampler_logprobs == pytest.approx(alone.tolist(), abs=precision(policy))


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "olmo_hybrid"])
def test_a_hybrid_is_sampled_with_its_states_and_the_adapter_that_was_handed_over(kind: str) -> None:
    policy = tiny(kind, torch.float32)
    engine, sampling = EagerEngine(policy, tiny_tokenizer(), batch_size=7), Sampling(group_size=3, max_tokens=6)
    engine.load_adapter(policy.adapter(), version=1)
    rollouts = engine.generate(prompts(3), sampling, (1, 0))
    found = mismatch_of(policy, rollouts)
    assert found.tokens > 20 and found.values()["sampling/sampling_logp_difference/max"] < 1e-5
    policy.adapter_params.data.mul_(1.5)
    assert engine.generate(prompts(3), sampling, (1, 0)) == rollouts  # the engine has its own copy
    assert mismatch_of(policy, rollouts).mean > 1e-3
    engine.load_adapter(policy.adapter(), version=2)
    assert mismatch_of(policy, engine.generate(prompts(3), sampling, (1, 0))).mean < 1e-5


def test_a_softcap_is_part_of_what_samples_and_of_what_checks(tmp_path: Path) -> None:
    """transformers' sdpa leaves it out: the engine would sample another policy than the one that is trained."""
    config = config_of("gemma2", **BASE | MIXED | {"attn_logit_softcapping": 0.3, "query_pre_attn_scalar": 1})
    base_of(config).save_pretrained(tmp_path)
    where = Base(str(tmp_path), "none", "float64")
    policy = Policy(attach_lora(load_base(where, torch.device("cpu")), Lora(rank=4), 0))
    assert policy.path.startswith("fused layers") and selfcheck.check(policy) < selfcheck.LEAST
    engine = EagerEngine(policy, tiny_tokenizer())
    engine.load_adapter(policy.adapter(), 1)
    made = engine.generate(prompts(3), Sampling(group_size=2, max_tokens=5), (1, 2))
    for batch in records.packed(made, plan(len(made), 60)):
        assert batch.sampler_logprobs is not None
        off = (policy.score(batch) - batch.sampler_logprobs)[batch.train_mask].abs().max()
        assert off < precision(policy)


def test_at_least_sixty_kinds_are_looked_at() -> None:
    assert len(ALL) >= 60 and len({kind for _, kind in ALL}) == len(ALL)


def test_a_hybrid_that_is_packed_is_stopped_at_the_start() -> None:
    """Fault injection: its state would run from one sequence into the next."""
    policy = tiny("recurrent_gemma")
    policy.packed = True
    before = policy.adapter_params.clone()
    random = torch.get_rng_state()
    with pytest.raises(ConfigError, match=r"two sequences side by side, run by .transformers.*padded: "):
        selfcheck.check(policy)
    assert torch.equal(policy.adapter_params, before), "bit for bit"
    assert torch.equal(torch.get_rng_state(), random)


def test_what_the_self_check_finds_does_not_depend_on_the_adapter() -> None:
    """An adapter that was trained has larger matrices, and 16 bits round more of it."""
    policy = tiny("llama")
    fresh = selfcheck.check(policy)
    policy.adapter_params.data.copy_(torch.randn(policy.adapter_params.shape))
    assert selfcheck.check(policy) == fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen3_5_text", "gpt_oss"])
def test_rounding_does_not_stop_a_run(kind: str, dtype: torch.dtype) -> None:
    policy = tiny(kind, dtype)
    before = policy.adapter_params.clone()
    assert selfcheck.check(policy) < (0.05 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(policy.adapter_params, before)


def test_a_policy_that_is_not_finite_is_stopped_at_the_start() -> None:
    policy = tiny("lfm2")
    policy.base.get_output_embeddings().weight.data[5] = float("nan")  # type: ignore[operator]
    with pytest.raises(TrainError, match=r"at the start .* not finite: 1 of the base's weights .*embed_tokens.weight"):
        selfcheck.check(policy)


def test_sinks_are_not_dropped_when_rows_are_packed() -> None:
    policy = tiny("gpt_oss")
    policy.fused, policy.packed = None, True
    del policy.decoder.forward
    with pytest.raises(ConfigError, match="GptOssAttention calls its attention with s_aux, which packed rows do not"):
        selfcheck.check(policy)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal"),
        ({"news": 1}, "news"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_packed_attention_refuses_what_it_would_ignore(asked: dict[str, Any], name: str) -> None:
    q = torch.randn(1, 2, 5, 8)
    sequences = Sequences.of(torch.tensor([0, 2, 5]), torch.tensor([-1, -1]), "cpu")
    with pytest.raises(ConfigError, match=f"with {name}, which packed rows do not honour"):
        packed_attention(torch.nn.Identity(), q, q, q, None, 1.0, sequences=sequences, **asked)
    with pytest.raises(ConfigError, match="with attention_mask, which packed rows"):
        packed_attention(torch.nn.Identity(), q, q, q, torch.ones(5, 5), 1.0, sequences=sequences)
    harmless = {"position_ids": torch.arange(5), "use_cache": False, "news": None}
    assert (
        packed_attention(torch.nn.Identity(), q, q, q, None, 1.0, sequences=sequences, **harmless)[0].isfinite().all()
    )


def test_pairs_keep_their_groups_in_padded_rows() -> None:
    compare(tiny("recurrent_gemma"), whole_groups=True)


@pytest.mark.parametrize("seed", range(3))
def test_padded_forwards_are_few_and_waste_a_quarter_at_most(seed: int) -> None:
    lengths = sorted(torch.randint(1, 2000, (200,), generator=torch.Generator().manual_seed(seed)).tolist())[::-1]
    blocks = padded.blocks_of(lengths)
    assert sum(count for count, _ in blocks) == len(lengths) and len(blocks) < 12
    at = 0
    for number, width in blocks:
        rows = lengths[at : at + number]
        assert rows[0] == width and 1 - sum(rows) / (number * width) <= padded.WASTE
        at += number


def adapted(kind: str, **fields: Any) -> str:
    return targets.describe(tiny(kind, torch.float32, Lora(rank=4, alpha=8, **fields)).model)


def test_the_start_says_what_has_an_adapter() -> None:
    assert adapted("llama") == "adapters: q k v o gate up down (2)"
    assert adapted("glm4_moe") == (
        "adapters: q k v o (2), gate up down (1), shared experts (1), experts (1 x 8), not the router"
    )
    assert adapted("qwen3_moe", experts=False) == "adapters: q k v o (2), not the experts, not the router"
    assert adapted("falcon_h1").endswith("not Mamba's out_proj, since its kernels read the weight past an adapter")
    assert adapted("glm4_moe", targets=("q_proj", "down_proj")) == (
        "adapters: q (2), down (1), shared experts (1), experts (1 x 8), not the router"
    )


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("glm4_moe", {"targets": ("gate",)}, "gate is a router, which is not trained"),
        ("falcon_h1", {"targets": ("out_proj",)}, "out_proj is the output of a Mamba layer: its kernels"),
        ("qwen3_moe", {"targets": ("q_proj", "down_proj"), "experts": False}, "down_proj matches no linear layer"),
        ("qwen3_moe", {"dropout": 0.1}, "lora.dropout = 0.1: PEFT has no dropout for an adapter on a parameter"),
    ],
)
def test_targets_that_cannot_be_honoured_are_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(kind, **fields)


def test_a_target_that_peft_leaves_out_is_an_error() -> None:
    model = tiny("glm4_moe", torch.float32).model
    wanted = targets.resolve(tiny("glm4_moe", torch.float32).model.unload(), Lora())  # type: ignore[operator]
    targets.check_attached(model, wanted)
    wanted.target_modules = [*wanted.target_modules, "model.layers.0.mlp.nothing"]  # type: ignore[misc]
    with pytest.raises(ConfigError, match="PEFT left out 1 of the"):
        targets.check_attached(model, wanted)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT looks for them among modules alone
@pytest.mark.parametrize("kind", ["glm4_moe", "gpt_oss"])
def test_an_adapter_over_a_mixture_is_an_ordinary_file_of_peft(kind: str, tmp_path) -> None:
    """Shared experts, dense layers and fused experts come back through PEFT's own loading and forward."""
    policy = tiny(kind, torch.float32)
    policy.model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    base: Any = tiny(kind, torch.float32).model.unload()  # type: ignore[operator]
    base.set_experts_implementation("eager")
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ids = torch.arange(10, 20)[None]
    fused = 'not the fused ones: experts_implementation is "eager"'
    with pytest.warns(UserWarning, match=fused) if policy.fused is not None else contextlib.nullcontext():
        logits = loaded(ids).logits
    assert torch.allclose(logits, policy.model(ids).logits, atol=1e-5, rtol=0)
    assert "default" in loaded.base_model.model.model.layers[1].mlp.experts.lora_A
    assert set(targets.adapted(loaded)) == set(targets.adapted(policy.model))


@pytest.mark.parametrize(
    "kind",
    [
        "lfm2",
        pytest.param("qwen3_5_text", marks=pytest.mark.slow),
        pytest.param("gemma4_text", marks=pytest.mark.slow),
        pytest.param("granitemoehybrid", marks=pytest.mark.slow),
    ],
)
def test_a_run_over_layers_that_differ_samples_and_trains_the_same_policy(kind: str, tmp_path: Path) -> None:
    base: Any = tiny(kind, torch.float32).model.unload()  # type: ignore[operator]
    base.config.architectures = [type(base).__name__]
    base.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i} and {i * i}"}) + "\n" for i in range(6)))
    cfg = rlft.Config(
        model=str(tmp_path / "model"),
        data=rlft.Data(str(tmp_path / "rows.jsonl"), chat="never"),
        out=str(tmp_path / "run"),
        steps=2,
        prompts_per_step=2,
        sampling=Sampling(group_size=3, max_tokens=6),
        device="cpu",
        quantization="none",
        lora=Lora(rank=4),
        engine=rlft.Engine(name="eager"),
    )

    def different(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text)) % 3) for text in completions]

    rlft.train(cfg, rewards=[different])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    apart = [line["sampling/sampling_logp_difference/mean"] for line in lines if "reward" in line]
    assert len(apart) == 2 and max(apart) < 1e-5


TEXT = {name: value for name, value in BASE.items() if name != "attention_dropout"}
SEEN = {
    "qwen3_5": (
        {**TEXT, **LINEAR},
        {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64},
    ),
    "gemma4": (
        {**TEXT, **GEMMA4},
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 64,
        },
    ),
}


def with_eyes(kind: str, folder: Path) -> str:
    """A saved vision-language model."""
    text, vision = SEEN[kind]
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=False)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4"])
def test_a_vision_language_model_trains_its_text_and_says_so(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    name = with_eyes(kind, tmp_path)
    base = load_base(Base(name, "none", device="cpu"), torch.device("cpu"), said.append)
    assert said == [f"{name}: the vision tower is left out; images are not supported yet with a {kind}"]
    policy = Policy(attach_lora(base, Lora(rank=4), 0))
    assert policy.path == "fused layers"
    assert not [weight for weight in policy.adapter() if "vision" in weight or "visual" in weight]
    assert selfcheck.check(policy) < selfcheck.LEAST


def test_a_model_that_needs_its_eyes_is_refused_by_what_it_is(tmp_path: Path) -> None:
    AutoConfig.for_model("llava_next").save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="is a vision-language model, which is not supported yet; give one of qwen2_vl"
    ):
        load_base(Base(str(tmp_path), "none", device="cpu"), torch.device("cpu"))
