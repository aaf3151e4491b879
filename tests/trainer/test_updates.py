"""Several optimiser updates per rollout batch, dynamic sampling, overlong completions and presets, through the loop."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small_run import small_run
from tiny import tiny_model, tiny_tokenizer

import rlft
from rlft.cli.main import parse
from rlft.config.data import Data, DynamicSampling, Overlong, Reward, Sampling
from rlft.config.files import presets, to_toml
from rlft.config.run import Algo, Checkpoint, Config, Optim, Packing, Parity
from rlft.errors import ConfigError, ParityError, RewardError, TrainError
from rlft.models.policy import Policy
from rlft.rewards.builtin.length import length
from rlft.rollout.eager import EagerEngine
from rlft.trainer import setup as session
from rlft.trainer.loop import train
from rlft.trainer.validate import problems

TIMES = ("time/", "perf/", "step_time")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_model(seed=3).unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}", "answer": str(i % 10)} for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(
        "def digits(completions, **kwargs):\n"
        "    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]\n"
        "def even(completions, prompts, **kwargs):\n"
        "    return [float(c > 'M') if int(p.split()[-1]) % 2 == 0 else 1.0 for p, c in zip(prompts, completions)]\n"
    )
    return folder


def config(home: Path, out: Path, **changes: Any) -> Config:
    own: dict[str, Any] = {
        "prompts_per_step": 4,
        "sampling": Sampling(group_size=4, max_tokens=6),
        "parity": Parity(probe=False),
        "checkpoint": Checkpoint(keep=10),
        "packing": Packing(tokens_per_micro_batch=60),
    }
    return small_run(home, out, **(own | changes))


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def adapter(out: Path, step: int) -> torch.Tensor:
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "trainer.safetensors")["adapter"]


# ---- several updates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_each_minibatch_and_pass_is_an_update_and_clipping_acts_only_after_the_first(
    name: str, home: Path, tmp_path: Path
) -> None:
    """With lr 0 the policy never moves: every ratio is exactly 1, bit for bit, in every mini-batch and pass."""
    optim = Optim(lr=0.0, minibatches=2, passes=2)
    algo = Algo(name, {"clip_low": 0.0, "clip_high": 0.0})  # any ratio but 1 would count as clipped
    train(config(home, tmp_path / "still", optim=optim, algo=algo, steps=1))
    still = metrics(tmp_path / "still")[0]
    assert still["clip_ratio/region_mean"] == 0 and still["grad_norm"] > 0
    train(config(home, tmp_path / "moving", optim=replace(optim, lr=1e-2), algo=algo, steps=2))
    moving = metrics(tmp_path / "moving")
    assert moving[0]["clip_ratio/region_mean"] > 0
    state = json.loads((tmp_path / "moving" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["state"]["updates"] == 8 and state["state"]["step"] == 2


def test_minibatches_of_one_pass_equal_two_steps_of_half_the_prompts(home: Path, tmp_path: Path) -> None:
    """The first update of a step with two mini-batches is the step of the first half alone; the second one starts from
    there, with its ratio against the policy that sampled. Compared through SFT, which has no ratio."""
    rows = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(24)]
    (home / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sft = functools.partial(config, home, data=Data(str(home / "sft.jsonl")), rewards=(), algo=Algo("sft"))
    train(sft(tmp_path / "a", prompts_per_step=4, steps=1, optim=Optim(lr=1e-2, minibatches=2, schedule="linear")))
    train(sft(tmp_path / "b", prompts_per_step=2, steps=2, optim=Optim(lr=1e-2, schedule="linear")))
    assert torch.equal(adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2))
    halves = [m["loss"] for m in metrics(tmp_path / "b")]
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(sum(halves) / 2)


@pytest.mark.parametrize("correction", ["auto", "bypass"])
def test_one_step_and_one_more_equal_two_with_updates_and_refill(correction: str, home: Path, tmp_path: Path) -> None:
    make = functools.partial(
        config,
        home,
        algo=Algo("grpo", {"correction": correction, "kl_coef": 0.1}),
        optim=Optim(lr=1e-2, minibatches=2, passes=2),
        rewards=(Reward(f"{home}/rewards.py:even"),),
        dynamic_sampling=DynamicSampling(rounds=3),
    )
    train(make(tmp_path / "two", steps=2))
    train(make(tmp_path / "one", steps=1))
    train(make(tmp_path / "one", steps=2), resume=True)
    assert torch.equal(adapter(tmp_path / "two", 2), adapter(tmp_path / "one", 2))
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert metrics(tmp_path / "two")[0]["dynamic_sampling/rounds"] > 0


def count_scores(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    score = Policy.score

    def counted(self, batch, weights="policy"):
        seen.append(weights)
        return score(self, batch, weights)

    monkeypatch.setattr(Policy, "score", counted)
    return seen


def test_old_log_probs_are_computed_once_for_decoupled_and_never_for_bypass_or_one_update(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "check_path", lambda policy: None)
    seen = count_scores(monkeypatch)
    many = Optim(lr=1e-2, minibatches=2, passes=3)
    cases = {"decoupled": many, "bypass": many, "single": Optim(lr=1e-2)}
    for correction, optim in cases.items():
        seen.clear()
        algo = Algo("grpo", {"correction": correction})
        train(
            config(
                home,
                tmp_path / correction,
                optim=optim,
                algo=algo,
                steps=1,
                packing=Packing(tokens_per_micro_batch=500),
            )
        )
        run = metrics(tmp_path / correction)[0]["batch/micro_batches"]
        assert run >= optim.minibatches
        assert seen == ["policy"] * int(run if correction == "decoupled" else 0), correction


@pytest.mark.parametrize("correction", ["decoupled", "bypass"])
def test_the_gate_comes_before_the_first_of_several_updates(
    correction: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = EagerEngine._draw
    cold = lambda self, logits, rows, sampling: draw(self, logits, rows, replace(sampling, temperature=0.6))  # noqa: E731
    monkeypatch.setattr(EagerEngine, "_draw", cold)
    cfg = config(home, tmp_path / "run", algo=Algo("grpo", {"correction": correction}), optim=Optim(minibatches=4))
    with pytest.raises(ParityError, match=r"Temperature fits the numbers: at 0.6 .*No update was made"):
        train(cfg)
    assert metrics(tmp_path / "run") == []


def test_more_minibatches_than_prompts_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.minibatches = 5 and prompts_per_step = 4: .*lower the first"):
        config(home, tmp_path, optim=Optim(minibatches=5))


# ---- dynamic sampling and overlong completions -------------------------------------------------------------------


def test_a_refilled_step_trains_on_varied_groups_and_keeps_every_completion(home: Path, tmp_path: Path) -> None:
    """Odd prompts give every completion the same reward, so their groups are dropped and others drawn."""
    cfg = config(
        home, tmp_path / "run", rewards=(Reward(f"{home}/rewards.py:even"),), dynamic_sampling=DynamicSampling(rounds=4)
    )
    train(cfg)
    for logged in metrics(tmp_path / "run"):
        assert (
            logged["dynamic_sampling/kept"] + logged["dynamic_sampling/short"] == 4
            and logged["dynamic_sampling/drawn"] > 4
        )
        assert 0 < logged["frac_reward_zero_std"] < 1  # before filtering
        rows = pq.ParquetFile(tmp_path / "run" / "rollouts" / f"step-{logged['step']:06d}.parquet").read().to_pylist()
        assert len(rows) == 4 * logged["dynamic_sampling/drawn"]
        trained = [row for row in rows if row["advantage"] is not None]
        assert len(trained) == 4 * logged["dynamic_sampling/kept"]
        assert all(int(row["prompt"].split()[-1]) % 2 == 0 for row in trained)
        texts = {}
        for row in rows:
            texts.setdefault(row["prompt"], []).append(row["completion"])
        assert all(len(set(group)) > 1 for group in texts.values()), "no two rollouts share a random stream"
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").read_text())["state"]
    assert state["consumed"] == sum(m["dynamic_sampling/drawn"] for m in metrics(tmp_path / "run"))


def test_only_equal_groups_end_the_run_with_what_to_do(home: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"every one of 12 groups has equal rewards after dynamic_sampling.rounds = 2"):
        train(
            config(home, tmp_path / "run", dynamic_sampling=DynamicSampling(rounds=2)),
            rewards=[lambda completions, **k: [1.0] * 16],
        )


def test_a_broken_reward_is_not_drawn_for_again_and_again(home: Path, tmp_path: Path) -> None:
    def broken(completions, trainer_state, **kwargs) -> list[float]:
        if trainer_state.global_step:
            raise RuntimeError("down")
        return [float(i) for i in range(len(completions))]

    with pytest.raises(RewardError, match="every reward of this step is invalid"):
        train(config(home, tmp_path / "run", dynamic_sampling=DynamicSampling(rounds=9)), rewards=[broken])


def test_the_penalty_is_trls_and_is_added_to_the_reward_but_does_not_decide_what_is_kept(
    home: Path, tmp_path: Path
) -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = [[0] * n for n in range(0, 26)]
    want = get_soft_overlong_punishment(max_completion_len=25, soft_punish_cache=5)(completion_ids=lengths)
    assert length(lengths, max_tokens=25, buffer=5) == pytest.approx(want)

    cfg = config(
        home,
        tmp_path / "run",
        rewards=(Reward(f"{home}/rewards.py:even"),),
        dynamic_sampling=DynamicSampling(rounds=1),
        steps=1,
        overlong=Overlong(penalty_share=0.5),
        sampling=Sampling(group_size=4, max_tokens=8),
    )
    train(cfg)
    rows = pq.ParquetFile(tmp_path / "run" / "rollouts" / "step-000001.parquet").read().to_pylist()
    for row in rows:
        assert row["rewards/overlong"] == pytest.approx(min(0.0, (4 - row["tokens"]) / 4))
        assert row["reward"] == pytest.approx(row["rewards/even"] + row["rewards/overlong"])
        assert row["advantage"] is None or int(row["prompt"].split()[-1]) % 2 == 0
    assert metrics(tmp_path / "run")[0]["rewards/overlong/mean"] < 0


def test_cut_completions_can_be_left_out_of_the_loss(home: Path, tmp_path: Path) -> None:
    """A tiny random model hardly ends by itself within three tokens: in this step everything is cut."""
    short = Sampling(group_size=4, max_tokens=3)
    train(config(home, tmp_path / "in", sampling=short, steps=1))
    with pytest.raises(TrainError, match="of the 16 completions of the last one 16 were cut"):
        train(config(home, tmp_path / "out", sampling=short, steps=1, overlong=Overlong(mask=True)))
    inside, outside = (metrics(tmp_path / run)[0] for run in ("in", "out"))
    assert inside["completions/clipped_ratio"] == outside["completions/clipped_ratio"] > 0.8
    assert inside["batch/tokens"] > outside["batch/tokens"] and inside["reward"] == outside["reward"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dynamic_sampling": DynamicSampling(rounds=2, by="digit")},
            'dynamic_sampling.by = "digit": no reward of that name; there are .*digits',
        ),
        (
            {"dynamic_sampling": DynamicSampling(rounds=2), "sampling": Sampling(group_size=1)},
            "the rewards of a group of one never differ",
        ),
    ],
)
def test_validate_names_what_cannot_be_refilled(
    changes: dict[str, Any], message: str, home: Path, tmp_path: Path
) -> None:
    found = "\n".join(problems(config(home, tmp_path / "run", **changes)))
    import re

    assert re.search(message, found), found


def test_settings_of_sampling_are_refused_for_recorded_completions(home: Path, tmp_path: Path) -> None:
    (home / "one.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    cfg = config(home, tmp_path / "run", data=Data(str(home / "one.jsonl")), rewards=(), algo=Algo("sft"))
    cfg = replace(cfg, dynamic_sampling=DynamicSampling(rounds=1), overlong=Overlong(mask=True), prompts_per_step=1)
    found = "\n".join(problems(cfg))
    assert "dynamic_sampling.rounds = 1: recorded completions are not drawn again" in found
    assert "overlong: recorded completions were not cut" in found


# ---- presets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(home: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run.toml"
    path.write_text(f'model = "m"\ndata = "{home}/prompts.jsonl"\nsteps = 1\nout = "o"\nrewards = ["number"]\n')
    yield path


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_a_whole_config_and_reads_back_from_what_a_run_saves(name: str, file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text() + f'[algo]\nname = "{name}"\n')
    cfg = Config.load(file)
    saved = tmp_path / "config.toml"
    saved.write_text(to_toml(cfg))
    assert Config.load(saved) == cfg
    assert rlft.preset(name, model="m", data=cfg.data.path, steps=1, out="o", rewards=["number"]) == cfg
    assert not [text for text in problems(cfg) if "algo" in text or "optim" in text]


def test_the_papers_numbers() -> None:
    common = {"model": "m", "data": "d", "steps": 1, "out": "o"}
    dapo, dr, gspo = (rlft.preset(name, **common) for name in ("dapo", "dr_grpo", "gspo"))
    assert (dapo.algo.name, dapo.algo.options["clip_high"], dapo.optim.minibatches) == ("grpo", 0.28, 16)
    assert dapo.dynamic_sampling.rounds == 10 and dapo.overlong.penalty_share == 0.2
    assert (dr.algo.options["advantage"], dr.algo.options["aggregation"]) == ("group_mean", "constant")
    assert (gspo.algo.name, gspo.optim.minibatches, gspo.algo.options["clip_low"]) == ("gspo", 4, 3e-4)
    luspo, scale, online = (rlft.preset(name, **common) for name in ("luspo", "scalerl", "online_dpo"))
    assert (luspo.algo.name, luspo.algo.options["aggregation"], luspo.algo.options["clip_high"]) == (
        "gspo",
        "sequence_sum",
        2.5e-3,
    )
    assert (scale.algo.name, scale.algo.options["aggregation"], scale.curriculum.solved_share) == (
        "cispo",
        "prompt_mean",
        0.9,
    )
    assert (online.algo.name, online.algo.options["advantage"], online.sampling.group_size) == (
        "dpo",
        "best_and_worst",
        2,
    )


def test_the_file_wins_over_the_preset_and_the_flag_over_both(file: Path) -> None:
    file.write_text(file.read_text() + '[algo]\nname = "dapo"\nclip_high = 0.3\n[optim]\nlr = 3e-6\n')
    cfg, _ = parse("train", [str(file), "--optim.minibatches=2", "--dynamic_sampling.rounds", "4"])
    assert (cfg.algo.options["clip_high"], cfg.algo.options["clip_low"]) == (0.3, 0.2)
    assert (cfg.optim.lr, cfg.optim.minibatches, cfg.dynamic_sampling.rounds) == (3e-6, 2, 4)


def test_a_flag_can_name_a_preset(file: Path) -> None:
    cfg, _ = parse("train", [str(file), "--algo.name", "dr_grpo"])
    assert cfg.algo.name == "grpo" and cfg.algo.options["aggregation"] == "constant"


def test_a_preset_from_python_says_how(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'algo.name = "dapo": a preset.*rlft.preset\("dapo", model=...'):
        train(config(home, tmp_path / "run", algo=Algo("dapo")))
    with pytest.raises(ConfigError, match=r'no preset "dappo". Did you mean "dapo"\? Presets: dapo, dr_grpo, gdpo'):
        rlft.preset("dappo")


def test_the_trainers_log_probs_are_written_beside_the_rollouts_they_belong_to(home: Path, tmp_path: Path) -> None:
    """With refilled, dropped and split groups: of each rollout that was trained, as before the first update."""
    train(
        config(
            home,
            tmp_path / "run",
            rewards=(Reward(f"{home}/rewards.py:even"),),
            dynamic_sampling=DynamicSampling(rounds=4),
            optim=Optim(lr=1e-2, minibatches=2, passes=2),
            steps=1,
        )
    )
    rows = pq.read_table(tmp_path / "run" / "rollouts" / "step-000001.parquet").to_pylist()
    trained = [row for row in rows if row["logprobs"]]
    assert trained and len(trained) < len(rows)
    for row in trained:
        assert row["advantage"] is not None and row["logprobs"] == pytest.approx(row["sampler_logprobs"], abs=1e-4)
    assert {row["group"] for row in rows if row["pieces"]} == {0, 1, 2, 3} and max(row["group"] for row in rows) > 3
