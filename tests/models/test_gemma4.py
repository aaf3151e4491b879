"""Gemma 4 in fused layers: k and v that layers share, inputs per layer, and what stays on transformers' own layers.

Against transformers, at every level and for every config field: test_families.py, test_architectures.py and
test_family_fields.py.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_base import in_float64
from test_architectures import tiny
from test_families import batch, close, fused, model_of, run
from test_memory import QWEN3_8B
from test_mixers import results
from torch import Tensor

from rlft.kernels.attention import Sequences, varlen_attention
from rlft.kernels.attention_backends import FA2_HEAD
from rlft.kernels.attention_plain import varlen_attention_reference
from rlft.kernels.rms_norm import OLMO, rms_norm_reference
from rlft.models import families
from rlft.models.fused import ops
from rlft.models.fused.layer_steps import SharedKV
from rlft.models.fused.levels import L0, L2, L3, LEVELS
from rlft.models.fused.memory import PassOptions, backward_work, evaluate, forward_work, saved, scratch
from rlft.models.policy import Policy

NAME = "base_model.model.model.per_layer_model_projection.lora_B.default.weight"
NAMES = ("gemma4", "gemma4 without inputs")


@pytest.mark.parametrize("name", NAMES)
def test_every_level_is_the_same_bit_for_bit_behind_shared_prompts(name: str) -> None:
    groups = [(9, [5, 1]), (2, [7, 0])]
    want = results(name, L0, groups)
    assert torch.equal(want[0], want[2]) and all(one.abs().max() > 0 for one in want)
    for level in LEVELS[1:]:
        for one, other in zip(results(name, level, groups), want, strict=True):
            assert torch.equal(one, other), level


@pytest.mark.parametrize("name", [*NAMES, "nanochat"])
def test_weights_in_host_memory_give_the_same_bits(name: str) -> None:
    groups = [(9, [5, 1])]
    for one, other in zip(results(name, L2, groups, "host"), results(name, L2, groups), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [*NAMES, "nanochat"])
def test_the_kernels_give_what_the_references_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: the parts of buffers that a GPU would be given, and the results that overwrite them."""
    groups = [(4, [3, 1])]
    want = results(name, L3, groups)
    monkeypatch.setattr(ops, "_uses_kernel", lambda x: x.dtype != torch.float64)
    for one, other in zip(results(name, L3, groups), want, strict=True):
        assert float((one - other).abs().max()) < 2e-5 * float(other.abs().max())


@pytest.mark.parametrize(
    "targets",
    [
        ["layers.1.self_attn.k_proj"],
        ["layers.0.self_attn.v_proj", "layers.4.self_attn.q_proj"],
        ["per_layer_model_projection"],
        ["layers.0.per_layer_input_gate", "layers.4.per_layer_projection"],
        ["layers.4.mlp.down_proj"],
    ],
    ids=" ".join,
)
def test_adapters_on_a_few_projections_alone(targets: list[str]) -> None:
    """Of a layer whose k and v others read, of one that reads them, and of what makes the inputs of all layers."""
    data = batch("none", torch.float64)
    plain, model = (model_of("gemma4", torch.float64, targets) for _ in range(2))
    fused(model)
    with in_float64(plain.get_base_model().get_decoder()):  # type: ignore[operator]
        want = run(plain, *data)
        assert len(want[1]) == 2 * len(targets)
        close(run(model, *data), want, 1e-12)


