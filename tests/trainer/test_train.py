"""The loop over a tiny random model on disk: GRPO and SFT, resume, guards, interruption. Real files, real workers."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_run
from tiny import SPECIAL, tiny_model, tiny_tokenizer

import rlft
from rlft.config.data import Data, Eval, Reward, Sampling
from rlft.config.run import Algo, Checkpoint, Config, Lora, Optim, Packing, Parity
from rlft.data import usable
from rlft.errors import ConfigError, EngineError, ParityError, RewardError, TrainError
from rlft.rollout.eager import EagerEngine
from rlft.runs.folder import Run
from rlft.trainer import ending, validate
from rlft.trainer.loop import train
from rlft.trainer.reopen import evaluate_run, generate_from_run

TIMES = ("time/", "perf/", "step_time")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, a prompt dataset, an SFT dataset and a reward file."""
    folder = tmp_path_factory.mktemp("home")
    base = tiny_model(seed=3).unload()
    base.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}", "answer": str(i % 10)} for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"say {i}", "chosen": f"it is {i * i}", "rejected": f"no {i}"} for i in range(24)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(24)]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(
        "def digits(completions, **kwargs):\n"
        "    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]\n"
        "def same(completions, **kwargs):\n"
        "    return [1.0] * len(completions)\n"
        "def fails(completions, trainer_state, **kwargs):\n"
        "    if trainer_state.global_step > 0: raise RuntimeError('the grader is down')\n"
        "    return [float(len(text) % 3) for text in completions]\n"
    )
    return folder


def grpo(home: Path, out: Path, **changes: Any) -> Config:
    own: dict[str, Any] = {
        "steps": 3,
        "prompts_per_step": 3,
        "sampling": Sampling(group_size=4, max_tokens=6),
        "parity": Parity(probe=False),
        "checkpoint": Checkpoint(keep=10),
    }
    return small_run(home, out, **(own | changes))


def sft(home: Path, out: Path, **changes: Any) -> Config:
    data = Data(str(home / "sft.jsonl"))
    return replace(grpo(home, out), **({"data": data, "algo": Algo("sft"), "rewards": ()} | changes))


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def saved(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "trainer.safetensors")


# ---- one loop ----------------------------------------------------------------------------------------------------


def test_grpo_leaves_an_adapter_a_report_and_every_completion(home: Path, tmp_path: Path) -> None:
    result = rlft.train(grpo(home, tmp_path / "run", eval=Eval(rows=5, every=2)))  # the module is callable
    assert result.steps == 3 and result.report.is_file() and (result.adapter / "adapter_model.safetensors").is_file()
    logged = [m for m in metrics(tmp_path / "run") if "loss" in m]
    assert len(logged) == 3
    for name in (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "epoch",
        "completions/mean_length",
        "completions/clipped_ratio",
        "rewards/digits/mean",
        "batch/tokens",
        "sampling/sampling_logp_difference/mean",
        "mismatch/p50",
        "mismatch/p90",
        "mismatch/p99",
        "clip_ratio/region_mean",
    ):
        assert name in logged[0], name
    assert logged[0]["sampling/sampling_logp_difference/mean"] < 1e-4
    assert len(list((tmp_path / "run" / "rollouts").glob("step-*.parquet"))) == 3
    # What the report shades tokens by: the trainer's log-probs beside the sampler's, and the text of each token.
    rows = Run.resume(tmp_path / "run").read_rollouts(2)
    assert any(row["logprobs"] for row in rows)
    for row in rows:
        assert row["logprobs"] is None or row["logprobs"] == pytest.approx(row["sampler_logprobs"], abs=1e-4)
        assert "".join(piece for piece in row["pieces"] if piece not in SPECIAL) == row["completion"]
        assert len(row["pieces"]) == row["tokens"]
    plan = Run.resume(tmp_path / "run").plan()
    assert plan["gradient"] == plan["adapter"] > 0 and plan["base"] > plan["adapter"]
    raw = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(m["perf/peak_GiB"] > 0.05 for m in raw if "loss" in m)
    phases = ("time/generate", "time/reward", "time/train", "time/sync", "time/idle")
    assert all(sum(m[p] for p in phases) == pytest.approx(m["step_time"]) for m in raw if "loss" in m)
    assert result.before.keys() == {name for name in result.after if "_change" not in name}
    assert "eval/reward" in result.before and "eval/reward_change" in result.after
    values = evaluate_run(tmp_path / "run")
    assert values["eval/reward"] == pytest.approx(result.after["eval/reward"])
    assert isinstance(generate_from_run(tmp_path / "run", ["say 3"], max_tokens=4)[0], str)


