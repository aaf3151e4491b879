"""Recorded completions are trained and measured at temperature 1, whatever [sampling] says; sampled ones at its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import records
import torch
from tiny import prompts, tiny_model, tiny_policy, tiny_tokenizer

from rlft.batch import group_ids
from rlft.config.data import Data, Eval, Sampling
from rlft.config.run import Algo, Config, Lora, Optim
from rlft.rollout.replay import ReplayEngine
from rlft.trainer.loop import train
from rlft.trainer.reopen import evaluate_run
from rlft.types import PackPlan

ROWS = 10
SAID = "sampling.temperature = 0.6: recorded completions are trained at temperature 1"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_model(seed=3).unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = {
        "sft": [{"prompt": f"{i} plus {i}", "completion": f"is {i + i}"} for i in range(ROWS)],
        "pairs": [{"prompt": f"say {i}", "chosen": f"it is {i * i}", "rejected": f"no {i}"} for i in range(ROWS)],
        "labels": [{"prompt": f"say {i}", "completion": f"{i * i}", "label": i % 2 == 0} for i in range(ROWS)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(home: Path, out: Path, algo: str, data: str, temperature: float) -> Config:
    return Config(
        model=str(home / "model"),
        data=Data(f"{home}/{data}.jsonl"),
        out=str(out),
        steps=2,
        prompts_per_step=4,
        algo=Algo(algo),
        lora=Lora(rank=4, alpha=8),
        optim=Optim(lr=1e-2),
        eval=Eval(rows=4),
        device="cpu",
        sampling=Sampling(temperature=temperature),
    )


RUNS = {"sft": "sft", "dpo": "pairs", "orpo": "pairs", "kto": "labels"}


@pytest.mark.parametrize("algo", RUNS)
def test_the_samplers_temperature_changes_nothing_that_is_trained_or_measured(
    algo: str, home: Path, tmp_path: Path, capsys
) -> None:
    results, said = [], []
    for temperature in (1.0, 0.6):
        out = tmp_path / f"run{temperature}"
        result = train(run(home, out, algo, RUNS[algo], temperature))
        said.append(capsys.readouterr().out)
        logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        kinds = ("loss", "grad", "rewards", "logps", "entropy", "eval")
        timeless = [{k: v for k, v in line.items() if k.startswith(kinds)} for line in logged]
        results.append((timeless, result.before, result.after, evaluate_run(out)))
    assert results[0] == results[1] and results[0][1]["eval/loss"] > 0.01
    assert SAID not in said[0] and said[1].count(SAID) == 1


def test_packed_by_anyone_a_recorded_row_is_at_1_and_a_sampled_one_at_the_plans() -> None:
    policy, engine = tiny_policy(torch.float64, trained=0.3), ReplayEngine()
    engine.load_adapter(policy.adapter(), 0)
    recorded = engine.generate(prompts(3, recorded=True), Sampling(), (0, 0))
    sampled = [replace(r, sampler_logprobs=(-1.0,) * len(r.completion_ids)) for r in recorded]
    plan = PackPlan("token_mean", 1000, 16, 0.6)
    packed = [records.packed(r, plan) for r in (recorded, sampled)]
    assert [batch.temperature for batches in packed for batch in batches] == [1.0, 0.6]
    assert (group_ids(recorded) == group_ids(sampled)).all()
    for batches, temperature in zip(packed, (1.0, 0.6), strict=True):
        (batch,), row = batches, recorded[1]
        ids = torch.tensor([row.prompt.ids + row.completion_ids])
        log_p = (policy.model(ids).logits[0].detach() / temperature).log_softmax(-1)
        first = len(row.prompt.ids)
        want = [float(log_p[t - 1, ids[0, t]]) for t in range(first, ids.shape[1])]
        own = (batch.seq_ids == records.rows(batch, recorded).index(1)) & batch.train_mask
        assert policy.score(batch)[own].tolist() == pytest.approx(want, abs=1e-6)
