"""The parts for a loop of one's own: each is what training runs on, and together they learn."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import rlft
from rlft.errors import ConfigError, RewardError

PAGE = Path(__file__).parents[1] / "docs" / "parts.md"
SAMPLING = rlft.Sampling(group_size=2, max_tokens=4)
HANGS = """
import time
def digits(completions, **columns):
    if any("hang" in text for text in completions):
        time.sleep(60)
    return [float(len(text)) for text in completions]
"""


def noise(policy: rlft.Policy) -> None:
    """Another adapter than before."""
    with torch.no_grad():
        policy.adapter_params.add_(torch.randn(policy.adapter_params.shape) * 0.3)


def test_the_loop_of_the_page_learns(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_tiny(tmp_path / "model")
    reward, loop = re.findall(r"```python title=\"[^\"]+\"\n(.*?)```", PAGE.read_text(), re.S)
    Path("my_rewards.py").write_text(reward)
    assert len(loop.splitlines()) <= 40
    names: dict[str, Any] = {}
    exec(loop.replace("Qwen/Qwen3-0.6B", str(tmp_path / "model")), names)
    assert sum(names["curve"][-3:]) > 2 * sum(names["curve"][:3])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_update_hands_the_adapter_over_and_nothing_else_does() -> None:
    model = tiny.tiny_model()
    before = list(model.parameters())
    with rlft.sampler(model, tiny.tiny_tokenizer(), SAMPLING) as sampler:
        first = sampler.generate(["ab", "cd"])
        assert [r.sample_index for r in first] == [0, 1, 0, 1] and {r.policy_version for r in first} == {0}
        held = {name: each.clone() for name, each in sampler.engine._slots.items()}  # type: ignore[attr-defined]
        noise(sampler.policy)
        assert all(torch.equal(held[n], each) for n, each in sampler.engine._slots.items())  # type: ignore[attr-defined]
        sampler.update()
        assert not all(torch.equal(held[n], each) for n, each in sampler.engine._slots.items())  # type: ignore
        assert {r.policy_version for r in sampler.generate(["ab"])} == {1}
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    with rlft.sampler(model, tiny.tiny_tokenizer(), SAMPLING) as second:
        assert second.policy is sampler.policy  # an optimiser may be over its parameters


def test_zero_grad_of_an_optimiser_removes_nothing_that_training_needs() -> None:
    model = tiny.tiny_model()
    with rlft.sampler(model, tiny.tiny_tokenizer(), SAMPLING) as sampler:
        policy, rollouts = sampler.policy, sampler.generate(["ab"])
    plan = rlft.PackPlan("token_mean", 4096, 4, 1.0)
    (batch,) = rlft.pack_rollouts(rollouts, [1.0, -1.0], plan)
    loss = rlft.algorithm("grpo").loss

    def gradient() -> torch.Tensor:
        loss(policy.logprobs(batch)[0], batch)[0].backward()
        return policy.flat.gradient.clone()

    first = gradient()
    assert first.any()
    torch.optim.SGD([policy.adapter_params], lr=0.0).zero_grad()
    assert torch.equal(gradient(), first)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).zero_grad()
    policy.flat.zero_grad()
    assert torch.equal(gradient(), first)


def test_an_invalid_reward_leaves_its_rollout_out() -> None:
    with rlft.sampler(tiny.tiny_model(), tiny.tiny_tokenizer(), SAMPLING) as sampler:
        rollouts = sampler.generate(["ab"])
    (batch,) = rlft.pack_rollouts(rollouts, [1.0, float("nan")], rlft.PackPlan("token_mean", 4096, 4, 1.0))
    assert [sample.rollout for sample in batch.samples] == rollouts[:1]


def test_a_reward_that_hangs_is_stopped_and_costs_one_completion(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(HANGS)
    with rlft.scorer(f"{tmp_path}/slow.py:digits", timeout=1) as scorer:
        assert scorer(["ab", "c"]).tolist() == [2.0, 1.0]
        start = time.monotonic()
        rewards = scorer(["ab", "hang", "abc"])
        assert time.monotonic() - start < 40
    assert rewards.isnan().tolist() == [False, True, False]
    assert scorer.breakdown is not None and scorer.breakdown.faults()


def test_texts_are_scored_with_columns_and_what_they_lack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.py").write_text("def ids(completions, completion_ids):\n    return [0.0] * len(completions)\n")
    with rlft.scorer("number") as scorer:
        assert scorer(["It is 7.", "no"], answer=["7", "7"]).tolist() == [1.0, 0.0]
        with pytest.raises(RewardError, match="answer has 1 values for 2 completions"):
            scorer(["7", "8"], answer=["7"])
    with rlft.scorer(f"{tmp_path}/ids.py:ids") as scorer, pytest.raises(RewardError, match="takes completion_ids"):
        scorer(["7"])
    with pytest.warns(UserWarning, match="can only be called in this process"):
        rlft.scorer(lambda completions, **_: [0.0] * len(completions)).close()


def test_what_cannot_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no adapter; give a PEFT model"):
        rlft.sampler(tiny.tiny_model().unload(), tiny.tiny_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'engine\.name = "replay": it samples nothing'):
        rlft.sampler(tiny.tiny_model(), tiny.tiny_tokenizer(), engine=rlft.Engine("replay"))


@pytest.mark.filterwarnings("ignore")
def test_vllm_samples_from_the_model_that_is_trained(smollm2_cut: Path, vllm_visible: None) -> None:
    model, tokenizer = rlft.load(str(smollm2_cut), lora=rlft.Lora(rank=4))
    with rlft.sampler(model, tokenizer, SAMPLING, rlft.Engine("vllm", max_seqs=4, max_model_len=64)) as sampler:
        assert type(sampler.engine).__name__ == "VllmEngine"
        noise_free = sampler.generate(["What is 3 + 4?"])
        with torch.no_grad():
            sampler.policy.adapter_params.add_(0.01)
        sampler.update()
        rollouts = sampler.generate(["What is 3 + 4?"])
        assert {r.policy_version for r in noise_free} == {0} and {r.policy_version for r in rollouts} == {1}
        (batch,) = rlft.pack_rollouts(rollouts, [1.0, -1.0], rlft.PackPlan("token_mean", 4096, 4, 1.0))
        assert batch.sampler_logprobs is not None
        difference = (sampler.policy.score(batch) - batch.sampler_logprobs)[batch.train_mask]
        assert float(difference.abs().max()) < 1e-3
