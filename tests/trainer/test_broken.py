"""Whole runs whose policy is broken end with exit code 3 and say what is at fault; none ends green."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import rlft
from rlft.algos.losses.dpo import Dpo
from rlft.algos.losses.grpo import Grpo
from rlft.algos.losses.sft import Sft
from rlft.config.data import Data, Eval, Overlong, Sampling
from rlft.config.run import Algo, Checkpoint, Config, Lora, Optim, Parity
from rlft.errors import ParityError, RlftError, TrainError
from rlft.rollout.eager import EagerEngine
from rlft.trainer import setup as session

KINDS = ("sft", "dpo", "grpo")
LOSSES = {"sft": Sft, "dpo": Dpo, "grpo": Grpo}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")

    def save(name: str, spoil: str = "", scale: float = math.nan) -> None:
        base: Any = tiny_model(seed=3).unload()
        if spoil:
            dict(base.named_parameters())[spoil].data.view(-1)[40:44] = scale
        base.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)

    save("model")
    save("nan", "model.layers.1.mlp.down_proj.weight")
    save("nan_head", "lm_head.weight")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(12)]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": f"no {i}"} for i in range(12)]
    (folder / "dpo.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "grpo.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(12)))
    return folder


def config(home: Path, out: Path, kind: str, **changes: Any) -> Config:
    cfg = Config(
        model=str(home / "model"),
        data=Data(str(home / f"{kind}.jsonl")),
        out=str(out),
        algo=Algo(kind),
        steps=8,
        prompts_per_step=2,
        sampling=Sampling(group_size=3, max_tokens=5),
        lora=Lora(rank=2, alpha=4),
        optim=Optim(lr=1e-2),
        parity=Parity(probe=False),
        checkpoint=Checkpoint(keep=9),
    )
    return replace(cfg, **changes)


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) + 0.1 * len(text) for text in completions]


def same(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def run(cfg: Config, callbacks: Any = (), reward: Any = digits) -> int:
    def here(completions: list[str], **columns: Any) -> list[float]:
        """A closure is called in this process; a worker would import this file and PyTorch with it."""
        return reward(completions, **columns)

    return rlft.train(cfg, [here] if cfg.algo.name == "grpo" else None, callbacks=callbacks).steps


def error(cfg: Config, callbacks: Any = (), reward: Any = digits) -> str:
    """The message that the run ends with; its exit code is 3."""
    with pytest.raises((TrainError, ParityError)) as found:
        run(cfg, callbacks, reward)
    assert isinstance(found.value, RlftError) and found.value.exit_code == 3
    return str(found.value)


def steps_of(cfg: Config) -> int:
    file = Path(cfg.out) / "metrics.jsonl"
    return sum("step_time" in json.loads(line) for line in file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The policy of the next run under "policy", for callbacks that reach into it."""
    held: dict[str, Any] = {}

    def load(cfg: Config, note: Any) -> Any:
        held["policy"] = load_policy(cfg, note)
        return held["policy"]

    load_policy = session.load_policy
    monkeypatch.setattr(session, "load_policy", load)
    return held


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_a_callback_set_to_nan(kind: str, home: Path, tmp_path: Path, policy: dict[str, Any]) -> None:
    def spoil(state: Any, values: Any) -> None:
        if state.step == 2:
            policy["policy"].flat.values.data[5] = math.nan

    cfg = config(home, tmp_path / "run", kind)
    assert "lora_A.weight for one" in error(cfg, [spoil]) and steps_of(cfg) <= 3
    # In the last step nothing but the save is left to see it.
    cfg = config(home, tmp_path / "last", kind, steps=2)
    assert "lora_A.weight for one" in error(cfg, [spoil])
    assert not (tmp_path / "last" / "checkpoints" / "step-000002").exists()


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_an_adapter_of_nan_that_is_continued(kind: str, home: Path, tmp_path: Path) -> None:
    model = tiny_model(seed=3, lora=Lora(rank=2, alpha=4))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(math.nan)
    model.save_pretrained(tmp_path / "adapter")
    cfg = config(home, tmp_path / "run", kind, lora=Lora(rank=2, alpha=4, resume_from=str(tmp_path / "adapter")))
    assert f'lora.resume_from = "{tmp_path / "adapter"}"' in error(cfg) and steps_of(cfg) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["nan", "nan_head"])
