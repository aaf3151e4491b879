"""Rows to prompts: the chat template exactly once, recorded completions token by token, faults by row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from rlft.config.data import Data
from rlft.data.encode import encode_prompt
from rlft.data.prompts import TOO_LONG, Prompts, check_rows, hold_out, load_prompts
from rlft.data.table import PromptTable
from rlft.errors import DataError
from rlft.models.load import load_tokenizer
from rlft.types import Prompt

USER = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def one(row: dict[str, Any], tokenizer: Any = None, **options: Any) -> Prompt:
    return encode_prompt(row, 0, Data("x", **options), tokenizer or tiny_tokenizer())


def text(ids: Any) -> str:
    return tiny_tokenizer().decode(list(ids))


def trained(prompt: Prompt, which: int = 0) -> list[str]:
    """The runs of trained tokens of a recorded completion, as text."""
    recorded, runs = prompt.recorded[which], [""]
    for token, train in zip(recorded.ids, recorded.mask, strict=True):
        if train:
            runs[-1] += text([token])
        elif runs[-1]:
            runs.append("")
    return [run for run in runs if run]


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_a_string_prompt_is_put_into_one_user_turn_once() -> None:
    prompt = one({"prompt": "hi", "answer": "3"})
    assert text(prompt.ids) == USER and prompt.messages == ({"role": "user", "content": "hi"},)
    assert prompt.row == {"prompt": "hi", "answer": "3"}


def test_messages_and_a_system_prompt() -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert text(one({"prompt": chat}).ids) == USER
    assert text(one({"prompt": "hi"}, system="be brief").ids) == f"<|im_start|>system\nbe brief<|im_end|>\n{USER}"
    own = [{"role": "system", "content": "mine"}, *chat]
    assert text(one({"prompt": own}, system="be brief").ids).count("system") == 1


def test_never_encodes_the_string_as_it_is() -> None:
    assert text(one({"prompt": "hi"}, chat="never").ids) == "hi"
    bare = tiny_tokenizer()
    bare.chat_template = None
    assert text(one({"prompt": "hi"}, bare).ids) == "hi"


def test_chat_template_arguments_reach_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt and not think %}<think>{% endif %}"
    assert text(one({"prompt": "hi"}, tokenizer).ids).endswith("<think>")
    assert not text(one({"prompt": "hi"}, tokenizer, chat_template_kwargs={"think": True}).ids).endswith("<think>")


def test_a_prompt_that_was_rendered_before_is_an_error() -> None:
    for prompt in (USER, [{"role": "user", "content": USER}]):
        with pytest.raises(
            DataError, match=r"row 0: the prompt contains .*a mark of the chat template.*rendered already"
        ):
            one({"prompt": prompt})


def test_a_template_that_opens_no_assistant_turn_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="opens no assistant turn"):
        one({"prompt": "hi"}, tokenizer)


def test_two_bos_are_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<pad>"
    tokenizer.chat_template = "<pad><pad>" + tokenizer.chat_template
    with pytest.raises(DataError, match="two BOS"):
        one({"prompt": "hi"}, tokenizer)


@pytest.mark.parametrize("row", [{"prompt": "<pad>hi"}, {"prompt": "<pad>hi", "completion": "a"}, {"text": "<pad>hi"}])
def test_a_plain_text_with_the_bos_that_the_tokenizer_adds_is_an_error(row: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.chat_template = "<pad>", None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    with pytest.raises(DataError, match="row 0: the text begins with two BOS tokens, since the tokenizer adds one"):
        one(row, tokenizer)
    plain = one({name: value.removeprefix("<pad>") for name, value in row.items()}, tokenizer)
    ids = plain.ids or plain.recorded[0].ids
    assert ids[0] == 0 and ids[1] != 0


def test_a_prompt_that_ends_with_the_assistant_is_continued() -> None:
    prefilled = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Let me"}]
    prompt = one({"prompt": prefilled, "completion": " see"})
    assert text(prompt.ids) == f"{USER}Let me" and trained(prompt) == [" see<|im_end|>"]
    assert prompt.messages == tuple(prefilled)


def test_a_system_prompt_without_a_template_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data.system needs a chat template"):
        one({"prompt": "hi"}, system="x", chat="never")


# ---- recorded completions ----------------------------------------------------------------------------------------


def test_a_string_completion_ends_with_eos_and_is_trained_whole() -> None:
    prompt = one({"prompt": "hi", "completion": "yes"})
    assert text(prompt.ids) == USER and trained(prompt) == ["yes<|im_end|>"] and prompt.recorded[0].reward == 1.0
    assert trained(one({"prompt": "hi", "completion": "yes<|im_end|>"})) == ["yes<|im_end|>"]


def test_a_message_completion_trains_the_turn_with_its_end() -> None:
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes"}]}
    assert trained(one(row)) == ["yes<|im_end|>"]


def test_messages_train_every_assistant_turn_and_nothing_else() -> None:
    turns = [("system", "s"), ("user", "hi"), ("assistant", "yes"), ("user", "and"), ("assistant", "no")]
    prompt = one({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert text(prompt.ids) == f"<|im_start|>system\ns<|im_end|>\n{USER}"
    assert trained(prompt) == ["yes<|im_end|>", "no<|im_end|>"]
    whole = text(prompt.ids + prompt.recorded[0].ids)
    assert whole == "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in turns).removesuffix("\n")


MARKED = (
    "{% for m in messages %}{% set last = loop.last %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] if last else m['content'].split('=')[-1] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Marks what the assistant says, and drops the reasoning of earlier turns, so that no turn is what its message adds."""


