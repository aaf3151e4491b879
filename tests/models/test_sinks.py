"""Attention sinks in fused layers: gpt-oss's attention beside a dense MLP, and what frozen extras of a layer may do.

gpt-oss itself, with its experts, is in test_fused_experts.py. Its attention has all that sinks come with: windows by
layer, biases, YaRN tables and transformers' eager attention, whose float64 is float64 to the end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from random_base import base_of, config_of
from test_families import BY_LAYER, SIZES, batch, close, fused, model_of, run
from torch import Tensor, nn

from rlft.config.run import Lora
from rlft.kernels import attention_backends
from rlft.kernels.attention import Sequences
from rlft.models.families import Family
from rlft.models.fused.decoder import FusedDecoder
from rlft.models.fused.fuse import fuse
from rlft.models.fused.levels import L0, LEVELS, Level
from rlft.models.fused.memory import MemoryPlan
from rlft.models.load import attach_lora

FAMILY = Family("GptOssModel", norm_style="olmo", sinks=True)
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
}
FIELDS = {
    **SIZES,
    **BY_LAYER,
    **{"sliding_window": 5, "attention_bias": True, "rope_parameters": YARN},
    **{"num_local_experts": 2, "num_experts_per_tok": 1},
}


class Dense(nn.Module):
    """An MLP that returns what gpt-oss's experts return: its output and the router's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(32, 48) for _ in range(2))
        self.down_proj = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


class Whole(nn.Module):
    """gpt-oss's rotary with tables of all columns, as those of other families; it computes the first half of them."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat([table, table], dim=-1) for table in self.rotary(*inputs))


def gpt_oss(dtype: torch.dtype = torch.float64) -> PeftModel:
    torch.manual_seed(0)
    base = base_of(config_of("gpt_oss", **FIELDS))
    for layer in base.model.layers:
        layer.mlp = Dense()
    base = base.to(dtype).eval().requires_grad_(False)
    for name, parameter in base.named_parameters():
        if "sinks" in name:
            parameter.data.copy_(torch.tensor([1.5, -2.0, 3.0, 0.2]))
        elif parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model = attach_lora(base, Lora(rank=3, alpha=6), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def fused_gpt_oss(model: PeftModel, level: Level = L0) -> FusedDecoder:
    decoder: Any = model.get_base_model().model
    decoder.rotary_emb = Whole(decoder.rotary_emb)
    layers = FusedDecoder(model, decoder, FAMILY)
    layers.plan = MemoryPlan((level,) * 2, 64, "layer", 2**20, 0, 0, 0)
    decoder.forward = layers.forward
    return layers


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_gpt_oss_attention_equals_transformers(padding: str) -> None:
    data = batch(padding, torch.float64)
    want = run(gpt_oss(), *data)
    model = gpt_oss()
    layers = fused_gpt_oss(model)
    assert layers.problem() is None
    got = run(model, *data)
    assert layers.last_plan is layers.plan
    close(got, want, 1e-6)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    without = run(model, *data)[0]
    assert float((without - want[0]).abs().max()) > 0.05, "sinks matter here"


@pytest.mark.parametrize("level", LEVELS)
def test_back_ends_that_return_an_lse_keep_it_with_the_sinks(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the same interface written out in PyTorch."""
    data = batch("left", torch.float64)
    want = run(gpt_oss(), *data)
    forward, backward = attention_backends.forward, attention_backends.backward
    monkeypatch.setattr(attention_backends, "choose_backend", lambda *of: "fa2")
    monkeypatch.setattr(attention_backends, "forward", lambda _, *arguments: forward("math", *arguments))
    monkeypatch.setattr(attention_backends, "backward", lambda _, *arguments: backward("math", *arguments))
    model = gpt_oss()
    fused_gpt_oss(model, level)
    close(run(model, *data), want, 1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_the_same_bit_for_bit(level: Level) -> None:
    ids, upstream = torch.randint(3, 61, (7, 13)), torch.randn(7, 13, 32)
    runs = []
    for at in (L0, level):
        model = gpt_oss(torch.float32)
        fused_gpt_oss(model, at)
        runs.append(run(model, ids, None, upstream))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][n], g) for n, g in runs[1][1].items())


def test_behind_a_shared_prompt_a_sink_counts_once_per_row() -> None:
    g = torch.Generator().manual_seed(4)
    prompt, lengths = 7, (4, 6, 1)
    ids = torch.randint(3, 61, (prompt + sum(lengths),), generator=g)
    upstream = torch.randn(len(ids), 32, generator=g, dtype=torch.float64)
    upstream[:prompt] = 0
    model, hidden, start = gpt_oss(), [], prompt
    decoder: Any = model.get_base_model().model
    for length in lengths:
        row = torch.cat([ids[:prompt], ids[start : start + length]])
        hidden.append(decoder(input_ids=row[None], use_cache=False).last_hidden_state[0, prompt:])
        start += length
    torch.cat(hidden).backward(upstream[prompt:])
    want = torch.cat(hidden).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = gpt_oss()
    layers = fused_gpt_oss(model)
    bounds = torch.tensor([0, prompt, *lengths]).cumsum(0).int()
    sequences = Sequences.of(bounds, torch.tensor([-1, 0, 0, 0]))
    positions = torch.cat([torch.arange(prompt), *(prompt + torch.arange(length) for length in lengths)])
    embedded = layers.decoder.embed_tokens(ids)  # type: ignore[union-attr]
    out = layers.final_norm(layers.hidden(embedded, positions, sequences)[0])
    out.backward(upstream)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    close((out.detach()[prompt:], grads), want, 1e-6)


def test_sinks_that_are_trained_run_transformers_layers() -> None:
    model = model_of("granite_swa", torch.float32)
    model.get_base_model().model.layers[0].self_attn.sinks.requires_grad_()
    assert fuse(model) == "weights of the base are trained"


def test_a_changed_curve_of_xielu_is_read_again() -> None:
    data = batch("none", torch.float64)
    ends = []
    for with_layers in (False, True):
        model = model_of("apertus", torch.float64)
        if with_layers:
            fused(model)
            run(model, *data)
        with torch.no_grad():
            for layer in model.get_base_model().model.layers:
                layer.mlp.act_fn.alpha_p.add_(0.7)
                layer.mlp.act_fn.alpha_n.sub_(0.4)
        ends.append(run(model, *data))
    close(ends[1], ends[0], 1e-6)


def test_xielu_needs_the_module_that_has_its_curve() -> None:
    model = model_of("llama", torch.float32)
    model.get_base_model().config.hidden_act = "xielu"
    assert fuse(model) == 'the activation "xielu"'
