"""Old and now are the same computation on a GPU: a policy that does not move has ratios of exactly 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fused_gpu import batch_of, model_of, quiet
from test_graphs import groups_of
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from rlft.config.data import Data, Reward, Sampling
from rlft.config.run import Algo, Config, Engine, Lora, Optim, Packing, Parity
from rlft.models.policy import Policy
from rlft.trainer.loop import train
from rlft.types import Batch

pytestmark = [pytest.mark.gpu, *quiet]
GIB = 2**30


def now(policy: Policy, batch: Batch) -> Tensor:
    """Log-probs of a pass that trains, with its backward."""
    logprobs, _ = policy.logprobs(batch)
    (logprobs * batch.weight.cuda()).sum().backward()
    return logprobs.detach()


@pytest.mark.parametrize("shape", ["alone", "shared short", "shared long"])
@pytest.mark.parametrize(("name", "nf4"), [("qwen3", False), ("qwen3", True), ("gemma3", False)])
def test_a_planned_batch_has_the_same_log_probs_in_every_pass(name: str, shape: str, nf4: bool, tmp_path: Any) -> None:
    """Launched, captured, replayed; with gradient and without; after graphs, buffers and memory went."""
    g = torch.Generator().manual_seed(5)
    policy = Policy(model_of(name, torch.bfloat16, nf4=nf4, tmp=tmp_path))
    fused = policy.fused
    assert fused is not None and fused.graphs is not None
    layout = {
        "alone": [(3, [47]), (3, [61])],
        "shared short": [(40, [90, 83, 76]), (30, [80, 73, 66])],
        "shared long": [(300, [20, 9, 31]), (200, [80, 1])],
    }[shape]
    batch = policy.planned(groups_of(layout, g, 1000))
    assert batch.plan.padded
    old = policy.score(batch)
    for _ in range(2):
        assert torch.equal(old, now(policy, batch))
    assert len(fused.graphs._graphs) == 1
    assert torch.equal(old, policy.score(batch)), "the forward graph alone"
    pending, _ = policy.logprobs(batch)
    assert torch.equal(old, policy.score(batch)), "launched, since the graph waits for a backward"
    (pending * batch.weight.cuda()).sum().backward()
    # The loop's next batch is planned with little memory, this one keeps its plan.
    fused.budget = 0.1 * GIB
    assert torch.equal(old, policy.score(batch)) and torch.equal(old, now(policy, batch))
    fused.budget = None
    fused.graphs.clear()
    fused.store.release()
    assert torch.equal(old, now(policy, batch))
    fused.graphs = None
    assert torch.equal(old, now(policy, batch)) and torch.equal(old, policy.score(batch))


@pytest.mark.parametrize("shared", [False, True])
def test_a_pass_that_is_planned_tightly_keeps_its_bits_when_memory_comes_back(shared: bool) -> None:
    """Other tiles, stores and levels between two passes of one batch."""
    big = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 6,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    }
    policy = Policy(model_of("qwen3", torch.bfloat16, **big))
    fused = policy.fused
    assert fused is not None
    g, plans = torch.Generator().manual_seed(1), set()
    batch = groups_of([(500, [900] * 4)] * 4, g, 1000) if shared else batch_of([9000, 7000], g)
    for budget, later in ((16.0, 0.9), (4.0, 16.0), (1.2, 16.0), (0.9, 4.0)):
        fused.budget = budget * GIB
        here = policy.planned(batch)
        plans.add((here.plan.tile, here.plan.store, here.plan.levels))
        old = policy.score(here)
        fused.budget = later * GIB
        assert torch.equal(old, now(policy, here)), (budget, later, str(here.plan))
        policy.score(batch)  # planned with other memory
        assert torch.equal(old, policy.score(here)), (budget, later, str(here.plan))
    assert len(plans) > 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_model(seed=3).unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}" * (1 + i % 5)} for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(
        "def digits(completions, **kwargs):\n"
        "    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]\n"
    )
    return folder


@pytest.mark.parametrize("budget", [60, 4096])
@pytest.mark.parametrize("algo", ["gspo", "grpo"])
def test_a_run_that_does_not_move_clips_nothing(algo: str, budget: int, home: Path, tmp_path: Path) -> None:
    """Any ratio but 1 is clipped: several mini-batches and passes, launched and captured, and after a restart."""
    cfg = Config(
        model=str(home / "model"),
        data=Data(str(home / "prompts.jsonl")),
        out=str(tmp_path / "run"),
        dtype="bfloat16",
        rewards=(Reward(f"{home}/rewards.py:digits"),),
        steps=3,
        prompts_per_step=8,
        device="cuda",
        quantization="none",
        sampling=Sampling(group_size=4, max_tokens=12),
        lora=Lora(rank=4, alpha=8),
        optim=Optim(lr=0.0, minibatches=2, passes=2),
        algo=Algo(algo, {"clip_low": 0.0, "clip_high": 0.0}),
        parity=Parity(probe=False),
        packing=Packing(tokens_per_micro_batch=budget),
        engine=Engine("eager"),
    )
    train(cfg)
    train(Config(**{**vars(cfg), "steps": 5}), resume=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "grad_norm" in row]
    assert len(steps) == 5
    for row in steps:
        assert row["clip_ratio/region_mean"] == 0 and row["grad_norm"] > 0