def test_a_template_that_marks_the_assistant_is_asked_and_may_rewrite_earlier_turns() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    turns = [("user", "1+1"), ("assistant", "so=2"), ("user", "2+2"), ("assistant", "hm=4")]
    prompt = one({"messages": [{"role": r, "content": c} for r, c in turns]}, tokenizer)
    assert trained(prompt) == ["2<|im_end|>", "hm=4<|im_end|>"]
    assert text(prompt.ids) == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert text(prompt.recorded[0].ids).endswith("hm=4<|im_end|>\n") and prompt.recorded[0].text == "hm=4"
    tokenizer.chat_template = MARKED.replace("{% generation %}", "{% generation %}{% endgeneration %}", 1).replace(
        "{% endgeneration %}{{ '\n' }}", "{{ '\n' }}"
    )
    with pytest.raises(
        DataError, match="row 0, column messages: the chat template marks no assistant token after a prompt"
    ):
        one({"messages": [{"role": r, "content": c} for r, c in turns]}, tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if loop.last or "
        "m['role'] == 'user' else 'cut') + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "and"), ("assistant", "no")]
    with pytest.raises(DataError, match="the chat template changes earlier turns"):
        one({"messages": [{"role": r, "content": c} for r, c in turns]}, tokenizer)


def test_plain_text_trains_every_token_that_has_one_before_it() -> None:
    prompt = one({"text": "abc"})
    assert prompt.ids == () and text(prompt.recorded[0].ids) == "abc<|im_end|>"
    assert prompt.recorded[0].mask == (False, True, True, True)


def test_pairs_with_and_without_a_prompt() -> None:
    for row in (
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {
            "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
        },
    ):
        prompt = one(row)
        assert text(prompt.ids) == USER and [r.reward for r in prompt.recorded] == [1.0, -1.0]
        assert trained(prompt, 0) == ["yes<|im_end|>"] and trained(prompt, 1) == ["no<|im_end|>"]
    prompt = one({"chosen": "Is it? yes", "rejected": "Is it? yellow"}, chat="never")
    assert text(prompt.ids) == "Is it? " and trained(prompt, 1) == ["yellow<|im_end|>"]


def test_pairs_that_are_alike_or_have_nothing_in_common_are_an_error() -> None:
    with pytest.raises(DataError, match="chosen and rejected are the same"):
        one({"chosen": "a b", "rejected": "a b"})
    with pytest.raises(DataError, match="must begin alike and then differ, or come with a prompt column"):
        one({"chosen": "x", "rejected": "y"})


# ---- whole datasets ----------------------------------------------------------------------------------------------


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "rows.jsonl")


