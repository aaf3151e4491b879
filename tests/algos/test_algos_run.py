"""Every loss file through the loop on the tiny model: two steps, TRL's metric names, an adapter that moved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import LOSSES, file_of
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

from rlft.cli.main import main
from rlft.config.data import Curriculum, Data, Eval, Reward, Sampling
from rlft.config.files import to_toml
from rlft.config.run import Algo, Checkpoint, Config, Lora, Optim, Packing, Parity
from rlft.errors import ConfigError, TrainError
from rlft.trainer.loop import train
from rlft.trainer.validate import problems

ROOT = Path(__file__).parents[2]
FILES = sorted({file_of(loss) for loss in LOSSES.values()})
PAIRED = sorted({file_of(loss) for loss in LOSSES.values() if loss.whole_groups})
CLIP = {"clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max"}
PAIR = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
NAMES = {
    **dict.fromkeys(("grpo", "gspo", "gmpo", "rloo", "dppo"), CLIP | {"clip_ratio/region_mean"}),
    **dict.fromkeys(PAIRED, PAIR),
    "kto": (PAIR - {"rewards/accuracies", "rewards/margins"}) | {"kl"},
    "cispo": {"cispo_clip_ratio"},
    "vespo": {"vespo/phi_seq_mean"},
}
"""What TRL logs for the objective, besides loss, entropy and rewards."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_model(seed=3).unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}", "answer": str(i % 10)} for i in range(8)]
    pairs = [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": f"{i} or so"} for i in range(8)]
    labels = [{"prompt": f"say {i}", "completion": f"it is {i * i}", "label": i % 2 == 0} for i in range(8)]
    sft = [{"prompt": row["prompt"], "completion": row["completion"]} for row in labels]
    for name, some in (("prompts", rows), ("pairs", pairs), ("labels", labels), ("sft", sft)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    (folder / "rewards.py").write_text(
        "def letters(completions, **kwargs):\n"
        "    return [sum(map(ord, text)) % 7 / 6 for text in completions]\n"
        "def lower(completions, **kwargs):\n"
        "    return [float(text.lower() == text) for text in completions]\n"
        "def easy(completions, prompts, **kwargs):\n"
        "    return [float(int(p.split()[-1]) % 2 == 0) for p in prompts]\n"
    )
    return folder


def config(
    home: Path, out: Path, data: str = "prompts", rewards: tuple[str, ...] = ("letters",), **changes: Any
) -> Config:
    sampled = data == "prompts"
    base = Config(
        model=str(home / "model"),
        data=Data(str(home / f"{data}.jsonl")),
        out=str(out),
        rewards=tuple(Reward(f"{home}/rewards.py:{name}") for name in rewards) if sampled else (),
        steps=2,
        prompts_per_step=2,
        sampling=Sampling(group_size=3, max_tokens=4),
        lora=Lora(rank=2, alpha=4),
        optim=Optim(lr=1e-2),
        parity=Parity(probe=False),
        checkpoint=Checkpoint(keep=10),
        packing=Packing(tokens_per_micro_batch=40),
    )
    return replace(base, **changes)


def ran(cfg: Config) -> list[dict[str, float]]:
    """The metrics of the steps of a run that moved its adapter and stayed finite."""
    train(cfg)
    out = Path(cfg.out)
    lines = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    folder = out / "checkpoints" / f"step-{cfg.steps:06d}"
    saved = load_file(folder / "trainer.safetensors")
    assert len(lines) == cfg.steps and all(line["loss"] is not None for line in lines)
    assert not torch.equal(saved["adapter"], saved["adapter_start"]) and saved["adapter"].isfinite().all()
    return lines


@pytest.mark.parametrize("name", FILES)
def test_each_loss_runs_two_steps_of_two_updates(name: str, home: Path, tmp_path: Path) -> None:
    data = {"sft": "sft", "dft": "sft", "kto": "labels"}.get(name, "pairs" if name in PAIRED else "prompts")
    cfg = config(home, tmp_path / "run", data, algo=Algo(name), optim=Optim(lr=1e-2, minibatches=2), prompts_per_step=4)
    for line in ran(cfg):
        assert NAMES.get(name, set()) | {"entropy", "grad_norm"} <= line.keys()


def test_entropy_kl_in_the_reward_and_masks_run_and_resume_exactly(home: Path, tmp_path: Path) -> None:
    options = {
        "kl": "reward",
        "kl_coef": 0.05,
        "entropy_coef": 0.01,
        "entropy_target": 9.0,
        "entropy_share": 0.5,
        "correction_weight": "sequence_mask",
        "sequence_mask_high": 1.5,
        "off_policy_limit": 0.5,
        "advantage": "batch_std",
    }
    cfg = config(home, tmp_path / "two", algo=Algo("grpo", options))
    first, second = ran(cfg)
    names = (
        "kl",
        "kl/k1",
        "policy_loss",
        "sampling/masked_ratio",
        "mismatch/ess",
        "sampling/importance_sampling_ratio/mean",
    )
    assert set(names) <= first.keys() and first["kl/k1"] == 0 and second["kl/k1"] != 0
    assert second["entropy_coef"] == pytest.approx(0.015)
    train(replace(cfg, out=str(tmp_path / "one"), steps=1))
    train(replace(cfg, out=str(tmp_path / "one")), resume=True)
    one, two = (load_file(tmp_path / run / "checkpoints/step-000002/trainer.safetensors") for run in ("one", "two"))
    assert torch.equal(one["adapter"], two["adapter"])


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "gdpo", "opo", "reinforce_plus_plus_baseline"])
def test_estimators_over_lengths_and_parts_run(name: str, home: Path, tmp_path: Path) -> None:
    ran(config(home, tmp_path / "run", rewards=("letters", "lower"), algo=Algo("grpo", {"advantage": name})))


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_sampled_completions_make_pairs_and_labels(name: str, home: Path, tmp_path: Path) -> None:
    advantage = {"dpo": "best_and_worst", "kto": "group_mean"}[name]
    line = ran(config(home, tmp_path / "run", algo=Algo(name, {"advantage": advantage})))[0]
    assert line["rewards/letters/mean"] >= 0 and "rewards/chosen" in line


