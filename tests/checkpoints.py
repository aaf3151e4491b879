"""Small random checkpoints of every kind on disk, and their bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from rlft.models.load import Base, load_base

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 17, 40, 8, 99, 5, 61, 22]])


def save(folder: Path, tied: bool = False, vocab: int = 103, dtype: torch.dtype = torch.bfloat16, **options) -> Path:
    """A random Llama with its tokenizer, whose rows are one and two NF4 blocks."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_quantised(plain: Path, folder: Path, **settings: Any) -> Path:
    """The model in `plain` as transformers quantises and saves it."""
    config = BitsAndBytesConfig(**settings)
    made = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, device_map={"": "cpu"}, dtype="bfloat16"
    )
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def base_of(model: Path | str, quantization: str = "auto", **options: Any) -> Any:
    return load_base(Base(str(model), quantization=quantization, device="cpu", **options), CPU)  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits
