"""The stacks that are compared, each as (model, step): one QLoRA or LoRA step over T random tokens.

A step is forward, log-prob of every token but the first, their mean, backward into LoRA r 16 on all linears.

    trl      transformers + PEFT + bitsandbytes, gradient checkpointing, TRL's chunked log-prob head
    peft     the same without checkpointing, for shapes whose activations are small
    unsloth  Unsloth, its own checkpointing, its loss from labels
    rlft     this library: `Policy.logprobs`

Shapes are those of published models with random weights; `slab` is 8 of Qwen3-8B's 36 layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TRL_CHUNK = 16384
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[Tensor], None]
QWEN = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1048576,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_8B = QWEN | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "slab": QWEN_8B | {"num_hidden_layers": 8},
    "8b": QWEN_8B | {"num_hidden_layers": 36},
    "0.6b": QWEN
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    "1.7b": QWEN
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "tie_word_embeddings": True,
    },
    # 48 layers of 6144 with 16384 in the MLP, as InternLM2-20B; 19.9 B parameters.
    "20b": QWEN
    | {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_attention_heads": 48,
        "num_hidden_layers": 48,
        "vocab_size": 92544,
        "tie_word_embeddings": False,
    },
    # 80 layers of 8192 with 28672 in the MLP, as Llama 3 70B; 70.6 B parameters.
    "70b": QWEN
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    # Hybrids of attention and layers with a state: LFM2-1.2B, and 8 layers of a Qwen3.5.
    "lfm2": {
        "model_type": "lfm2",
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 12288,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "max_position_embeddings": 128000,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # To run a script by hand on a CPU.
    "tiny": QWEN
    | {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
    },
}


def config_of(shape: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    settings = SHAPES[shape] | changes
    return AutoConfig.for_model(settings.pop("model_type", "qwen3"), **settings)


def path_of(shape: str) -> str:
    """Where `make` writes a shape."""
    return f"/tmp/shapes/{shape}"


def make(shape: str, **changes: Any) -> str:
    """Write a shape's checkpoint in bf16 with its tokenizer, once per machine. changes: of its config. Raises
    ValueError where another benchmark has written it with other ones."""
    from transformers import AutoModelForCausalLM

    path = Path(path_of(shape))
    if (path / "config.json").exists():
        written, wanted = json.loads((path / "config.json").read_text()), SHAPES[shape] | changes
        other = {name: written[name] for name in wanted.keys() & written.keys() if written[name] != wanted[name]}
        if other:
            raise ValueError(f"{path} was written by another benchmark, with {other}: remove it")
    else:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config_of(shape, **changes), dtype=torch.bfloat16)
        model.save_pretrained(path)
        tokenizer_of(shape).save_pretrained(path)
        del model
        torch.cuda.empty_cache()
    return str(path)


def tokenizer_of(shape: str) -> Any:
    """A tokenizer whose words are the numbers of their tokens, so that "12 7" is tokens 12 and 7; 0 is "<pad>" and 2
    is "<eos>", since a special token is also found inside of a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {{0: "<pad>", 2: "<eos>"}.get(i, str(i)): i for i in range(SHAPES[shape]["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def base_of(shape: str, nf4: bool, attention: str = "sdpa") -> Any:
    """transformers' model in bf16, or with linear layers quantised by bitsandbytes. attention: its back end."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        path_of(shape),
        quantization_config=quantised if nf4 else None,
        dtype=torch.bfloat16,
        device_map={"": 0 if DEVICE == "cuda" else DEVICE},
        attn_implementation=attention,
    )


def lora() -> Any:
    """PEFT's config of the adapter that every stack has."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _peft(shape: str, nf4: bool, checkpointing: bool) -> tuple[Any, Step]:
    from peft import get_peft_model
    from trl.kernels import ChunkedLogProbFunction

    base = base_of(shape, nf4)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    base.requires_grad_(False)
    model = get_peft_model(base, lora())
    model.train()
    inner: Any = model.base_model.model

    def step(ids: Tensor) -> None:
        hidden = inner.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        logprobs, *_ = ChunkedLogProbFunction.apply(hidden, inner.lm_head.weight, None, ids[1:], 1.0, TRL_CHUNK)
        (-logprobs.mean()).backward()
        model.zero_grad(set_to_none=True)

    return model, step


def trl(shape: str, nf4: bool) -> tuple[Any, Step]:
    return _peft(shape, nf4, checkpointing=True)


def peft(shape: str, nf4: bool) -> tuple[Any, Step]:
    return _peft(shape, nf4, checkpointing=False)


def unsloths_model(shape: str, nf4: bool) -> Any:
    """Unsloth's model with its adapter and its own checkpointing."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        path_of(shape), max_seq_length=32768, dtype=torch.bfloat16, load_in_4bit=nf4
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )


def unsloth(shape: str, nf4: bool) -> tuple[Any, Step]:
    model = unsloths_model(shape, nf4)
    model.train()

    def step(ids: Tensor) -> None:
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        model.zero_grad(set_to_none=True)

    return model, step


def rlft(shape: str, nf4: bool) -> tuple[Any, Step]:
    from rlft.config.run import Lora
    from rlft.models.load import Base, attach_lora, load_base

    how = Base(path_of(shape), "nf4" if nf4 else "none", "bfloat16", "cuda")
    model = attach_lora(load_base(how, torch.device("cuda")), Lora(rank=16, alpha=32), seed=1)
    return model, rlft_step(model)


def rlft_step(model: Any) -> Step:
    """A step of the policy over one sequence of which every token but the first is trained; `step.policy` is it. Rows
    that were packed once are packed for all repeats, as the others' ids are tensors once and for all."""
    from rlft.models.policy import Policy
    from rlft.types import Batch

    policy: list[Policy] = []
    packed: list[tuple[Tensor, Batch]] = []

    def step(ids: Tensor) -> None:
        if not policy:
            policy.append(Policy(model))
            step.policy = policy[0]  # type: ignore[attr-defined]
        if not packed or packed[0][0] is not ids:
            packed[:] = [(ids, batch_of([ids.tolist()]))]
        batch = packed[0][1]
        policy[0].flat.zero_grad()
        logprobs, _ = policy[0].logprobs(batch)
        (-(logprobs * batch.weight.to(logprobs.device)).sum()).backward()

    return step


def batch_of(
    sequences: list[list[int]], prompt: int = 1, advantages: list[float] | None = None, sampled: bool = False
) -> Any:
    """One packed micro-batch of sequences whose first `prompt` tokens are not trained. sampled: they come with the
    log-probs of a sampler that drew tokens evenly."""
    from rlft.batch import count, groups_of, pack
    from rlft.types import FinishReason, PackPlan, Prompt, Rollout

    rollouts = []
    for i, ids in enumerate(sequences):
        answer = tuple(ids[prompt:])
        sampler = (-12.0,) * len(answer) if sampled else None
        rollouts.append(
            Rollout(
                Prompt(tuple(ids[:prompt]), {}, 0),
                answer,
                (True,) * len(answer),
                sampler,
                "",
                FinishReason.STOP,
                i,
                0,
                0,
            )
        )
    tokens = sum(map(len, sequences))
    plan = PackPlan("token_mean", tokens, tokens, 1.0)
    groups = groups_of(rollouts, advantages or [1.0] * len(rollouts))
    (batch,) = pack(groups, plan, count(groups))
    return batch


def random_nf4(shape: str) -> Any:
    """A shape too large to be written first: random weights, quantised layer by layer where they are made."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)
    std = model.config.initializer_range
    with torch.device(DEVICE):
        rotary = type(model.model.rotary_emb)(model.config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = torch.randn(module.out_features, module.in_features, device=DEVICE, dtype=torch.bfloat16) * std
            packed = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            packed.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(DEVICE)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, packed)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            made = torch.ones if "norm" in name else torch.randn
            data = made(parameter.shape, device=DEVICE, dtype=torch.bfloat16)
            parent, _, last = name.rpartition(".")
            module = model.get_submodule(parent)
            setattr(module, last, nn.Parameter(data if "norm" in name else data * std, requires_grad=False))
    model.model.rotary_emb = rotary
    return model.eval()
