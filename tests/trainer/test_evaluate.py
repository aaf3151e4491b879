"""Evaluation on held-out rows: what is measured, that it changes nothing, and which checkpoint it keeps."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_run
from tiny import tiny_model, tiny_tokenizer

from rlft.cli.main import main
from rlft.config.data import Data, DynamicSampling, Eval, Reward, Sampling
from rlft.config.run import Algo, Checkpoint, Config, Lora, Parity
from rlft.errors import ConfigError, DataError
from rlft.runs.folder import Run
from rlft.trainer.evaluate import averages, change, sampling_of
from rlft.trainer.loop import train
from rlft.trainer.reopen import evaluate_run
from rlft.trainer.result import Result
from rlft.types import Best

nan = math.nan


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, data of every kind and a reward file."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model(seed=3).unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("prompts.jsonl", [{"prompt": f"say {i}", "answer": str(i % 10)} for i in range(24)])
    write("others.jsonl", [{"prompt": f"say {i}", "answer": "1"} for i in range(20, 30)])
    write("sft.jsonl", [{"prompt": f"say {i}", "completion": f"it is {i * i}", "answer": "1"} for i in range(24)])
    write("sft_held.jsonl", [{"prompt": f"tell {i}", "completion": f"it is {i}", "answer": "1"} for i in range(5)])
    write("pairs.jsonl", [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": f"no {i}"} for i in range(24)])
    write("texts.jsonl", [{"text": f"number {i} is {i * i}"} for i in range(24)])
    (folder / "rewards.py").write_text(
        "def digits(completions, **kwargs):\n"
        "    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]\n"
        "def vowel(completions, **kwargs):\n"
        "    return [float(any(c in 'aeiou' for c in text)) for text in completions]\n"
        "def scripted(completions, trainer_state, **kwargs):\n"
        "    return [[0.1, 0.5, 0.9, 0.3, 0.9][trainer_state.global_step]] * len(completions)\n"
    )
    return folder


def grpo(home: Path, out: Path, **changes: Any) -> Config:
    own: dict[str, Any] = {
        "steps": 4,
        "prompts_per_step": 3,
        "sampling": Sampling(group_size=2, max_tokens=6),
        "parity": Parity(probe=False),
    }
    return small_run(home, out, **(own | changes))


def sft(home: Path, out: Path, **changes: Any) -> Config:
    data = Data(str(home / "sft.jsonl"))
    return grpo(home, out, **({"data": data, "algo": Algo("sft"), "rewards": ()} | changes))


def scripted(home: Path, **changes: Any) -> Eval:
    """Rewards of 0.1, 0.5, 0.9, 0.3 and 0.9 after steps 0 to 4."""
    return Eval(rows=3, every=1, rewards=(Reward(f"{home}/rewards.py:scripted"),), **changes)


def evaluations(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/rows" in line]


def saved(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


# ---- from rewards to numbers -------------------------------------------------------------------------------------


def test_rows_weigh_alike_and_invalid_rewards_are_left_out() -> None:
    """Three rows of four samples: 1 of 3 valid solved, none valid, all solved."""
    found = averages([[1, 0, nan, 0], [nan] * 4, [1, 1, 1, 1]], Eval(rows=3, samples=4, temperature=1.0))
    assert found["eval/reward"] == pytest.approx((1 / 3 + 1) / 2) == found["eval/pass@1"]
    assert found["eval/pass@2"] == pytest.approx((2 / 3 + 1) / 2)  # of 3 pairs of samples 2 hold the solved one
    assert found["eval/pass@4"] == 1.0 and found["eval/pass@4_low"] == pytest.approx(0.2065, abs=1e-4)
    assert "eval/pass@4_stderr" not in found, "one row has no standard error"
    assert found["eval/reward_stderr"] == pytest.approx(1 / 3)  # |1 - 1/3| / 2
    assert found["eval/reward_low"] <= found["eval/reward"] <= found["eval/reward_high"]


def test_solved_means_the_threshold_reached_up_to_fp32_rounding() -> None:
    rewards = [1.0, float(torch.tensor(0.9)), 1.5, 0.0]
    assert rewards[1] < 0.9
    cfg = Eval(rows=1, samples=4, temperature=1.0, pass_at=(1, 3))
    found = averages([rewards], cfg)
    assert found["eval/pass@1"] == 0.5 and found["eval/pass@3"] == 1.0 and "eval/pass@2" not in found
    assert averages([rewards], replace(cfg, threshold=0.9))["eval/pass@1"] == 0.75


def test_everything_invalid_is_nan_and_not_0() -> None:
    assert list(averages([[nan], [nan]], Eval(rows=2))) == ["eval/reward"]
    assert math.isnan(averages([[nan], [nan]], Eval(rows=2))["eval/reward"])


def test_before_and_after_are_paired_by_row() -> None:
    """Rows of very different difficulty that all rise by 0.1: the paired error is 0, the unpaired ones are large."""
    before = {row: [row / 10] for row in range(8)}
    after = {row: [row / 10 + 0.1] for row in reversed(range(8))} | {99: [5.0]}
    found = change(before, after, Eval(rows=8))
    assert found["eval/reward_change"] == pytest.approx(0.1) and found["eval/reward_change_stderr"] < 1e-9
    assert averages(list(before.values()), Eval(rows=8))["eval/reward_stderr"] > 0.08
    assert change({}, after, Eval(rows=8)) == {}


def test_a_change_is_over_the_rows_with_a_valid_reward_on_both_sides() -> None:
    found = change({1: [0.0], 2: [nan], 3: [0.5]}, {1: [1.0], 2: [1.0], 3: [nan]}, Eval(rows=3))
    assert found["eval/reward_change"] == 1.0 and found["eval/pass@1_change"] == 1.0
    assert "eval/reward_change_stderr" not in found


def test_the_evaluation_has_its_own_sampling_and_every_field_is_said() -> None:
    cfg = grpo(Path("h"), Path("o"), sampling=Sampling(max_tokens=9, stop_token_ids=(7,)), eval=Eval(rows=2))
    assert sampling_of(cfg) == Sampling(1, 9, temperature=0.0, top_p=1.0, top_k=0, stop_token_ids=(7,))
    own = Eval(rows=2, samples=4, temperature=0.6, top_p=0.95, top_k=20, max_tokens=32, stop_token_ids=())
    assert sampling_of(replace(cfg, eval=own)) == Sampling(4, 32, 0.6, 0.95, 20, ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 0, "every": 5}, "eval.every = 5: nothing to evaluate on: set eval.rows"),
        ({"data": Data("d.jsonl")}, "eval.rows = 0: say how many rows of eval.data to use"),
        ({"rows": 1, "samples": 4, "temperature": 1.0, "pass_at": (8,)}, "eval.pass_at = (8,): each from 1 to"),
        ({"rows": 1, "top_p": 0.9}, "eval.temperature = 0: greedy decoding takes the most likely token"),
        ({"rows": 1, "max_tokens": 0}, "eval.max_tokens = 0: want at least 1"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Eval(**fields)
    assert message in str(caught.value)


def test_the_ks_are_the_powers_of_two_up_to_samples() -> None:
    ks = {n: Eval(rows=1, samples=n, temperature=1.0).ks() for n in (1, 7, 8)}
    assert ks == {1: (1,), 7: (1, 2, 4), 8: (1, 2, 4, 8)}


# ---- a run with sampled evaluation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory) -> tuple[Result, Path]:
    """Refilled steps over four epochs and more, an evaluation every second one, stopped after step 4 and resumed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    rewards = (Reward(f"{home}/rewards.py:vowel"), Reward(f"{home}/rewards.py:digits", weight=0.5))
    own = Eval(rows=6, every=2, samples=4, temperature=1.0, rewards=rewards)
    cfg = grpo(
        home,
        out,
        prompts_per_step=9,
        eval=own,
        steps=4,
        dynamic_sampling=DynamicSampling(rounds=2),
        rewards=rewards[:1],
    )
    train(cfg)
    return train(replace(cfg, steps=8), resume=True), out


