"""LLM.int8's outlier columns are of a whole micro-batch: what that does to a row, and to a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import records
import torch
from checkpoints import base_of
from test_reference import dpo, logged
from tiny import tiny_model, tiny_tokenizer

from rlft.config.run import Lora
from rlft.models.load import attach_lora
from rlft.models.policy import Policy
from rlft.trainer.loop import train
from rlft.types import PackPlan, Prompt, Rollout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model whose layers see values above LLM.int8's threshold of 6 in some rows, and pairs."""
    folder = tmp_path_factory.mktemp("home")
    model = tiny_model(seed=3).unload()
    for name, weight in model.named_parameters():
        if name.endswith("layernorm.weight"):
            weight.data *= 2.5
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}", "chosen": f"it is {i * i * i}", "rejected": f"no {i}"} for i in range(6)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def packed(policy: Policy, rollouts: list[Rollout]) -> torch.Tensor:
    """Log-probs of the first of them, among the others."""
    plan = PackPlan("token_mean", 9999, 64, 1.0)
    (batch,) = records.packed(rollouts, plan)
    first = [s for s in range(len(batch.prefix)) if batch.group_ids[s] >= 0][records.rows(batch, rollouts).index(0)]
    return policy.score(batch)[batch.train_mask & (batch.seq_ids == first)]


@pytest.mark.parametrize(("kept", "mixes"), [("int8", True), ("none", False)])
def test_a_policy_knows_whether_its_rows_depend_on_each_other(kept: str, mixes: bool, home: Path) -> None:
    policy = Policy(attach_lora(base_of(home / "model", kept), Lora(rank=4, alpha=8), 0))
    assert policy.mixes_rows == mixes
    ids = [(tuple(range(10 + i, 20 + i)), (40 + i, 50, 60 - i)) for i in range(12)]
    rollouts = [Rollout(Prompt(p, {}, i), c, (True,) * 3, None, "", "stop", 0, 0, 0) for i, (p, c) in enumerate(ids)]
    off = (packed(policy, rollouts[:1]) - packed(policy, rollouts)).abs().max()
    assert off > 1e-4 if mixes else off < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_policy_that_does_not_move_has_no_margin_in_any_epoch(home: Path, tmp_path: Path, capsys) -> None:
    """DPO with lr 0 over three epochs of another packing each: policy and reference are of the same micro-batch."""
    cfg = dpo(home, tmp_path / "run", steps=6)
    values = {"quantization": "int8", "optim": type(cfg.optim)(lr=0.0)}
    train(type(cfg)(**{**vars(cfg), **values}))
    assert logged(tmp_path / "run", "loss") == pytest.approx([math.log(2)] * 6, abs=1e-7)
    assert logged(tmp_path / "run", "rewards/margins") == [0.0] * 6
    assert "int8: LLM.int8 finds its outlier columns over all rows of a micro-batch" in capsys.readouterr().out