def test_pairs_serve_kto_and_its_loss_is_measured(home: Path, tmp_path: Path) -> None:
    cfg = config(home, tmp_path / "run", "pairs", algo=Algo("kto"), eval=Eval(rows=2))
    lines = [json.loads(line) for line in (Path(train(cfg).out) / "metrics.jsonl").read_text().splitlines()]
    assert next(line["eval/loss"] for line in lines if "eval/loss" in line) == pytest.approx(0.5)  # nothing moved yet


def test_solved_prompts_are_not_drawn_again(home: Path, tmp_path: Path) -> None:
    """Every second prompt is solved by anything: once seen they are passed over, and a resume knows them."""
    cfg = config(home, tmp_path / "run", rewards=("easy",), steps=6, curriculum=Curriculum(solved_share=1.0))
    cfg = replace(cfg, data=replace(cfg.data, shuffle=False))
    train(replace(cfg, steps=5))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["curriculum/solved"] for line in lines] == [1, 2, 3, 4, 4]
    state = json.loads((tmp_path / "run/checkpoints/step-000005/state.json").read_text())["state"]
    assert state["solved"] == [0, 2, 4, 6] and state["consumed"] == 12  # 0 to 7, then 1 and 3 of the second epoch
    train(cfg, resume=True)
    state = json.loads((tmp_path / "run/checkpoints/step-000006/state.json").read_text())["state"]
    assert state["solved"] == [0, 2, 4, 6] and state["consumed"] == 16


def test_nothing_left_to_draw_ends_the_run(home: Path, tmp_path: Path) -> None:
    cfg = config(home, tmp_path / "run", steps=9, curriculum=Curriculum(solved_share=0.1, threshold=0.0))
    with pytest.raises(TrainError, match=r"curriculum.solved_share: all 8 prompts are solved"):
        train(cfg)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ("labels", {"algo": Algo("sft")}, 'algo.name = "sft": rows whose label is false would be unlearned'),
        ("prompts", {"algo": Algo("dpo")}, 'pairs of sampled completions with algo.advantage = "best_and_worst"'),
        ("pairs", {"curriculum": Curriculum(solved_share=0.5)}, "curriculum: recorded completions are not solved"),
        ("sft", {"algo": Algo("dppo")}, 'algo.name = "dppo": needs sampler log-probs'),
    ],
)
def test_validate_names_what_does_not_fit(data: str, changes: Any, message: str, home: Path, tmp_path: Path) -> None:
    assert message in "\n".join(problems(config(home, tmp_path / "run", data, **changes)))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_kto_wants_two_prompts_in_an_update(minibatches: int, home: Path, tmp_path: Path) -> None:
    optim = Optim(lr=1e-2, minibatches=minibatches)
    cfg = config(home, tmp_path / "run", "labels", algo=Algo("kto"), prompts_per_step=minibatches, optim=optim)
    with pytest.raises(ConfigError, match="an update of one prompt: kto compares"):
        train(cfg)


LOOKS = """
import torch
from dataclasses import dataclass
from rlft.algos.loss import Loss
from rlft.types import Stat, StepInputs
@dataclass(frozen=True)
class Looks(Loss):
    aggregation, needs_reference, zero_adv_zero_grad = "sequence_mean", True, True
    def prepare(self, view):
        gain = float(view.log_ratios(view.rollouts).sum())
        return StepInputs(extra={"floor": view.entropy_quantile(0.5), "gain": gain})
    def __call__(self, logprobs, batch):
        used, inputs = batch.train_mask, batch.inputs.extra
        gain = torch.where(used, logprobs.detach().double() - batch.ref_logprobs.double(), 0).sum()
        above = (batch.entropy.detach() > inputs["floor"])[used].double().mean()
        stats = {"off": Stat("mean", abs(gain - inputs["gain"])), "moved": Stat("mean", abs(gain)),
                 "uneven": Stat("mean", abs(above - 0.5) * used.sum())}
        return -(batch.weight * torch.where(used, logprobs, 0)).sum(), stats
"""


@pytest.mark.parametrize(("minibatches", "passes"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_prepare_sees_each_update_as_it_starts(minibatches: int, passes: int, home: Path, tmp_path: Path) -> None:
    """One micro-batch per update, so that the loss sees all that `prepare` saw, by the same policy."""
    (home / "looks.py").write_text(LOOKS)
    optim = Optim(lr=0.1, minibatches=minibatches, passes=passes)
    cfg = config(
        home,
        tmp_path / "run",
        "sft",
        algo=Algo(f"{home}/looks.py"),
        optim=optim,
        prompts_per_step=4,
        steps=3,
        packing=Packing(tokens_per_micro_batch=1000),
    )
    line = ran(cfg)[-1]
    assert line["batch/micro_batches"] == minibatches
    assert line["moved"] > 0.1 and line["off"] < 1e-4 * line["moved"] and line["uneven"] <= 1


def test_the_example_of_a_users_loss_trains_from_a_config(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Two updates per step, so that its ratio acts; a flag sets its setting, and a resume reads both from the run."""
    monkeypatch.chdir(ROOT)
    cfg = config(home, tmp_path / "run", algo=Algo("examples/my_loss.py"), optim=Optim(lr=1e-2, passes=2))
    file = tmp_path / "run.toml"
    file.write_text(to_toml(cfg))
    assert main(["train", str(file), "--algo.width=0.1", "--steps=1", "--verbose"]) == 0
    assert "examples/my_loss.py: ratio per token, squared penalty of width 0.1, no KL" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "run" / "config.toml"), "--steps=2", "--resume"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] is not None for line in lines)
    with pytest.raises(SystemExit):
        main(["train", str(file), "--help"])
    assert "--algo.width" in capsys.readouterr().out
    assert main(["train", str(file), "--algo.width=0"]) == 2
    assert "algo.width = 0.0: want a number above 0" in capsys.readouterr().err
    assert main(["train", str(file), "--algo.with=1"]) == 2
    assert "algo.with: unknown setting. Did you mean" in capsys.readouterr().err
