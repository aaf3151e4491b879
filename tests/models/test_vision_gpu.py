"""Images on a GPU: the fused layers, with and without a CUDA graph, against the same model on a CPU."""

from __future__ import annotations

import pytest
import seeing
import torch
from test_vision import loss_of, packed, some_rollouts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("kind", "vision"), [*((kind, False) for kind in seeing.FUSED), ("qwen3_vl", True), ("gemma3", True)]
)
def test_a_gpu_gives_what_a_cpu_gives(kind: str, vision: bool) -> None:
    found = []
    for device in ("cpu", "cuda"):
        policy = seeing.policy_of(kind, torch.float32, device=device, vision=vision)
        assert policy.fused is not None
        rollouts = some_rollouts(kind)
        for _ in range(3):  # a graph is captured after the first passes
            policy.flat.zero_grad()
            logprobs = loss_of(policy, packed(rollouts))
        found.append(([logprobs[id(rollout)].cpu() for rollout in rollouts], policy.flat.gradient.cpu()))
    for one, other in zip(*(logprobs for logprobs, _ in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)
    expected, gradient = (gradient for _, gradient in found)
    assert (gradient - expected).norm() < 1e-2 * expected.norm()
