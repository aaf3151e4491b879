"""What `rlft validate` finds without loading a model: each problem in the user's words, and all of them at once."""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.cli.main import main
from rlft.config.files import to_toml
from rlft.config.run import Config
from rlft.runs.claim import TWICE
from rlft.runs.folder import Run
from rlft.trainer.validate import problems

REWARDS = """
def answers(completions, answer, **columns):
    return [0.0 for _ in completions]

def wants_solution(completions, solution, level, *, strict, weight=1.0):
    return [0.0 for _ in completions]

NOT_A_FUNCTION = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path


def config(folder: Path, **table: Any) -> Config:
    base = {
        "model": "some/model",
        "data": str(folder / "d.jsonl"),
        "out": str(folder / "runs" / "a"),
        "steps": 2,
        "rewards": [f"{folder}/my_rewards.py:answers"],
    }
    return Config(**{**base, **table})


def test_a_sound_run_has_no_problem(folder: Path) -> None:
    assert problems(config(folder)) == []
    assert problems(config(folder, rewards=[], data=str(folder / "sft.jsonl"), algo="sft")) == []
    assert not (folder / "runs").exists(), "looking must not make the folder"


def test_all_problems_are_found_at_once(folder: Path) -> None:
    cfg = config(
        folder,
        algo="gpro",
        rewards=["numbr", f"{folder}/my_rewards.py:missing"],
        lora={"resume_from": str(folder / "nowhere")},
        eval={"rows": 4},
    )
    found = problems(cfg)
    starts = [
        f'lora.resume_from = "{folder}/nowhere": no PEFT adapter there (adapter_config.json is missing)',
        'algo.name = "gpro": unknown. Did you mean ',
        "eval.rows = 4: the data has 4 rows and some must be left to train on; lower eval.rows",
        'rewards = "numbr": unknown. Did you mean "number"? Known: ',
        f'rewards = "{folder}/my_rewards.py:missing": {folder}/my_rewards.py has no "missing".',
    ]
    assert len(found) == len(starts), found
    for text, start in zip(found, starts, strict=True):
        assert text.startswith(start)


def one(cfg: Config, **options: bool) -> str:
    found = problems(cfg, **options)
    assert len(found) == 1, found
    return found[0]


def test_a_run_folder_is_used_once(folder: Path) -> None:
    cfg = config(folder)
    Path(cfg.out).mkdir(parents=True)
    assert problems(cfg) == [], "an empty folder is free"
    run = Run.create(cfg.out)
    run.write_config(to_toml(cfg))
    assert problems(cfg) == [], "no step of the run is finished"
    run.log(1, {"loss": 1.0})
    assert one(cfg) == f'out = "{cfg.out}": already holds a run; {TWICE}'
    for if_exists in ("resume", "overwrite", "number"):
        assert problems(dataclasses.replace(cfg, if_exists=if_exists)) == []
    assert problems(cfg, resume=True) == []


def test_there_must_be_a_run_to_resume(folder: Path) -> None:
    wanted = "holds no run to resume; leave out --resume, or give the folder of a run"
    cfg = config(folder)
    assert one(cfg, resume=True) == f'out = "{cfg.out}": {wanted}'
    Path(cfg.out).mkdir(parents=True)
    assert problems(cfg, resume=True) == [], "what a start leaves that was killed while loading"
    (Path(cfg.out) / "thesis.tex").write_text("x")
    assert one(cfg, resume=True) == f'out = "{cfg.out}": {wanted}'


def test_out_cannot_be_a_file_nor_lie_below_one(folder: Path) -> None:
    file = folder / "d.jsonl"
    assert one(config(folder, out=str(file))) == f'out = "{file}": is a file; give a folder'
    below = one(config(folder, out=str(file / "a")))
    assert below == f'out = "{file}/a": {file} cannot be written to; give another folder'


def test_a_setting_of_the_algorithm_is_checked(folder: Path) -> None:
    found = one(config(folder, algo={"name": "grpo", "clip_hi": 0.3}))
    assert found == 'algo.clip_hi: unknown setting. Did you mean "clip_high"?'


def test_a_group_of_one_has_no_baseline(folder: Path) -> None:
    single = {"group_size": 1}
    assert one(config(folder, sampling=single)) == (
        'sampling.group_size = 1 with algo.advantage = "group_norm": a group of one has advantage 0, so nothing is '
        "learned; set sampling.group_size to 2 or more"
    )
    assert problems(config(folder, sampling=single, algo={"name": "grpo", "advantage": "identity"})) == []


def test_sampled_completions_need_a_reward_unless_functions_come_from_python(folder: Path) -> None:
    cfg = config(folder, rewards=[])
    assert one(cfg).startswith("rewards is empty: completions are sampled, so name a reward function")
    assert problems(cfg, callables=True) == []
    found = problems(config(folder, rewards=[], eval={"rows": 2}))
    assert found[1].startswith("eval.rows = 2 but there is no reward to score with: set eval.rewards")


def test_a_loss_that_needs_sampler_log_probs_refuses_recorded_completions(folder: Path) -> None:
    (folder / "needy.py").write_text(
        "from dataclasses import dataclass\nfrom rlft.algos.loss import Loss\n@dataclass(frozen=True)\n"
        "class Needy(Loss):\n    needs_sampler = True\n    def __call__(self, logprobs, batch): ...\n"
    )
    (folder / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    cfg = config(folder, data=str(folder / "sft.jsonl"), rewards=[], algo=f"{folder}/needy.py")
    assert one(cfg).endswith("needs sampler log-probs, which recorded completions lack")


def test_replay_needs_recorded_completions(folder: Path) -> None:
    found = one(config(folder, engine={"name": "replay"}))
    assert found.startswith('engine.name = "replay": the data has no column of completions (completion, text, ')


def test_a_reward_that_asks_for_a_column_that_is_not_there_says_which_there_are(folder: Path) -> None:
    use = f"{folder}/my_rewards.py:wants_solution"
    assert one(config(folder, rewards=[{"use": use, "args": {"strict": True}}])) == (
        f'rewards = "{use}": asks for solution; the data has answer, level. Map a column with data.columns, or set '
        f"rewards.args; every function may take prompts, completions, completion_ids, trainer_state, log_metric, "
        f"log_extra"
    )


def test_what_a_reward_file_raises_is_shown_without_its_escapes_and_even_where_its_text_raises(folder: Path) -> None:
    (folder / "silent.py").write_text(
        "class Silent(BaseException):\n    def __str__(self): raise KeyError('no text')\nraise Silent\n"
    )
    (folder / "colours.py").write_text("raise ValueError('\\x1b[2J')\n")
    for name, said in (("silent", "Silent: <Silent whose str raises>"), ("colours", r"ValueError: \x1b[2J")):
        assert one(config(folder, rewards=[f"{folder}/{name}.py:f"])).endswith(f"importing it raised {said}")


def test_a_reward_that_is_no_function_or_cannot_be_imported_is_named(folder: Path) -> None:
    use = f"{folder}/my_rewards.py:NOT_A_FUNCTION"
    assert one(config(folder, rewards=[use])) == f'rewards = "{use}": not a function but int'
    (folder / "broken.py").write_text("import sys\nraise ValueError('no key')\n")
    use = f"{folder}/broken.py:f"
    assert one(config(folder, rewards=[use])) == f'rewards = "{use}": importing it raised ValueError: no key'
    (folder / "leaves.py").write_text("raise SystemExit(5)\n")
    use = f"{folder}/leaves.py:f"
    assert one(config(folder, rewards=[use])) == f'rewards = "{use}": importing it raised SystemExit: 5'


def test_a_module_beside_the_config_is_found_as_a_script_would_find_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "beside_rewards.py").write_text(REWARDS)
    (folder / "run.toml").write_text(to_toml(config(folder, rewards=["beside_rewards:answers"])))
    monkeypatch.chdir(folder)
    # The console script has no working folder on its path, unlike `python -m`.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(folder))])
    assert main(["validate", "run.toml"]) == 0, capsys.readouterr().out


def test_a_dataset_that_is_not_there_is_a_problem_of_the_data(folder: Path) -> None:
    assert "gone.jsonl" in one(config(folder, data=str(folder / "gone.jsonl")))


def test_more_held_out_rows_than_there_are_is_a_problem(folder: Path) -> None:
    cfg = config(folder, eval={"rows": 9, "data": str(folder / "d.jsonl")})
    assert one(cfg) == "eval.rows = 9: eval.data has 4 rows; lower eval.rows"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_problem(folder: Path) -> None:
    assert one(config(folder, device="cuda")).startswith('device = "cuda": this machine shows PyTorch no GPU')


def test_a_model_folder_that_is_not_there_is_a_problem(folder: Path) -> None:
    assert one(config(folder, model=f"{folder}/gone")) == f'model = "{folder}/gone": no such folder'
    assert one(config(folder, model=f"{folder}/m.gguf")) == f'model = "{folder}/m.gguf": no such file'


def test_validate_prints_its_verdict_or_the_problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "run.toml"
    path.write_text(to_toml(config(folder)))
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no problem found"
    assert main(["validate", str(path), "--show"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["model"] == "some/model"
    assert "clip_high = 0.2" in text
    assert text.endswith("# no problem found\n")
    assert f"no reward function was called: `rlft reward-check {path}` calls them" in text
    path.write_text(to_toml(config(folder, rewards=["number"])))
    assert main(["validate", str(path)]) == 0 and "reward-check" not in capsys.readouterr().out
    path.write_text(to_toml(dataclasses.replace(config(folder), model=f"{folder}/gone")))
    assert main(["validate", str(path), "--sampling.group_size=1"]) == 2
    head, model, group, *notes = capsys.readouterr().out.splitlines()
    assert "so a step draws each of them more than once" in notes[0]
    assert notes[1].startswith("the code that it names was imported to check it: rewards = ")
    assert head == "2 problems:"
    assert model == f'  model = "{folder}/gone": no such folder'
    assert group.startswith("  sampling.group_size = 1 with algo.advantage")


def test_faults_of_different_kinds_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that Config could find, one in the data, one in the rewards, and one that no file can hold."""
    file = tmp_path / "a.toml"
    file.write_text(
        f'model = "{tmp_path}/m"\ndata = "{tmp_path}/d.jsonl"\nrewards = ["numbr"]\nsteps = 1\nout = "{tmp_path}/o"\n'
        "sampling = { temperature = 0, top_k = 3 }\n"
    )
    assert main(["validate", str(file)]) == 2
    out = capsys.readouterr().out
    assert out.startswith("5 problems:")
    for text in ('m": no such', "d.jsonl", "numbr", "temperature = 0", "top_k = 3"):
        assert text in out