def test_held_out_rows_are_never_trained_on(run: tuple[Result, Path]) -> None:
    """Over shuffled epochs, refills and a resume: more than 72 prompts of 18 rows, 6 others evaluated five times."""
    folder = Run(run[1])
    trained = [row["row"] for step in folder.rollout_steps() for row in folder.read_rollouts(step)]
    held = [{row["row"] for row in folder.read_evaluation(step)} for step in folder.evaluation_steps()]
    assert len(held) == 5 and all(rows == held[0] for rows in held) and len(held[0]) == 6
    assert set(trained) == set(range(24)) - held[0] and len(trained) > 8 * 9 * 2


def test_the_metrics_are_those_of_the_completions_on_disk(run: tuple[Result, Path]) -> None:
    result, out = run
    folder = Run(out)
    first, last = (folder.read_evaluation(step) for step in (0, 8))
    rewards = [row["reward"] for row in last]
    values = result.after
    assert values["eval/reward"] == pytest.approx(sum(rewards) / 24) and values["eval/samples"] == 4
    by_row = [rewards[i : i + 4] for i in range(0, 24, 4)]
    assert values["eval/pass@4"] == pytest.approx(sum(max(row) >= 1 for row in by_row) / 6)
    difference = values["eval/reward"] - sum(row["reward"] for row in first) / 24
    assert values["eval/reward_change"] == pytest.approx(difference)
    assert result.before == {k: v for k, v in evaluations(out)[0].items() if k != "step"}
    assert {"eval/rewards/vowel/mean", "eval/rewards/digits/mean", "eval/pass@2_low"} <= values.keys()


