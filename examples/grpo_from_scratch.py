"""`rlft train examples/sums.toml` with the loop written out: no engine, no reward workers, no packing, no run folder.

    python examples/grpo_from_scratch.py --steps 3

Only the data (rows, chat template, order) and the reward come from rlft; sampling, advantage, loss and update are here,
in plain PyTorch, under the names and in the order of `rlft.trainer.loop.loop`. It prints the same losses as the
library's loop (tests/trainer/test_from_scratch.py holds the first three to 1e-4, in float64), because it draws the same
random numbers.

The five choices: token-level ratio, clip 0.2 (inert with one update per batch, where the ratio is 1), no KL, advantage
(reward - group mean) / (group std + 1e-4), mean over all tokens of the step. One factor more corrects for the sampler:
min(p_trainer / p_sampler, 2) per token, which is 1 here but for rounding. Papers: GRPO 2402.03300, DAPO 2503.14476.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from rlft.config.run import Config
from rlft.data.prompts import Prompts
from rlft.models.load import attach_lora, load_base, load_tokenizer
from rlft.rewards.builtin.number import number
from rlft.rollout.engine import rollout_seed
from rlft.trainer.limits import limits_of_files
from rlft.trainer.optim import learning_rate
from rlft.trainer.setup import load_prompts_of
from rlft.types import Prompt


@dataclass
class Group:
    """The completions of one prompt, with their rewards and advantages [G]."""

    prompt: Prompt
    ids: list[list[int]]
    sampler: list[list[float]]
    """Log-prob of every token under the distribution it was drawn from."""
    rewards: Tensor
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.inference_mode()
def sample(
    model: PeftModel, prompt: Prompt, seeds: list[int], max_tokens: int, eos: int
) -> tuple[list[list[int]], list[list[float]]]:
    """One completion per seed, with the log-prob of every token under the distribution it was drawn from."""
    uniforms = np.stack([np.random.Generator(np.random.PCG64(seed)).random(max_tokens) for seed in seeds])
    ids, logprobs = [[] for _ in seeds], [[] for _ in seeds]
    out = model(input_ids=torch.tensor([prompt.ids]), use_cache=True, logits_to_keep=1)
    out.past_key_values.batch_repeat_interleave(len(seeds))
    logits = out.logits[:, -1].expand(len(seeds), -1)
    for t in range(max_tokens):
        log_p = logits.log_softmax(-1)  # (G, V)
        cumulative = log_p.double().exp().cumsum(-1)
        u = torch.from_numpy(uniforms[:, t]) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, u[:, None], right=True)  # (G, 1)
        for row, token in enumerate(tokens[:, 0].tolist()):
            if not ids[row] or ids[row][-1] != eos:  # a finished row is decoded on, and ignored
                ids[row].append(token)
                logprobs[row].append(log_p[row, token].item())
        if all(row[-1] == eos for row in ids):
            break
        logits = model(input_ids=tokens, past_key_values=out.past_key_values, use_cache=True).logits[:, -1]
    return ids, logprobs


def sample_and_score(model: PeftModel, tokenizer: Any, cfg: Config, step: int, slot: int, prompt: Prompt) -> Group:
    """A group of completions of a prompt, the `slot`-th of the step, with their rewards."""
    seeds = [rollout_seed((cfg.seed, step), slot, g) for g in range(cfg.sampling.group_size)]
    ids, sampler = sample(model, prompt, seeds, cfg.sampling.max_tokens, tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    rewards = torch.tensor(number(texts, [prompt.row["answer"]] * len(texts)))
    return Group(prompt, ids, sampler, rewards)


def advantages(groups: list[Group]) -> None:
    """(reward - mean) / (std + 1e-4) within a group; exactly 0 when all rewards are equal."""
    for group in groups:
        r = group.rewards
        equal = r.max() == r.min()
        group.advantages = torch.zeros_like(r) if equal else (r - r.mean()) / (r.std() + 1e-4)


def group_loss(model: PeftModel, group: Group, tokens: int) -> Tensor:
    """Sum of the group's token losses over the tokens of the whole step: sums of groups are then the step's mean."""
    longest = max(len(row) for row in group.ids)
    pad = lambda rows, value: torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])  # noqa: E731
    completion, mask = pad(group.ids, 0), pad([[1] * len(row) for row in group.ids], 0).bool()  # (G, L)
    prompt_ids = torch.tensor([group.prompt.ids]).expand(len(group.ids), -1)
    # Padding is on the right and attention is causal, so no real token sees it.
    logits = model(input_ids=torch.cat([prompt_ids, completion], 1)).logits
    predicting = logits[:, len(group.prompt.ids) - 1 : -1]  # the row before each completion token
    logprobs = predicting.log_softmax(-1).gather(2, completion[..., None]).squeeze(2)
    now = logprobs.detach()
    rho = (now - pad(group.sampler, 0.0)).exp().clamp(max=2.0)  # sampler correction, no gradient
    ratio = (logprobs - now).exp()  # 1, with the gradient of the log-prob
    a = group.advantages[:, None]
    loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) * rho
    return loss[mask].sum() / tokens


def losses(model: PeftModel, groups: list[Group]) -> float:
    """Forward and backward of every group; the loss of the step."""
    tokens, total = sum(len(row) for group in groups for row in group.ids), 0.0
    for group in groups:
        loss = group_loss(model, group, tokens)
        loss.backward()  # of zeros for a group of equal rewards; with no gradient at all AdamW would not count the step
        total += loss.item()
    return total


def update(optimizer: torch.optim.Optimizer, cfg: Config, step: int) -> None:
    """Clip the gradient and apply it at the learning rate of the step."""
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.optim.max_grad_norm)
    optimizer.param_groups[0]["lr"] = learning_rate(cfg.optim, step, cfg.steps)
    optimizer.step()
    optimizer.zero_grad()


def record(step: int, groups: list[Group], loss: float) -> None:
    """Print the step."""
    reward = torch.cat([group.rewards for group in groups]).mean().item()
    tokens = sum(len(row) for group in groups for row in group.ids)
    print(f"step {step + 1}  loss {loss:.6f}  reward {reward:.3f}  tokens {tokens}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent / "sums.toml"))
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    cfg = Config.load(Path(args.config))
    tokenizer = load_tokenizer(cfg.model)
    rows, _ = load_prompts_of(cfg, tokenizer, limits_of_files(cfg))
    prompts = Prompts(rows, cfg.seed, cfg.data.shuffle)
    model = attach_lora(load_base(cfg, torch.device("cpu")), cfg.lora, cfg.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.optim.lr, betas=cfg.optim.betas, weight_decay=cfg.optim.weight_decay)

    for step in range(args.steps):
        groups = [
            sample_and_score(model, tokenizer, cfg, step, slot, prompt)
            for slot, prompt in enumerate(prompts.take(cfg.prompts_per_step))
        ]
        advantages(groups)
        loss = losses(model, groups)
        update(optimizer, cfg, step)
        record(step, groups, loss)


if __name__ == "__main__":
    main()