def test_two_passes_before_their_backwards_do_not_mix_what_layers_share() -> None:
    first, second = batch("none", torch.float32), batch("left", torch.float32)
    model = model_of("gemma4", torch.float32)
    fused(model)
    decoder: Any = model.get_base_model().get_decoder()  # type: ignore[operator]
    alone = [run(model, *data)[1] for data in (first, second)]
    model.zero_grad()
    outs = [decoder(input_ids=ids, attention_mask=mask).last_hidden_state for ids, mask, _ in (first, second)]
    for hidden, (_, mask, upstream) in zip(outs, (first, second), strict=True):
        live = torch.ones_like(hidden[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        hidden[live].backward(upstream[live])
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, alone[0][name] + alone[1][name], rtol=1e-4, atol=1e-4), name


def test_experts_run_on_transformers_layers_and_the_start_says_why() -> None:
    experts: Any = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    path = tiny("gemma4_text", torch.float32, **experts, enable_moe_block=True).path
    assert path.startswith("transformers' own layers, padded: ")
    assert "enable_moe_block is True, which no fused layer of gemma4_text reads" in path


def test_parts_of_layers_that_a_config_leaves_out_are_refused() -> None:
    config: Any = tiny("gemma4_text").base.config
    family = families.find("gemma4_text")
    assert family is not None and not list(family.unread(config))
    config.per_layer_config = {1: {"skip": ["mlp"]}}
    assert list(family.unread(config)) == [("skip", ["mlp"])]


def test_a_causal_model_under_a_trainer_has_the_loss_of_transformers() -> None:
    """Its head reads fields of the decoder's result that other families do not have."""
    ids, mask, _ = batch("left", torch.float32)
    assert mask is not None
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))  # padding predicts nothing
    labels = ids.masked_fill(mask * before == 0, -100)
    ends = []
    for fuses in (False, True):
        model = model_of("gemma4", torch.float32).train()
        decoder = fused(model) if fuses else None
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        ends.append((out.loss.item(), model.get_parameter(NAME).grad))
        assert decoder is None or decoder.last_plan is not None
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-5)
    assert torch.allclose(ends[1][1], ends[0][1], atol=1e-4 * float(ends[0][1].abs().max()))


def test_embedded_tokens_alone_run_transformers_layers() -> None:
    model = model_of("gemma4", torch.float32)
    decoder = fused(model)
    text: Any = decoder.decoder
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        want = text(input_ids=ids, use_cache=False).last_hidden_state
        decoder._last_plan = None
        embedded = text.embed_tokens(ids)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            got = text(inputs_embeds=embedded, use_cache=False).last_hidden_state
        given = text.get_per_layer_inputs(ids, None)
        more = text(inputs_embeds=embedded, per_layer_inputs=given, use_cache=False).last_hidden_state
        shared = text(input_ids=ids, use_cache=False, return_shared_kv_states=True).shared_kv_states
    assert decoder.last_plan is None and set(shared) == {"sliding_attention", "full_attention"}
    assert ["the layers read ids" in str(warning.message) for warning in found] == [True]
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(more, want, atol=1e-5)


def test_a_factor_that_changes_is_read_again_and_a_hook_is_seen() -> None:
    decoder = fused(model_of("gemma4", torch.float32))
    text: Any = decoder.decoder
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        before = text(ids, use_cache=False).last_hidden_state
        text.layers[1].layer_scalar.mul_(0.5)
        got = text(ids, use_cache=False).last_hidden_state
        want = text(ids, use_cache=False, output_hidden_states=True).last_hidden_state
    assert float((got - want).abs().max()) < 1e-4 < 0.1 < float((got - before).abs().max())
    text.per_layer_model_projection.register_forward_hook(lambda *_: None)
    assert "has a hook" in str(decoder.problem())


def test_one_query_head_over_the_keys_of_another_layer_is_refused() -> None:
    path = tiny("gemma4_text", torch.float32, num_attention_heads=1, num_key_value_heads=1).path
    assert "one query head over the keys of another layer" in path


def test_which_layers_share() -> None:
    decoder = fused(model_of("gemma4", torch.float32))
    assert [layer.kv_from for layer in decoder.layers] == [None, None, 0, 1, 1]
    assert [layer.shares_kv for layer in decoder.layers] == [True, True, False, False, False]
    assert [layer.head_dim for layer in decoder.layers] == [8, 16, 8, 16, 16]
    assert [layer.width for layer in decoder.layers] == [48, 48, 96, 96, 96]
    assert decoder.graphless == "inputs per layer and shared keys and values" and decoder.graphs is None


def test_gradients_of_shared_keys_are_summed() -> None:
    k, v = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    parts = torch.randn(3, 2, 5, 2, 4, dtype=torch.float64)
    shared = SharedKV(k, v)
    for dk, dv in parts.clone():
        sums = shared.add(dk, dv)
    for got, want in zip(sums, parts.sum(0), strict=True):
        assert torch.allclose(got, want, atol=1e-15)


def test_the_norm_of_values_is_that_of_its_formula() -> None:
    """Of a view into a wider buffer, as qkv is; gradcheck of the reference, and its gradient."""
    buffer = torch.randn(5, 20, dtype=torch.float64)
    x, weight = buffer[:, 4:16].unflatten(1, (3, 4)), torch.randn(4, dtype=torch.float64)

    def reference(value: Tensor) -> Tensor:
        return rms_norm_reference(value, weight, 1e-6, OLMO)

    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(reference, (leaf,))
    norm, dy = ops.Norm(weight, 1e-6, OLMO), torch.randn(5, 3, 4, dtype=torch.float64)
    out = reference(leaf)
    (want,) = torch.autograd.grad(out, leaf, dy)
    before = buffer.clone()
    assert torch.allclose(ops.head_norm_forward(x, norm), out, atol=1e-14)
    assert torch.allclose(ops.head_norm_backward(dy, x, norm), want, atol=1e-14)
    assert torch.equal(buffer, before)


