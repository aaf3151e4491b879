"""Bad input through the command line: for each a message with field, value and what to do, and an exit code.

What needs a full disk is in test_full_disk.py; what one module refuses is tested with that module too."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from rlft import environment
from rlft.cli.main import main

RUN = """
model = "{home}/model"
data = "{home}/{data}"
rewards = {rewards}
steps = 6
prompts_per_step = 3
out = "{out}"
algo = "{algo}"
sampling = {{ group_size = 2, max_tokens = 4 }}
lora = {{ rank = 4, alpha = 8 }}
parity = {{ probe = false }}
"""
FILES: dict[str, Any] = {
    "prompts": [{"prompt": f"say {i}", "answer": str(i)} for i in range(12)],
    "sft": [{"prompt": f"say {i}", "completion": "it"} for i in range(12)],
    "empty": [],
    "questions": [{"question": "1+1", "answer": "2"}],
    "hole": [{"prompt": "a"}, {"prompt": None}],
    "number": [{"prompt": 3}],
    "mixed": [{"prompt": "a", "answer": "3"}, {"prompt": "b", "answer": 3}],
    "unanswered": [{"prompt": "a", "answer": "3"}, {"prompt": "b", "answer": None}],
    "half": [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}],
    "one-sided": [{"prompt": "a", "chosen": "b"}],
    "unlike": [{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}],
}
REWARDS = """
def good(completions, **columns): return [float(len(text) % 3) for text in completions]
def same(completions, **columns): return [1.0] * len(completions)
def short(completions, **columns): return [1.0]
def words(completions, **columns): return ["good"] * len(completions)
def single(completions, **columns): return 1.0
def endless(completions, **columns): return [float("inf")] * len(completions)
def raises(completions, **columns): raise RuntimeError("grader down")
def none(completions, **columns): return [None] * len(completions)
def solution(completions, solution): return [1.0] * len(completions)
def later(completions, trainer_state, **columns):
    if trainer_state.global_step == 1: raise RuntimeError("grader down")
    return good(completions)
