"""What a user reads when a reward function is not what rlft wants: what is wrong, what there is, what to write."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_rewards import rollouts

from rlft.config.data import Reward
from rlft.config.files import to_toml
from rlft.config.run import Config
from rlft.config.trl_names import TRL_REWARDS
from rlft.errors import ConfigError, RewardError
from rlft.rewards.score import build_rewards, check_invalid, score
from rlft.types import FinishReason, Prompt, Rollout


def raised(function: Any, made: list[Rollout] | None = None) -> str:
    functions = build_rewards([function])
    with pytest.raises(RewardError) as caught:
        score(made or rollouts(2), functions, {})
    return str(caught.value)


def conversational() -> list[Rollout]:
    chat = [{"role": "user", "content": "hi"}]
    return [
        Rollout(Prompt((1,), {"prompt": chat}, 0, tuple(chat)), (1,), (True,), None, "text", FinishReason.STOP, 0, 0, 0)
    ]


def test_nan_for_every_row_is_called_nan() -> None:
    nans, nones = lambda completions, **_: [math.nan] * 2, lambda completions, **_: [None] * 2
    functions = build_rewards([nans])
    functions[0].name = "broken"
    _, parts = score(rollouts(2), functions, {})
    line = 'no reward function applied to 2 of 2 completions (nan from "broken"), which are left out'
    assert parts.faults() == [line]
    _, parts = score(rollouts(2), build_rewards([nones]), {})
    assert "2 of 2 completions (None)" in parts.faults()[0]
    with pytest.raises(RewardError) as caught:
        check_invalid([], 1.0, [line])
    assert str(caught.value) == f"every reward of this step is invalid, so there is nothing to learn from: {line}"


def test_a_mistyped_argument_is_answered_with_all_that_is_given() -> None:
    message = raised(lambda completions_ids: [1.0] * 2)
    assert 'Did you mean "completion_ids"?' in message
    assert "it gets answer, completion_ids, completions, log_extra, log_metric, prompts, trainer_state" in message
    assert "Did you mean" not in raised(lambda solution: [1.0] * 2)


STRINGS = [
    lambda completions, **_: [float(len(completion[0]["content"])) for completion in completions],
    lambda completions, **_: [float(len(completion["content"])) for completion in completions],
    lambda completions, **_: [float(len(completion.get("content"))) for completion in completions],
]
MESSAGES = [
    lambda completions, **_: [float(completion.strip() == "a") for completion in completions],
    lambda completions, **_: [float(re.search("a", completion) is not None) for completion in completions],
]


@pytest.mark.parametrize("i", range(3))
def test_a_function_that_wants_messages_is_told_that_it_got_strings(i: int) -> None:
    assert raised(STRINGS[i]).endswith(
        "completions are strings here, because the prompts are strings: use the text itself, or give the prompts as "
        "lists of messages"
    )


@pytest.mark.parametrize("i", range(2))
def test_a_function_that_wants_strings_is_told_that_it_got_messages(i: int) -> None:
    assert 'the text is completion[-1]["content"]' in raised(MESSAGES[i], conversational())


def test_no_hint_where_the_fault_is_another() -> None:
    for function in (lambda completions, **_: [][0], lambda completions, **_: len(7)):  # type: ignore[arg-type]
        said = raised(function)
        assert "here, because" not in said


def test_a_file_without_a_function_lists_its_functions_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "rew.py"
    path.write_text("raise SystemExit\nimport os\ndef _hidden(): ...\ndef by_tokens(): ...\nasync def fmt(): ...\n")
    with pytest.raises(ConfigError) as caught:
        build_rewards([str(path)])
    assert str(caught.value) == (f'rewards = "{path}": which function of it? It has by_tokens, fmt; give "{path}:fmt"')
    with pytest.raises(ConfigError, match=r"No such file or directory \(looked for it from"):
        build_rewards([str(tmp_path / "none.py")])
    path.write_text("def (")
    with pytest.raises(ConfigError, match="is no Python: invalid syntax"):
        build_rewards([str(path)])


@pytest.mark.parametrize("name", TRL_REWARDS)
def test_trls_name_of_a_reward_is_answered_with_ours(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_rewards([name])
    assert str(caught.value) == f'rewards = "{name}": {TRL_REWARDS[name]}'


def test_a_timeout_may_be_infinite_and_never_nan_or_negative() -> None:
    assert Reward("number", timeout="inf").timeout == math.inf  # type: ignore[arg-type]
    for wrong in (math.nan, -1.0, 0.0, -math.inf, True):
        with pytest.raises(ConfigError, match=r"rewards.timeout = "):
            Reward("number", timeout=wrong)
    with pytest.raises(ConfigError, match=r"rewards.weight = inf"):
        Reward("number", weight=math.inf)


def test_a_config_with_all_settings_of_a_reward_is_read_as_it_was_written(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"timeout": math.inf, "memory_mb": 100, "file_mb": 5, "env": ("A_KEY",)}
    reward = Reward("number", 0.5, network=False, batch="group", args={"a": 1}, **settings)
    cfg = Config(model="m", data="d.jsonl", out="o", steps=1, rewards=(reward,))  # type: ignore[arg-type]
    (tmp_path / "run.toml").write_text(to_toml(cfg))
    assert Config.load(tmp_path / "run.toml").rewards == (reward,)
