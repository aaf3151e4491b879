"""gpt-oss as it was released: experts in MXFP4 are kept byte for byte and computed with their exact values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import base_of, logits
from mixtures import mixture, save_mixture
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import rlft
from rlft.config.data import Data
from rlft.config.run import Algo, Config, Lora, Optim
from rlft.errors import ConfigError
from rlft.kernels.mxfp4 import Mxfp4Weight, decode_mxfp4_reference
from rlft.models import experts
from rlft.models.experts_mxfp4 import StackMxfp4
from rlft.models.fused.memory import weight_bytes
from rlft.models.load import attach_lora, fingerprint
from rlft.models.quantization import held_in
from rlft.runs.export_base import export_base

LEAVES = ("gate_up_proj", "down_proj")


def release(folder: Path, **fields: Any) -> dict[str, Tensor]:
    """A gpt-oss with random blocks and scales in place of its stacks; returns its tensors."""
    save_mixture(folder, "gpt_oss", **fields)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(LEAVES)]:
        count, columns, rows = tensors.pop(name).shape
        blocks, scales = (count, rows, columns // 32, 16), (count, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, scales, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    table = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**table, "quantization_config": quantization}))
    return tensors


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    release(folder)
    return folder


def plain(folder: Path) -> Any:
    """The model with the values that transformers decodes to, in fp32, and its own loop over experts."""
    model, tensors = mixture("gpt_oss"), load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_blocks")]:
        blocks, scales = tensors.pop(name), tensors.pop(name.replace("_blocks", "_scales"))
        tensors[name.removesuffix("_blocks")] = convert_moe_packed_tensors(blocks, scales).float()
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_and_scale_decodes_to_transformers_bits(dtype: torch.dtype) -> None:
    """Also zeros with a sign. 255 is NaN in the format, which transformers does not know."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 250, 1, 1)
    scales = torch.arange(3, 253, dtype=torch.uint8).view(1, 250, 1).repeat(1, 1, 16)
    ours = decode_mxfp4_reference(Mxfp4Weight(blocks, scales, (1, 250, 512)), dtype)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert torch.equal(ours, theirs) and torch.equal(ours.signbit(), theirs.signbit())
    nan = decode_mxfp4_reference(Mxfp4Weight(blocks[:, :1], scales[:, :1] * 0 + 255, (1, 1, 512)), dtype)
    assert nan.isnan().all()
    with pytest.raises(ValueError, match="rows of whole blocks of 32"):
        Mxfp4Weight(blocks, scales, (1, 250, 500))


def test_files_are_kept_byte_for_byte_and_saved_as_they_were(released: Path, tmp_path: Path) -> None:
    base, files = base_of(released), load_file(released / "model.safetensors")
    assert held_in(base) == "mxfp4" and base.dtype == torch.float32
    for name, stack in experts.stacks(base).items():
        assert isinstance(stack.weight, StackMxfp4) and tuple(stack.weight.ds_shape) == stack.shape
        assert torch.equal(stack.weight.data, files[f"{name}_blocks"])
    base.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == files.keys() and all(torch.equal(saved[name], files[name]) for name in files)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    assert fingerprint(base_of(tmp_path)) == fingerprint(base)
    whole = sum(p.numel() for p in mixture("gpt_oss").parameters())
    packed = sum(files[f"{name}_blocks"].numel() * 2 for name in experts.stacks(base))
    counts = weight_bytes(base)
    assert counts["parameters"] == whole and counts["bytes"] == packed * 17 // 32 + 4 * (whole - packed)


def test_values_and_gradients_are_those_of_the_decoded_model(released: Path) -> None:
    models = [attach_lora(base, Lora(rank=4, alpha=8), 0) for base in (base_of(released), plain(released))]
    models[1].get_base_model().set_experts_implementation("eager")  # type: ignore[operator]
    found = []
    for model in models:
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        model(input_ids=torch.arange(10, 24)[None]).logits.log_softmax(-1)[..., 5].sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.allclose(logits(models[0]), logits(models[1]), atol=1e-4)
    assert found[0].keys() == found[1].keys() and sum("experts" in name for name in found[0]) == 8
    for name, gradient in found[1].items():
        assert torch.allclose(found[0][name], gradient, atol=1e-4 * float(gradient.abs().max())), name


def test_sft_trains_over_released_files_and_the_base_is_written_decoded(released: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i % 4}", "completion": f"{i % 4}{i % 4}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = Config(
        model=str(released),
        data=Data(str(tmp_path / "rows.jsonl"), chat="never"),
        out=str(tmp_path / "run"),
        algo=Algo("sft"),
        steps=3,
        prompts_per_step=4,
        lora=Lora(rank=4, alpha=8),
        optim=Optim(lr=0.02),
        device="cpu",
    )
    losses = list(rlft.train(cfg).metrics()["loss"])
    assert losses[-1] < losses[0] and "parameters in mxfp4" in (tmp_path / "run" / "log.txt").read_text()
    result = export_base(str(released), tmp_path / "plain", quantization="auto", dtype="float32")
    assert result.decoded == 4
    assert torch.allclose(logits(base_of(tmp_path / "plain")), logits(plain(released)), atol=1e-4)


def test_what_cannot_be_done_with_mxfp4_is_refused(released: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='its files are quantised to mxfp4; set quantization = "auto"'):
        base_of(released, "nf4")
    model = attach_lora(base_of(released), Lora(rank=4), 0)
    with pytest.raises(ConfigError, match="is in 4 bits, and merging into it would round twice"):
        model.merge_and_unload()
    release(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    save_file({**tensors, name: tensors[name][:, :, :1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError,
        match=r"in blocks of MXFP4; give the files as they were released|have other shapes than config.json says",
    ):
        base_of(tmp_path)