def test_queries_alone_are_rotated_bit_for_bit_as_beside_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernel too, which rotates two groups of heads."""
    g = torch.Generator().manual_seed(0)
    q, k, dq, dk = (torch.randn(6, heads, 8, generator=g) for heads in (3, 2, 3, 2))
    angles = torch.randn(6, 4, generator=g)
    cos, sin = (torch.cat([table, table], 1) for table in (angles.cos(), angles.sin()))
    of_q, of_k = (ops.Norm(torch.randn(8, generator=g), 1e-6, OLMO) for _ in range(2))
    rope = ops.Rope(cos, sin, of_q, of_k, query_scale=torch.rand(6, 1, generator=g))
    for kernel in (False, True):
        monkeypatch.setattr(ops, "_uses_kernel", lambda x, kernel=kernel: kernel)
        both, alone = (q.clone(), k.clone()), q.clone()
        rotated = rope.forward(*both)
        assert torch.equal(rope.forward_queries(alone), rotated[0])
        rope.backward(dq.clone(), dk.clone(), *both, rotated)
        rope.backward_queries(dq.clone(), alone)
        assert torch.equal(alone, both[0])


def test_wide_heads_have_their_keys_repeated() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(9, heads, FA2_HEAD + 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    cu_seqlens, prefix = torch.tensor([0, 4, 6, 9]), torch.tensor([-1, 0, 0])
    sequences = Sequences.of(cu_seqlens.int(), prefix.int())
    want = varlen_attention_reference(q, k, v, cu_seqlens, prefix, 0.05)
    assert torch.allclose(varlen_attention(q, k, v, sequences, 0.05), want, atol=1e-12)


def test_the_plan_counts_what_layers_share_and_what_they_read() -> None:
    gemma = replace(QWEN3_8B, post_norm=True)
    shares, reads = replace(gemma, shares_kv=True), replace(gemma, kv_projections=0)
    for level in LEVELS:
        assert saved(shares, level) - saved(gemma, level) == 2 * 4 * gemma.kv
    assert gemma.projected - reads.projected == 2 * gemma.kv
    assert (gemma.rotated - reads.rotated, replace(gemma, value_norm=True).rotated - gemma.rotated) == (gemma.kv,) * 2
    own = replace(gemma, per_layer=256, tails=(64,) * 6, ranks=(48, 16, 32, 16, 16, 16))
    assert own.weights - gemma.weights == 2 * 256 * gemma.hidden
    assert scratch(own, "layer") - scratch(gemma, "layer") == 2 * 2 * (256 + 64) * (gemma.hidden + 64)
    narrow = {"q": 64, "kv": 64}
    for work in (forward_work, backward_work):
        assert work(replace(own, **narrow), 64, 64, L0) > work(replace(gemma, **narrow), 64, 64, L0)
    total = replace(own, per_layer_total=36 * 256)
    rows, how = 4096, PassOptions(4096, "layer", 2**20)
    peaks = [evaluate(shape, rows, 1, (0, L0, L0), how).peak for shape in (own, total)]
    assert peaks[1] - peaks[0] == rows * 2 * 36 * 256
    trained = evaluate(replace(total, per_layer_trained=True), rows, 1, (0, L0, L0), how).peak
    assert trained - peaks[0] == rows * 3 * 2 * 36 * 256


def test_the_plan_knows_the_kinds_of_the_layers() -> None:
    policy = Policy(model_of("gemma4", torch.float32))
    assert policy.fused is not None
    shape = policy.fused.shape
    assert shape.order == (0, 1, 2, 3, 3) and shape.per_layer_total == 5 * 12 and shape.per_layer_trained
    sliding, full, reads, _ = shape.layer_kinds
    assert (sliding.kv_projections, full.kv, reads.kv_projections, reads.kv) == (2, 32, 0, 16)
    assert reads.intermediate == 96 and reads.per_layer == 12 and len(reads.tails) == 6
    value = Policy(model_of("gemma4 without inputs", torch.float32)).fused
    assert value is not None and value.shape.layer_kinds[1].kv_projections == 1