def test_the_base_the_best_and_the_last_are_evaluated_again_from_the_folder(run: tuple[Result, Path]) -> None:
    result, out = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = evaluate_run(out)
    same = ("eval/reward", "eval/pass@4", "eval/reward_low", "eval/completions/mean_length")
    assert again["step"] == 8 and all(again[name] == pytest.approx(result.after[name]) for name in same)
    base = evaluate_run(out, "base")
    assert base["step"] == 0 and all(base[name] == pytest.approx(result.before[name]) for name in same)
    best = evaluate_run(out, "best")
    assert best["eval/reward"] == pytest.approx(max(e["eval/reward"] for e in evaluations(out)[1:]))
    assert best["eval/chosen_among"] == len(evaluations(out)) - 1 > 1, "all but the one before the first step"
    assert "eval/chosen_among" not in again | base
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "looking changes nothing"


def test_the_command_prints_a_table_or_json(run: tuple[Result, Path], capsys) -> None:
    out = run[1]
    assert main(["eval", str(out), "--samples", "2", "--rows", "4", "--max_tokens", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"step 8 of {out} on 4 held-out rows, 2 completions each"
    assert lines[1].split() == ["value", "stderr", "95%", "interval"]
    assert lines[2].startswith("  reward (avg@2)") and " to " in lines[2]
    assert not any("chosen as the best" in line for line in lines)
    assert main(["eval", str(out), "--checkpoint", "best", "--rows", "1", "--max_tokens", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    tried = len(evaluations(out)) - 1
    assert f"chosen as the best of {tried} evaluations on these rows: results here are too good" in said
    assert main(["eval", str(out), "--base", "--json", "--samples=1", "--temperature=0"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["step"] == 0 and values["eval/rows"] == 6 and "eval/pass@1" in values and "eval/pass@2" not in values


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--checkpoint", "5"],
            '--checkpoint 5: {out} has no such checkpoint; give "latest", "best" or one of its steps: ',
        ),
        (["--rows", "7"], "--rows 7: the run holds out 6 rows (eval.rows); give 1 to that many"),
        (["--base", "--checkpoint", "best"], "--base and --checkpoint best: give one of them"),
        (["--temperature", "0"], "eval.samples = 4: greedy samples are all equal"),
    ],
)
def test_what_cannot_be_evaluated_is_said(run: tuple[Result, Path], flags: list[str], message: str, capsys) -> None:
    assert main(["eval", str(run[1]), *flags]) == 2
    assert message.format(out=run[1]) in capsys.readouterr().err


def test_a_resume_that_would_hold_out_rows_that_were_trained_on_is_refused(
    run: tuple[Result, Path], home: Path
) -> None:
    cfg = grpo(home, run[1], steps=9, eval=Eval(rows=7))
    with pytest.raises(ConfigError, match="rows held out now may have been trained on; resume with the data, seed and"):
        train(cfg, resume=True)


# ---- other rows --------------------------------------------------------------------------------------------------


def test_training_rows_with_an_evaluated_prompt_are_left_out(home: Path, tmp_path: Path, capsys) -> None:
    """others.jsonl begins with the prompts of rows 20 to 23."""
    cfg = grpo(
        home, tmp_path / "run", steps=1, prompts_per_step=20, eval=Eval(rows=6, data=Data(f"{home}/others.jsonl"))
    )
    result = train(cfg)
    assert "4 training rows with a prompt of eval.data left out" in capsys.readouterr().out
    trained = {row["row"] for row in Run(tmp_path / "run").read_rollouts(1)}
    assert trained == set(range(20)) and result.after["eval/rows"] == 6
    with pytest.raises(DataError, match=r"eval.data: every training row has a prompt that is evaluated on"):
        train(
            replace(
                cfg,
                out=str(tmp_path / "b"),
                data=Data(f"{home}/others.jsonl"),
                eval=Eval(rows=10, data=Data(f"{home}/others.jsonl")),
            )
        )


def test_evaluation_rows_that_are_too_long_are_dropped_and_told(home: Path, tmp_path: Path, capsys) -> None:
    """ "say 9" renders to one token less than "say 10"."""
    short = len(
        tiny_tokenizer().apply_chat_template(
            [{"role": "user", "content": "say 9"}], tokenize=False, add_generation_prompt=True
        )
    )
    tokens = len(tiny_tokenizer().encode("<|im_start|>user\nsay 9<|im_end|>\n<|im_start|>assistant\n"))
    assert tokens < short  # a mark is one token
    held = Data(f"{home}/prompts.jsonl", max_prompt_tokens=tokens)
    cfg = grpo(home, tmp_path / "run", data=Data(f"{home}/others.jsonl"), steps=1, eval=Eval(rows=10, data=held))
    assert train(cfg).after["eval/rows"] == 10  # say 0 to say 9
    assert "eval.data: 14 rows are left out: prompt longer than max_prompt_tokens" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"eval.rows = 11: eval.data has 10 usable rows; lower eval.rows"):
        train(replace(cfg, out=str(tmp_path / "b"), eval=Eval(rows=11, data=held)))


# ---- the best checkpoint -----------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_named(home: Path, tmp_path: Path, capsys) -> None:
    """0.5, 0.9, 0.3, 0.9 with keep = 1: step 2 stays beside the last; the equal of step 4 does not replace it."""
    out = tmp_path / "run"
    result = train(grpo(home, out, steps=3, eval=scripted(home), checkpoint=Checkpoint(keep=1)))
    assert saved(out) == ["best.json", "step-000002", "step-000003"]
    marked = json.loads((out / "checkpoints" / "best.json").read_text())
    assert marked == {"checkpoint": "step-000002", "metric": "eval/reward", "value": pytest.approx(0.9)}
    assert result.best == out / "checkpoints" / "step-000002" and result.adapter.name == "step-000003"
    assert "step 2 did best (eval/reward 0.900): choose it with --checkpoint best" in capsys.readouterr().out
    train(grpo(home, out, steps=4, eval=scripted(home), checkpoint=Checkpoint(keep=1)), resume=True)
    assert saved(out) == ["best.json", "step-000002", "step-000004"]
    assert main(["generate", str(out), "say 3", "--checkpoint", "best", "--max_tokens", "3"]) == 0


def test_a_resume_takes_the_best_from_what_is_left(home: Path, tmp_path: Path) -> None:
    """Killed in step 4 with bests of steps 1 and 2; the checkpoint of step 2 is lost: its evaluation is set aside."""
    out = tmp_path / "run"
    cfg = grpo(home, out, eval=scripted(home))

    def die(state, values) -> None:
        if state.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cfg, callbacks=[die])
    shutil.rmtree(out / "checkpoints" / "step-000004")  # which a kill would not have left
    assert saved(out) == ["best.json", "step-000001", "step-000002"]
    lost = out / "checkpoints" / "step-000002"
    lost.rename(tmp_path / "lost")
    # As a kill between the two writes leaves it: the file names what is not there.
    assert Run(out).best() == Best(1, "eval/reward", pytest.approx(0.5))

    def look(state, values) -> None:
        if state.step == 2:
            seen.append(json.loads((out / "checkpoints" / "best.json").read_text())["checkpoint"])

    seen: list[str] = []
    result = train(cfg, resume=True, callbacks=[look])
    assert seen == ["step-000001"] and result.best == out / "checkpoints" / "step-000002"
    assert [e["step"] for e in evaluations(out)] == [0, 1, 2, 3, 4]


# ---- recorded rows -----------------------------------------------------------------------------------------------


def cross_entropy(home: Path, file: str) -> float:
    """transformers' own token mean over the completions of every row of a file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(home / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    total, tokens = 0.0, 0
    for row in map(json.loads, (home / file).read_text().splitlines()):
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        completion = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt + completion]), labels=labels).loss.item()
        total, tokens = total + loss * len(completion), tokens + len(completion)
    return total / tokens


def test_sft_without_rewards_measures_the_held_out_loss_and_changes_nothing(home: Path, tmp_path: Path) -> None:
    """Dropout is on in training: the loss is transformers' cross-entropy all the same, and the adapter bit-equal to
    that of a run without evaluation."""
    lora = Lora(rank=4, alpha=8, dropout=0.2)
    held = Eval(rows=5, every=1, data=Data(f"{home}/sft_held.jsonl"))
    result = train(sft(home, tmp_path / "a", lora=lora, eval=held))
    assert result.before["eval/loss"] == pytest.approx(cross_entropy(home, "sft_held.jsonl"), abs=1e-5)
    assert result.before["eval/perplexity"] == pytest.approx(math.exp(result.before["eval/loss"]), rel=1e-6)
    assert result.after["eval/loss"] < result.before["eval/loss"] and result.after["eval/rows"] == 5
    assert "eval/reward" not in result.after and not (tmp_path / "a" / "evaluations").exists()
    assert result.best == result.adapter
    train(sft(home, tmp_path / "b", lora=lora))
    adapters = [load_file(tmp_path / r / "checkpoints/step-000004/trainer.safetensors")["adapter"] for r in "ab"]
    assert torch.equal(*adapters)
    assert evaluate_run(tmp_path / "a")["eval/loss"] == pytest.approx(result.after["eval/loss"], abs=1e-6)


def test_recorded_rows_with_rewards_have_a_loss_and_a_reward(home: Path, tmp_path: Path, capsys) -> None:
    own = Eval(rows=5, rewards=(Reward(f"{home}/rewards.py:digits"),), samples=2, temperature=1.0)
    result = train(sft(home, tmp_path / "run", steps=1, eval=own), verbose=True)
    assert {"eval/loss", "eval/perplexity", "eval/reward", "eval/reward_change", "eval/pass@2"} <= result.after.keys()
    told = capsys.readouterr().out
    assert "held-out rewards are not all 0 or 1: solved means at least 1" in told and "perplexity" in told


def test_dpo_measures_ln_2_at_first_and_the_accuracy_of_pairs(home: Path, tmp_path: Path) -> None:
    cfg = sft(home, tmp_path / "run", data=Data(f"{home}/pairs.jsonl"), algo=Algo("dpo"), steps=6, eval=Eval(rows=6))
    result = train(cfg)
    assert result.before["eval/loss"] == pytest.approx(0.69315, abs=1e-5)
    assert result.after["eval/loss"] < 0.6 and result.after["eval/rewards/accuracies"] == 1.0
    again = evaluate_run(tmp_path / "run")
    assert again["eval/loss"] == pytest.approx(result.after["eval/loss"], abs=1e-5), "the reference is the run's"
    assert evaluate_run(tmp_path / "run", "base")["eval/loss"] == pytest.approx(0.69315, abs=1e-5)


def test_plain_text_has_a_loss_and_no_prompt_to_sample_from(home: Path, tmp_path: Path) -> None:
    cfg = sft(home, tmp_path / "run", data=Data(f"{home}/texts.jsonl"), steps=1, eval=Eval(rows=4))
    assert train(cfg).after["eval/loss"] > 0
    with pytest.raises(ConfigError, match="rows of plain text have no prompt to sample from; leave out rewards"):
        train(replace(cfg, out=str(tmp_path / "b"), eval=Eval(rows=4, rewards=(Reward("exact"),))))


def test_rows_of_another_kind_need_a_reward(home: Path, tmp_path: Path) -> None:
    """DPO's pairs against prompt + completion rows: the pair loss has nothing to be measured on."""
    held = Eval(rows=4, data=Data(f"{home}/sft.jsonl"))
    cfg = sft(home, tmp_path / "run", data=Data(f"{home}/pairs.jsonl"), algo=Algo("dpo"), steps=1, eval=held)
    with pytest.raises(ConfigError, match=r"eval.rows = 4 but there is no reward to score with: set eval.rewards"):
        train(cfg)