"""
LOSS = """
from dataclasses import dataclass
import torch
from rlft.algos.loss import Loss
@dataclass(frozen=True)
class Mine(Loss):
    needs_sampler = {needs_sampler}
    def __call__(self, logprobs, batch):
        return {loss}, {{}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, seed in (("model", 3), ("other", 4)):
        tiny_model(seed=seed).unload().save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (folder / "rewards.py").write_text(REWARDS)
    for name, needs_sampler, loss in (
        ("needy", True, "logprobs.sum()"),
        ("nan", False, "(logprobs * float('nan')).sum()"),
        ("huge", False, "torch.empty(2**60).sum()"),
        ("bug", False, "logprobs[0, 0]"),
    ):
        (folder / f"{name}_loss.py").write_text(LOSS.format(needs_sampler=needs_sampler, loss=loss))
    return folder


def run(home: Path, out: Path, *flags: str, command: str = "train", data: str = "prompts.jsonl") -> int:
    """`rlft COMMAND FILE FLAGS...` in this process; returns its exit code."""
    file = out.with_suffix(".toml")
    rewards, algo = ([f"{home}/rewards.py:good"], "grpo") if data == "prompts.jsonl" else ([], "sft")
    file.write_text(RUN.format(home=home, data=data, rewards=json.dumps(rewards), algo=algo, out=out))
    return main([command, str(file), *(flag.format(home=home) for flag in flags)])


SAMPLED = {
    "no dataset": (["--data.path={home}/gone.jsonl"], 'data.path = "{home}/gone.jsonl": no such file'),
    "no hub dataset": (["--data.path=/gone/d"], 'data.path = "/gone/d": no such file or folder'),
    "empty dataset": (["--data.path={home}/empty.jsonl"], 'data.path = "{home}/empty.jsonl": the dataset is empty'),
    "torn dataset": (["--data.path={home}/torn.jsonl"], "{home}/torn.jsonl, line 2: not valid JSON"),
    "no prompt column": (
        ["--data.path={home}/questions.jsonl"],
        "the dataset has the columns question, answer; want prompt, .* Map yours with data.columns, for example",
    ),
    "no mapped column": (
        ["--data.path={home}/questions.jsonl", "--data.columns", "prompt", "problem"],
        'data.columns: prompt = "problem", but row 0 has no such column; it has question, answer',
    ),
    "no column for a reward": (
        ["--rewards.0.use={home}/rewards.py:solution"],
        "asks for solution; the data has answer. Map a column with data.columns, or set rewards.args",
    ),
    "null prompt": (
        ["--data.path={home}/hole.jsonl"],
        "row 1: column prompt is missing or null, .*; fix the row or leave it out",
    ),
    "a number as prompt": (["--data.path={home}/number.jsonl"], "row 0: column prompt is 3: want a string or messages"),
    "long prompt": (
        ["--data.max_prompt_tokens=3", "--data.long_prompts=error"],
        'row 0: the prompt has 24 tokens, data.max_prompt_tokens is 3; raise it, or set data.long_prompts = "drop"',
    ),
    "all prompts long": (
        ["--data.max_prompt_tokens=3"],
        r"every prompt is longer than data.max_prompt_tokens = 3 \(12 rows\): raise it",
    ),
    "unknown algorithm": (
        ["--algo.name=gprpo"],
        'algo.name = "gprpo": unknown. Did you mean "grpo"\\? Known: .*grpo, .*sft',
    ),
    "unknown advantage": (
        ["--algo.advantage=group_nrom"],
        'algo.advantage = "group_nrom": unknown. Did you mean "group_norm"\\? Known: ',
    ),
    "unknown reward": (
        ["--rewards.0.use=nubmer"],
        'rewards = "nubmer": unknown. Did you mean "number"\\? Known: .*exact, ',
    ),
    "rewards too few": (
        ["--rewards.0.use={home}/rewards.py:short"],
        'reward "short" returned 1 rewards for 6 completions',
    ),
    "rewards as text": (
        ["--rewards.0.use={home}/rewards.py:words"],
        """reward "words" returned 'good' for completion 0, want a float or None""",
    ),
    "no list of rewards": (
        ["--rewards.0.use={home}/rewards.py:single"],
        'reward "single" returned float, want a list with one float or None per completion',
    ),
    "infinite rewards": (
        ["--rewards.0.use={home}/rewards.py:endless"],
        'reward "endless" .*returned inf for completion [0-9]+, want a finite float, None or nan',
    ),
    "a reward that fails at once": (
        ["--rewards.0.use={home}/rewards.py:raises"],
        'reward "raises" failed on every completion of its first call: RuntimeError: grader down',
    ),
    "group of one": (
        ["--sampling.group_size=1"],
        'sampling.group_size = 1 with algo.advantage = "group_norm": .* set sampling.group_size to 2 or more',
    ),
    "pairs from an engine": (
        ["--algo.name=dpo"],
        'algo.name = "dpo": learns from pairs, and the data has prompt, answer; give rows with chosen and rejected',
    ),
    "nothing recorded": (
        ["--engine.name=replay"],
        'engine.name = "replay": the data has no column of completions .*; set "eager"',
    ),
    "LoRA on nothing": (
        ["--lora.targets", "q_prjo"],
        r"lora.targets = \('q_prjo',\): q_prjo matches no linear layer of the text decoder; it has .* v_proj$",
    ),
    "LoRA on the head": (
        ["--lora.targets", "lm_head"],
        "lora.targets = 'lm_head': an adapter on the head or the embedding is not supported",
    ),
    "no adapter to continue": (["--lora.resume_from=/gone"], 'lora.resume_from = "/gone": no PEFT adapter there'),
    "no model folder": (["--model=/gone/model"], 'model = "/gone/model": no such folder'),
    "a file as model": (
        ["--model={home}/rewards.py"],
        'model = "{home}/rewards.py": a file; give the folder of a saved model, or a .gguf file',
    ),
    "greedy training": (["--sampling.temperature=0"], "sampling.temperature = 0: want above 0 in training"),
    "a word for a number": (["--optim.lr=fast"], 'optim.lr = "fast": want a number'),
    "a flag without value": (
        ["--steps", "--seed=1"],
        "--steps: a value is missing; want --steps VALUE, or --steps=VALUE",
    ),
    "a mistyped flag": (["--optim.lrr=1"], 'optim.lrr: unknown setting. Did you mean "lr"\\?'),
}
"""Name -> flags, and the message; exit code 2."""


@pytest.mark.parametrize("name", SAMPLED)
def test_a_setting_or_dataset_that_is_wrong(name: str, home: Path, tmp_path: Path, capsys) -> None:
    flags, message = SAMPLED[name]
    assert run(home, tmp_path / "run", *flags) == 2
    shown = capsys.readouterr().err
    assert re.search(message.replace("{home}", str(home)), shown), shown
    assert "Traceback" not in shown
    # Nothing is in the way of the next start.
    assert not (tmp_path / "run" / "config.toml").exists() or "first call" in message or "returned" in message


RECORDED = {
    "a pair without a side": ("half", "dpo", "row 1: column rejected is missing or null, but row 0 has chosen, reject"),
    "pairs without a side": ("one-sided", "dpo", "has a column chosen and none called rejected: a pair needs both"),
    "a pair of text and messages": ("unlike", "dpo", "row 0: chosen and rejected must both be strings or both be"),
    "no pairs": ("sft", "dpo", 'algo.name = "dpo": learns from pairs, and the data has prompt, completion; give'),
    "recorded groups of one": ("sft", "grpo", 'algo.advantage = "group_norm": the data has one completion per row'),
    "no sampler log-probs": ("sft", "{home}/needy_loss.py", "needs sampler log-probs, which recorded completions"),
}
"""Name -> data, algorithm, message; exit code 2."""


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_data_that_does_not_fit_the_algorithm(name: str, home: Path, tmp_path: Path, capsys) -> None:
    data, algo, message = RECORDED[name]
    assert run(home, tmp_path / "run", f"--algo.name={algo}", data=f"{data}.jsonl") == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_needs_a_gpu_says_what_to_set_instead(home: Path, tmp_path: Path, capsys) -> None:
    for flag, message in {
        "--device=cuda": 'device = "cuda": this machine shows PyTorch no GPU; set device = "cpu" or see `rlft env`',
        "--quantization=nf4": "has 32 inputs, and bitsandbytes computes on a CPU only with a multiple of 64; use a GPU",
    }.items():
        assert run(home, tmp_path / "run", flag) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("have", [None, "0.49.1"])
def test_bitsandbytes_missing_or_too_old_gives_the_pip_command(have, home, tmp_path, capsys, monkeypatch) -> None:
    version = environment.version
    monkeypatch.setattr(environment, "version", lambda package: have if package == "bitsandbytes" else version(package))
    assert run(home, tmp_path / "run", "--quantization=nf4") == 2
    what = "bitsandbytes 0.49.1 is outside the tested window >=0.50" if have else "bitsandbytes is not installed"
    assert f"{what}: pip install 'bitsandbytes>=0.50'" in capsys.readouterr().err


def test_an_adapter_of_another_base_does_not_fit(home: Path, tmp_path: Path, capsys) -> None:
    wide = tiny_model(layers=3)
    wide.save_pretrained(tmp_path / "wide")
    assert run(home, tmp_path / "run", f"--lora.resume_from={tmp_path}/wide") == 2
    assert "the adapter does not fit this base: 14 of its tensors have no place in it" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_refused_and_left_alone(home, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert run(home, out, "--steps=1") == 0
    folder = out / "checkpoints" / "step-000001"

    def resumed(message: str, *flags: str) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        capsys.readouterr()
        assert run(home, out, "--steps=2", "--resume", *flags) == 2
        shown = capsys.readouterr().err
        assert re.search(message, shown), shown
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    resumed("does not fit this run: base of the checkpoint is .* here it is .* --out", "--model={home}/other")
    resumed("does not fit this run: lora of the checkpoint is 'rank 4, .* here it is 'rank 8", "--lora.rank=8")
    state, tensors = folder / "state.json", folder / "trainer.safetensors"
    whole = {path: path.read_bytes() for path in (state, tensors)}
    state.write_text(whole[state].decode().replace('"format": 2', '"format": 99'))
    resumed(r"a checkpoint in format 99, and this rlft reads format 2; use the rlft that wrote it \(0\.1\.0\)")
    flipped = bytes([*whole[tensors][:-1], whole[tensors][-1] ^ 1])
    for path, data in ((state, b"{}"), (tensors, whole[tensors][:-9]), (tensors, flipped)):
        path.write_bytes(data)
        resumed("step-000001: damaged checkpoint: .*; remove that folder and resume from the one before it")
        path.write_bytes(whole[path])
        state.write_bytes(whole[state])
    assert run(home, out, "--steps=2", "--resume") == 0
    # The checkpoint before a damaged one is where the run goes on.
    (out / "checkpoints" / "step-000002" / "state.json").write_text("")
    assert run(home, out, "--steps=3", "--resume") == 2
    shutil.rmtree(out / "checkpoints" / "step-000002")
    assert run(home, out, "--steps=3", "--resume") == 0


def test_equal_rewards_are_a_warning_and_the_step_is_taken(home: Path, tmp_path: Path, capsys) -> None:
    assert run(home, tmp_path / "run", "--rewards.0.use={home}/rewards.py:same", "--steps=1") == 0
    assert "every group has equal rewards (mean 1), so they teach nothing: use tasks that" in capsys.readouterr().out


def test_rewards_that_are_all_invalid_stop_the_run(home: Path, tmp_path: Path, capsys) -> None:
    assert run(home, tmp_path / "none", "--rewards.0.use={home}/rewards.py:none") == 3
    wanted = (
        "every reward of this step is invalid, so there is nothing to learn from: no reward function applied to 6 of 6"
    )
    assert wanted in capsys.readouterr().err
    assert run(home, tmp_path / "later", "--rewards.0.use={home}/rewards.py:later", "--checkpoint.every=1") == 3
    assert re.search(r"(?s)every reward of this step is invalid, .*later.*grader down", capsys.readouterr().err)
    assert (tmp_path / "later" / "checkpoints" / "step-000001").is_dir(), "what was done before is kept"


def test_gradients_that_are_not_finite_are_skipped_counted_and_stop_after_five(home, tmp_path, capsys) -> None:
    assert run(home, tmp_path / "run", "--algo.name={home}/nan_loss.py", data="sft.jsonl") == 3
    assert "error: 5 updates in a row had a non-finite gradient (norm nan): lower optim.lr" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines] == [1, 2, 3, 4]


def test_out_of_memory_says_what_to_lower(home: Path, tmp_path: Path, capsys) -> None:
    assert run(home, tmp_path / "run", "--algo.name={home}/huge_loss.py", data="sft.jsonl") == 1
    shown = capsys.readouterr().err
    for name in (
        "packing.tokens_per_micro_batch (4096 tokens",
        "engine.batch_size (64 sequences)",
        "sampling.max_tokens (4)",
    ):
        assert name in shown


def test_what_nobody_expected_is_a_short_traceback_and_whose_file_it_came_from(home, tmp_path, capsys) -> None:
    assert run(home, tmp_path / "run", "--algo.name={home}/bug_loss.py", data="sft.jsonl") == 1
    lines = capsys.readouterr().err.splitlines()
    assert "no step was finished. Start again with: rlft train" in lines[-1]
    assert lines[-2] == f"It was raised in {home}/bug_loss.py, which is not a file of rlft: look there first."
    assert lines[-3].startswith("error: IndexError: too many indices")
    assert sum('  File "' in line for line in lines) == 4


def test_all_faults_of_a_run_come_at_once_before_anything_is_loaded(home: Path, tmp_path: Path, capsys) -> None:
    assert run(home, tmp_path / "run", "--sampling.group_size=1", "--rewards.0.use=nubmer", "--eval.rows=99") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: 3 problems:\n  1. ") and "loading" not in shown.out
