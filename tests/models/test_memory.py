"""The memory plan by itself; its agreement with what a GPU really takes is in test_fused_gpu.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from rlft.kernels.logprobs import CHUNK_BYTES
from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.levels import L0, L1, L2, L3, L4, L5, LEVELS
from rlft.models.fused.memory import (
    GIB,
    TILES,
    PassOptions,
    backward_work,
    evaluate,
    forward_work,
    head_work,
    host_bytes,
    saved,
    scratch,
    weight_bytes,
)
from rlft.models.fused.plan_search import choose_plan, exposed_copy_seconds

QWEN3_8B = DecoderShape(
    layers=36,
    hidden=4096,
    q=4096,
    kv=1024,
    q_heads=32,
    intermediate=12288,
    vocab=151936,
    dtype=torch.bfloat16,
    tails=(64, 64, 64, 64),
    ranks=(48, 16, 32, 16),
    qk_norm=True,
    post_norm=False,
    attention="fa4",
)


def test_a_factor_takes_the_memory_of_a_copy() -> None:
    """Of the down projection's output where gate and up are kept. A copy of the embedded tokens, before their factor,
    is less than the backward takes beyond the forward."""
    plain = replace(QWEN3_8B, layers=2)
    rows, tile, row = 8192, 2048, 2 * 4096
    how = PassOptions(tile, "layer", CHUNK_BYTES)

    def peak(shape: DecoderShape) -> int:
        return evaluate(shape, rows, rows, (2, L2, L2), how).peak

    for shape, level in itertools.product((plain, replace(plain, q=64, kv=64, intermediate=64)), LEVELS):
        assert forward_work(shape, rows, tile, level) + rows * row <= backward_work(shape, rows, tile, level)
    assert peak(replace(plain, residual_factor=True)) == peak(plain)
    for level, more in ((L0, tile * row), (L2, 0)):
        scaled = forward_work(replace(plain, residual_factor=True, q=64, kv=64), rows, tile, level)
        assert scaled - forward_work(replace(plain, q=64, kv=64), rows, tile, level) == more


def test_no_graph_runs_a_decoder_of_which_some_layers_have_no_flash_attention() -> None:
    """In a graph sequences have no bounds on the host, so other attention would see all rows as one sequence."""
    wide = replace(QWEN3_8B, attention="sdpa")
    assert QWEN3_8B.flash and not wide.flash
    assert not replace(QWEN3_8B, kinds=(QWEN3_8B, wide), order=(0, 1) * 18).flash


def test_bytes_per_token_are_those_of_the_arithmetic() -> None:
    """Qwen3-8B in bf16: 86 KB a layer for the smallest set without a product done again,
    28.8, 16.5 and 8.2 KB below; tails and S on top."""
    plain = replace(QWEN3_8B, tails=(0, 0, 0, 0), ranks=(0, 0, 0, 0))
    assert [saved(plain, level) for level in LEVELS] == [86144, 28800, 16512, 8192, 0, 0]
    assert [host_bytes(plain, level) for level in LEVELS] == [0, 0, 0, 0, 16512, 8192]
    assert saved(QWEN3_8B, L0) - saved(plain, L0) == 2 * (64 + 64 + 48 + 16)
    assert scratch(plain, "layer") == 2 * 192_937_984 and scratch(plain, "shadow") == 36 * 2 * 192_937_984


def test_an_mlp_without_a_gate_takes_the_memory_of_one_projection_less() -> None:
    """In what L0 keeps, in a tile of what others run again, and in the buffer of the weights."""
    plain = replace(QWEN3_8B, gated=False)
    rows, tile, width = 8192, 2048, 12288
    assert saved(QWEN3_8B, L0) - saved(plain, L0) == 2 * width
    assert saved(QWEN3_8B, L1) == saved(plain, L1)
    # Where attention is small, so that the MLP decides.
    narrow = {"q": 64, "kv": 64}
    for level, less in ((L0, 0), (L1, tile * 2 * width)):
        sizes = [forward_work(replace(shape, **narrow), rows, tile, level) for shape in (QWEN3_8B, plain)]
        assert sizes[0] - sizes[1] == less
    back = [backward_work(replace(shape, **narrow), rows, rows, L1) for shape in (QWEN3_8B, plain)]
    assert back[0] - back[1] == rows * 2 * width
    assert scratch(QWEN3_8B, "layer") - scratch(plain, "layer") == 2 * width * (4096 + 64)
    assert QWEN3_8B.weights - plain.weights == 4096 * width


@pytest.mark.parametrize("rows", [512, 4096, 32768, 131072])
@pytest.mark.parametrize("budget", [1.0, 3.0, 12.0, 70.0])
@pytest.mark.parametrize("host", [0.0, 8.0, 100.0])
def test_a_plan_is_within_both_budgets_or_the_smallest_there_is(rows: int, budget: float, host: float) -> None:
    plan = choose_plan(QWEN3_8B, rows, rows, budget * GIB, host * GIB)
    assert plan.host <= host * GIB and len(set(plan.levels)) <= 2
    if plan.peak > budget * GIB:
        assert (plan.tile, plan.store) == (TILES[-1], "group") and set(plan.levels) <= {L3, L5}
    more = choose_plan(QWEN3_8B, rows, rows, 2 * budget * GIB, host * GIB)
    assert more.peak <= 2 * budget * GIB or plan.peak > budget * GIB


def test_what_a_plan_gives_up_first() -> None:
    """With room for everything the base is decoded once and nothing is done again; then decoding, then levels."""
    easy = choose_plan(QWEN3_8B, 2048, 2048, 70 * GIB, 100 * GIB)
    assert (set(easy.levels), easy.store, easy.tile) == ({L0}, "shadow", TILES[0])
    tighter = choose_plan(QWEN3_8B, 2048, 2048, 8 * GIB, 100 * GIB)
    assert (set(tighter.levels), tighter.store) == ({L0}, "layer")
    tight = choose_plan(QWEN3_8B, 8192, 8192, 8 * GIB, 100 * GIB)
    assert L4 in tight.levels and tight.levels[-1] == L0, "the last layers keep most"
    assert set(choose_plan(QWEN3_8B, 8192, 8192, 8 * GIB, 0.0).levels) <= {L0, L1, L2, L3}, (
        "no host memory, no L4 or L5"
    )
    longest = choose_plan(QWEN3_8B, 400_000, 400_000, 68 * GIB, 112 * GIB)
    assert longest.peak <= 68 * GIB and L5 in longest.levels


def test_the_head_takes_the_scratch_for_its_chunk() -> None:
    own, shared = (head_work(QWEN3_8B, 8192, 8192, PassOptions(8192, s, CHUNK_BYTES)) for s in ("shadow", "layer"))
    assert own - shared == 512 * (151936 + 4096) * 4, "the logits of 512 rows and their product with the head"


def test_an_entropy_bonus_is_in_the_plan() -> None:
    """Its jacobian beside that of the log-prob, [trained, H] of the activations' type, and nothing else."""
    bonus = replace(QWEN3_8B, entropy_grad=True)
    for store in ("shadow", "layer", "group"):
        how = PassOptions(8192, store, CHUNK_BYTES)
        assert head_work(bonus, 8192, 5000, how) - head_work(QWEN3_8B, 8192, 5000, how) == 2 * 4096 * 5000
    rows, tight = 32768, 0.0
    small = replace(QWEN3_8B, layers=2)  # where the head is the peak
    plain = choose_plan(small, rows, rows, 100 * GIB, tight)
    assert choose_plan(replace(small, entropy_grad=True), rows, rows, 100 * GIB, tight).peak > plain.peak
    for shape in (small, replace(small, entropy_grad=True)):
        assert choose_plan(shape, rows, rows, plain.peak, tight).peak <= plain.peak
    assert choose_plan(replace(small, entropy_grad=True), rows, rows, plain.peak, tight) != plain


