"""A model and its data are held against each other before the model is loaded, under every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, tiny_model, tiny_tokenizer
from transformers import LlamaConfig

from rlft.cli.main import main
from rlft.trainer.limits import context_of

REWARDS = "def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 25,
            },
            100,
        ),
    ],
)
def test_the_context_takes_the_extension_of_rope_into_account(rope: dict[str, Any], context: int) -> None:
    config = LlamaConfig(max_position_embeddings=100, rope_parameters={"rope_theta": 10000.0, **rope})
    assert context_of(config) == context


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context of 512, one with an added token, one whose template has no system role; and rows."""
    folder = tmp_path_factory.mktemp("limits")
    model: Any = tiny_model(seed=3).unload()
    for name in ("model", "added", "strict"):
        tokenizer = tiny_tokenizer()
        if name == "added":
            tokenizer.add_tokens(["<answer>"])
        if name == "strict":
            tokenizer.chat_template = (
                "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
            )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "rewards.py").write_text(REWARDS)
    rows = {
        "prompts": [{"prompt": f"say {i}"} for i in range(4)],
        "long": [{"prompt": "a"}, {"prompt": "a" * 600}],
        "tags": [{"prompt": "put it into <answer>"}],
        "text": [{"text": "a" * 600}],
        "ids": [{"input_ids": [5, 6, 400]}],
    }
    for name, made in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def run(home: Path, out: Path, command: str, *flags: str, model: str = "model", data: str = "prompts") -> int:
    file = out.with_suffix(".toml")
    sft = data in ("text", "ids")
    file.write_text(
        f'model = "{home / model}"\nout = "{out}"\nsteps = 1\nprompts_per_step = 2\ndevice = "cpu"\n'
        f'data.path = "{home / data}.jsonl"\nalgo.name = "{"sft" if sft else "grpo"}"\n'
        + ("" if sft else f'rewards = ["{home}/rewards.py:length"]\nsampling = {{ group_size = 2, max_tokens = 4 }}\n')
    )
    return main([command, str(file), *flags])


@pytest.mark.parametrize("command", ["train", "validate"])
@pytest.mark.parametrize(
    ("setup", "flags", "message"),
    [
        ({"data": "long"}, (), r"row 1: the prompt has 6\d\d tokens, and the model's context is 512"),
        ({"data": "text"}, (), "row 0: 601 tokens with its completion, and the model's context is 512"),
        ({"data": "ids"}, (), "row 0: token id 400, and the model's embedding has 103 rows"),
        ({"data": "tags", "model": "added"}, (), r"row 0: token 103 \(<answer>\), and the model's embedding has 103"),
        (
            {"model": "strict"},
            ("--data.system", "be brief"),
            r"row 0, column prompt: the chat template refuses .*no sys",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_the_model_is_loaded(
    setup: dict[str, str], flags: tuple[str, ...], message: str, command: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    import re

    assert run(home, tmp_path / "run", command, *flags, **setup) == 2
    said = "".join(capsys.readouterr())
    assert re.search(message, said.replace("\n", " ")), said
    assert "Traceback" not in said and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_completions_that_would_end_beyond_the_context_are_refused_under_the_eager_engine(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    assert run(home, tmp_path / "run", "train", "--sampling.max_tokens", "510", "--engine.name", "eager") == 2
    assert "sampling.max_tokens = 510: with the longest prompt" in capsys.readouterr().err


def test_long_prompts_are_left_out_where_the_config_says_so(home: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ("--data.max_prompt_tokens", "100", "--engine.name", "eager")
    assert run(home, tmp_path / "run", "validate", *flags, data="long") == 0
    assert "no problem found" in capsys.readouterr().out


def test_reward_check_names_what_the_template_refuses(home: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ("--completion", "prompt")
    code = run(home, tmp_path / "run", "reward-check", *flags, model="strict")
    assert code == 0
    file = tmp_path / "run.toml"
    file.write_text(file.read_text().replace("data.path", 'data.system = "be brief"\ndata.path'))
    assert main(["reward-check", str(file), *flags]) == 2
    assert "row 0, column prompt: the chat template refuses" in capsys.readouterr().err