def test_sft_runs_through_the_same_loop_and_its_first_loss_is_transformers_cross_entropy(
    home: Path, tmp_path: Path
) -> None:
    train(sft(home, tmp_path / "run", steps=8, prompts_per_step=8))
    losses = [m["loss"] for m in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(home / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    total, tokens = 0.0, 0
    for row in pq.read_table(tmp_path / "run" / "rollouts" / "step-000001.parquet").to_pylist():
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        ids = torch.tensor([prompt + list(row["completion_ids"])])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        n = len(row["completion_ids"])
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * n
        tokens += n
    assert losses[0] == pytest.approx(total / tokens, abs=1e-5)


def test_dpo_runs_through_the_same_loop_and_its_first_loss_is_ln_2(home: Path, tmp_path: Path) -> None:
    train(sft(home, tmp_path / "run", data=Data(str(home / "pairs.jsonl")), algo=Algo("dpo"), steps=6))
    logged = metrics(tmp_path / "run")
    assert logged[0]["loss"] == pytest.approx(0.69315, abs=1e-5)
    assert logged[-1]["loss"] < 0.5 and logged[-1]["rewards/accuracies"] == 1.0


def test_gspo_runs_through_the_same_loop_with_grpos_rollouts(home: Path, tmp_path: Path) -> None:
    """One update per rollout batch: its ratio is 1, so its first step has GRPO's gradient under the same averaging."""
    train(grpo(home, tmp_path / "a", algo=Algo("gspo"), steps=1))
    train(grpo(home, tmp_path / "b", algo=Algo("grpo", {"aggregation": "sequence_mean"}), steps=1))
    one, other = (metrics(tmp_path / run)[0] for run in "ab")
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5) and one["grad_norm"] > 0
    assert one["reward"] == other["reward"]


def test_reward_functions_and_callbacks_from_python(home: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def overwrite(_: Any, values: dict[str, float]) -> None:
        values.update(dict.fromkeys(values, math.nan) | {"custom": 1.0, "nonfinite_logprobs": 1e9})

    prefer = "x"  # a closure: runs in this process
    result = train(
        grpo(home, tmp_path / "run", rewards=(), steps=2),
        rewards=[lambda completions, **kwargs: [float(text.count(prefer)) for text in completions]],
        callbacks=[overwrite, lambda state, values: seen.append((state.step, values["reward"]))],
    )
    assert result.steps == 2
    # A callback has a copy: what it writes reaches no other callback, no check and no file.
    assert seen == [(row["step"], row["reward"]) for row in metrics(tmp_path / "run")]
    assert "custom" not in metrics(tmp_path / "run")[0]


def test_epochs_decide_the_steps(home: Path, tmp_path: Path) -> None:
    cfg = sft(home, tmp_path / "run", steps=None, data=Data(str(home / "sft.jsonl"), epochs=0.5))
    assert train(cfg).steps == 4  # 24 rows, 3 per step


def test_a_start_reads_the_data_and_builds_the_algorithm_once(home: Path, tmp_path: Path, monkeypatch) -> None:
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: (calls.append(name), function(*args, **options))[1])

    for module, name in ((usable, "load_rows"), (validate, "build_algorithm")):
        counted(module, name)
    train(grpo(home, tmp_path / "run", steps=1))
    assert sorted(calls) == ["build_algorithm", "load_rows"]


def test_skipping_zero_advantage_rows_gives_bit_equal_weights_after_three_steps(home: Path, tmp_path: Path) -> None:
    """A reward that is 1 for most groups: most rows have zero advantage. Skipped or run, the weights are the same."""
    ends = []
    for skip in (True, False):
        packing = Packing(tokens_per_micro_batch=40, skip_zero_advantage=skip)
        cfg = grpo(
            home,
            tmp_path / str(skip),
            packing=packing,
            prompts_per_step=8,
            sampling=Sampling(group_size=2, max_tokens=20),
        )
        train(
            cfg, rewards=[lambda completions, **kwargs: [float(i < 4 and "1" in t) for i, t in enumerate(completions)]]
        )
        ends.append((saved(tmp_path / str(skip), 3)["adapter"], metrics(tmp_path / str(skip))))
    skipped = [m["batch/skipped"] for m in ends[0][1]]
    assert sum(skipped) > 0 and sum(m["batch/skipped"] for m in ends[1][1]) == 0
    assert torch.equal(ends[0][0], ends[1][0])


# ---- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "dropout"), [(grpo, 0.0), (sft, 0.1)])
def test_one_step_and_one_more_equal_two_bit_for_bit(make, dropout: float, home: Path, tmp_path: Path) -> None:
    """Weights, optimiser, metrics but times, and the prompts of the second step; with dropout, so random state too."""
    lora = Lora(rank=4, alpha=8, dropout=dropout)
    train(make(home, tmp_path / "two", steps=2, lora=lora))
    train(make(home, tmp_path / "one", steps=1, lora=lora))
    train(make(home, tmp_path / "one", steps=2, lora=lora), resume=True)
    whole, parts = saved(tmp_path / "two", 2), saved(tmp_path / "one", 2)
    assert whole.keys() == parts.keys() and {"adapter", "optim.exp_avg"} <= whole.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    files = [tmp_path / run / "rollouts" / "step-000002.parquet" for run in ("two", "one")]
    import pyarrow.parquet as pq

    assert pq.read_table(files[0]).equals(pq.read_table(files[1]))


def test_steps_past_the_checkpoint_are_set_aside_on_resume(home: Path, tmp_path: Path, monkeypatch) -> None:
    """A run that died in step 3 with a checkpoint of step 2 does step 3 again, and keeps the lost one aside."""
    out = tmp_path / "run"

    def die(state, values) -> None:
        if state.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ending, "rescue", lambda session, ways: "")  # as a kill
        train(grpo(home, out, steps=4, checkpoint=Checkpoint(every=2)), callbacks=[die])
    assert [m["step"] for m in metrics(out)] == [1, 2, 3]
    result = train(grpo(home, out, steps=4), resume=True)
    assert result.steps == 4 and [m["step"] for m in metrics(out)] == [1, 2, 3, 4]
    assert list((out / "set-aside").rglob("step-000003.parquet"))


def test_a_run_stopped_before_its_first_checkpoint_starts_again_and_ends_equal(
    home: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def die(state, values) -> None:
        raise KeyboardInterrupt

    cfg = grpo(home, tmp_path / "run", steps=2, eval=Eval(rows=4))
    train(replace(cfg, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ending, "rescue", lambda session, ways: "")  # as a kill
        train(cfg, callbacks=[die])
    assert len(metrics(tmp_path / "run")) == 2  # an evaluation and a step
    capsys.readouterr()
    train(cfg, resume=True)
    told = (
        f"holds no checkpoint yet, so the run starts again from step 0; what it had done is in {tmp_path}/run/set-aside"
    )
    assert told in capsys.readouterr().out
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert len((tmp_path / "run" / "set-aside" / "001" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_stopped_after_its_last_evaluation_is_not_evaluated_twice(
    home: Path, tmp_path: Path, monkeypatch
) -> None:
    cfg = grpo(home, tmp_path / "run", steps=1, eval=Eval(rows=4))
    with monkeypatch.context() as patch:
        patch.setattr("rlft.report.write", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    before = metrics(tmp_path / "run")
    result = train(cfg, resume=True)
    assert metrics(tmp_path / "run") == before and result.after["eval/reward"] == before[-1]["eval/reward"]


def test_a_folder_that_holds_a_run_and_one_that_holds_none_are_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(grpo(home, tmp_path / "run"), resume=True)
    train(grpo(home, tmp_path / "run", steps=1))
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume.*--out"):
        train(grpo(home, tmp_path / "run"))


def test_a_checkpoint_of_another_base_is_refused(home: Path, tmp_path: Path) -> None:
    train(grpo(home, tmp_path / "run", steps=1))
    other = tiny_model(seed=4).unload()
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="base"):
        train(grpo(home, tmp_path / "run", steps=2, model=str(tmp_path / "other")), resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_or_sigterm_finishes_the_step_and_saves(number, home: Path, tmp_path: Path, capsys) -> None:
    def interrupt(state, values) -> None:
        if state.step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = train(grpo(home, tmp_path / "run", steps=50), callbacks=[interrupt])
    assert result.interrupted and result.steps == 2 and signal.getsignal(number) is before
    what = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    told = capsys.readouterr().out
    assert f"stopping after this step and saving; {what} again stops at once" in told
    assert told.endswith(
        f'stopped after step 2 of 50. Go on with: the same call with resume=True (out="{tmp_path}/run")\n'
    )
    assert train(grpo(home, tmp_path / "run", steps=3), resume=True).steps == 3


def test_the_second_ctrl_c_stops_at_once(home: Path, tmp_path: Path) -> None:
    def twice(state, values) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # A shell starts what runs in its background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(grpo(home, tmp_path / "run"), callbacks=[twice])
    finally:
        signal.signal(signal.SIGINT, before)
    assert Run(tmp_path / "run").latest_checkpoint().name == "step-000001" and (tmp_path / "run/report.html").exists()


# ---- guards and faults -------------------------------------------------------------------------------------------


def test_a_wrong_temperature_stops_at_the_first_step_without_an_update(home: Path, tmp_path: Path, monkeypatch) -> None:
    draw = EagerEngine._draw
    cold = lambda self, logits, rows, sampling: draw(self, logits, rows, replace(sampling, temperature=0.6))  # noqa: E731
    monkeypatch.setattr(EagerEngine, "_draw", cold)
    with pytest.raises(ParityError, match=r"Temperature fits the numbers: at 0.6 .*No update was made"):
        train(grpo(home, tmp_path / "run"))
    assert metrics(tmp_path / "run") == []


def test_an_adapter_withheld_after_the_first_step_stops_the_run(home: Path, tmp_path: Path, monkeypatch) -> None:
    write = EagerEngine._write
    calls: list[int] = []

    def once(self, tensors) -> None:
        calls.append(1)
        if len(calls) == 1:
            write(self, tensors)

    monkeypatch.setattr(EagerEngine, "_write", once)
    with pytest.raises(EngineError, match="policy version 1 the engine does not hold the trainer's adapter"):
        train(grpo(home, tmp_path / "run"))


def test_equal_rewards_are_warned_of_and_the_step_is_taken(home: Path, tmp_path: Path, capsys) -> None:
    result = train(grpo(home, tmp_path / "run", rewards=(Reward(f"{home}/rewards.py:same"),), steps=2))
    assert result.steps == 2
    assert [m["frac_reward_zero_std"] for m in metrics(tmp_path / "run")] == [1.0, 1.0]
    assert [m["grad_norm"] for m in metrics(tmp_path / "run")] == [0.0, 0.0]
    assert "equal rewards" in capsys.readouterr().out


def test_a_grader_that_breaks_mid_run_stops_it_instead_of_scoring_zero(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError) as caught:
        train(grpo(home, tmp_path / "run", rewards=(Reward(f"{home}/rewards.py:fails"),)))
    assert caught.value.exit_code == 3 and "fails" in str(caught.value)
    assert len(metrics(tmp_path / "run")) == 1


def test_non_finite_gradients_are_skipped_counted_and_stop_the_run(home: Path, tmp_path: Path) -> None:
    (tmp_path / "nan_loss.py").write_text(
        "from dataclasses import dataclass\n"
        "from rlft.algos.loss import Loss\n"
        "@dataclass(frozen=True)\n"
        "class Nan(Loss):\n"
        "    def __call__(self, logprobs, batch):\n"
        "        return (logprobs * float('nan')).sum(), {}\n"
    )
    cfg = sft(home, tmp_path / "run", algo=Algo(f"{tmp_path}/nan_loss.py"), optim=Optim(max_skipped=3), steps=9)
    with pytest.raises(TrainError, match="3 updates in a row had a non-finite gradient"):
        train(cfg)
    assert [m["skipped_updates"] for m in metrics(tmp_path / "run")] == [1.0, 2.0]


def test_out_of_memory_says_what_to_lower(home: Path, tmp_path: Path) -> None:
    (tmp_path / "big_loss.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from rlft.algos.loss import Loss\n"
        "@dataclass(frozen=True)\n"
        "class Big(Loss):\n"
        "    def __call__(self, logprobs, batch):\n"
        "        return torch.empty(2**60).sum(), {}\n"
    )
    with pytest.raises(TrainError, match=r"out of memory .*Lower packing.tokens_per_micro_batch \(4096") as caught:
        train(sft(home, tmp_path / "run", algo=Algo(f"{tmp_path}/big_loss.py")))
    assert caught.value.exit_code == 1


def test_problems_are_all_named_at_once_before_anything_is_loaded(home: Path, tmp_path: Path) -> None:
    cfg = grpo(home, tmp_path / "run", rewards=(Reward("nubmer"),), algo=Algo("gprpo"))
    with pytest.raises(ConfigError, match=r"(?s)2 problems:.*gprpo.*grpo.*nubmer.*number"):
        train(cfg)
    assert not (tmp_path / "run").exists()