def test_a_plan_says_what_it_does() -> None:
    plan = choose_plan(QWEN3_8B, 262_144, 262_144, 68 * GIB, 112 * GIB)
    for part in (" at L", "GiB kept", "at work", "tiles of", "on the host"):
        assert part in str(plan)


def test_weights_are_counted_without_the_adapter() -> None:
    from tiny import tiny_model

    model = tiny_model()
    plain = [p for n, p in model.named_parameters() if "lora_" not in n]
    found = weight_bytes(model)
    assert found == {"bytes": 4 * found["parameters"], "parameters": sum(p.numel() for p in plain)}


def test_copied_keys_are_in_the_plan() -> None:
    """Prompts copied for their completions: keys, values and their gradients, as flash-attn-4 and FA2 take them."""
    rows, keys = 8192, 5 * 8192
    for attention, each in (("fa4", 4 * 2 * 1024 + 8 * 1024), ("fa2", 4 * 2 * 1024 + 4 * 4096)):
        shape = replace(QWEN3_8B, attention=attention)
        for level in (L0, L1, L2, L3):
            more = backward_work(shape, rows, TILES[-1], level, 2 * keys) - backward_work(
                shape, rows, TILES[-1], level, keys
            )
            assert more == keys * each
        plain, copied = (choose_plan(shape, rows, rows, 3.0 * GIB, 100 * GIB, k) for k in (0, keys))
        assert plain.peak <= 3.0 * GIB and copied.peak <= 3.0 * GIB and copied.saved < plain.saved


def test_copies_back_from_the_host_are_in_the_plan_of_the_layers_above() -> None:
    """Most at L4 and one at L0: two layers come back while it runs, beside all that it has kept."""
    rows, how = 8192, PassOptions(TILES[-1], "layer", CHUNK_BYTES)
    plan = evaluate(QWEN3_8B, rows, 1, (35, L4, L0), how)
    above = rows * (2 * host_bytes(QWEN3_8B, L4) + saved(QWEN3_8B, L0) + 35 * saved(QWEN3_8B, L4))
    assert plan.peak >= above + backward_work(QWEN3_8B, rows, how.tile, L0) + scratch(QWEN3_8B, "layer")


def test_copies_to_the_host_cost_time_where_the_products_beside_them_are_shorter() -> None:
    """An 8B layer runs 0.64 us per token forward and has 16.5 KB to move, 0.33 us; a narrow one has no such time."""
    assert (
        exposed_copy_seconds(QWEN3_8B, L4) == exposed_copy_seconds(QWEN3_8B, L5) == 0
        and exposed_copy_seconds(QWEN3_8B, L0) == 0
    )
    narrow = replace(QWEN3_8B, hidden=1024, q=1024, intermediate=3072, q_heads=8)
    assert exposed_copy_seconds(narrow, L5) == 0 < exposed_copy_seconds(narrow, L4)
    kept = choose_plan(narrow, 32768, 32768, 4 * GIB, 100 * GIB)
    assert L4 not in kept.levels, str(kept)


def test_what_is_on_its_way_to_the_host_is_in_the_plan() -> None:
    more = [forward_work(QWEN3_8B, 1000, 1000, level) for level in (L2, L4)]
    x, attention = 2 * 4096, 2 * 4096 + 4 * 32
    assert more[1] - more[0] == 1000 * (x + attention + host_bytes(QWEN3_8B, L4)), "its own, and the layer's before it"