BAD = {
    "no known column": ([{"q": "a"}], r"has the columns q; want prompt"),
    "a prompt is missing": ([{"prompt": "a"}, {"x": 1}], r"row 1: column prompt is missing or null"),
    "a ragged pair": (
        [{"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": None}],
        "row 1: column rejected",
    ),
    "a pair of two kinds": (
        [{"chosen": "a", "rejected": [{"role": "user", "content": "a"}]}],
        "row 0: chosen and rejected",
    ),
    "a number as prompt": ([{"prompt": 3}], "row 0: column prompt is 3: want a string or messages"),
    "a message without content": ([{"prompt": [{"role": "user"}]}], r"want \{\"role\": ..., \"content\": ...\}"),
    "an empty string": ([{"prompt": ""}], "row 0: column prompt is an empty string"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_rows_are_named_without_a_tokenizer(fault: str, tmp_path: Path) -> None:
    rows, message = BAD[fault]
    with pytest.raises(DataError, match=message):
        check_rows(Data(write(tmp_path, rows)), seed=0)


def test_long_prompts_are_dropped_and_counted_or_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a" * n} for n in (1, 30, 2)])
    limit = len(one({"prompt": "a"}).ids) + 5
    loaded = load_prompts(Data(path, max_prompt_tokens=limit), tiny_tokenizer(), 0)
    assert [p.index for p in loaded.prompts] == [0, 2] and loaded.drops.counts == {TOO_LONG: 1}
    with pytest.raises(
        DataError, match=rf"row 1: the prompt has {limit + 24} tokens, data.max_prompt_tokens is {limit}"
    ):
        load_prompts(Data(path, max_prompt_tokens=limit, long_prompts="error"), tiny_tokenizer(), 0)
    with pytest.raises(DataError, match=r"every prompt is longer than data.max_prompt_tokens = 1 \(3 rows\)"):
        load_prompts(Data(path, max_prompt_tokens=1), tiny_tokenizer(), 0)


def rows(n: int) -> list[Prompt]:
    return [Prompt((i % 7, 1), {"prompt": str(i)}, i) for i in range(n)]


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    order = [p.index for p in Prompts(rows(9), seed=1).take(18)]
    assert sorted(order[:9]) == sorted(order[9:]) == list(range(9)) and order[:9] != order[9:]
    assert [p.index for p in Prompts(rows(9), seed=1, shuffle=False).take(11)] == [*range(9), 0, 1]


def test_the_cursor_is_the_whole_state() -> None:
    whole, resumed = Prompts(rows(9), seed=1), Prompts(rows(9), seed=1)
    expected = whole.take(13)[4:]
    resumed.consumed = 4
    assert resumed.take(2) + resumed.take(7) == expected and resumed.epoch == pytest.approx(13 / 9)
    assert Prompts(rows(9), 0).steps(4, 1.0) == 3 and Prompts(rows(9), 0).steps(3, 2.0) == 6


def test_held_out_rows_are_distinct_and_every_equal_prompt_leaves_the_training_set() -> None:
    """30 rows over 7 distinct prompts: 3 held out, and no training row has their ids."""
    rest, held = map(list, hold_out(PromptTable.of(rows(30)), 3, seed=0))
    assert len({p.ids for p in held}) == 3 and not {p.ids for p in held} & {p.ids for p in rest}
    assert [list(part) for part in hold_out(PromptTable.of(rows(30)), 3, seed=0)] == [rest, held]
    with pytest.raises(DataError, match=r"eval.rows = 7: the data has 7 distinct prompts"):
        hold_out(PromptTable.of(rows(30)), 7, seed=0)


def test_smollm2_prompts_are_rendered_by_its_own_template(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    prompt = one({"prompt": "2 + 3 =", "completion": "5"}, tokenizer)
    assert tokenizer.decode(prompt.ids).endswith("<|im_start|>user\n2 + 3 =<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(prompt.recorded[0].ids) == "5<|im_end|>"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = one({"messages": [{"role": r, "content": c} for r, c in turns]}, tokenizer)
    recorded = chat.recorded[0]
    assert (
        tokenizer.decode([t for t, m in zip(recorded.ids, recorded.mask, strict=True) if m]) == "b<|im_end|>d<|im_end|>"
    )
