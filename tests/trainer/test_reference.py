"""Reference log-probs are computed once per recorded row, and a resumed run has the same ones bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import records
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_policy, tiny_tokenizer

from rlft.config.data import Data, Sampling
from rlft.config.run import Algo, Checkpoint, Config, Lora, Optim, Packing
from rlft.models.policy import Policy
from rlft.trainer import setup as session
from rlft.trainer.loop import train
from rlft.trainer.reference import Reference
from rlft.types import Batch, PackPlan, Prompt, Rollout

ROWS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_model(seed=3).unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}", "chosen": f"it is {i * i * i}", "rejected": f"no {i}"} for i in range(ROWS)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def dpo(home: Path, out: Path, steps: int) -> Config:
    """Three pairs a step in micro-batches of one or two pairs, other ones in each epoch."""
    return Config(
        model=str(home / "model"),
        data=Data(str(home / "pairs.jsonl")),
        out=str(out),
        algo=Algo("dpo"),
        steps=steps,
        prompts_per_step=3,
        lora=Lora(rank=4, alpha=8),
        optim=Optim(lr=1e-2),
        packing=Packing(tokens_per_micro_batch=110),
        sampling=Sampling(max_tokens=16),
        checkpoint=Checkpoint(keep=10),
    )


def logged(out: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Pairs of each reference forward."""
    seen: list[int] = []
    score = Policy.score

    def counted(self: Policy, batch: Batch, weights: Any = "policy") -> torch.Tensor:
        if weights == "reference":
            seen.append(len(batch.group_weight))
        return score(self, batch, weights)

    monkeypatch.setattr(Policy, "score", counted)
    return seen


def test_a_second_epoch_of_dpo_runs_no_reference_forward(
    home: Path, tmp_path: Path, forwards: list[int], monkeypatch
) -> None:
    train(dpo(home, tmp_path / "kept", 4))
    assert sum(forwards) == ROWS and len(forwards) == sum(logged(tmp_path / "kept", "batch/micro_batches")[:2])
    forwards.clear()
    monkeypatch.setattr(session, "Reference", lambda policy, keep: Reference(policy, keep=False))
    train(dpo(home, tmp_path / "plain", 4))
    assert sum(forwards) == 2 * ROWS
    ours, plain = (logged(tmp_path / run, "loss") for run in ("kept", "plain"))
    assert ours[0] == pytest.approx(0.69315, abs=1e-5) and ours[-1] < 0.6
    assert ours == pytest.approx(plain, abs=1e-5)


def test_a_run_that_sees_no_row_twice_keeps_nothing(home: Path, tmp_path: Path) -> None:
    result = train(dpo(home, tmp_path / "run", 2))
    assert not [n for n in load_file(result.adapter / "trainer.safetensors") if n.startswith("reference.")]


@pytest.mark.parametrize("first", [1, 3])
def test_resumed_in_the_first_or_the_second_epoch_a_run_equals_a_whole_one(
    home: Path, tmp_path: Path, first: int, forwards: list[int]
) -> None:
    def kill(state, values) -> None:
        if state.step == first + 1:
            raise KeyboardInterrupt

    whole = train(dpo(home, tmp_path / "whole", 4))
    cfg = replace(dpo(home, tmp_path / "parts", 4), checkpoint=Checkpoint(every=first, keep=10))
    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[kill])
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step-{first + 1:06d}")  # which a kill would not have left
    forwards.clear()
    parts = train(cfg, resume=True)
    assert sum(forwards) == max(0, ROWS - 3 * first)
    one, other = (load_file(r.adapter / "trainer.safetensors") for r in (whole, parts))
    assert one.keys() == other.keys() and len(one["reference.keys"]) == 2 * ROWS
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert logged(tmp_path / "whole", "loss") == logged(tmp_path / "parts", "loss")


def pair(index: int, lengths: tuple[int, int], recorded: bool = True) -> list[Rollout]:
    prompt = Prompt((10 + index, 11, 12), {}, index)
    ids = [tuple(range(20 + index, 20 + index + n)) for n in lengths]
    return [
        Rollout(prompt, ids[s], (True,) * n, None if recorded else (-1.0,) * n, "", "stop", s, 0, 0, 1.0 - 2 * s)
        for s, n in enumerate(lengths)
    ]


def batches(rollouts: list[Rollout], budget: int, temperature: float = 1.0, share: bool = True) -> list[Batch]:
    plan = PackPlan("sequence_sum", budget, 9, temperature, True, share)
    return records.packed(rollouts, plan, torch.tensor([r.recorded_reward for r in rollouts]))


def test_the_values_are_the_references_in_every_packing_and_stay_when_the_adapter_moves() -> None:
    policy = tiny_policy(torch.float64, trained=0.3)
    policy.flat.start.copy_(policy.adapter_params.data)
    rollouts = [*pair(0, (4, 2)), *pair(1, (1, 5)), *pair(2, (3, 0))]
    reference = Reference(policy, keep=True)
    for budget, share, moved in ((1000, True, 0.0), (9, True, 0.5), (16, False, 1.0)):
        policy.adapter_params.data += moved
        for batch in batches(rollouts, budget, share=share):
            got = reference.fill(batch).ref_logprobs
            want = policy.score(batch, weights="reference")
            assert got is not None and got.dtype == want.dtype and (got - want).abs().max() < 1e-6
            assert not got[~batch.train_mask].any() and got[batch.train_mask].all()


def test_edited_rows_are_computed_anew_and_sampled_ones_always(forwards: list[int]) -> None:
    policy = tiny_policy()
    reference = Reference(policy, keep=True)

    def run(rollouts: list[Rollout], temperature: float = 1.0, share: bool = True) -> int:
        forwards.clear()
        for batch in batches(rollouts, 1000, temperature, share):
            reference.fill(batch)
        return len(forwards)

    rows = pair(0, (4, 2))
    assert (run(rows), run(rows), run(rows, share=False)) == (1, 0, 0)
    assert run(rows, 0.7) == 0  # recorded completions are at temperature 1, whatever the sampling's is
    edited = [replace(r, prompt=replace(r.prompt, ids=(9, 9, 9))) for r in rows]
    assert run(edited) == 1
    sampled = pair(0, (4, 2), recorded=False)
    assert (run(sampled), run(sampled)) == (1, 1)
