"""What all stacks share: small random checkpoints, data, reward functions, faults of a sampler, and what is recorded.

Every run has the same prompts, learning rate and number of steps; a fault that is not there from the start comes in
step `AT`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

TESTS = Path(__file__).parents[2] / "tests"
sys.path.insert(0, str(TESTS))

from tiny import SPECIAL, tiny_tokenizer  # noqa: E402

STEPS, AT = 6, 3
"""Steps of a run, and the step (from 1) that a fault comes in."""
PROMPTS, GROUP, TOKENS, LR = 5, 4, 8, 1e-2
"""Prompts per step, completions of each, tokens of each at most, learning rate."""
TIMEOUT = 5.0
"""Seconds that a reward function has, where that can be set."""

SHAPE: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ATTENTION = {"gpt_oss": "eager"}
"""Back end of a kind's attention where it is not "sdpa"."""

REWARDS = f"""
import os
import time

AT = {AT}


def digits(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) + 0.01 * (i % 3) for i, text in enumerate(texts)]


def before(trainer_state):
    return trainer_state.global_step + 1 < AT


def nan(completions, trainer_state, **kwargs):
    return digits(completions) if before(trainer_state) else [float("nan")] * len(completions)


def raises(completions, trainer_state, **kwargs):
    if not before(trainer_state):
        raise RuntimeError("the grader is down")
    return digits(completions)


MARKED = []


def infinite(completions, trainer_state, **kwargs):
    found = digits(completions)
    if not before(trainer_state):
        # The same completion in every call: rlft calls again with parts of a batch that failed.
        MARKED.extend([str(completions[0])] if not MARKED else [])
        found = [float("inf") if str(c) == MARKED[0] else value for c, value in zip(completions, found)]
    return found


def hangs(completions, trainer_state, **kwargs):
    if not before(trainer_state):
        time.sleep(10_000)
    return digits(completions)


def dies(completions, trainer_state, **kwargs):
    if not before(trainer_state):
        os.kill(os.getpid(), 9)
    return digits(completions)
"""
"""The file of reward functions; in TRL they run in the process of the run."""


@dataclass
class Outcome:
    """What a stack did with a fault."""

    metric: str
    """ "stopped_at_step", "finished" (steps), "crashed" (exit code), "hung" (seconds), or "not_injected"."""
    value: float
    note: str
    """One clause that the table shows, then "; " and details."""
    warned: tuple[str, ...] = ()
    """Warnings, shortened."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def home(folder: Path, kind: str = "llama", bos: bool = False) -> Path:
    """A folder with a checkpoint in fp32, prompts, recorded completions and reward functions.

    bos: the tokenizer puts its BOS before every text, as Llama's does.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SHAPE, **KINDS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION.get(kind, "sdpa"))
    model.to(torch.float32).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": SPECIAL[1]})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
            single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)]
        )
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(30)))
    recorded = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(30)]
    (folder / "recorded.jsonl").write_text("\n".join(map(json.dumps, recorded)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change_rows(path: Path, **columns: Any) -> None:
    """Each column of the file's rows replaced by what the function makes of it."""
    rows = [row | {name: make(row[name]) for name, make in columns.items()} for row in rows_of(path)]
    path.write_text("\n".join(map(json.dumps, rows)))


def with_two_bos(folder: Path) -> Path:
    """Prompts that begin with BOS, for a tokenizer that puts one before them."""
    home(folder, bos=True)
    change_rows(folder / "prompts.jsonl", prompt=lambda text: SPECIAL[1] + text)
    return folder


def rendered_twice(folder: Path) -> Path:
    """Messages whose content is what the chat template makes of the prompt."""
    home(folder)
    template = tiny_tokenizer()

    def render(text: str) -> list[dict[str, str]]:
        message = [{"role": "user", "content": text}]
        shown = template.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return [{"role": "user", "content": str(shown)}]

    change_rows(folder / "prompts.jsonl", prompt=render)
    return folder


def with_nan_weight(folder: Path) -> Path:
    """A checkpoint one weight of which is nan."""
    from safetensors.torch import load_file, save_file

    path = home(folder) / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


# ---- faults of a sampler: the model is changed while it samples, and put back after --------------------------------


def named(model: nn.Module, ending: str) -> Tensor:
    """The one parameter whose name ends so."""
    (found,) = [p for n, p in model.named_parameters() if n.endswith(ending)]
    return found


@contextmanager
def holding(values: dict[Tensor, Tensor]) -> Iterator[None]:
    """Each tensor with the value of another one inside the block."""
    before = {tensor: tensor.detach().clone() for tensor in values}
    with torch.no_grad():
        for tensor, value in values.items():
            tensor.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before.items():
                tensor.copy_(value)


def wrong_weight(model: nn.Module) -> Any:
    """Layer 1 has the output projection of layer 0, as when weights are handed over under a wrong name."""
    own, other = (named(model, f"layers.{i}.self_attn.o_proj.base_layer.weight") for i in (1, 0))
    return holding({own: other.detach().clone()})


def no_sinks(model: nn.Module) -> Any:
    """Attention without its sinks."""
    sinks = [p for n, p in model.named_parameters() if n.endswith("self_attn.sinks")]
    assert sinks
    return holding({p: torch.full_like(p, -1e4) for p in sinks})


def lora_layers(model: nn.Module, adapter: str) -> list[LoraLayer]:
    """PEFT's layers that have this adapter; at least one."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.scaling]
    assert layers, adapter
    return layers


@contextmanager
def scaled_twice(model: nn.Module, adapter: str) -> Iterator[None]:
    """alpha / rank of the adapter applied twice."""
    layers = lora_layers(model, adapter)
    for layer in layers:
        layer.scaling[adapter] **= 2
    try:
        yield
    finally:
        for layer in layers:
            layer.scaling[adapter] **= 0.5


def finite(model: nn.Module) -> bool:
    """Whether every trained parameter is finite."""
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def short(error: BaseException, most: int = 260) -> str:
    """Type and message of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= most else text[:most] + ' ...'}"


def raise_ours(error: BaseException) -> None:
    """Raise an error of these scripts again: it is no result."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if Path(frame.filename).is_relative_to(Path(__file__).parents[1]):
        raise error
