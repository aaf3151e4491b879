"""Built-in rewards that read text: number, exact, format, tags, repetition; what a run gives them and says of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, tiny_model, tiny_tokenizer

from rlft.config import resolve
from rlft.config.data import Data, Reward, Sampling
from rlft.config.run import Config, Lora, Parity
from rlft.errors import DataError
from rlft.rewards.builtin.exact import exact
from rlft.rewards.builtin.number import number, read
from rlft.rewards.builtin.repetition import repetition
from rlft.rewards.builtin.tags import tags
from rlft.rewards.programs.cases import COLUMNS
from rlft.rewards.rows import pass_opened
from rlft.rewards.score import BUILTIN, build_rewards
from rlft.rewards.worker import signature
from rlft.runs.folder import Run
from rlft.trainer.loop import train
from rlft.trainer.validate import problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 1,000\nthat is all 3", 1000),
        (r"\boxed{72}, checked 2 times", 72),
        ("The answer is 72, because 5 times 2 is 10", 72),
        ("the answer is 3 + 4 = 7", 7),
        ("**Answer:** 42 (page 3)", 42),
        ("<answer>8</answer> 9", 8),
        (r"\boxed{3}, no: \boxed{4}", 4),
        (r"\boxed{x = \frac{1}{2}}", 0.5),
        (r"$-\dfrac{3}{4}$", -0.75),
        (r"1\frac{1}{2}", 1.5),
        ("1 1/2 cups", 1.5),
        ("on 12/25/2024", 2024),
        ("about .5", 0.5),
        ("−7", -7),
        ("-$5", -5),
        (r"3 \times 10^{8} m", 3e8),
        ("6.5e-3", 0.0065),
        (r"1{,}250", 1250),
        (r"1\,250", 1250),
        (r"\boxed{72", 72),
        ("<answer>8", 8),
        ("####\n7", None),
        ("3/0", None),
        ("9" * 5000, None),
        (r"\boxed{none} of the 3", None),
        ("", None),
    ],
)
def test_number_reads_the_shapes_that_models_write(text: str, value: float | None) -> None:
    found = read(text)
    assert (found and float(found.value)) == value


@pytest.mark.parametrize(
    "part", ["<answer>", "\\boxed{", "#### ", "answer is ", "1/", "1,", "1 ", "5e", "-", "\\frac{1", "\\text{"]
)
def test_number_reads_a_long_text_of_one_part_in_time(part: str) -> None:
    start = time.process_time()
    read(part * (60_000 // len(part)))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "answer",
    [
        72,
        72.0,
        "72",
        " 72.\n",
        "$72",
        "$72$",
        "She has 9 * 8 = <<9*8=72>>72.\n#### 72",
        r"so \boxed{72}",
        "The answer is 72.",
    ],
)
def test_number_reads_the_shapes_of_datasets(answer: Any) -> None:
    assert number(completions=["72", "it is 72.00", "73", "none"], answer=[answer] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_number_compares_percent_fractions_and_rounded_values() -> None:
    assert number(completions=["50%", "0.5", "50", "50%", "50%"], answer=["0.5", "50%", "50%", 50, "50%"]) == [1.0] * 5
    assert number(completions=["0.5", "5%"], answer=[50, "50%"]) == [0.0, 0.0]
    assert number(completions=["3/4", "0.75", "6/8"], answer=[0.75, "3/4", r"\frac{3}{4}"]) == [1.0] * 3
    assert number(completions=["0.333"], answer=["1/3"]) == [0.0]
    assert number(completions=["0.333", "0.3"], answer=["1/3"] * 2, tolerance=0.01) == [1.0, 0.0]


@pytest.mark.parametrize(
    "answer",
    ["He has 5 apples", "four", "", True, float("nan"), float("inf"), "x=5", r"\boxed{(3, 4)}", [5], "5 and 6"],
)
def test_an_answer_that_is_no_number_names_itself(answer: Any) -> None:
    with pytest.raises(DataError, match="answer is no number: "):
        number(completions=["5"], answer=[answer])
    assert number(completions=["5"], answer=[answer], strict=False) == [None]


def test_number_does_not_apply_to_a_row_without_an_answer() -> None:
    assert number(completions=["5", "5"], answer=[None, 5]) == [None, 1.0]


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("true", True, 1.0),
        ("False", False, 1.0),
        ("1", True, 0.0),
        ("true", "True", 0.0),
        ("1", 1.0, 1.0),
        ("1.0", 1, 1.0),
        ("1.50", 1.5, 1.0),
        ("007", 7, 1.0),
        ("1.0", "1", 0.0),
        ("one", 1, 0.0),
        ("sNaN", 1, 0.0),
        ("NYC", ["New York", "NYC"], 1.0),
        ("x", None, None),
    ],
)
def test_exact_compares_as_the_answers_type_says(text: str, answer: Any, reward: float | None) -> None:
    assert exact(completions=[text], answer=[answer]) == [reward]


def test_soft_tags_earn_shares_and_strict_tags_all_or_nothing() -> None:
    whole = "<think>\n2+2\n</think>\n<answer>4</answer>"
    texts = [whole, "<answer>4</answer>", "4", f"{whole}<think>", f"{whole} done", "<answer>4</answer><think>a</think>"]
    assert tags(completions=texts) == [1.0, 0.5, 0.0, 0.75, 1.0, 1.0]
    assert tags(completions=texts, strict=True) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert tags(completions=["<a.b>1</a.b>", "<axb>1</axb>"], elements=["a.b"], strict=True) == [1.0, 0.0]
    with pytest.raises(ValueError, match="want a list of names"):
        tags(completions=["x"], elements="think")


def test_repetition_is_minus_the_share_of_repeated_n_grams() -> None:
    assert repetition(completion_ids=[[7] * 100, list(range(100)), [7] * 39, []]) == [1 / 61 - 1, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="ngram = 0"):
        repetition(completion_ids=[[1]], ngram=0)


def rows(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def test_validate_names_the_first_row_whose_answer_is_no_number(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", [{"prompt": "q", "answer": right} for right in ("#### 5", "five", "6", "six")])
    cfg = Config(model="some/model", data=Data(data), out=str(tmp_path / "a"), steps=1, rewards=(Reward("number"),))
    (problem,) = problems(cfg)
    assert (
        problem.startswith("rewards = \"number\": row 1: answer is no number: 'five'; ")
        and "(2 of the first 4" in problem
    )
    lax = Reward("number", args={"strict": False})
    assert problems(Config(model="some/model", data=Data(data), out=str(tmp_path / "a"), steps=1, rewards=(lax,))) == []


def test_reward_check_shows_the_answer_that_is_no_number(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "5", "answer": "He has five"}])
    command = [sys.executable, "-m", "rlft", "reward-check", "number", "--data", data]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "answer is no number: 'He has five'" in done.stderr


def test_a_template_that_opens_a_tag_lets_format_and_tags_be_earned(tmp_path: Path) -> None:
    """Every completion is "<think>\\n" and more to `format`, though the model writes no tag."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model().unload().save_pretrained(tmp_path / "model")
    prompts = [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(4)]
    cfg = Config(
        model=str(tmp_path / "model"),
        data=Data(rows(tmp_path / "d.jsonl", prompts)),
        out=str(tmp_path / "run"),
        steps=1,
        prompts_per_step=2,
        rewards=(
            Reward("format", args={"pattern": "<think>\n.*"}),
            Reward("tags"),
            Reward("tags", args={"opened": ""}),
        ),
        sampling=Sampling(group_size=2, max_tokens=4),
        lora=Lora(rank=4, alpha=8),
        parity=Parity(probe=False),
    )
    train(cfg)
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (line["rewards/format/mean"], line["rewards/tags/mean"], line["rewards/tags_2/mean"]) == (1.0, 0.25, 0.0)
    command = [sys.executable, "-m", "rlft", "reward-check", "tags", "--run", str(tmp_path / "run")]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.splitlines()[1].split()[-1] == "0.25"
    assert Run.resume(str(tmp_path / "run")).rollout_steps() == [1]


