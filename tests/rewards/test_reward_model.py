"""The built-in `reward_model` with tiny random models on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import records
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlft.config.data import Reward
from rlft.rewards.builtin.reward_model import _load, reward_model
from rlft.rewards.score import build_rewards, score
from rlft.types import FinishReason, Prompt, Rollout


def save(folder: Path, labels: int = 1, pad: int | None = 0, template: bool = True) -> Any:
    """A tiny reward model in `folder`."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = LlamaConfig(
        vocab_size=103,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_labels=labels,
        initializer_range=0.5,
        **sizes,
    )
    config.pad_token_id = pad
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    _load.cache_clear()


PROMPTS = ["2+2", [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}], "hello"]
COMPLETIONS = ["4", [{"role": "assistant", "content": "it is four"}], "a longer answer than both"]


@pytest.mark.parametrize("pad", [0, None])
def test_scores_are_the_logits_of_each_conversation_by_itself(tmp_path: Path, pad: int | None) -> None:
    model, tokenizer = save(tmp_path, pad=pad), tiny_tokenizer()
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = completion if isinstance(completion, str) else completion[0]["content"]
        shown = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], tokenize=False)
        ids = torch.tensor([tokenizer(shown, add_special_tokens=False)["input_ids"]])
        expected.append(model(input_ids=ids).logits[0, 0].item())
    for size in (1, 2, 8):
        found = reward_model(prompts=PROMPTS, completions=COMPLETIONS, model=str(tmp_path), batch_size=size)
        assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.01


def test_a_model_with_several_labels_needs_one_named(tmp_path: Path) -> None:
    model = save(tmp_path, labels=3)
    model.config.id2label = {0: "bad", 1: "fine", 2: "good"}
    model.save_pretrained(tmp_path)

    def call(**args: Any) -> list[float]:
        return reward_model(prompts=["q"], completions=["a"], model=str(tmp_path), **args)

    for label in (None, "best", 3):
        with pytest.raises(ValueError, match=r"3 labels; name the one that is the reward: 0 \(bad\), 1 \(fine\)"):
            call(label=label)
    assert call(label="good") == call(label=2) != call(label=1)


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    tiny_model().unload().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no reward model: it has no trained weights for score\.weight"):
        reward_model(prompts=["q"], completions=["a"], model=str(tmp_path))


def test_texts_that_are_too_long_and_prompts_without_a_template_are_faults(tmp_path: Path) -> None:
    save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"have \d+ tokens, and .* takes 128"):
        reward_model(prompts=["q"], completions=["a" * 200], model=str(tmp_path / "a"))
    save(tmp_path / "b", template=False)
    with pytest.raises(ValueError, match="no chat template, and the prompts are messages"):
        reward_model(prompts=PROMPTS[1:2], completions=["a"], model=str(tmp_path / "b"))
    ids = tiny_tokenizer()("q", "a")["input_ids"]
    assert len(ids) == 2 and reward_model(prompts=["q"], completions=["a"], model=str(tmp_path / "b"))


def test_reward_model_by_name_leaves_the_row_at_fault_out(tmp_path: Path) -> None:
    save(tmp_path)
    (function,) = build_rewards([Reward("reward_model", timeout=300, args={"model": str(tmp_path)})])
    texts = ["4", "x" * 300, "5", "6"]
    made = [
        Rollout(Prompt((1,), {"prompt": "q"}, 0), (1,), (True,), None, text, FinishReason.STOP, i, 0, 0)
        for i, text in enumerate(texts)
    ]
    try:
        _, parts = score(made, [function], {})
    finally:
        function.close()
    assert parts.outcomes["reward_model"].invalid == [False, True, False, False]
    expected = reward_model(prompts=["q"] * 3, completions=["4", "5", "6"], model=str(tmp_path))
    assert [value for value in records.columns(parts)["reward_model"] if value == value] == pytest.approx(expected)
