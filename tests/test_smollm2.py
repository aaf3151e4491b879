"""The real small model: engine against trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from sums import sums

from rlft import parity
from rlft.batch import count, pack
from rlft.config import Sampling
from rlft.data import load_prompts
from rlft.models.load import attach_lora, load_base, load_tokenizer
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine
from rlft.types import PackPlan


def test_the_trainer_agrees_with_the_engine_to_1e_4_nat_in_fp32(smollm2: Path, tmp_path: Path) -> None:
    cfg = sums(smollm2, tmp_path)
    tokenizer = load_tokenizer(cfg.model)
    policy = Policy(attach_lora(load_base(cfg, torch.device("cpu")), cfg.lora, cfg.seed))
    for name, tensor in policy.adapter().items():
        if ".lora_B." in name:
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    engine = EagerEngine(policy, tokenizer)
    engine.load_adapter(policy.adapter(), version=0)
    prompts = load_prompts(cfg.data, tokenizer, 0).prompts[:6]
    rollouts = engine.generate(prompts, Sampling(group_size=4, max_tokens=24), (0, 0))
    plan = PackPlan((True,) * len(rollouts), "token_mean", 400, 24, 1.0)
    found = parity.Mismatch()
    for batch in pack(rollouts, torch.ones(len(rollouts)), plan, count(rollouts, plan)):
        found.add(policy.score(batch), batch)
    assert found.tokens > 200 and found.mean < 1e-4 and found.values()["mismatch/outside"] == 0
