"""Experts in NF4: made while loading from either kind of files, saved and loaded, computed with, counted, refused."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from checkpoints import IDS, base_of, logits
from datasets import Dataset
from mixtures import mixture, save_mixture
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from torch import Tensor, nn

from rlft.config.run import Lora
from rlft.errors import ConfigError
from rlft.models import experts, experts_nf4, targets
from rlft.models.experts_nf4 import Stack4bit
from rlft.models.fused.fuse import fuse
from rlft.models.fused.memory import weight_bytes
from rlft.models.load import Base, attach_lora, fingerprint, load_base
from rlft.models.quantization import held_in
from rlft.runs.export_base import export_base

KINDS = ("qwen3_moe", "mixtral", "gpt_oss")


def stacks_of(model: nn.Module) -> dict[str, Any]:
    return {name: stack.weight for name, stack in experts.stacks(model).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_either_kind_become_the_bytes_of_bitsandbytes(kind: str, tmp_path: Path) -> None:
    """The bytes of the matrices on top of each other, also from several shards; the saved files hold the same."""
    folders = [save_mixture(tmp_path / str(original), kind, original) for original in (True, False)]
    bases = [base_of(folder, "nf4") for folder in folders]
    assert fingerprint(bases[0]) == fingerprint(bases[1])
    wanted = stacks_of(mixture(kind))
    for name, stack in experts.stacks(bases[0]).items():
        weight = stack.weight
        packed, state = quantize_4bit(wanted[name].flatten(0, 1), compress_statistics=True, quant_type="nf4")
        assert isinstance(weight, Stack4bit) and not weight.requires_grad
        assert torch.equal(weight.data, packed) and tuple(weight.ds_shape) == tuple(wanted[name].shape)
        values = dequantize_4bit(packed, state).view(wanted[name].shape)
        values = values.transpose(1, 2) if stack.module.is_transposed else values
        assert torch.equal(experts.decoded(stack.module, stack.leaf, torch.float32), values), name
    bases[0].save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    table = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert table["quant_method"] == "bitsandbytes" and table["load_in_4bit"] is True
    files = list((tmp_path / "saved").glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    ends = {name.partition("experts.down_proj")[2] for name in stored if "experts.down_proj" in name}
    assert len(files) > 2 and {"", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"} <= ends
    again = base_of(tmp_path / "saved")
    assert fingerprint(again) == fingerprint(bases[0]) and torch.equal(logits(again), logits(bases[0]))


def decoded_values(weight: Any) -> Tensor:
    state = getattr(weight, "quant_state", None)
    return weight.data if state is None else dequantize_4bit(weight.data, state).view(state.shape)


def decoded(base: Any, kind: str) -> Any:
    """The plain model with the weights that a 4-bit one computes with."""
    model = mixture(kind)
    state = {name: tensor for name, tensor in base.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(state | {name: decoded_values(weight) for name, weight in base.named_parameters()})
    return model


def with_adapter(base: Any, fresh: bool = False) -> PeftModel:
    model, generator = attach_lora(base, Lora(rank=4, alpha=8), 0), torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and not fresh:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model(input_ids=IDS).logits.log_softmax(-1)[..., 5].sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_4_bits_compute_with_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    base = base_of(save_mixture(tmp_path, kind), "nf4")
    theirs = with_adapter(decoded(base, kind))
    model = with_adapter(base)
    theirs.get_base_model().set_experts_implementation("eager")  # type: ignore[operator]
    assert torch.allclose(logits(model), logits(theirs), atol=1e-4)
    mine, wanted = gradients(model), gradients(theirs)
    assert mine.keys() == wanted.keys() and sum("experts" in name for name in mine) == 8
    for name, gradient in wanted.items():
        assert torch.allclose(mine[name], gradient, atol=1e-4 * float(gradient.abs().max())), name


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("qwen2_moe", {"shared_expert_intermediate_size": 64}), ("qwen3_moe", {"moe_intermediate_size": 96})],
    ids=["a gate of the shared expert in 4 bits", "rows of one block and a half"],
)
def test_what_is_cut_otherwise_computes_too(kind: str, fields: dict[str, int], tmp_path: Path) -> None:
    """In fused layers, or where they do not take it on transformers' layers."""
    base = base_of(save_mixture(tmp_path, kind, **fields), "nf4")
    values = {name: decoded_values(weight) for name, weight in base.named_parameters()}
    before = base(input_ids=IDS, use_cache=False).logits
    model = with_adapter(base, fresh=True)
    fuse(model)
    assert torch.allclose(model(input_ids=IDS, use_cache=False).logits, before, atol=1e-4)
    plain_model = mixture(kind, **fields)
    plain_model.load_state_dict({**plain_model.state_dict(), **values})
    plain_model.set_experts_implementation("eager")
    assert torch.allclose(plain_model(input_ids=IDS).logits, before, atol=1e-4)


