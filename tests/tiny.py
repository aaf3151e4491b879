"""A two-layer random Llama and a character tokenizer with a ChatML template: real transformers and PEFT objects that
run in milliseconds."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlft.config.run import Lora
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.types import Prompt, Recorded

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, plus <pad>, <|im_start|> and <|im_end|> (EOS)."""
    letters = SPECIAL + list(string.printable)
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], unk_token="?"
    )
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    fast.chat_template = CHATML
    return fast


def tiny_model(
    dtype: torch.dtype = torch.float32, seed: int = 0, lora: Lora | None = None, layers: int = 2
) -> PeftModel:
    """Llama with grouped queries (4 heads, 2 key heads), hidden size 32, 103 tokens."""
    config = LlamaConfig(
        vocab_size=103,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    return attach_lora(base, lora or Lora(rank=4, alpha=8), seed)


def save_tiny(folder: Path) -> Path:
    """Write the tiny model, without an adapter, and its tokenizer into a folder; returns it."""
    tiny_model().unload().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_policy(dtype: torch.dtype = torch.float32, trained: float = 0.0, **options: Any) -> Policy:
    """A policy over the tiny model. trained: size of the noise put into the adapter's B, 0 for a fresh adapter."""
    policy = Policy(tiny_model(dtype, **options), dtype=dtype)
    if trained:
        g = torch.Generator().manual_seed(7)
        for name, tensor in policy.adapter().items():
            if ".lora_B." in name:
                tensor.copy_(torch.randn(tensor.shape, generator=g, dtype=torch.float64) * trained)
    return policy


def prompts(count: int, recorded: bool = False) -> list[Prompt]:
    """Prompts of unequal length (ids 10 and up), with one recorded completion each if asked."""
    made = []
    for i in range(count):
        ids = tuple(10 + (3 * i + j) % 80 for j in range(3 + 2 * i % 7))
        answer = (20 + i, 30 + i, 2)
        extra = (Recorded(answer, (True,) * 3, 1.0, "ab"),) if recorded else ()
        made.append(Prompt(ids, {"prompt": "p", "answer": str(i)}, i, None, extra))
    return made
