"""What cannot be loaded says which setting it is and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import base_of, logits, save, save_quantised
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import rlft
from rlft import environment
from rlft.errors import ConfigError
from rlft.models.load import Base, resolve_device


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def quantised(plain: Path, tmp_path_factory) -> Path:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return save_quantised(plain, tmp_path_factory.mktemp("nf4"), bnb_4bit_compute_dtype=torch.bfloat16, **four)


def refusal(model: Path | str, quantization: str = "auto", **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        base_of(model, quantization, **options)
    return str(caught.value)


def test_4_bit_rows_that_are_not_whole_blocks_are_refused_on_a_cpu(tmp_path: Path) -> None:
    """bitsandbytes 0.50.2 multiplies by other weights there."""
    table = LlamaConfig.from_pretrained(save(tmp_path / "a")).to_dict()
    LlamaForCausalLM(LlamaConfig(**{**table, "intermediate_size": 96})).save_pretrained(tmp_path / "b")
    message = "mlp.down_proj has 96 inputs, and bitsandbytes computes on a CPU only with a multiple of 64; use a GPU"
    assert message in refusal(tmp_path / "b", "nf4")
    assert logits(base_of(tmp_path / "b", "int8")).isfinite().all()


def test_quantised_files_are_not_quantised_otherwise(plain: Path, quantised: Path, tmp_path: Path) -> None:
    for wanted in ("none", "int8"):
        assert refusal(quantised, wanted) == (
            f'quantization = "{wanted}" with model = "{quantised}": its files are quantised to nf4; set quantization = '
            f'"auto" to take them as they are, or give the plain model'
        )
    eight = save_quantised(plain, tmp_path / "8", load_in_8bit=True)
    assert "its files are quantised to int8; set" in refusal(eight, "nf4")
    four = save_quantised(plain, tmp_path / "4", load_in_4bit=True, bnb_4bit_quant_type="fp4")
    assert "its files are quantised to fp4; set" in refusal(four, "nf4")
    assert logits(base_of(four)).isfinite().all()


def test_quantised_files_of_others_are_refused(plain: Path, tmp_path: Path) -> None:
    table = json.loads((save(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, "quantization_config": {"quant_method": "gptq"}}))
    assert 'its files are quantised by "gptq", and adapters' in refusal(tmp_path)


def test_a_quantised_head_is_refused(plain: Path, tmp_path: Path) -> None:
    save_quantised(plain, tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["nothing"])
    assert "its files have a quantised head, and log-probs are computed with a plain one; give files" in refusal(
        tmp_path
    )


def test_a_decoder_that_bitsandbytes_cannot_take_is_refused(tmp_path: Path) -> None:
    """Experts are one tensor per layer, and no linear layers; in 8 bits they stay plain."""
    config = Qwen3MoeConfig(
        vocab_size=103,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    assert "bitsandbytes can take 11% of the decoder, the rest are no" in refusal(tmp_path, "int8")
    assert base_of(tmp_path).dtype == torch.float32


def test_float64_is_not_quantised(plain: Path) -> None:
    for kind in ("nf4", "int8"):
        assert refusal(plain, kind, dtype="float64").startswith(f'dtype = "float64" with weights in {kind}: ')


@pytest.mark.parametrize("have", [None, "0.49.1"])
def test_bitsandbytes_missing_or_too_old(plain: Path, have: str | None, monkeypatch) -> None:
    version = environment.version
    monkeypatch.setattr(environment, "version", lambda package: have if package == "bitsandbytes" else version(package))
    what = "0.49.1 is outside the tested window >=0.50" if have else "is not installed"
    assert refusal(plain, "nf4") == f"bitsandbytes {what}: pip install 'bitsandbytes>=0.50'"
    assert base_of(plain).dtype == torch.float32, "a plain model needs none"


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    bert = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for folder, name in (("t5", "T5ForConditionalGeneration"), ("bert", "BertForMaskedLM")):
        assert f"{name} is not a causal language model; give one that continues text" in refusal(tmp_path / folder)
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "nothing_yet"}')
    assert "transformers cannot load its config.json (The checkpoint you are trying to load has model type" in refusal(
        tmp_path / "t5"
    )


def test_files_without_all_weights_are_refused(plain: Path, tmp_path: Path) -> None:
    headless = LlamaModel(LlamaConfig.from_pretrained(plain))
    headless.config.architectures = ["LlamaForCausalLM"]
    headless.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**table, "architectures": ["LlamaForCausalLM"]}))
    assert "its files lack 1 weights of LlamaForCausalLM, lm_head.weight for one; give" in refusal(tmp_path)
    file = save(tmp_path / "short") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is damaged (" in refusal(tmp_path / "short")


def test_values_that_are_no_settings_name_those_that_are(plain: Path) -> None:
    for field in ("quantization", "dtype", "device"):
        with pytest.raises(ConfigError, match=f"{field} = 'int3': one of auto, "):
            rlft.load(str(plain), **{field: "int3"})  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="shows PyTorch no GPU"):
            resolve_device(Base(str(plain), device="cuda"))
