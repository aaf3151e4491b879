"""Gated DeltaNets and short convolutions in fused layers: behind shared prompts at every level, what is refused, and
what the memory plan makes of layers that differ. Against transformers: test_families.py and test_architectures.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_architectures import tiny
from test_families import FAMILIES, HYBRIDS, fused, model_of
from test_graphs import groups_of
from test_memory import QWEN3_8B
from torch import Tensor

from rlft.kernels.attention import Sequences
from rlft.kernels.logprobs import CHUNK_BYTES
from rlft.models.fused import ops
from rlft.models.fused.decoder_shape import DecoderShape
from rlft.models.fused.levels import L0, L2, L3, L4, LEVELS, Level
from rlft.models.fused.memory import GIB, MemoryPlan, PassOptions, backward_work, evaluate, forward_work, saved, scratch
from rlft.models.fused.mixer_shape import MixerShape, Recurrent
from rlft.models.fused.placement import Place
from rlft.models.fused.plan_search import choose_plan
from rlft.models.policy import Policy

GROUPS = [(70, [30, 9, 1]), (2, [25, 0]), (3, [80])]
"""Prompt and completions: longer and shorter than a chunk and than a convolution's taps, one of them empty."""


def results(name: str, level: Level, groups: Any = GROUPS, place: Place = "device") -> list[Tensor]:
    """Log-probs and gradient behind shared prompts, and log-probs of a pass without gradient."""
    policy = Policy(model_of(name, torch.float32), place=place)
    assert policy.fused is not None
    policy.fused.plan = MemoryPlan((level,) * len(policy.fused.layers), 64, "layer", 2**20, 0, 0, 0)
    batch = groups_of(groups, torch.Generator().manual_seed(4), 61)
    assert (batch.prefix >= 0).any()
    logprobs, _ = policy.logprobs(batch)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return [logprobs.detach(), policy.flat.gradient, policy.score(batch)]


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_level_is_the_same_bit_for_bit_behind_shared_prompts(name: str) -> None:
    want = results(name, L0)
    assert torch.equal(want[0], want[2]) and all(one.abs().max() > 0 for one in want)
    for level in LEVELS[1:]:
        for one, other in zip(results(name, level), want, strict=True):
            assert torch.equal(one, other), level