def test_prompts_that_differ_in_their_last_tag_are_reported_and_change_nothing() -> None:
    (function,) = build_rewards(["tags"])
    try:
        note = pass_opened([function], ["assistant\n<think>\n", "assistant\n"])
        assert "some prompts end in '<think>\\n' and some do not" in note and function.args == {}
        assert pass_opened([function], ["assistant\n"]) == "" and function.args == {}
        assert "tags score '<think>\\n' + completion" in pass_opened([function], ["assistant\n<think>\n"])
        assert function.args == {"opened": "<think>\n"}
    finally:
        function.close()


def test_the_page_of_rewards_names_every_built_in_and_its_arguments_and_its_toml_is_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    table = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(table) == set(resolve.names_in(BUILTIN))
    given = {"prompts", "completions", "completion_ids", "log_metric", "log_extra", "answer", "task", "metadata"}
    columns = {*COLUMNS, "inputs", "outputs", "entry_point", "test_setup_code"}
    for name, line in table.items():
        arguments = signature(vars(resolve.module(name, BUILTIN, "rewards"))[name]).names
        assert set(re.findall(r"`(\w+)`", line.split("|")[4])) == set(arguments) - given - columns, name
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        for reward in tomllib.loads(block)["rewards"]:
            if isinstance(reward, dict):
                Reward(**reward)
