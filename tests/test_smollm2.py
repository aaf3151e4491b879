"""The real small model: engine against trainer, the loop written out against the library's, and learning."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlft import parity
from rlft.batch import count, pack
from rlft.config import Config, Sampling
from rlft.config_file import load, to_toml
from rlft.data import load_prompts
from rlft.models.load import attach_lora, load_base, load_tokenizer
from rlft.models.policy import Policy
from rlft.rollout.eager import EagerEngine
from rlft.runs import Run
from rlft.train import train
from rlft.types import PackPlan

ROOT = Path(__file__).parents[1]


def sums(smollm2: Path, out: Path, **changes) -> Config:
    """examples/sums.toml on the unpacked model, without evaluation."""
    cfg = load(ROOT / "examples" / "sums.toml")
    data = replace(cfg.data, template=f"{ROOT}/{cfg.data.template}")
    return replace(cfg, model=str(smollm2), out=str(out), data=data, eval=replace(cfg.eval, rows=0), **changes)


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


def test_the_loop_written_out_has_the_same_first_three_losses(smollm2: Path, tmp_path: Path) -> None:
    # Both draw the same uniform numbers; a token changes only where rounding moves a probability past one of them,
    # about once in 1e5 tokens. Three steps are 1,400.
    cfg = sums(smollm2, tmp_path / "run", steps=3, prompts_per_step=4, seed=1)
    cfg = replace(cfg, parity=replace(cfg.parity, probe=False))
    (tmp_path / "config.toml").write_text(to_toml(cfg))
    train(cfg)
    ours = [line["loss"] for line in Run.resume(tmp_path / "run").metrics()]
    script = ["examples/grpo_from_scratch.py", "--config", str(tmp_path / "config.toml"), "--steps", "3"]
    done = subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert len(plain) == 3 and any(abs(loss) > 1e-3 for loss in plain)
    assert ours == pytest.approx(plain, abs=1e-4)


def test_twelve_steps_on_sums_raise_the_reward(smollm2: Path, tmp_path: Path) -> None:
    """The learning test: reward of the last four steps at least 0.1 above the first four's (0.08)."""
    train(sums(smollm2, tmp_path / "run", steps=12))
    rewards = [line["reward"] for line in Run.resume(tmp_path / "run").metrics()]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1, rewards