@pytest.mark.gpu
def test_gpu_decodes_and_trains_as_the_cpu(plain: Path) -> None:
    base: Any = load_base(Base(str(plain), "nf4", dtype="float32", device="cuda"), torch.device("cuda"))
    for stack in experts.stacks(base).values():
        weight: Any = stack.weight
        values = dequantize_4bit(weight.data, weight.quant_state).view(stack.shape)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(experts.decoded(stack.module, stack.leaf, dtype), values.to(dtype))
    model, exact = with_adapter(base), with_adapter(base_of(plain, "nf4"))
    model(input_ids=IDS.cuda()).logits.float().log_softmax(-1)[..., 5].sum().backward()
    wanted = gradients(exact)
    for name, parameter in model.named_parameters():
        if name in wanted:
            off = (parameter.grad.cpu() - wanted[name]).norm() / wanted[name].norm()
            assert off < 1e-3, name


def test_what_is_in_4_bits_is_counted(plain: Path) -> None:
    base, whole = base_of(plain, "nf4"), mixture()
    counts, numbers = weight_bytes(base), {id(p): p.numel() for p in whole.parameters()}
    assert held_in(base) == "nf4" and counts["parameters"] == sum(numbers.values())
    packed = sum(p.numel() for n, p in whole.named_parameters() if "proj" in n)
    rest = sum(numbers.values()) - packed
    assert packed * 0.5 < counts["bytes"] - 4 * rest < packed * 0.54
    assert experts.describe(base) == ["experts: 2 layers of 8 in nf4, by rlft's function"]
    assert experts.describe(whole) == ["experts: 2 layers of 8 in float32, by rlft's function"]


def test_loading_holds_one_layer_of_plain_experts_at_a_time(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, quantized = [], experts_nf4.quantized

    def storages() -> dict[int, int]:
        """Address -> bytes of the tensors with three dimensions, of experts and of other tests' models."""
        tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.dim() == 3]
        return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}

    def observed(weight: Tensor, settings: Any) -> Stack4bit:
        added = sum(size for address, size in storages().items() if address not in before)
        held.append(added / (weight.numel() * weight.element_size()))
        return quantized(weight, settings)

    gc.collect()
    before = storages()

    monkeypatch.setattr(experts_nf4, "quantized", observed)
    base_of(plain, "nf4", dtype="bfloat16")
    assert len(held) == 4 and max(held) <= 2, "the stack, and what it is concatenated from"


def test_the_decoded_base_is_written_with_a_weight_per_expert(plain: Path, tmp_path: Path) -> None:
    result = export_base(str(plain), tmp_path / "out", dtype="float32")
    assert result.decoded == 8 + 4
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in names
    assert torch.allclose(logits(base_of(tmp_path / "out", "none")), logits(base_of(plain, "nf4")), atol=1e-4)


# ---- refused -----------------------------------------------------------------------------------------------------


