"""`rlft reward-check` as a user calls it: what it scores, what it prints, its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import records
from tiny import tiny_model, tiny_tokenizer

from rlft.cli.main import main
from rlft.config.run import Config
from rlft.rewards.score import build_rewards, score
from rlft.runs.folder import Run
from rlft.runs.tables import shown_prompt
from rlft.types import Prompt, Rollout

REWARDS = """
def right(completions, answer, **kwargs):
    return [None if a == "?" else float(c.endswith(a)) for c, a in zip(completions, answer)]

def fails_on_3(completions, answer, **kwargs):
    if "3" in answer: raise ValueError("no [3] here")
    return [0.5] * len(completions)

def fails(completions): raise KeyError("always")
def longer(completions, completion_ids): return [len(ids) for ids in completion_ids]
def turns(prompts, completions): return [len(p) + len(c) for p, c in zip(prompts, completions)]
"""

CONFIG = """
model = "model"
data = { path = "prompts.jsonl", columns = { prompt = "question" }, system = "Be short." }
rewards = ["my_rewards.py:right", { use = "my_rewards.py:longer", weight = 0.1 }]
steps = 1
out = "run"
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(REWARDS)
    Path("run.toml").write_text(CONFIG)

    def rows(name: str, *made: dict) -> None:
        Path(name).write_text("\n".join(map(json.dumps, made)))

    rows("prompts.jsonl", *({"question": f"say {i}", "answer": str(i)} for i in range(5)))
    rows(
        "answered.jsonl",
        *({"prompt": f"say {i}", "answer": "?3"[i] if i < 2 else "2", "completion": f"it is {i}"} for i in range(4)),
    )
    rows("pairs.jsonl", {"prompt": "2+2", "chosen": "4", "rejected": "5", "answer": "4"})
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "it is 7"}]
    rows("chat.jsonl", {"messages": [*chat, {"role": "user", "content": "go on"}], "answer": "7"})
    return tmp_path


def check(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[list[str]], str]:
    """Exit code, the words of each line, and stderr."""
    code = main(["reward-check", *args])
    captured = capsys.readouterr()
    return code, [line.split() for line in captured.out.splitlines()], captured.err


def test_recorded_completions_are_scored_and_shown_with_each_functions_reward(capsys) -> None:
    code, lines, _ = check(capsys, "my_rewards.py:right", "--data", "answered.jsonl", "--rows", "3")
    assert code == 0
    assert lines[0] == ["prompt", "completion", "right", "total"]
    assert [line[-2:] for line in lines[1:4]] == [["none", "none"], ["0", "0"], ["1", "1"]]
    assert lines[1][:5] == ["say", "0", "it", "is", "0"]
    assert lines[4][:2] == ["function", "weight"] and lines[5][:6] == ["right", "1", "0.5", "1", "0", "1"]
    assert 0 < float(lines[5][6]) < 1
    assert " ".join(lines[6]).startswith("no reward function applied to 1 of 3 completions")


def test_a_function_that_fails_on_a_row_is_shown_and_exits_with_2(capsys) -> None:
    code, lines, _ = check(capsys, "my_rewards.py:fails_on_3", "--data", "answered.jsonl")
    assert code == 2
    assert [line[-1] for line in lines[1:5]] == ["0.5", "invalid", "0.5", "0.5"]
    assert "failed on 1 of 4 completions" in " ".join(lines[7]) and "no [3] here" in " ".join(lines[7])
    code, _, said = check(capsys, "my_rewards.py:fails", "--data", "answered.jsonl")
    assert code == 2 and "failed on every completion of its first call: KeyError: 'always'" in said


def test_both_sides_of_a_pair_and_the_last_turn_of_a_conversation(capsys) -> None:
    _, lines, _ = check(capsys, "my_rewards.py:right", "--data", "pairs.jsonl")
    assert [line[-1] for line in lines[1:3]] == ["1", "0"]
    _, lines, _ = check(capsys, "my_rewards.py:right", "--data", "pairs.jsonl", "--completion", "answer")
    assert [line[-1] for line in lines[1:2]] == ["1"] and lines[2][0] == "function"
    code, lines, _ = check(capsys, "my_rewards.py:turns", "--data", "chat.jsonl")
    assert code == 0 and lines[1] == ["hi", "it", "is", "7", "2", "2"]  # one message before, one message long


def test_rows_without_a_completion_say_what_is_needed(capsys) -> None:
    code, _, said = check(capsys, "my_rewards.py:right", "--data", "prompts.jsonl")
    assert code == 2 and "want prompt, prompt + completion" in said  # the config maps the column, nothing else does
    code, _, said = check(capsys, "run.toml", "--rows", "1")
    assert code == 2 and "the rows have no completion to score" in said and "--completion answer" in said


