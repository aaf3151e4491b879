"""What is trained, token by token, under the shapes of chat templates that models have, and that engines stop there."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, prompts, tiny_model, tiny_policy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlft.config.data import Data, Eval, Sampling
from rlft.config.run import Algo, Config, Lora, Optim
from rlft.data.chat import end_id
from rlft.data.encode import encode_prompt
from rlft.data.template import ChatTemplate
from rlft.rollout.eager import EagerEngine
from rlft.rollout.engine import eos_ids, undeclared_end
from rlft.trainer.loop import train
from rlft.types import Recorded

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = MISTRAL.replace("m['content'] + eos_token", "m['content'] + ' ' + eos_token")
"""A space stands before the end of the turn."""
SHAPES: dict[str, tuple[str, str, str, list[str], list[str]]] = {
    # template, BOS, EOS, other tokens, how a turn ends
    "chatml": (CHATML, "", "<|im_end|>", ["<|im_start|>"], ["<|im_end|>"]),
    "chatml, base": (CHATML, "", "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
    "llama 3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
        ["<|eot_id|>"],
    ),
    "llama 3, base": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["<|eot_id|>"],
    ),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], ["<end_of_turn>"]),
    "phi 3": (PHI3, "", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|end|>"], ["<|end|>"]),
    "phi 3, eos ends turns": (PHI3, "", "<|end|>", ["<|user|>", "<|assistant|>"], ["<|end|>"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], ["</s>"]),
    "llama 2": (LLAMA2, "<s>", "</s>", [], [" ", "</s>"]),
}


def tokenizer_of(template: str, bos: str, eos: str, others: list[str]) -> PreTrainedTokenizerFast:
    """One token per printable character, and the special ones."""
    special = ["<pad>", *([bos] if bos else []), eos, *others]
    vocabulary = {c: i for i, c in enumerate([*special, "<unk>", *string.printable])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    made.decoder = decoders.Fuse()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=eos,
        pad_token="<pad>",
        unk_token="<unk>",
        **({"bos_token": bos} if bos else {}),
    )
    fast.add_special_tokens({"additional_special_tokens": others})
    fast.chat_template = template
    return fast


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def trained(recorded: Recorded, tokenizer: Any) -> list[list[str]]:
    """The runs of trained tokens."""
    runs: list[list[str]] = [[]]
    for token, train_ in zip(tokenizer.convert_ids_to_tokens(list(recorded.ids)), recorded.mask, strict=True):
        if train_:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def encoded(row: dict[str, Any], tokenizer: Any) -> Any:
    return encode_prompt(row, 0, Data("x"), tokenizer)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_string_completion_ends_as_the_template_ends_a_turn(shape: str) -> None:
    *parts, end = SHAPES[shape]
    tokenizer = tokenizer_of(*parts)  # type: ignore[arg-type]
    prompt = encoded({"prompt": "ab", "completion": "cd"}, tokenizer)
    assert trained(prompt.recorded[0], tokenizer) == [["c", "d", *end]]
    pair = encoded({"prompt": "ab", "chosen": "c", "rejected": "d"}, tokenizer)
    assert [trained(side, tokenizer) for side in pair.recorded] == [[["c", *end]], [["d", *end]]]
    label = encoded({"prompt": [user("ab")], "completion": "c", "label": False}, tokenizer)
    assert trained(label.recorded[0], tokenizer) == [["c", *end]]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_completion_that_has_its_end_gets_no_second_one(shape: str) -> None:
    *parts, end = SHAPES[shape]
    tokenizer = tokenizer_of(*parts)  # type: ignore[arg-type]
    for given in ("cd" + "".join(end), "cd" + "".join(end) + "\n", "cd" + tokenizer.eos_token):
        (run,) = trained(encoded({"prompt": "ab", "completion": given}, tokenizer).recorded[0], tokenizer)
        assert "".join(run) == given.rstrip()


@pytest.mark.parametrize("shape", SHAPES)
def test_messages_train_each_turn_with_its_end_and_nothing_after_it(shape: str) -> None:
    *parts, end = SHAPES[shape]
    tokenizer = tokenizer_of(*parts)  # type: ignore[arg-type]
    before = [" "] if shape in ("mistral", "llama 2") else []  # these templates put a space before the content
    chat = [user("ab"), assistant("cd"), user("e"), assistant("f")]
    one = encoded({"messages": chat[:2]}, tokenizer)
    assert trained(one.recorded[0], tokenizer) == [[*before, "c", "d", *end]]
    same = encoded({"prompt": chat[:1], "completion": chat[1:2]}, tokenizer)
    assert same.recorded == one.recorded and same.ids == one.ids
    two = encoded({"messages": chat}, tokenizer)
    assert trained(two.recorded[0], tokenizer) == [[*before, "c", "d", *end], [*before, "f", *end]]
    assert trained(encoded({"messages": [*chat, user("g")]}, tokenizer).recorded[0], tokenizer) == [
        [*before, "c", "d", *end],
        [*before, "f", *end],
    ]
    # All of it is what the template renders, up to the end of the last turn.
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer.encode(whole, add_special_tokens=False)
    got = [*two.ids, *two.recorded[0].ids]
    assert got == ids[: len(got)] and set(tokenizer.decode(ids[len(got) :])) <= set("\n" + tokenizer.eos_token)


def test_strings_are_taken_as_they_are_where_the_template_would_change_them() -> None:
    """A template that drops reasoning (R1's distillations) or strips white space must not change what is trained."""
    *parts, _ = SHAPES["llama 3"]
    tokenizer = tokenizer_of(*parts)  # type: ignore[arg-type]
    tokenizer.chat_template = LLAMA3.replace("m['content'] | trim", "(m['content'].split('</think>')[-1]) | trim")
    said = " <think>x</think>\ny "
    (run,) = trained(encoded({"prompt": "ab", "completion": said}, tokenizer).recorded[0], tokenizer)
    assert "".join(run) == said + "<|eot_id|>"


def test_outside_of_a_chat_and_without_an_end_in_the_template_it_is_eos() -> None:
    *parts, _ = SHAPES["gemma"]
    tokenizer = tokenizer_of(*parts)  # type: ignore[arg-type]
    for row in ({"text": "abc"}, {"prompt": "ab", "completion": "bc"}):
        prompt = encode_prompt(row, 0, Data("x", chat="never"), tokenizer)
        assert trained(prompt.recorded[0], tokenizer) == [["b", "c", "<eos>"]]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert ChatTemplate(Data("x"), tokenizer).turn_end([user("a")]) is None and end_id(tokenizer) is None
    (run,) = trained(encoded({"prompt": "ab", "completion": "cd"}, tokenizer).recorded[0], tokenizer)
    assert run == ["c", "d", "<eos>"]
    assert trained(encoded({"messages": [user("a"), assistant("b")]}, tokenizer).recorded[0], tokenizer) == [
        ["b", "\n"]
    ]


def test_a_call_of_a_tool_may_end_by_another_token() -> None:
    *parts, _ = SHAPES["llama 3, base"]
    parts[3] = [*parts[3], "<|eom_id|>"]  # type: ignore[misc]
    tokenizer = tokenizer_of(*parts)  # type: ignore[arg-type]
    tokenizer.chat_template = LLAMA3.replace("'<|eot_id|>'", "('<|eom_id|>\n' if m.get('call') else '<|eot_id|>')")
    chat = [user("a"), {**assistant("b"), "call": True}, {"role": "tool", "content": "c"}, assistant("d")]
    recorded = encoded({"messages": chat}, tokenizer).recorded[0]
    assert trained(recorded, tokenizer) == [["b", "<|eom_id|>"], ["d", "<|eot_id|>"]]


def test_white_space_that_a_template_marks_behind_the_end_is_not_trained() -> None:
    *parts, _ = SHAPES["chatml, base"]
    tokenizer = tokenizer_of(*parts)  # type: ignore[arg-type]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = [user("a"), assistant("b\n"), user("c"), assistant("d")]
    recorded = encoded({"messages": chat}, tokenizer).recorded[0]
    assert trained(recorded, tokenizer) == [["b", "\n", "<|im_end|>"], ["d", "<|im_end|>"]]


# ---- engines -----------------------------------------------------------------------------------------------------


def base_chatml() -> PreTrainedTokenizerFast:
    *parts, _ = SHAPES["chatml, base"]
    return tokenizer_of(*parts)  # type: ignore[arg-type]


def test_an_engine_stops_at_the_end_of_turn_that_no_file_of_the_model_names() -> None:
    policy, tokenizer = tiny_policy(), base_chatml()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for owner in (policy.base.config, policy.base.generation_config):
        owner.eos_token_id = tokenizer.eos_token_id  # type: ignore[union-attr]
    assert eos_ids(tokenizer, policy.base) == {end, tokenizer.eos_token_id}
    assert "ends a turn with <|im_end|>" in undeclared_end(tokenizer, policy.base)
    assert f"stop_token_ids = [{end}]" in undeclared_end(tokenizer, policy.base)
    engine = EagerEngine(policy, tokenizer)
    engine.load_adapter(policy.adapter(), 0)
    made = engine.generate(prompts(4), Sampling(group_size=12, max_tokens=40), (0, 0))
    ended = [r for r in made if end in r.completion_ids]
    assert len(ended) > 3
    for r in ended:
        assert r.completion_ids.index(end) == len(r.completion_ids) - 1 and r.finish_reason == "stop"
    policy.base.generation_config.eos_token_id = [tokenizer.eos_token_id, end]  # type: ignore[union-attr]
    assert undeclared_end(tokenizer, policy.base) == ""
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_id(tokenizer) is None
    tokenizer.chat_template = None
    assert end_id(tokenizer) is None


def test_a_run_says_where_a_turn_ends_that_no_file_names_and_samples_up_to_there(tmp_path: Path, capsys) -> None:
    """Supervised on one answer until it is all that the model says; the evaluation then stops behind it."""
    tokenizer, model = base_chatml(), tiny_model(seed=3).unload()
    for owner in (model.config, model.generation_config):
        owner.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": "ok"}) for i in range(8)))
    cfg = Config(
        model=str(tmp_path / "model"),
        data=Data(str(tmp_path / "d.jsonl")),
        out=str(tmp_path / "run"),
        steps=20,
        prompts_per_step=4,
        algo=Algo("sft"),
        lora=Lora(rank=8, alpha=32),
        optim=Optim(lr=2e-2),
        sampling=Sampling(max_tokens=8),
        eval=Eval(rows=2),
        device="cpu",
    )

    def ok(completions: list[str], **_: Any) -> list[float]:
        return [float(c == "ok") for c in completions]

    result = train(cfg, rewards=[ok])
    assert "the chat template ends a turn with <|im_end|>, which is an end neither" in capsys.readouterr().out
    assert result.after["eval/reward"] == 1 and result.after["eval/completions/mean_length"] == 3