def refusal(make: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_experts_that_were_quantised_one_by_one_are_refused(quant_type: str, plain: Path, tmp_path: Path) -> None:
    """As files of transformers 4 have them, whose experts were linear layers."""
    base_of(plain, "nf4").save_pretrained(tmp_path)
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        packed, state = quantize_4bit(tensor, quant_type=quant_type)
        scales = {f"{name}.{end}": each for end, each in state.as_dict(packed=True).items()}
        stored |= {name: packed, **scales}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    table = json.loads((tmp_path / "config.json").read_text())
    table["quantization_config"]["bnb_4bit_quant_type"] = quant_type
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert "files whose experts were quantised one by one cannot be stacked: give the plain" in refusal(
        lambda: base_of(tmp_path)
    )


def test_stacks_in_fp4_are_refused(plain: Path, tmp_path: Path) -> None:
    base_of(plain, "nf4").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, weight in stacks_of(mixture()).items():
        _, state = quantize_4bit(weight, quant_type="fp4", compress_statistics=True)
        del stored[f"{name}.quant_state.bitsandbytes__nf4"]
        stored |= {f"{name}.{end}": each for end, each in state.as_dict(packed=True).items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    assert "in fp4 stored as torch.uint8, and experts are computed in nf4" in refusal(lambda: base_of(tmp_path))


def test_stacks_that_are_not_stored_as_bytes_are_refused(plain: Path, tmp_path: Path) -> None:
    """As for FSDP; transformers would cast the bytes, taken for numbers."""
    base_of(plain, "nf4").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored |= {name: stored[name].view(-1, 2).view(torch.bfloat16) for name in stacks_of(mixture())}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    assert "in nf4 stored as torch.float32, and experts" in refusal(lambda: base_of(tmp_path))


def test_experts_are_not_quantised_to_8_bits(plain: Path) -> None:
    text = refusal(lambda: base_of(plain, "int8"))
    assert (
        'the rest are no plain linear layers (experts are quantised in "nf4" alone); set quantization = "none"' in text
    )


def test_4_bit_experts_are_neither_merged_into_nor_run_by_another_function(plain: Path) -> None:
    model = with_adapter(base_of(plain, "nf4"))
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):  # PEFT, of the linear layers
        assert "is in 4 bits, and merging into it would round twice" in refusal(model.merge_and_unload)
    model.get_base_model().set_experts_implementation("grouped_mm")  # type: ignore[operator]
    assert 'which only experts_implementation = "rlft" reads, not "grouped_mm"' in refusal(lambda: logits(model))
    assert math.isfinite(float(logits(with_adapter(base_of(plain, "nf4"))).sum()))


def test_the_gate_of_shared_experts_has_no_adapter_in_4_bits_either(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path, "qwen2_moe", shared_expert_intermediate_size=64)
    found = [targets.find(base_of(folder, form)) for form in ("nf4", "none")]
    assert found[0] == found[1] and not any("shared_expert_gate" in name for name in found[0].linear)


# ---- other trainers ----------------------------------------------------------------------------------------------


def with_transformers(model: Any, folder: Path) -> Any:
    from test_trainers import plain_trainer

    return plain_trainer(model, folder, max_steps=3)


def with_trl(model: Any, folder: Path) -> Any:
    from test_trainers import COMMON
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"say {i}", "completion": f"{i}{i}"} for i in range(12)]
    settings = SFTConfig(output_dir=str(folder), max_steps=3, **COMMON)
    return SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )


@pytest.mark.parametrize("trainer", [with_transformers, with_trl])
def test_other_trainers_train_the_same_adapter_over_4_bits(trainer: Any, plain: Path, tmp_path: Path) -> None:
    """As over the decoded weights with transformers' loop and PEFT's sum."""
    base = base_of(plain, "nf4")
    theirs = with_adapter(decoded(base, "qwen3_moe"))
    theirs.get_base_model().set_experts_implementation("eager")  # type: ignore[operator]
    ends, dtypes = [], {}
    for model in (with_adapter(base), theirs):
        torch.manual_seed(5)
        run = trainer(model, tmp_path)
        factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
        dtypes = dtypes or {name: p.dtype for name, p in factors.items()}  # TRL: bfloat16 over 4 bits
        for name, parameter in factors.items():
            parameter.data = parameter.data.to(dtypes[name])
        start = {name: p.detach().clone() for name, p in factors.items()}
        run.train()
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        ends.append((losses, {name: p.detach() - start[name] for name, p in model.named_parameters() if name in start}))
    (mine, moved), (wanted, expected) = ends
    rounding = 1e-4 if torch.float32 in dtypes.values() else 5e-3
    assert len(mine) == 3 and mine == pytest.approx(wanted, abs=rounding)
    assert moved.keys() == expected.keys() and all(each.any() for each in moved.values())
    # Adam divides a gradient by its own size: one that is nothing but rounding moves its weight by anything up to lr.
    off = torch.cat([(moved[name] - value).abs().flatten() for name, value in expected.items()])
    assert (off > rounding).double().mean() < 0.01
