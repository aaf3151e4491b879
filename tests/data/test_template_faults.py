"""Whatever a chat template or a tokenizer raises is an error of a row, with its column and the template's words."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import CHATML, tiny_tokenizer

from rlft.config.data import Data
from rlft.data.encode import encode_prompt
from rlft.data.limits import Limits
from rlft.errors import DataError
from rlft.types import Prompt

RAISING = {
    "raise_exception": ("{{ raise_exception('roles must alternate') }}", r"\(roles must alternate\)"),
    "undefined": ("{{ nothing.at_all }}", r"\('nothing' is undefined\)"),
    "syntax": ("{% if %}", "has a syntax error"),
    "sandbox": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", r"unsafe|undefined"),
    "type": ("{{ 'a' + 3 }}", r"\(TypeError: can only concatenate str"),
    "zero": ("{{ 1 // 0 }}", r"\(ZeroDivisionError: "),
    "overflow": ("{% for i in range(10 ** 10) %}{% endfor %}", r"\(OverflowError: "),
    "recursion": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "nested too deeply"),
    "key": ("{{ {}|attr('x') }}{{ messages[99].role }}", "undefined|has no"),
    "memory": ("{{ 'a' * (10 ** 18) }}", r"\((MemoryError|OverflowError)"),
}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a string prompt": ({"prompt": "hi"}, "prompt"),
    "messages as prompt": ({"prompt": TURNS[:1]}, "prompt"),
    "a prefilled prompt": ({"prompt": TURNS}, "prompt"),
    "a completion": ({"prompt": "hi", "completion": "x"}, "prompt"),
    "a pair": ({"chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "no"}]}, "prompt"),
    "messages": ({"messages": TURNS}, "messages"),
}


def encode(row: dict[str, Any], tokenizer: Any, **options: Any) -> Prompt:
    return encode_prompt(row, 7, Data("x", **options), tokenizer)


@pytest.mark.parametrize("fault", RAISING)
def test_what_a_template_raises_is_named_with_row_column_and_words(fault: str) -> None:
    template, words = RAISING[fault]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + CHATML
    for row, column in ROWS.values():
        with pytest.raises(DataError, match=f"^row 7, column {column}: the chat template .*({words})") as caught:
            encode(row, tokenizer)
        assert caught.value.reason == "template"


def test_a_fault_that_only_the_answer_causes_names_its_column() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[-1].content == 'no' %}{{ raise_exception('not that') }}{% endif %}" + CHATML
    )
    messages = [{"role": "assistant", "content": "no"}]
    for row, column in (
        ({"prompt": "hi", "completion": messages}, "completion"),
        ({"prompt": "hi", "chosen": [TURNS[1]], "rejected": messages}, "rejected"),
        ({"messages": [TURNS[0], *messages]}, "messages"),
    ):
        with pytest.raises(DataError, match=rf"^row 7, column {column}: the chat template refuses .*\(not that\)"):
            encode(row, tokenizer)


def test_the_error_says_what_to_change() -> None:
    tokenizer = tiny_tokenizer()
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    alternates = (
        "{% if messages|length > 1 and messages[0].role == messages[1].role %}{{ raise_exception('no') }}{% endif %}"
    )
    tokenizer.chat_template = refuses + alternates + CHATML
    with pytest.raises(DataError, match=r"without its system message: leave out data\.system or that message"):
        encode({"prompt": "hi"}, tokenizer, system="be brief")
    with pytest.raises(DataError, match="without its system message"):
        encode({"prompt": "hi", "system": "be brief"}, tokenizer)
    with pytest.raises(DataError, match="messages 0 and 1 are both user: join them"):
        encode({"prompt": [TURNS[0], TURNS[0]]}, tokenizer)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "hi \ud83d"}, "prompt"),
        ({"prompt": [{"role": "user", "content": "hi \ud83d"}]}, "prompt"),
        ({"prompt": "hi", "completion": "a \udc00"}, "completion"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b \udc00"}, "rejected"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]}, "messages"),
        ({"text": "ab \ud83d"}, "text"),
    ],
)
def test_half_a_character_is_named(row: dict[str, Any], column: str) -> None:
    for options in ({}, {"chat": "never"}) if isinstance(row.get("prompt", ""), str) else ({},):
        with pytest.raises(
            DataError, match=rf"^row 7, column {column}: the text holds half of a character at position"
        ):
            encode(row, tiny_tokenizer(), **options)  # type: ignore[arg-type]
    marking = tiny_tokenizer()
    marking.chat_template = CHATML.replace(
        "m['content'] + '<|im_end|>'", "'' }}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ ''"
    )
    if "messages" in row:
        with pytest.raises(DataError, match=f"^row 7, column {column}: the text holds half of a character"):
            encode(row, marking)
    fine = {"text": "ab", "other": "\ud83d"}
    assert encode(fine, tiny_tokenizer()).row["other"] == "\ud83d", "columns that are not tokens may hold anything"


def test_a_column_that_is_nested_too_deeply_is_named() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = {"a": deep}
    for row in (
        {"messages": [{"role": "user", "content": "a", "more": deep}, TURNS[1]]},
        {"prompt": "hi", "tools": [deep]},
    ):
        with pytest.raises(DataError, match=r"row 7: .*nested too deeply"):
            encode(row, tiny_tokenizer())


# ---- what the template does not raise, and is wrong ---------------------------------------------------------------

THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
R1 = THINKING.replace("m['content'] +", "m['content'].split('</think>')[-1] +")


def test_a_tag_that_the_template_opens_is_not_trained_twice() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = R1
    for said in ("<think>\nso\n</think>2", "so\n</think>2", " <think>so\n</think>2"):
        prompt = encode({"prompt": "1+1", "completion": said}, tokenizer)
        whole = tokenizer.decode([*prompt.ids, *prompt.recorded[0].ids])
        assert whole.endswith("assistant\n<think>\nso\n</think>2<|im_end|>") and whole.count("<think>") == 1
    with pytest.raises(DataError, match="opens the assistant's turn with <think> and does not show it in an answer"):
        encode({"messages": [TURNS[0], {"role": "assistant", "content": "<think>\nso</think>2"}]}, tokenizer)
    with pytest.raises(DataError, match=r"the completion begins with '<\|im_start\|>assistant', which .* has opened"):
        encode({"prompt": "hi", "completion": "<|im_start|>assistant\nyes"}, tiny_tokenizer())


def bos_tokenizer(added: bool) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<pad>"
    if added:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
            single="<pad> $A", special_tokens=[("<pad>", 0)]
        )
    return tokenizer


@pytest.mark.parametrize("marks", [False, True])
def test_two_bos_are_refused_on_every_path(marks: bool) -> None:
    tokenizer = bos_tokenizer(added=True)
    for row in ({"text": "<pad>a"}, {"prompt": "<pad>a"}, {"prompt": "<pad>a", "completion": "b"}):
        with pytest.raises(DataError, match="row 7: the text begins with two BOS"):
            encode(row, tokenizer, chat="never")
    tokenizer = bos_tokenizer(added=False)
    template = "<pad><pad>" + CHATML
    if marks:
        template = template.replace(
            "m['content'] + '<|im_end|>'", "'' }}{% generation %}{{ m['content'] + '<|im_end|>'"
        )
        template = template.replace(" + '\n' }}{% endfor", " }}{% endgeneration %}{{ '\n' }}{% endfor")
    tokenizer.chat_template = template
    for row in ({"prompt": "a"}, {"messages": TURNS}, {"prompt": "a", "chosen": "b", "rejected": "c"}):
        with pytest.raises(DataError, match=r"row 7: the rendered (prompt|conversation) begins with two BOS"):
            encode(row, tokenizer)
    tokenizer.chat_template = "<pad>" + CHATML
    with pytest.raises(DataError, match="row 7: the completion begins with <pad>, which begins a sequence"):
        encode({"prompt": "a", "completion": "<pad>b"}, tokenizer)
    with pytest.raises(DataError, match="row 7: the row begins with two BOS"):
        encode({"input_ids": [0, 0, 5]}, tokenizer)


def test_a_text_that_was_rendered_before_gets_no_second_end() -> None:
    for said in ("<|im_start|>user\na<|im_end|>\n", "a<|im_end|>", "a<|im_end|> \n"):
        ids = encode({"text": said}, tiny_tokenizer()).recorded[0].ids
        assert tiny_tokenizer().decode(list(ids)) == said


def test_rows_are_held_against_context_and_vocabulary() -> None:
    from rlft.data.encode import Encoder

    tokenizer, length = tiny_tokenizer(), len(encode({"prompt": "abc"}, tiny_tokenizer()).ids)

    def hold(row: dict[str, Any], kind: str, limits: Limits, **options: Any) -> Prompt:
        return Encoder(Data("x", **options), tokenizer, kind, limits).encode(row, 7)

    hold({"prompt": "abc"}, "prompt", Limits(length + 1))
    with pytest.raises(DataError, match=rf"row 7: the prompt has {length} tokens, and the model's context is {length}"):
        hold({"prompt": "abc"}, "prompt", Limits(length))
    hold({"prompt": "abc"}, "prompt", Limits(length), max_prompt_tokens=length - 1)
    hold({"text": "abc"}, "text", Limits(4))
    with pytest.raises(DataError, match="row 7: 4 tokens with its completion, and the model's context is 3") as caught:
        hold({"text": "abc"}, "text", Limits(3))
    assert caught.value.reason == "too long"
    rows = len(tokenizer)
    tokenizer.add_tokens(["<answer>"])
    hold({"text": "abc"}, "text", Limits(None, rows))
    with pytest.raises(
        DataError, match=rf"row 7: token {rows} \(<answer>\), and the model's embedding has {rows} rows"
    ):
        hold({"text": "abc<answer>"}, "text", Limits(None, rows))
    with pytest.raises(DataError, match=r"token id 999, .*the ids are of another tokenizer"):
        hold({"input_ids": [5, 999]}, "input_ids", Limits(None, rows))