def test_a_config_gives_rewards_data_and_where_asked_for_the_tokenizer(home: Path, capsys) -> None:
    tiny_tokenizer().save_pretrained(home / "model")
    tiny_model().unload().config.save_pretrained(home / "model")
    code, lines, _ = check(capsys, "run.toml", "--completion", "answer", "--rows", "2")
    assert code == 0 and lines[0] == ["prompt", "completion", "right", "longer", "total"]
    assert lines[1] == ["say", "0", "0", "1", "1", "1.1"]  # one character is one token
    code, _, said = check(capsys, "my_rewards.py:longer", "--data", "answered.jsonl")
    assert code == 2 and 'reward "longer" wants completion_ids, which need a tokenizer' in said


@pytest.fixture
def run(home: Path) -> Run:
    """A run of run.toml with the rollouts of two steps."""
    run = Run.create(home / "run")
    run.write_config(CONFIG)
    for step in (1, 2):
        made = []
        for i in range(3):
            row = {"prompt": f"say {i}", "answer": str(i)}
            prompt = Prompt((1,), row, i, ({"role": "user", "content": f"say {i}"},))
            ids = tuple(range(step + i))
            made.append(Rollout(prompt, ids, (True,) * len(ids), None, f"step {step}: {2 * i}", "stop", 0, step - 1, 0))
        run.write_rollouts(step, records.samples(made, [0.0] * 3, {}, [0.0] * 3))
    return run


def test_a_runs_completions_are_scored_with_their_rows_and_ids(run: Run, capsys) -> None:
    code, lines, _ = check(capsys, "run.toml", "--run", "run")
    assert code == 0
    assert [line[-3:] for line in lines[1:4]] == [["1", "2", "1.2"], ["0", "3", "0.3"], ["0", "4", "0.4"]]
    code, lines, _ = check(capsys, "my_rewards.py:right", "--run", "run", "--step", "1", "--rows", "2")
    assert code == 0 and lines[1][2:5] == ["step", "1:", "0"] and lines[3][0] == "function"


def test_a_runs_conversations_find_their_rows_with_the_system_message(home: Path, capsys) -> None:
    chat = [{"role": "user", "content": "hi"}]
    (home / "prompts.jsonl").write_text(json.dumps({"question": chat, "answer": "7"}))
    prompt = Prompt((1,), {"prompt": chat}, 0, ({"role": "system", "content": "Be short."}, *chat))
    assert "Be short." in shown_prompt(prompt)
    run = Run.create(home / "run")
    run.write_config(CONFIG)
    run.write_rollouts(
        1, records.samples([Rollout(prompt, (1,), (True,), None, "7", "stop", 0, 0, 0)], [0.0], {}, [0.0])
    )
    code, lines, _ = check(capsys, "my_rewards.py:turns", "--run", "run")
    assert code == 0 and lines[1][-1] == "3"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["my_rewards.py:right"], "give the rows to score: --data PATH"),
        (["my_rewards.py:right", "--run", "run", "--step", "9"], "--step 9: run holds rollouts of the steps 1 to 2"),
        (["my_rewards.py:right", "--run", "run", "--data", "answered.jsonl"], None),
        (["my_rewards.py:right", "--run", "run", "--data", "pairs.jsonl"], "has no row with the prompt 'say 0'"),
        (["my_rewards.py:right", "--data", "pairs.jsonl", "--step", "1"], "--step 1: a step of which run?"),
        (["my_rewards.py:right", "--run", "run", "--completion", "answer"], "give one of them"),
        (["my_rewards.py:right", "--data", "pairs.jsonl", "--completion", "no"], "row 0 has no such column"),
        (["my_rewards.py:rihgt", "--data", "pairs.jsonl"], 'has no "rihgt". Did you mean "right"?'),
        (["nubmer", "--data", "pairs.jsonl"], 'Did you mean "number"?'),
    ],
)
def test_what_is_missing_is_named(args: list[str], said: str | None, run: Run, capsys) -> None:
    code, _, err = check(capsys, *args)
    assert (code, err) == (0, "") if said is None else code == 2 and said in err


def test_it_scores_as_training_does(run: Run, capsys) -> None:
    cfg = Config.load("run.toml")
    functions = build_rewards(cfg.rewards)
    saved = run.read_rollouts(2)
    made = [
        Rollout(
            Prompt((1,), {"prompt": s["prompt"], "answer": s["prompt"][-1]}, 0),
            tuple(s["completion_ids"]),
            (True,) * s["tokens"],
            None,
            s["completion"],
            "stop",
            0,
            1,
            0,
        )
        for s in saved
    ]
    total, _ = score(made, functions, {"global_step": 1})
    for function in functions:
        function.close()
    _, lines, _ = check(capsys, "run.toml", "--run", "run")
    assert [float(line[-1]) for line in lines[1:4]] == pytest.approx(total.tolist())
