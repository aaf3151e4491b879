"""A base in host memory or divided over ranks computes to the bit what one on the device computes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import records
import torch
from test_policy import plan, rollouts
from tiny import save_tiny, tiny_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rlft
from rlft.config.run import Config, Lora
from rlft.errors import ConfigError
from rlft.models.fused.layer_bytes import DividedBytes, HostBytes
from rlft.models.fused.placement import Place, layer_weights
from rlft.models.fused.ring import Layout, Ring
from rlft.models.load import Base, attach_lora, load_base, resolve_device
from rlft.models.policy import Policy
from rlft.models.structure import decoder_of
from rlft.trainer.validate import validate

EQUAL = ("step", "loss", "entropy", "grad_norm", "perplexity", "eval/loss", "eval/perplexity")


def policy_of(model: Any, place: Place) -> Policy:
    """A policy whose adapter is not zero."""
    policy = Policy(model, place=place)
    with torch.no_grad():
        policy.adapter_params.copy_(torch.sin(torch.arange(policy.adapter_params.numel())) * 0.2)
    return policy


def results(policy: Policy) -> list[Tensor]:
    """Log-probs under policy and reference, and gradients of two passes that were run before either's backward."""
    batches = records.packed(rollouts(2), plan(0, budget=9))
    assert len(batches) > 2
    scored = [policy.score(batch, weights=weights) for batch in batches for weights in ("policy", "reference")]
    policy.flat.zero_grad()
    for first, second in itertools.pairwise(batches):
        losses = [policy.logprobs(batch)[0].square().sum() for batch in (first, second)]
        for loss in losses:
            loss.backward()
    return [*scored, policy.flat.gradient.clone()]


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("budget", [None, 1.0])  # of memory: by layer; one projection at a time
def test_log_probs_and_gradients_are_equal_to_the_bit(layers: int, budget: float | None) -> None:
    policies = [policy_of(tiny_model(layers=layers), place) for place in ("device", "host")]
    for policy in policies:
        assert policy.fused is not None
        policy.fused.budget = budget
    want, found = map(results, policies)
    for one, other in zip(want, found, strict=True):
        assert torch.equal(one, other) and one.abs().max() > 0
    assert policies[1].fused is not None and policies[1].fused.store.mode == ("layer" if budget is None else "group")
    assert policies[0].fingerprint == policies[1].fingerprint


def save_blocks(folder: Path) -> None:
    """Write a model whose layers can be quantized on a CPU: every input is a multiple of 64."""
    config = tiny_model(layers=4).config.to_dict() | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    LlamaForCausalLM(LlamaConfig.from_dict(config)).save_pretrained(folder)


