"""Which mode vLLM runs in and how large its cache is, for what is free on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlft.errors import EngineError
from rlft.models.device_memory import DeviceMemory
from rlft.rollout.vllm.memory import GIB, GRAPHS, EngineMemory, _slots, choose_mode

GPU = DeviceMemory(torch.device("cuda"))
SIZES = EngineMemory(
    linear=13 * GIB,
    largest=GIB // 4,
    slots=GIB // 8,
    per_token=2**17,
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


def test_slots_have_room_for_all_that_a_layer_of_vllms_stands_for() -> None:
    weights = {
        f"model.layers.0.{name}.weight": torch.empty(size, device="meta")
        for name, size in (
            ("self_attn.q_proj", (64, 32)),
            ("self_attn.k_proj", (16, 32)),
            ("mlp.up_proj", (96, 32)),
            ("norm", (32,)),
        )
    }
    ranks = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": 24}
    assert _slots(ranks, weights) == (64 + 32 + 16 + 32) * 32
