"""Which mode vLLM runs in and how large its cache is, for what is free on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from rlft.errors import EngineError
from rlft.models.device_memory import DeviceMemory
from rlft.rollout.vllm.caches import Caches, delta_work
from rlft.rollout.vllm.memory import GIB, GRAPHS, EngineMemory, _largest, _slots, choose_mode

GPU = DeviceMemory(torch.device("cuda"))
SIZES = EngineMemory(
    linear=13 * GIB,
    largest=GIB // 4,
    slots=GIB // 8,
    caches=Caches(2**17),
    longest=1024,
    sequences=256,
    work=GIB,
    batched=8192,
    pending=GIB // 8,
)
"""About Qwen3-8B's: its 256 sequences want 32 GiB."""


def free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(GPU, "free", lambda: gib * GIB)


def test_expanded_where_it_fits_beside_the_cache_else_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 70)
    roomy = choose_mode(SIZES, "auto", None, GPU)
    assert (roomy.mode, roomy.kv_bytes) == ("dequantized", SIZES.full_cache)
    free(monkeypatch, 20)
    tight = choose_mode(SIZES, "auto", None, GPU)
    assert tight.mode == "shared" and "13.00 GiB of plain weights would not fit" in str(tight)
    assert choose_mode(SIZES, "auto", 2.0, GPU).mode == "dequantized"  # a cache of 2 GiB was asked for


@pytest.mark.parametrize("gib", [18.0, 18.03, 18.1])
def test_a_cache_that_memory_limits_is_rounded_so_that_what_was_compiled_fits_again(monkeypatch, gib: float) -> None:
    free(monkeypatch, gib)
    left = gib * GIB - SIZES.pending - SIZES.slots - SIZES.work - GRAPHS - SIZES.largest
    kv = choose_mode(SIZES, "shared", None, GPU).kv_bytes
    assert kv == 15.5 * GIB and 0 <= left - kv < GIB / 4


def test_a_step_of_one_sequence_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 70)
    one = replace(SIZES, sequences=1)
    assert choose_mode(one, "dequantized", None, GPU).kv_bytes == one.min_cache > one.full_cache


def test_too_little_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10)
    with pytest.raises(EngineError, match=r"dequantized weights leave -5.\d+ GiB .* which needs 0.25 .*engine.kv_gib"):
        choose_mode(SIZES, "dequantized", None, GPU)


def test_merged_experts_leave_room_for_the_copy_that_checks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 30)
    mixture = replace(SIZES, stack=2 * GIB)
    cache = {mode: choose_mode(mixture, mode, None, GPU).kv_bytes for mode in ("dequantized", "merged")}
    assert cache["merged"] == cache["dequantized"] - 3 * GIB


def test_slots_have_room_for_all_that_a_layer_of_vllms_stands_for() -> None:
    weights = {
        f"model.layers.0.{name}.weight": size
        for name, size in (
            ("self_attn.q_proj", (64, 32)),
            ("self_attn.k_proj", (16, 32)),
            ("mlp.up_proj", (96, 32)),
            ("norm", (32,)),
        )
    }
    ranks = {"model.layers.0.self_attn.q_proj.weight": 24}
    assert _slots(ranks, weights) == (64 + 32 + 16 + 32) * 32
    stacks = {"model.layers.0.mlp.experts.up_proj": (8, 96, 32)}
    assert _slots({next(iter(stacks)): 3}, stacks) == 8 * 3 * (96 + 32)


def test_the_cache_of_a_hybrid_is_what_vllm_lays_out_for_it() -> None:
    """Of Qwen3.5-4B's shape: 8 layers of attention, and 24 of gated DeltaNet, whose states take 2.1 MB each in fp32."""
    shape = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4}
    delta = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128}
    config = AutoConfig.for_model("qwen3_5_text", **shape, **delta, head_dim=256, linear_value_head_dim=128)
    assert config.layer_types.count("linear_attention") == 24
    caches = Caches.of(config, 2)
    state, token = 32 * 128 * 128 * 4 + 3 * 8192 * 2, 2 * 4 * 256 * 2
    assert caches.per_token == 8 * token
    assert (caches.block - 128) * token < state <= caches.block * token
    # A block has 8 layers: those of attention, or a third of the others.
    assert caches.states == 3 * 8 * caches.block * token
    assert caches.of_sequence(1) == 4 * 8 * caches.block * token
    assert caches.of_sequence(caches.block + 1) == caches.of_sequence(1) + 8 * caches.block * token
    assert delta_work(config, 2) > 2 * 128 * 128 and delta_work(AutoConfig.for_model("llama"), 2) == 0


def test_the_cache_of_short_convolutions_is_small() -> None:
    """Of LFM2-1.2B's shape: 10 convolutions and 6 layers of attention; vLLM fills the convolutions up to 12."""
    types = ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)]
    shape = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    caches = Caches.of(AutoConfig.for_model("lfm2", **shape, layer_types=types), 2)
    token = 2 * 8 * 64 * 2
    assert (caches.per_token, caches.block, caches.states) == (6 * token, 128, 2 * 6 * 128 * token)


def test_a_cache_with_states_bounds_the_sequences_at_a_time() -> None:
    caches = Caches(per_token=2**15, block=640, states=60 * 2**20)
    sizes = replace(SIZES, caches=caches, longest=1000)
    assert sizes.full_cache == 256 * (1280 * 2**15 + 60 * 2**20)
    assert sizes.most_sequences(GIB) == GIB // (640 * 2**15 + 60 * 2**20) == 12


def test_heads_of_two_sizes_are_counted_by_layer() -> None:
    config = AutoConfig.for_model(
        "gemma4_text",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=64,
    )
    assert Caches.of(config, 2).per_token == 2 * 2 * (16 + 64) * 2


def test_the_largest_layer_is_of_all_that_vllm_stacks() -> None:
    shapes = {
        "m.layers.0.linear_attn.in_proj_qkv.weight": (96, 32),
        "m.layers.0.linear_attn.in_proj_z.weight": (64, 32),
        "m.layers.0.linear_attn.out_proj.weight": (32, 64),
        "m.layers.0.mlp.gate_proj.weight": (70, 32),
        "m.layers.0.mlp.up_proj.weight": (70, 32),
    }
    assert _largest(shapes) == (96 + 64) * 32
