"""Does the path that a policy runs compute what transformers computes? Asked at the start of every run.

Two random sequences of 24 and 17 tokens that begin alike are scored packed and behind their common prompt, with a
random adapter, and compared with transformers' own forward of each row alone, in which no packing, padding or fused
layer takes part. Differences are measured relative to the spread of the log-probs, where rounding is as large in every
model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.batch import count, pack
from rlft.errors import ConfigError
from rlft.models.policy import Policy
from rlft.trainer.broken import not_finite
from rlft.types import Batch, PackPlan, Prompt, Rollout

PROMPT, LENGTHS = 9, (24, 17)
"""Tokens that the two sequences have in common, and all of theirs."""
ROUNDINGS = 20
"""Largest difference, in roundings of the model's type."""
LEAST = 1e-3
"""No smaller limit: fp32 products are summed in another order, over thousands of terms and many layers."""
MIXED = 0.2
"""Where quantisation makes a row depend on what it is packed with (LLM.int8): still far below what another sequence's
state does."""


def check(policy: Policy) -> float:
    """Largest relative difference between the policy's log-probs and transformers' own; the adapter is restored bit for
    bit and no global random state is used. Raises ConfigError, naming the path, where it is more than rounding, and
    TrainError where transformers' own log-probs are not finite."""
    flat = policy.adapter_params.data
    kept = flat.clone()
    rollouts = _rollouts(policy)
    try:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in policy.adapter().items():
            if ".lora_B." in name:
                tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
        alone = [_alone(policy, rollout) for rollout in rollouts]
        if not all(logprobs.isfinite().all() for logprobs in alone):
            # The path is not at fault: what is, is found without the random adapter.
            flat.copy_(kept)
            raise not_finite(policy, _batches(rollouts, share=False), "at the start the policy's log-probs")
        found = {
            layout: max(_apart(a, b) for a, b in zip(_scored(policy, rollouts, share), alone, strict=True))
            for layout, share in (("side by side", False), ("behind a shared prompt", True))
        }
    finally:
        flat.copy_(kept)
    limit = max(LEAST, ROUNDINGS * torch.finfo(policy.base.dtype).eps)  # type: ignore[arg-type]
    limit = max(limit, MIXED) if policy.mixes_rows else limit
    for layout, off in found.items():
        if not off <= limit:
            raise ConfigError(
                f"model: {type(policy.base).__name__} does not train exactly here: two sequences {layout}, run by "
                f'"{policy.path}", have log-probs that differ from transformers\' own, a row at a time, by {off:.2g} '
                f"of their spread (limit {limit:.2g}); give another model, and report this one"
            )
    return max(found.values())


def _rollouts(policy: Policy) -> list[Rollout]:
    vocabulary = policy.base.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    # From the middle: special tokens and placeholders of images lie at the ends.
    low, high = vocabulary // 8, max(vocabulary // 8 + 1, vocabulary // 2)
    ids = torch.randint(low, high, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = Prompt(tuple(ids[0][:PROMPT]), {}, 0, None)
    made = []
    for sample, (row, length) in enumerate(zip(ids, LENGTHS, strict=True)):
        completion = tuple(row[PROMPT:length])
        made.append(Rollout(prompt, completion, (True,) * len(completion), None, "", "stop", sample, 0, sample))
    return made


def _batches(rollouts: list[Rollout], share: bool) -> list[Batch]:
    """The sequences in one micro-batch."""
    plan = PackPlan((True,) * len(rollouts), "token_mean", sum(LENGTHS), max(LENGTHS), 1.0, share_prefix=share)
    return pack(rollouts, torch.ones(len(rollouts)), plan, count(rollouts, plan))


def _scored(policy: Policy, rollouts: list[Rollout], share: bool) -> list[Tensor]:
    """Log-probs of each completion by the policy, in one micro-batch."""
    (batch,) = _batches(rollouts, share)
    logprobs = policy.score(batch).cpu().double()
    own = [s for s, group in enumerate(batch.group_ids.tolist()) if group >= 0]
    by_row = {row: logprobs[(batch.seq_ids == s) & batch.train_mask] for s, row in zip(own, batch.rows, strict=True)}
    return [by_row[i] for i in range(len(rollouts))]


@torch.no_grad()
def _alone(policy: Policy, rollout: Rollout) -> Tensor:
    """Log-probs of a completion by transformers' own forward of its row."""
    ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids], device=policy.device)
    # Fused layers leave calls that ask for hidden states to transformers.
    asked = {} if policy.fused is None else {"output_hidden_states": True}
    logits = policy.model(input_ids=ids, use_cache=False, **asked).logits[0]
    start = len(rollout.prompt.ids)
    log_p = logits[start - 1 : -1].double().log_softmax(-1)
    return log_p.gather(1, ids[0, start:, None]).squeeze(1).cpu()


def _apart(found: Tensor, alone: Tensor) -> float:
    """Root mean square of the differences over the log-probs' standard deviation; nan where either is not finite."""
    return float((found - alone).square().mean().sqrt() / alone.std().clamp(min=1e-2))