def loaded(
    folder: Path, quantization: Literal["nf4", "none"], place: Place, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Policy:
    """A policy over the model that `save_blocks` has written."""
    cfg = Base(str(folder), quantization, dtype)
    return policy_of(attach_lora(load_base(cfg, resolve_device(cfg)), Lora(rank=4), 0), place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("placement")
    save_tiny(home / "model")
    save_blocks(home / "blocks")
    rows = [{"prompt": f"say {i}", "completion": f"{i} {i * 7 % 13}"} for i in range(12)]
    (home / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_packed_bytes_keep_every_pattern(folder: Path, quantization: Literal["nf4", "none"]) -> None:
    policies = [loaded(folder / "blocks", quantization, place) for place in ("device", "host")]
    for one, other in zip(*map(results, policies), strict=True):
        assert torch.equal(one, other)
    # 0x7FC1 and 0xFFFF are NaN as bfloat16: moved as numbers they could change.
    packed = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    layouts = [Layout.of([packed, torch.tensor([1.0])])]
    for kind in (HostBytes, DividedBytes):
        source = kind(layouts, torch.device("cpu"))
        source.put(0, [packed, torch.tensor([1.0])])
        source.open()
        ring = Ring(layouts, source, torch.device("cpu"))
        ring.need(0)
        assert torch.equal(ring.views(0)[0], packed) and ring.views(0)[1].item() == 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_gpu_computes_the_same_bits_from_host_memory(folder: Path, quantization: Literal["nf4", "none"]) -> None:
    host, device = [loaded(folder / "blocks", quantization, place, "bfloat16") for place in ("host", "device")]
    assert host.fused is not None and device.fused is not None
    for budget in (None, 1.0):  # of memory: by layer; one projection at a time
        host.fused.budget = budget
        found = results(host)
        # With more memory the device would keep all weights decoded, and products of other strides round otherwise.
        device.fused.budget = host.fused.last_plan.peak if budget is None and host.fused.last_plan else budget
        for one, other in zip(results(device), found, strict=True):
            assert one.is_cuda and torch.equal(one, other)
        assert host.fused.store.mode == ("layer" if budget is None else "group")
    weight = next(p for name, p in host.base.named_parameters() if "q_proj.base_layer" in name)
    assert weight.device.type == "cpu"


def test_a_pass_forth_and_back_copies_each_layer_once_ahead_of_its_use() -> None:
    tensors = [torch.full((4,), float(i)) for i in range(7)]
    layouts = [Layout.of([tensor]) for tensor in tensors]
    source = HostBytes(layouts, torch.device("cpu"))
    for i, tensor in enumerate(tensors):
        source.put(i, [tensor])
    ring, fetched = Ring(layouts, source, torch.device("cpu")), []

    class Noted:
        def pieces(self, layer: int) -> list[Tensor]:
            fetched.append(layer)
            return source.pieces(layer)

    ring._source = Noted()  # type: ignore[assignment]
    for layer in [*range(7), *reversed(range(7)), *range(7)]:
        ring.need(layer)
        ring.need(layer)
        assert ring.views(layer)[0][0] == layer
        expected = {layer + 1, layer + 2} if len(fetched) <= 7 else set()
        assert expected & set(range(7)) <= set(fetched)
    # The turn needs no copy of the last three layers, nor of the first three.
    assert fetched == [0, 1, 2, 3, 4, 5, 6, 3, 2, 1, 0, 3, 4, 5, 6]


def test_a_run_from_host_memory_is_the_run_from_the_device(folder: Path) -> None:
    results = []
    for place in ("device", "host"):
        out = folder / place
        rlft.train(
            Config(
                model=str(folder / "model"),
                data=str(folder / "sft.jsonl"),
                out=str(out),
                algo="sft",
                steps=2,
                prompts_per_step=4,
                eval={"rows": 3},
                base={"place": place},
            )
        )
        files = (out / "metrics.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if k in EQUAL} for line in files]
        results.append((rows, (out / "checkpoints/step-000002/adapter_model.safetensors").read_bytes()))
        assert rlft.open(out).generate("say 1", max_tokens=2) is not None
    assert results[0] == results[1] and len(results[0][0]) == 4


def test_what_cannot_read_from_there_is_refused(folder: Path) -> None:
    base = {"model": str(folder / "model"), "out": str(folder / "refused"), "steps": 1}
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    grpo = Config(data=str(folder / "prompts.jsonl"), rewards=["number"], base={"place": "host"}, **base)  # type: ignore[arg-type]
    assert any("base.place" in problem and "samples" in problem for problem in validate(grpo).problems)
    sharded = Config(data=str(folder / "sft.jsonl"), algo="sft", base={"place": "sharded"}, **base)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'base.place = "sharded" in one process.*"host"'):
        rlft.train(sharded)
    policy = policy_of(tiny_model(), "host")
    assert policy.fused is not None
    fused_before = tiny_model()
    policy_of(fused_before, "device")
    with pytest.raises(ConfigError, match=r'base.place = "host": .* has been used with base.place = "device"'):
        policy_of(fused_before, "host")
    with torch.no_grad():
        policy.base.get_submodule("model.layers.0.self_attn.o_proj.base_layer").weight.mul_(2)  # type: ignore[union-attr,operator]
    assert "were changed" in str(policy.fused.problem())


def test_all_but_the_layers_weights_move() -> None:
    model = tiny_model()
    stays = layer_weights(decoder_of(model.get_base_model()))
    names = [name for name, parameter in model.named_parameters() if id(parameter) in stays]
    assert len(names) == len(stays) == 2 * 7 and all(".layers." in name and "base_layer" in name for name in names)
