"""Secrets of a config: found by the words of their names, shown nowhere, and read from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlft.config import secrets
from rlft.config.data import Reward
from rlft.config.files import to_toml
from rlft.config.run import Config
from rlft.errors import ConfigError

KEY = "sk-live-123"
SECRET = (
    "key api_key apiKey APIKey OPENAI_API_KEY x-api-key apikey api_keys api_key_2 key1 aws_secret_access_key "
    "token hf_token hfToken token_openai access_tokens auth Authorization auth_header bearer password "
    "db_password passwd passphrase client_secret credentials service_credentials_json session_cookie"
)
PLAIN = (
    "max_tokens tokens_per_micro_batch stop_token_ids pad_token eos_token_id max_token token_mean token_count "
    "tokens num_key_value_heads answer_key sort_key key_column key_path api_key_file api_key_env keyword keys "
    "monkey turkey author authors tokenizer secretary passing"
)


@pytest.mark.parametrize("name", SECRET.split())
def test_the_name_of_a_secret(name: str) -> None:
    assert secrets.secret(name)


@pytest.mark.parametrize("name", PLAIN.split())
def test_a_name_that_only_looks_like_one(name: str) -> None:
    assert not secrets.secret(name)


def test_no_setting_of_a_config_is_a_secret() -> None:
    from rlft.config.section import paths

    assert [path for path in paths() if secrets.secret(path.rpartition(".")[2])] == []


def config(args: dict[str, Any]) -> Config:
    return Config("m", "d", "out", rewards=[Reward("number", args=args)], steps=1)


@pytest.mark.parametrize(
    "args",
    [
        {"api_key": KEY},
        {"options": {"headers": {"Authorization": f"Bearer {KEY}"}}},
        {"clients": [{"name": "a", "token": KEY}]},
        {"credentials": {"user": KEY, "all": [KEY]}},
        {"url": f"https://me:{KEY}@host/v1"},
    ],
)
def test_a_secret_is_in_nothing_that_is_made_of_a_config(args: dict[str, Any]) -> None:
    cfg = config(args)
    assert cfg.rewards[0].args == args, "the function gets it"
    for text in (to_toml(cfg), repr(cfg), repr(cfg.rewards), str(cfg.rewards[0])):
        assert KEY not in text and secrets.MASK in text
    assert secrets.literals(args, "rewards[0].args") and KEY in "".join(secrets.values(args))


def test_a_number_is_a_secret_too_and_a_truth_value_is_none() -> None:
    assert secrets.masked({"password": 1234, "auth": True, "max_tokens": 5}) == {
        "password": secrets.MASK,
        "auth": True,
        "max_tokens": 5,
    }


def test_columns_are_names_and_no_secrets() -> None:
    cfg = Config("m", {"path": "d", "columns": {"key": "answer"}}, "out", steps=1)
    assert 'key = "answer"' in to_toml(cfg)


def test_a_wrong_value_is_not_repeated_where_it_is_a_secret() -> None:
    with pytest.raises(ConfigError) as error:
        Config("m", "d", "out", rewards=[{"use": "number", "args": [{"api_key": KEY}]}], steps=1)  # type: ignore[list-item]
    assert KEY not in str(error.value) and secrets.MASK in str(error.value)


def test_a_torn_file_is_not_quoted(tmp_path: Path) -> None:
    for name, text in {"a.yaml": f"api_key: {KEY}: b\n", "a.toml": f'api_key = "{KEY}\n'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match="line 1") as error:
            Config.load(tmp_path / name)
        assert KEY not in str(error.value)


def test_a_reference_is_written_as_it_is_and_read_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    args = {"api_key": "env:MY_KEY", "more": [{"b": "env:MY_KEY"}]}
    assert secrets.resolved(args, "args") == {"api_key": KEY, "more": [{"b": KEY}]}
    assert 'api_key = "env:MY_KEY"' in to_toml(config(args))
    assert secrets.values(args) == [KEY] and not secrets.literals(args, "args")
    assert list(secrets.problems(args, "args")) == []


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_missing_or_empty_is_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    sentence = 'args.api_key = "env:MY_KEY": the environment variable MY_KEY is not set, or empty; set it before'
    assert [text for text in secrets.problems({"api_key": "env:MY_KEY"}, "args") if sentence in text]
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        secrets.resolved({"api_key": "env:MY_KEY"}, "args")


def test_what_was_masked_or_mistyped_is_not_taken_for_a_value() -> None:
    masked = [{"api_key": secrets.MASK}, {"url": f"https://me:{secrets.MASK}@host"}]
    for args in masked:
        assert ["was masked when this file was written" in text for text in secrets.problems(args, "args")] == [True]
    assert "want" in "".join(secrets.problems({"api_key": "env:MY-KEY"}, "args"))
    assert list(secrets.problems({"pattern": secrets.MASK, "text": "env: x"}, "args")) == []