@pytest.mark.parametrize("name", HYBRIDS)
def test_weights_in_host_memory_give_the_same_bits(name: str) -> None:
    """Layers of several sizes pass through slots of one size."""
    for one, other in zip(results(name, L2, place="host"), results(name, L2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_kernels_give_what_the_references_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: the parts of buffers that a GPU would be given, and the results that overwrite them."""
    groups = [(66, [3, 1])]
    want = results(name, L3, groups)
    monkeypatch.setattr(ops, "_uses_kernel", lambda x: x.dtype != torch.float64)
    for one, other in zip(results(name, L3, groups), want, strict=True):
        assert float((one - other).abs().max()) < 2e-5 * float(other.abs().max())


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("qwen3_5_text", {"hidden_act": "gelu"}, "hidden_act is gelu, and the convolution before the delta rule"),
        ("qwen3_5_text", {"linear_conv_kernel_dim": 5}, "a convolution of 5 taps"),
        ("olmo_hybrid", {"linear_value_head_dim": 260}, "heads of 260 in the delta rule"),
        ("lfm2", {"conv_L_cache": 5}, "a convolution of 5 taps"),
    ],
)
def test_what_no_kernel_computes_runs_transformers_layers_and_says_why(kind: str, fields: Any, why: str) -> None:
    path = tiny(kind, torch.float32, **fields).path
    assert path.startswith("transformers' own layers, padded: ") and why in path


def test_layers_without_attention_have_no_rotary_tables() -> None:
    policy = tiny("qwen3_5_text", torch.float32, layer_types=["linear_attention"] * 2)
    assert policy.fused is not None and policy.fused.mixers == "gated DeltaNet"
    assert policy.fused.shape.mixer is not None and policy.fused.graphs is None


def test_a_hook_on_a_convolution_runs_transformers_layers() -> None:
    for name, module in (("qwen3_5", "linear_attn.conv1d"), ("lfm2", "conv.conv"), ("olmo_hybrid", "linear_attn")):
        decoder = fused(model_of(name, torch.float32))
        assert decoder.problem() is None
        decoder.decoder.layers[0].get_submodule(module).register_forward_hook(lambda *_: None)  # type: ignore[union-attr,index,operator]
        assert "has a hook" in str(decoder.problem())


def test_weights_of_a_mixer_that_change_are_read_again() -> None:
    model = model_of("qwen3_5", torch.float32)
    decoder, ids = fused(model), torch.arange(3, 14)[None]
    with torch.no_grad():
        first = decoder.decoder(ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        decoder.decoder.get_submodule("layers.0.linear_attn").A_log.add_(1.0)  # type: ignore[union-attr,operator]
        later = decoder.decoder(ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        want = decoder.decoder(ids, use_cache=False, output_hidden_states=True).last_hidden_state  # type: ignore[operator]
    assert not torch.equal(first, later) and torch.allclose(later, want, atol=1e-5)


DELTA = MixerShape(8256, 9000, 30000, 8000, 20000, 4 * 524288, finishes=True)
KINDS = (
    replace(QWEN3_8B, q=4096, kv=0, qk_norm=False, attention="none", mixer=DELTA),
    replace(QWEN3_8B, output_gate=True),
)
HYBRID = replace(KINDS[0], kinds=KINDS, order=(0, 0, 0, 1) * 9)


@pytest.mark.parametrize("mixed", [(0, L2, L0), (36, L2, L0), (7, L2, L0), (7, L4, L0), (35, L4, L3)])
def test_kinds_that_are_alike_have_the_plan_of_one(mixed: tuple[int, Level, Level]) -> None:
    alike = replace(QWEN3_8B, kinds=(QWEN3_8B, QWEN3_8B), order=(0, 1) * 18)
    for store in ("layer", "group", "shadow"):
        how = PassOptions(2048, store, CHUNK_BYTES)
        for keys in (0, 20480):
            assert evaluate(alike, 8192, 100, mixed, how, keys) == evaluate(QWEN3_8B, 8192, 100, mixed, how, keys)


def by_walking(s: DecoderShape, rows: int, levels: tuple[Level, ...], how: PassOptions) -> int:
    """The peak of layers without a head and without the host, one layer after the other."""
    kept = highest = 0
    for layer, level in enumerate(levels):
        kind = s.layer_kinds[s.kind(layer)]
        kept += rows * saved(kind, level)
        work = max(f(kind, rows, how.tile, level) for f in (forward_work, backward_work))
        highest = max(highest, kept + work)
    return highest + scratch(s, how.store)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 17, 36])
def test_the_peak_of_layers_that_differ_is_that_of_walking_over_them(count: int) -> None:
    rows, how = 8192, PassOptions(2048, "layer", CHUNK_BYTES)
    plan = evaluate(HYBRID, rows, 1, (count, L2, L0), how)
    assert plan.peak == by_walking(HYBRID, rows, (L2,) * count + (L0,) * (36 - count), how)
    assert plan.saved == rows * (
        sum(saved(KINDS[HYBRID.kind(i)], L2 if i < count else L0) for i in range(HYBRID.layers))
    )


def test_a_gate_keeps_the_buffer_of_its_projection_through_the_mlp() -> None:
    plain, gated = (replace(KINDS[1], output_gate=gated, intermediate=4 * 12288) for gated in (False, True))
    assert gated.qkv - plain.qkv == gated.q
    row = 2 * 4096
    more = backward_work(gated, 1024, 1024, L2) - backward_work(plain, 1024, 1024, L2)
    assert more == 1024 * (2 * (gated.qkv + gated.ranks[0]) + row), "qkv, and what o is projected from"


def test_short_sequences_have_more_chunks_than_rows() -> None:
    cu_seqlens = torch.tensor([0, 20, *range(21, 86)], dtype=torch.int32)
    sequences = Sequences.of(cu_seqlens, torch.tensor([-1, *[0] * 65], dtype=torch.int32))
    recurrent = Recurrent.of(sequences)
    assert recurrent == Recurrent(66 * 64, 8, 72)
    one, many = (DELTA.work(85, counted, backward=True) for counted in (None, recurrent))
    assert many - one == (recurrent.rows - 85) * DELTA.backward_chunks + 72 * DELTA.state


def test_a_plan_for_layers_that_differ_is_within_its_budget() -> None:
    for budget in (3.0, 6.0, 20.0):
        plan = choose_plan(HYBRID, 16384, 16384, budget * GIB, 0.0, 0, True, Recurrent(16384, 8, 64))
        assert plan.peak <= budget * GIB or plan.store == "group"
    assert set(choose_plan(HYBRID, 2048, 2048, 140 * GIB, 0.0).levels) == {L0}


def test_the_plan_knows_the_kinds_of_the_layers() -> None:
    shape = fused(model_of("olmo_hybrid", torch.float32)).shape
    delta, attention = shape.layer_kinds
    assert shape.order == (0, 1) and delta.mixer is not None and attention.mixer is None
    own = FAMILIES["olmo_hybrid"][1]
    key, value = own["linear_key_head_dim"] * 2, own["linear_value_head_dim"] * 4
    assert delta.projected == 2 * key + 2 * value + 8 and delta.q == value and attention.q == 32
    assert delta.weights == 32 * (delta.projected + value + 3 * 48)
    assert (delta.post_norm, attention.post_norm) == (False, True)
    assert shape.weights == (delta.weights + attention.weights) // 2