def test_a_base_with_a_nan_weight(
    kind: str, model: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-check sees it at the start; without it a step does, the probe, or an evaluation."""
    cfg = config(home, tmp_path / "start", kind, model=str(home / model))
    name = "lm_head.weight" if model == "nan_head" else "model.layers.1.mlp.down_proj.weight"
    fault = f"not finite: 1 of the base's weights hold values that are not finite, {name} for one"
    assert f"at the start the policy's log-probs are {fault}" in error(cfg) and steps_of(cfg) == 0
    monkeypatch.setattr(session, "check_path", lambda policy: None)
    cfg = replace(cfg, out=str(tmp_path / "run"))
    assert fault in error(cfg) and steps_of(cfg) <= 1
    if kind == "grpo":
        assert name in error(replace(cfg, out=str(tmp_path / "probed"), parity=Parity()))
        assert "engine are not finite on held-out rows" in error(
            replace(cfg, out=str(tmp_path / "eval"), eval=Eval(rows=2))
        )
    else:
        told = error(replace(cfg, out=str(tmp_path / "eval"), eval=Eval(rows=2)))
        assert "log-probs of held-out completions are not finite" in told and name in told


def test_log_probs_are_seen_where_nothing_has_an_advantage(home: Path, tmp_path: Path, policy: dict[str, Any]) -> None:
    """Equal rewards have no gradient, so only the log-probs themselves can show it."""
    assert run(config(home, tmp_path / "good", "grpo", steps=6), reward=same) == 6  # a warning, no fault

    def spoil(state: Any, values: Any) -> None:
        if state.step == 2:
            policy["policy"].base.lm_head.weight.data[7] = math.nan

    assert "lm_head.weight" in error(config(home, tmp_path / "run", "grpo"), [spoil], reward=same)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_policy_that_explodes(kind: str, steps: int, home: Path, tmp_path: Path) -> None:
    # At 1e6 the numbers of SFT stay finite.
    for lr in (1e30,) if kind == "sft" else (1e6, 1e30):
        cfg = config(home, tmp_path / f"run{lr:g}", kind, steps=steps, optim=Optim(lr=lr))
        assert "ower optim.lr" in error(cfg)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_nan(kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: skipped and counted. Always: stopped after five in a row, or by the end of a shorter run."""
    kind_of_loss, calls = LOSSES[kind], [0]
    loss = kind_of_loss.__call__

    def once(self: Any, logprobs: Any, batch: Any) -> Any:
        calls[0] += 1
        value, stats = loss(self, logprobs, batch)
        return (value * math.nan if calls[0] == 2 else value), stats

    monkeypatch.setattr(kind_of_loss, "__call__", once)
    assert run(config(home, tmp_path / "once", kind, steps=4)) == 4
    lines = [json.loads(x) for x in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped_updates", 0) > 0 for line in lines) == 1

    def always(self: Any, logprobs: Any, batch: Any) -> Any:
        value, stats = loss(self, logprobs, batch)
        return value * math.nan, stats

    monkeypatch.setattr(kind_of_loss, "__call__", always)
    assert "5 updates in a row had a non-finite gradient" in error(config(home, tmp_path / "always", kind))
    assert "3 updates in a row" in error(config(home, tmp_path / "short", kind, steps=3))
    # In float16 the loss scale may be at fault until it is 1, but a run that never made an update did not train.
    told = error(config(home, tmp_path / "half", kind, steps=3, dtype="float16"))
    assert "all 3 updates of the run had a non-finite gradient and were skipped" in told


def spoiled(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The engine's rollouts with changes, each a function of the rollout."""
    made = EagerEngine._rollout
    monkeypatch.setattr(
        EagerEngine,
        "_rollout",
        lambda self, row: replace(r := made(self, row), **{k: f(r) for k, f in changes.items()}),
    )


def test_a_policy_that_samples_nothing_to_train(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        nothing = {"completion_ids": lambda r: (), "completion_mask": lambda r: (), "sampler_logprobs": lambda r: ()}
        spoiled(patch, **nothing)
        told = error(config(home, tmp_path / "empty", "grpo"))
        assert "no token could be trained in 5 steps in a row: of the 6 completions of the last one 6 are empty" in told
        assert "in 2 steps in a row" in error(config(home, tmp_path / "short", "grpo", steps=2))
        assert "completion of the engine is empty" in error(config(home, tmp_path / "e", "grpo", parity=Parity()))
    with monkeypatch.context() as patch:
        spoiled(patch, completion_mask=lambda r: (False,) * len(r.completion_ids))
        assert "6 have no token that the policy chose" in error(config(home, tmp_path / "masked", "grpo"))
    with monkeypatch.context() as patch:
        spoiled(patch, sampler_logprobs=lambda r: (math.nan,) * len(r.completion_ids))
        cfg = config(home, tmp_path / "nan", "grpo")
        assert "of the engine's log-probs are not finite: scored again they are finite" in error(cfg)
        assert steps_of(cfg) == 1
    cut = config(
        home,
        tmp_path / "cut",
        "grpo",
        overlong=Overlong(mask=True),
        sampling=Sampling(3, max_tokens=1),
        optim=Optim(lr=1e-2, max_skipped=2),
    )
    assert "were cut at sampling.max_tokens (left out with overlong.mask)" in error(cut)


def test_one_sequence_in_twelve_stops_a_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8% of the sequences are 2 nat off; the mean over tokens is below the limit."""
    spoiled(
        monkeypatch,
        sampler_logprobs=lambda r: tuple(
            x + (2.0 if r.prompt.index == 3 and r.sample_index == 1 else 0.0) for x in r.sampler_logprobs
        ),
    )
    cfg = config(home, tmp_path / "run", "grpo", prompts_per_step=12, parity=Parity(probe=False, ceiling=0.2))
    told = error(cfg)
    assert "about 1 of 36 sequences, most about sample 1 of row 3 of the data" in told


def test_the_last_update_is_looked_at(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    assert run(config(home, tmp_path / "run", "sft", steps=1)) == 1
    assert torch.equal(before, torch.get_rng_state())
