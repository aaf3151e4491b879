"""Log-probs and gradients of prompts with images against transformers' own forward of each row with its pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlft.batch import pack_rollouts
from rlft.config.data import Data
from rlft.data.encode import encode_prompt
from rlft.data.limits import Limits
from rlft.errors import DataError
from rlft.models.fused import memory
from rlft.models.policy import Policy
from rlft.models.vision import Vision
from rlft.positions import next_position, prompt_positions
from rlft.types import Batch, FinishReason, PackPlan, Prompt, Rollout
from tests import seeing
from tests.random_base import in_float64

PICTURES = (seeing.file_of(3), seeing.file_of(2, (16, 40)), seeing.file_of(4, (32, 24)))


def prompt_of(index: int, text: str, *images: bytes) -> Prompt:
    row = {"prompt": text, "images": list(images)}
    return encode_prompt(row, index, Data("no file"), seeing.tokenizer(), Limits(images=seeing.reader()))


def rollouts_of(prompts: Sequence[Prompt], samples: int = 3) -> list[Rollout]:
    """Completions of different lengths, `samples` of each prompt."""
    made = []
    for prompt in prompts:
        for sample in range(samples):
            ids = tuple(10 + (7 * prompt.index + 3 * sample + 5 * i) % 60 for i in range(3 + 2 * sample + prompt.index))
            made.append(Rollout(prompt, ids, (True,) * len(ids), None, "", FinishReason.STOP, sample, 0, sample))
    return made


def some_rollouts() -> list[Rollout]:
    """Prompts with one image, with two of different sizes, without any, and with the first one again."""
    return rollouts_of(
        [
            prompt_of(0, "How many?", PICTURES[0]),
            prompt_of(1, "Which has more?", PICTURES[1], PICTURES[2]),
            prompt_of(2, "Say 3."),
            prompt_of(3, "And here?", PICTURES[0]),
        ]
    )


def packed(rollouts: Sequence[Rollout], share: bool = True, budget: int = 10**6) -> list[Batch]:
    plan = PackPlan("token_mean", budget, 64, 1.0, share_prefix=share)
    advantages = [0.3 + 0.1 * i for i in range(len(rollouts))]
    return pack_rollouts(rollouts, advantages, plan)


def loss_of(policy: Policy, batches: Sequence[Batch]) -> dict[int, Tensor]:
    """Log-probs of each rollout by its id; the gradient of the weighted sum is added to the policy's buffer."""
    found = {}
    for batch in batches:
        logprobs, _ = policy.logprobs(batch)
        (logprobs * batch.weight * batch.advantages).sum().backward()
        sequences = [i for i, group in enumerate(batch.group_ids.tolist()) if group >= 0]
        for sequence, sample in zip(sequences, batch.samples, strict=True):
            found[id(sample.rollout)] = logprobs[(batch.seq_ids == sequence) & batch.train_mask].detach()
    return found


def reference(policy: Policy, rollout: Rollout) -> Tensor:
    """transformers' own log-probs of a completion, with gradient: one row with its pixels."""
    prompt = rollout.prompt
    ids = torch.tensor([prompt.ids + rollout.completion_ids])
    given: dict[str, Tensor] = {}
    if prompt.images:
        assert policy.vision is not None
        pixels = [policy.vision.reader.pixels(image) for image in prompt.images]
        kinds = (ids == policy.base.config.image_token_id).int()
        given = {"pixel_values": torch.cat([each for each, _ in pixels]), "mm_token_type_ids": kinds}
        given["image_grid_thw"] = torch.cat([grid for _, grid in pixels])
    # A call that asks for hidden states bypasses the fused layers.
    logits = policy.model(input_ids=ids, use_cache=False, output_hidden_states=True, **given).logits[0]
    policy.base.model.rope_deltas = None  # of the last images, which transformers would use for text
    start = len(prompt.ids)
    return logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).squeeze(1)


@contextmanager
def exact(policy: Policy) -> Iterator[None]:
    """Tower and layers without transformers' roundings to fp32, in both forwards."""
    with in_float64(policy.decoder):
        yield


def check(policy: Policy, batches: Sequence[Batch]) -> None:
    """Log-probs and gradients of batches against the reference, both to 1e-6."""
    with exact(policy):
        policy.flat.zero_grad()
        found = loss_of(policy, batches)
        gradient = policy.flat.gradient.clone()
        policy.flat.zero_grad()
        for batch in batches:
            sequences = [i for i, group in enumerate(batch.group_ids.tolist()) if group >= 0]
            for sequence, sample in zip(sequences, batch.samples, strict=True):
                expected = reference(policy, sample.rollout)
                torch.testing.assert_close(found[id(sample.rollout)], expected.detach(), rtol=0, atol=1e-6)
                mask = (batch.seq_ids == sequence) & batch.train_mask
                (expected * (batch.weight * batch.advantages)[mask]).sum().backward()
    torch.testing.assert_close(gradient, policy.flat.gradient, rtol=1e-6, atol=1e-6)
    assert policy.flat.gradient.abs().max() > 1e-3


@pytest.fixture(scope="module", params=seeing.KINDS)
def policy(request: pytest.FixtureRequest) -> Policy:
    return seeing.policy_of(request.param)


@pytest.mark.parametrize("share", [True, False])
def test_fused_layers_agree_with_transformers_and_its_pixels(policy: Policy, share: bool) -> None:
    assert policy.fused is not None
    check(policy, packed(some_rollouts(), share))


@pytest.mark.parametrize("levels", ["L0", "L3"])
def test_every_level_of_saved_activations_keeps_what_is_added(levels: str) -> None:
    pass


def test_the_order_of_images_matters(policy: Policy) -> None:
    there = rollouts_of([prompt_of(0, "a", PICTURES[0], PICTURES[2])], 1)
    back = rollouts_of([prompt_of(0, "a", PICTURES[2], PICTURES[0])], 1)
    (first,), (second,) = (loss_of(policy, packed(rollouts)).values() for rollouts in (there, back))
    assert (first - second).abs().max() > 1e-3
