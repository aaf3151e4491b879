"""How wrong is the gradient when the engine samples from another distribution than the trainer's, and how much of that
does each correction take away?

    python benchmarks/correction_bias.py

A toy policy over 4 tokens, 4 tokens long, so that every expectation is an exact sum over all 256 completions. The
sampler's logits are the trainer's plus normal noise, scaled so that log rho has the given standard deviation per token.
The loss is rlft's own code with its own corrections, on completions that weigh as often as the sampler draws them.

    bias       |expected gradient - true gradient| / |true gradient|
    cosine     of the two
    noise      root of the summed variance of the gradient of one completion / |true gradient|

The true gradient is that of the expected reward under the trainer's policy. Rewards have their mean taken off. Means
over 20 draws of policy, rewards and noise. Writes a results file.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from results_file import write
from torch import Tensor

from rlft.algos.losses.cispo import Cispo
from rlft.algos.losses.dppo import Dppo
from rlft.algos.losses.grpo import Grpo
from rlft.algos.losses.reinforce import Reinforce
from rlft.algos.losses.topr import Topr
from rlft.algos.losses.vespo import Vespo
from rlft.algos.policy_loss import PolicyLoss
from rlft.batch import pack_all
from rlft.types import Batch, FinishReason, PackPlan, Prompt, Rollout

TOKENS, LENGTH, DRAWS = 4, 4, 20
SPREADS = (0.02, 0.1, 0.3, 0.6, 1.0)
"""Standard deviation of a token's log rho, in nats; 0.05 is what vLLM in bf16 shows (formulae 4), FP8 more."""
EVERY = list(itertools.product(range(TOKENS), repeat=LENGTH))
CORRECTIONS: dict[str, PolicyLoss] = {
    "none": Grpo(correction="none"),
    "token TIS, 2": Grpo(),
    "token MIS, [0.5, 2]": Grpo(correction_weight="token_mask", correction_floor=0.5),
    "IcePop, [0.5, 5]": Grpo(correction_weight="token_mask", correction_floor=0.5, correction_cap=5.0),
    "sequence TIS, 5": Grpo(correction_weight="sequence_truncate", correction_cap=5.0),
    "sequence mask, 3": Grpo(correction_weight="sequence_mask", correction_cap=3.0),
    "sequence weight, no bound": Grpo(correction_weight="sequence_truncate", correction_cap=1e9),
    "geometric mask, [0.9, 1.1]": Grpo(correction="none", sequence_mask_low=0.9, sequence_mask_high=1.1),
    "geometric mask and token TIS": Grpo(sequence_mask_low=0.9, sequence_mask_high=1.1),
    "OPSM, 0.1": Grpo(correction="none", off_policy_limit=0.1),
    "bypass, clip 0.2": Grpo(correction="bypass"),
    "cispo, bypass, 5": Cispo(correction="bypass"),
    "reinforce, token TIS": Reinforce(),
    "dppo, TV 0.2": Dppo(),
    "topr": Topr(),
    "vespo": Vespo(),
}


def frame() -> Batch:
    """Every completion once, with weight 1 per token, which `weighed` changes."""
    made = [
        Rollout(Prompt((0,), {}, 0), row, (True,) * LENGTH, None, "", FinishReason.STOP, i, 0, 0)
        for i, row in enumerate(EVERY)
    ]
    plan = PackPlan("sequence_sum", 10**6, LENGTH, 1.0, share_prefix=False)
    (batch,) = pack_all(made, plan)
    assert [sample.rollout for sample in batch.samples] == made
    return batch


def log_probs(logits: Tensor) -> Tensor:
    """[256, LENGTH] of every completion, by the token before (the prompt is row TOKENS) and the position."""
    table, rows = logits.log_softmax(-1), torch.tensor(EVERY)
    before = torch.cat([torch.full((len(rows), 1), TOKENS), rows[:, :-1]], 1)
    return table[torch.arange(LENGTH)[None], before, rows]


def measured(name: str, logits: Tensor, noise: Tensor, rewards: Tensor, batch: Batch) -> dict[str, float]:
    """bias, cosine and noise of one correction on one draw."""
    loss = CORRECTIONS[name]
    logits = logits.clone().requires_grad_()
    now, sampler = log_probs(logits), log_probs(logits.detach() + noise)
    rewards = rewards - (now.detach().sum(1).exp() * rewards).sum()
    (truth,) = torch.autograd.grad((now.sum(1).exp() * rewards).sum(), logits, retain_graph=True)
    chance = sampler.sum(1).exp()

    def grid(values: Tensor) -> Tensor:
        return torch.zeros(len(batch.input_ids), dtype=torch.float64).masked_scatter(batch.train_mask, values.flatten())

    advantages = grid(rewards[:, None].expand(-1, LENGTH))
    given = replace(batch, advantages=advantages, sampler_logprobs=grid(sampler), weight=batch.train_mask.double())
    if loss.correction == "bypass":
        given = replace(given, old_logprobs=given.sampler_logprobs)
    flat = grid(now.detach()).requires_grad_()
    loss(flat, given)[0].backward()
    assert flat.grad is not None
    # Of each completion, by the chain rule: d loss / d log-prob of its tokens times d log-prob / d logits.
    by_token = -flat.grad[batch.train_mask].reshape(now.shape)
    each = torch.stack(
        [
            torch.autograd.grad((by_token[i] * now[i]).sum(), logits, retain_graph=True)[0].flatten()
            for i in range(len(EVERY))
        ]
    )
    expected, truth = (chance[:, None] * each).sum(0), truth.flatten()
    variance = (chance[:, None] * (each - expected) ** 2).sum()
    return {
        "bias": float((expected - truth).norm() / truth.norm()),
        "cosine": float(expected @ truth / (expected.norm() * truth.norm()).clamp(min=1e-300)),
        "noise": float(variance.sqrt() / truth.norm()),
    }


def main() -> None:
    """Measure every correction at every spread, print a table and write the results file."""
    torch.set_default_dtype(torch.float64)
    batch, rows = frame(), []
    for spread in SPREADS:
        print(f"log rho spread {spread:g} nat: bias, cosine, noise")
        sums: dict[str, dict[str, float]] = {name: {} for name in CORRECTIONS}
        for draw in range(DRAWS):
            g = torch.Generator().manual_seed(draw)
            logits = torch.randn(LENGTH, TOKENS + 1, TOKENS, generator=g)
            noise, rewards = torch.randn(logits.shape, generator=g), torch.rand(len(EVERY), generator=g)
            difference = log_probs(logits) - log_probs(logits + noise * 0.01)
            size = (log_probs(logits).sum(1).exp()[:, None] * difference**2).sum() / LENGTH
            noise = noise * 0.01 * spread / size.sqrt()
            for name in CORRECTIONS:
                for metric, value in measured(name, logits, noise, rewards, batch).items():
                    sums[name][metric] = sums[name].get(metric, 0.0) + value / DRAWS
        for name, values in sums.items():
            print(f"  {name:30}" + "".join(f"{value:9.3f}" for value in values.values()))
            for metric, value in values.items():
                unit = "" if metric == "cosine" else "of |true gradient|"
                rows.append(
                    {
                        "work": f"spread {spread:g} nat",
                        "stack": name,
                        "metric": metric,
                        "value": round(value, 5),
                        "unit": unit,
                        "note": "",
                    }
                )
    print(write("correction_bias", rows))


if __name__ == "__main__":
    main()
