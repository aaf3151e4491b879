"""Check at the start of every run that the policy computes the same log-probs as transformers.

Two random sequences of 24 and 17 tokens with a common prompt are scored under a random adapter, once packed side by
side and once behind a shared prefix. The reference is transformers' own forward of each row alone, without packing,
padding or fused layers. Differences are measured relative to the spread of the log-probs, so that rounding is
comparable between models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.batch import pack_all
from rlft.errors import ConfigError
from rlft.models.policy import Policy
from rlft.trainer.broken import not_finite
from rlft.types import Batch, FinishReason, PackPlan, Prompt, Rollout

PROMPT, LENGTHS = 9, (24, 17)
"""Tokens of the common prompt, and of the two whole sequences."""
ROUNDINGS = 20
"""Largest difference, in units of the machine epsilon of the model's dtype."""
LEAST = 1e-3
"""Smallest limit: fp32 sums run in another order, over thousands of terms and many layers."""
MIXED = 0.2
"""Limit where quantisation makes a row depend on its micro-batch (LLM.int8); leakage from another sequence is far
larger."""


def check(policy: Policy) -> float:
    """Return the largest relative difference between the policy's log-probs and transformers' own.

    The adapter is restored bit for bit, and no global random state is used. Raises ConfigError, naming the path, when
    the difference is more than rounding, and TrainError when transformers' own log-probs are not finite.
    """
    flat = policy.adapter_params.data
    saved = flat.clone()
    rollouts = _rollouts(policy)
    try:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in policy.adapter().items():
            # Both matrices: rounding grows with an adapter that was trained before, and its A with it.
            scale = 0.05 if ".lora_B." in name else (3 * tensor.shape[-1]) ** -0.5
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
        alone = [_alone(policy, rollout) for rollout in rollouts]
        if not all(logprobs.isfinite().all() for logprobs in alone):
            # The path is not the cause. Restore the adapter, so that the error names the real one.
            flat.copy_(saved)
            raise not_finite(policy, _batches(rollouts, share=False), "at the start the policy's log-probs")
        differences = {
            layout: max(
                _difference(logprobs_here, logprobs_alone)
                for logprobs_here, logprobs_alone in zip(_scored(policy, rollouts, share), alone, strict=True)
            )
            for layout, share in (("side by side", False), ("behind a shared prompt", True))
        }
    finally:
        flat.copy_(saved)
    limit = limit_of(policy)
    for layout, difference in differences.items():
        if not difference <= limit:
            raise ConfigError(
                f"model: {type(policy.base).__name__} does not train exactly here: two sequences {layout}, run by "
                f'"{policy.path}", have log-probs that differ from transformers\' own, a row at a time, by '
                f"{difference:.2g} of their spread (limit {limit:.2g}); give another model, and report this one"
            )
    return max(differences.values())


def limit_of(policy: Policy) -> float:
    """Return the largest relative difference that rounding explains."""
    limit = max(LEAST, ROUNDINGS * torch.finfo(policy.base.dtype).eps)  # type: ignore[arg-type]
    return max(limit, MIXED) if policy.mixes_rows else limit


def _rollouts(policy: Policy) -> list[Rollout]:
    vocabulary = policy.base.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    # From the middle: special tokens and image placeholders are at the ends of the vocabulary.
    low, high = vocabulary // 8, max(vocabulary // 8 + 1, vocabulary // 2)
    ids = torch.randint(low, high, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = Prompt(tuple(ids[0][:PROMPT]), {}, 0, None)
    rollouts = []
    for sample, (row, length) in enumerate(zip(ids, LENGTHS, strict=True)):
        completion = tuple(row[PROMPT:length])
        rollouts.append(
            Rollout(prompt, completion, (True,) * len(completion), None, "", FinishReason.STOP, sample, 0, sample)
        )
    return rollouts


def _batches(rollouts: list[Rollout], share: bool) -> list[Batch]:
    """Pack the sequences into one micro-batch."""
    return pack_all(rollouts, PackPlan("token_mean", sum(LENGTHS), max(LENGTHS), 1.0, share_prefix=share))


def _scored(policy: Policy, rollouts: list[Rollout], share: bool) -> list[Tensor]:
    """Return the policy's log-probs of each completion, scored in one micro-batch."""
    (batch,) = _batches(rollouts, share)
    logprobs = policy.score(batch).cpu().double()
    sequences = [sequence for sequence, group in enumerate(batch.group_ids.tolist()) if group >= 0]
    by_rollout = {
        id(sample.rollout): logprobs[(batch.seq_ids == sequence) & batch.train_mask]
        for sequence, sample in zip(sequences, batch.samples, strict=True)
    }
    return [by_rollout[id(rollout)] for rollout in rollouts]


@torch.no_grad()
def _alone(policy: Policy, rollout: Rollout) -> Tensor:
    """Return the log-probs of a completion from transformers' own forward of its row."""
    ids = torch.tensor([rollout.prompt.ids + rollout.completion_ids], device=policy.device)
    # A call that asks for hidden states bypasses the fused layers.
    options = {} if policy.fused is None else {"output_hidden_states": True}
    logits = policy.model(input_ids=ids, use_cache=False, **options).logits[0]
    start = len(rollout.prompt.ids)
    log_p = logits[start - 1 : -1].double().log_softmax(-1)
    return log_p.gather(1, ids[0, start:, None]).squeeze(1).cpu()


def _difference(logprobs: Tensor, reference: Tensor) -> float:
    """Return the RMS difference over the reference's standard deviation; nan where either is not finite."""
    return float((logprobs - reference).square().mean().sqrt() / reference.std().clamp(min=1e-2))
