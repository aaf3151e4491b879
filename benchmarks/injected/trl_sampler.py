"""A `rollout_func` for TRL's GRPO that samples by transformers' `generate` inside of a fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from material import AT, TOKENS, holding
from torch import Tensor, nn


class Sampler:
    """Samples by transformers' `generate` inside of a fault.

    Beside it the trainer's log-probs of the same tokens are computed: `apart` is the mean |difference| of each step.
    """

    def __init__(
        self,
        spoiled: Callable[[Any], Any] = lambda _: nullcontext(),
        temperature: float = 1.0,
        off: float = 0.0,
        empty: bool = False,
    ) -> None:
        """spoiled: trainer -> context to sample in. off: nats that one of 20 sequences' log-probs are off by."""
        self.spoiled, self.temperature, self.off, self.empty = spoiled, temperature, off, empty
        self.apart: list[float] = []

    @torch.no_grad()
    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        tokenizer, model = trainer.processing_class, trainer.model
        device = next(model.parameters()).device
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        faulty = trainer.state.global_step + 1 >= AT
        if self.empty:
            return {"prompt_ids": prompt_ids, "completion_ids": [[] for _ in prompts], "logprobs": [[]] * len(prompts)}
        training = model.training
        model.eval()
        completions, logprobs, differences = [], [], []
        for ids, same in itertools.groupby(prompt_ids):
            rows = torch.tensor([ids for _ in same], device=device)
            with self.spoiled(trainer):
                out = model.generate(
                    input_ids=rows,
                    attention_mask=torch.ones_like(rows),
                    do_sample=True,
                    temperature=self.temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=TOKENS,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
            log_p = torch.stack(out.scores, 1).float().log_softmax(-1)
            for sequence, own in zip(out.sequences, log_p, strict=True):
                tokens = sequence[len(ids) :]
                ends = (tokens == tokenizer.eos_token_id).nonzero().flatten().tolist()
                tokens = tokens[: ends[0] + 1] if ends else tokens
                drawn = own[: len(tokens)].gather(1, tokens[:, None]).squeeze(1)
                if self.off and faulty and not completions:
                    drawn = drawn - self.off
                trained = alone(model, sequence[: len(ids) + len(tokens)])[len(ids) - 1 :]
                differences.append((drawn - trained).abs())
                completions.append(tokens.tolist())
                logprobs.append(drawn.tolist())
        model.train(training)
        self.apart.append(float(torch.cat(differences).mean()))
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs}


def alone(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probs [T - 1] of the tokens of one sequence [T] after the first."""
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def adapter_of(model: nn.Module) -> dict[Tensor, Tensor]:
    return {p: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


class Stale:
    """The adapter of step `AT` - 1 from then on."""

    def __init__(self) -> None:
        self.kept: dict[Tensor, Tensor] = {}

    def __call__(self, trainer: Any) -> Any:
        if trainer.state.global_step + 1 < AT:
            self.kept = adapter_of(trainer.model)
        return holding(self.kept)
