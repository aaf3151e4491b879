"""The stacks that are compared on a slab of Qwen3-8B, each as (model, step): one QLoRA step over T random tokens.

The slab is Qwen3-8B's layer (hidden 4096, 32/8 heads of 128, MLP 12288, vocabulary 151,936), 8 of its 36 layers, random
weights. A step is forward, log-prob of every token but the first, mean of them, backward into LoRA r 16 on all linears.

    trl      transformers + PEFT + bitsandbytes, gradient checkpointing, TRL's chunked log-prob head
    unsloth  Unsloth, its own checkpointing, its loss from labels
    rlft     this library: `Policy.logprobs`
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SLAB = "/tmp/slab"
TRL_CHUNK = 16384
Step = Callable[[Tensor], None]


def make(layers: int = 8, path: str = SLAB) -> None:
    """Write the slab, once per machine."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    if (Path(path) / "config.json").exists():
        return
    config = Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=262144, rope_theta=1e6,
        tie_word_embeddings=False, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)


def trl() -> tuple[Any, Step]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl.kernels import ChunkedLogProbFunction

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        SLAB, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    model.train()
    inner: Any = model.base_model.model

    def step(ids: Tensor) -> None:
        hidden = inner.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        logprobs, *_ = ChunkedLogProbFunction.apply(hidden, inner.lm_head.weight, None, ids[1:], 1.0, TRL_CHUNK)
        (-logprobs.mean()).backward()
        model.zero_grad(set_to_none=True)

    return model, step


def unsloth(longest: int = 32768) -> tuple[Any, Step]:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(SLAB, max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    model.train()

    def step(ids: Tensor) -> None:
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        model.zero_grad(set_to_none=True)

    return model, step


def rlft() -> tuple[Any, Step]:
    from rlft.config import Lora
    from rlft.models.load import Base, attach_lora, load_base

    device = torch.device("cuda")
    model = attach_lora(load_base(Base(SLAB, "nf4", "bfloat16", "cuda"), device), Lora(rank=16, alpha=32), seed=1)
    return model, rlft_step(model)


def rlft_step(model: Any) -> Step:
    """A step of the policy over one sequence of which every token but the first is trained; `step.policy` is it. Rows
    that were packed once are packed for all repeats, as the others' ids are tensors once and for all."""
    from rlft.batch import count, pack
    from rlft.models.policy import Policy
    from rlft.types import Batch, PackPlan, Prompt, Rollout

    policy: list[Policy] = []
    packed: list[tuple[Tensor, Batch]] = []

    def batch_of(ids: Tensor) -> Batch:
        first, *rest = ids.tolist()
        rollout = Rollout(Prompt((first,), {}, 0), tuple(rest), (True,) * len(rest), None, "", "stop", 0, 0, 0)
        plan = PackPlan((True,), "token_mean", len(ids), len(ids), 1.0)
        (batch,) = pack([rollout], torch.ones(1), plan, count([rollout], plan))
        return batch

    def step(ids: Tensor) -> None:
        if not policy:
            policy.append(Policy(model))
            step.policy = policy[0]  # type: ignore[attr-defined]
        if not packed or packed[0][0] is not ids:
            packed[:] = [(ids, batch_of(ids))]
        batch = packed[0][1]
        policy[0].flat.zero_grad()
        logprobs, _ = policy[0].logprobs(batch)
        (-(logprobs * batch.weight.to(logprobs.device)).sum()).backward()

    return step
