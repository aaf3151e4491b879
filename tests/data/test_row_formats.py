"""Formats that people have become rlft's columns; fields that a format defines are read or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_tokenizer

from rlft.config.data import Data
from rlft.data.encode import Encoder, encode_prompt
from rlft.data.kinds import Purpose, kind_of
from rlft.data.reader import Reader
from rlft.errors import DataError
from rlft.types import Prompt

SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
USER = "<|im_start|>user\n{}<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"
TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}{{ c.function.name + ' ' }}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def tokenizer_with(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read(row: dict[str, Any], purpose: Purpose = "", **options: Any) -> dict[str, Any]:
    return Reader(Data("x", **options), purpose).read(row, 0)


def encoded(row: dict[str, Any], template: str | None = None, **options: Any) -> Prompt:
    tokenizer = tiny_tokenizer() if template is None else tokenizer_with(template)
    return encode_prompt(row, 0, Data("x", **options), tokenizer)


def shown(ids: Any) -> str:
    return tiny_tokenizer().decode(list(ids))


def marked(prompt: Prompt, which: int = 0) -> str:
    """The recorded completion with its trained tokens in brackets."""
    recorded, text, on = prompt.recorded[which], "", False
    for token, train in zip(recorded.ids, recorded.mask, strict=True):
        text += ("[" if train else "]") if train != on else ""
        text, on = text + shown([token]), train
    return text + ("]" if on else "")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


# ---- ShareGPT ----------------------------------------------------------------------------------------------------


def test_sharegpt_is_read_as_messages() -> None:
    turns = [("system", "short"), ("human", "hi"), ("gpt", "yes"), ("human", "and"), ("gpt", "no")]
    row = {"conversations": [{"from": speaker, "value": said} for speaker, said in turns]}
    prompt = encoded(row)
    assert shown(prompt.ids) == SYSTEM.format("short") + USER.format("hi") + OPEN
    assert marked(prompt) == f"[yes<|im_end|>]\n{USER.format('and')}{OPEN}[no<|im_end|>]"
    reader = Reader(Data("x"))
    reader.read(row, 0)
    assert reader.kind == "messages" and reader.notes() == ["data: ShareGPT rows, read as messages"]
    # Under another name, mapped by the user, and with the usual keys in the column of ShareGPT.
    assert encoded({"messages": row["conversations"]}).recorded == prompt.recorded
    usual = {"conversations": [user("hi"), assistant("yes")]}
    assert marked(encoded(usual)) == "[yes<|im_end|>]"


def test_sharegpt_calls_of_tools_and_pairs() -> None:
    turns = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"a": null}}'},
        {"from": "observation", "value": "12"},
        {"from": "gpt", "value": "cold"},
    ]
    prompt = encoded({"conversations": turns, "tools": '[{"name": "weather"}]', "system": "s"}, TOOLS)
    assert shown(prompt.ids).startswith('{"type": "function", "function": {"name": "weather"}}' + SYSTEM.format("s"))
    assert marked(prompt).startswith('[weather {"a": null}<|im_end|>]\n<|im_start|>tool\n12<|im_end|>\n')
    pair = {
        "conversations": turns[:1],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    prompt = encoded(pair)
    assert [marked(prompt, side) for side in (0, 1)] == ["[a<|im_end|>]", "[b<|im_end|>]"]
    with pytest.raises(DataError, match='row 0: column messages: message 0 is from = "narrator": known are human'):
        read({"conversations": [{"from": "narrator", "value": "x"}]})


# ---- Alpaca and OpenAI -------------------------------------------------------------------------------------------


def test_alpaca_puts_the_input_after_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    prompt = encoded(row)
    assert shown(prompt.ids) == USER.format("Add.\n\n1 and 2") + OPEN and marked(prompt) == "[3<|im_end|>]"
    assert read({**row, "input": ""})["prompt"] == "Add."
    mapped = {"prompt": "Add.", "completion": "3", "input": "1 and 2"}
    assert read(mapped, columns={"prompt": "instruction", "completion": "output"})["prompt"] == "Add.\n\n1 and 2"
    assert read(mapped)["prompt"] == "Add.", "input beside another prompt is a column like any other"
    earlier = {**row, "history": [["hi", "hello"]], "system": "s"}
    assert shown(encoded(earlier).ids).startswith(SYSTEM.format("s") + USER.format("hi") + OPEN + "hello")
    with pytest.raises(DataError, match=r"column history is \['hi'\]: want a list of \[question, answer\]"):
        read({**row, "history": ["hi"]})


def test_openai_preferences_and_functions() -> None:
    row = {
        "input": {"messages": [user("hi")], "tools": []},
        "preferred_output": [assistant("yes")],
        "non_preferred_output": [assistant("no")],
    }
    prompt = encoded(row)
    assert [marked(prompt, side) for side in (0, 1)] == ["[yes<|im_end|>]", "[no<|im_end|>]"]
    old = {"messages": [user("?"), {"role": "assistant", "function_call": {"name": "weather", "arguments": "{}"}}]}
    prompt = encoded({**old, "functions": [WEATHER["function"]]}, TOOLS)
    assert marked(prompt) == "[weather {}<|im_end|>]" and '"name": "weather"' in shown(prompt.ids)


# ---- tools -------------------------------------------------------------------------------------------------------

CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn", "unit": null}'}}
SAID = '[weather {"city": "Bonn", "unit": null}<|im_end|>]'


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_in_the_form_of_the_wire_are_written_as_objects(content: dict[str, Any]) -> None:
    """Arguments are JSON text and content is missing, as in OpenAI's files; keys that Arrow added are dropped."""
    call = {**CALL, "index": None, "function": {**CALL["function"], "strict": None}}
    row = {"messages": [user("?"), {"role": "assistant", **content, "tool_calls": [call], "name": None}]}
    assert marked(encoded(row, TOOLS)) == SAID
    as_object = {**CALL, "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    row = {"messages": [user("?"), {"role": "assistant", **content, "tool_calls": [as_object]}]}
    assert marked(encoded(row, TOOLS)) == '[weather {"city": "Bonn"}<|im_end|>]'


@pytest.mark.parametrize(
    ("test", "content", "arguments"),
    [
        ("m.tool_calls", "", "c.function.arguments | tojson"),
        ("m.content is none", None, "c.function.arguments | tojson"),
        ("'content' not in m", {}, "c.function.arguments | tojson"),
        ("m.tool_calls", "", "c.function.arguments"),  # a template that wants JSON text
    ],
)
def test_a_call_gets_the_form_that_the_template_writes(test: str, content: Any, arguments: str) -> None:
    template = TOOLS.replace("{% if m.tool_calls %}", "{% if " + test + " %}").replace(
        "c.function.arguments | tojson", arguments
    )
    row = {"messages": [user("?"), {"role": "assistant", "tool_calls": [CALL]}]}
    assert marked(encoded(row, template)) == SAID


def test_calls_and_tools_that_the_template_does_not_show_are_refused() -> None:
    row = {"messages": [user("?"), {"role": "assistant", "tool_calls": [CALL]}]}
    with pytest.raises(DataError, match="row 0, column messages: the chat template does not show tool_calls"):
        encoded(row)
    with pytest.raises(DataError, match="row 0, column prompt: the chat template does not show tools"):
        encoded({"prompt": "?", "tools": [WEATHER]})
    for arguments, message in (("{", "are no JSON object"), ("[1]", r"are \[1\]: want an object")):
        wrong = {**CALL, "function": {"name": "weather", "arguments": arguments}}
        with pytest.raises(DataError, match=f"column messages: message 1: the arguments of weather {message}"):
            read({"messages": [user("?"), {"role": "assistant", "tool_calls": [wrong]}]})
    with pytest.raises(DataError, match=r"row 0: column tools: want a list of tools.* got \['hammer'\].*data.columns"):
        read({"prompt": "?", "tools": ["hammer"]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "?"},
        {"prompt": [user("?")], "completion": "x"},
        {"prompt": "?", "chosen": "a", "rejected": "b"},
        {"messages": [user("?"), assistant("x")]},
    ],
)
def test_every_kind_of_row_shows_its_tools(row: dict[str, Any]) -> None:
    prompt = encoded({**row, "tools": [{**WEATHER, "strict": None}]}, TOOLS)
    assert shown(prompt.ids).startswith('{"type": "function", "function": {"name": "weather"')
    assert "strict" not in shown(prompt.ids)
    assert not shown(encoded({**row, "tools": None}, TOOLS).ids).startswith("{")


# ---- marks of turns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["weight", "train", "trainable", "training", "loss"])
@pytest.mark.parametrize("generation", [False, True])
def test_a_turn_that_is_marked_off_is_not_trained(mark: str, generation: bool) -> None:
    template = TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ m.content }}")
    if generation:
        said = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        template = template.replace("{{ m.content }}", said + "{{ m.content }}{% endif %}")
    turns = [user("a"), assistant("bad", **{mark: 0}), {**user("b"), mark: None}, assistant("good", **{mark: True})]
    prompt = encoded({"messages": turns}, template)
    end = "]<|im_end|>\n" if generation else "<|im_end|>]"
    assert marked(prompt) == f"bad<|im_end|>\n{USER.format('b')}{OPEN}[good{end}"
    assert prompt.messages == (user("a"),)
    with pytest.raises(DataError, match="no assistant message to train on"):
        encoded({"messages": turns[:2]}, template)


def test_marks_that_cannot_be_kept_are_refused() -> None:
    for message, match in (
        (assistant("x", weight=0.5), "weight = 0.5: want 0 or 1"),
        (assistant("x", train="yes"), "train = 'yes': want 0 or 1"),
        (assistant("x", train_detail=[{"begin": 0}]), "train_detail: parts of a turn cannot be marked"),
        ({**user("x"), "trainable": True}, "trainable = True: only turns of the assistant are trained"),
    ):
        with pytest.raises(DataError, match=match):
            read({"messages": [user("a"), message]})


# ---- content -----------------------------------------------------------------------------------------------------


def test_content_in_text_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b"}]
    assert shown(encoded({"prompt": [user(parts)]}).ids) == USER.format("ab") + OPEN
    only_parts = TOOLS.replace(
        "{% if m.content %}{{ m.content }}{% endif %}",
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}",
    )
    for content in ("ab", parts):
        assert shown(encoded({"prompt": [user(content)]}, only_parts).ids) == USER.format("ab") + OPEN


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            [{"type": "video"}, {"type": "text", "text": "what?"}],
            "neither text nor an image \\('video'\\): video, sound",
        ),
        ([3], "neither text nor an image \\(3\\)"),
        (3, "the content 3: want a string"),
        ({"a": 1}, "the content {'a': 1}: want a string"),
        (None, "no content, only role, content"),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_content_that_is_no_text_is_refused_by_name(column: str, content: Any, match: str) -> None:
    with pytest.raises(DataError, match=rf"row 0: column {column}: message 0 \(user\) has .*{match}"):
        read({column: [user(content), assistant("x")]})


def test_keys_of_messages_that_the_template_does_not_read_are_said() -> None:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(Data("x"), tokenizer, "messages")
    encoder.encode({"messages": [user("a"), assistant("b", reasoning_content="because", name="me")]}, 0)
    assert encoder.notes() == [
        "data: the chat template does not read the key reasoning_content of messages, so the model does not"
    ]


# ---- sides that hold the prompt ----------------------------------------------------------------------------------


def test_ultrafeedback_has_its_prompt_once() -> None:
    row = {
        "prompt": "hi",
        "chosen": [user("hi"), assistant("yes")],
        "rejected": [user("hi"), assistant("no")],
        "messages": [user("hi"), assistant("yes")],
    }
    prompt = encoded(row)
    assert shown(prompt.ids) == USER.format("hi") + OPEN
    assert [marked(prompt, side) for side in (0, 1)] == ["[yes<|im_end|>]", "[no<|im_end|>]"]
    assert encoded({**row, "prompt": [user("hi")]}).recorded == prompt.recorded
    with pytest.raises(DataError, match="row 0: chosen and rejected begin with other messages than the prompt"):
        encoded({**row, "prompt": "something else"})
    one = encoded({"prompt": "hi", "completion": row["chosen"]})
    assert one.ids == prompt.ids and marked(one) == "[yes<|im_end|>]"


# ---- which kind --------------------------------------------------------------------------------------------------

BOTH = {"prompt": "hi", "messages": [user("other"), assistant("x")], "text": "t"}


@pytest.mark.parametrize(
    ("row", "mapped", "purpose", "kind"),
    [
        (BOTH, (), "", "messages"),
        (BOTH, (), "supervised", "messages"),
        (BOTH, (), "sampling", "prompt"),
        (BOTH, ("prompt",), "", "prompt"),
        (BOTH, ("prompt", "answer"), "supervised", "prompt"),
        (BOTH, ("text",), "supervised", "text"),
        (BOTH | {"completion": "y"}, ("prompt",), "supervised", "completion"),
        (BOTH | {"chosen": "a", "rejected": "b"}, (), "pairs", "preference"),
        (BOTH | {"chosen": "a", "rejected": "b"}, (), "supervised", "messages"),
        (BOTH | {"chosen": "a", "rejected": "b"}, ("prompt",), "", "preference"),
        ({"chosen": "a", "rejected": "b"}, (), "supervised", "preference"),
        ({"input_ids": [1], "text": "t"}, (), "supervised", "input_ids"),
        ({"input_ids": [1], "text": "t"}, ("text",), "supervised", "text"),
        ({"prompt_ids": [1], "completion_ids": [2]}, (), "", "completion_ids"),
    ],
)
def test_the_mapping_decides_first_and_then_the_algorithm(row: Any, mapped: Any, purpose: Any, kind: str) -> None:
    assert kind_of(row, mapped, purpose) == kind


def test_what_is_asked_is_the_prompt_of_rewards_and_what_is_not_read_is_said() -> None:
    from rlft.rewards.overlap import columns_of
    from rlft.types import FinishReason, Rollout

    for purpose, asked in (("sampling", "hi"), ("supervised", [user("other")])):
        reader = Reader(Data("x"), purpose)
        row = reader.read(BOTH, 0)
        assert reader.kind is not None
        prompt = Encoder(Data("x"), tiny_tokenizer(), reader.kind).encode(row, 0)
        rollout = Rollout(prompt, (1,), (True,), None, "x", FinishReason.STOP, 0, -1, 0)
        columns = columns_of([rollout])
        assert columns["prompts"] == [asked] and isinstance(columns["completions"][0], type(asked))
        unread = {"sampling": "the columns messages, text are not read", "supervised": "the columns prompt, text are"}
        assert unread[purpose] in reader.notes()[0]
    system = encoded({"prompt": [user("a")]}, system="be brief")
    rollout = Rollout(system, (1,), (True,), None, "x", FinishReason.STOP, 0, -1, 0)
    assert columns_of([rollout])["prompts"] == [[{"role": "system", "content": "be brief"}, user("a")]]


# ---- token ids ---------------------------------------------------------------------------------------------------


def test_rows_of_token_ids() -> None:
    prompt = encoded(
        {"input_ids": [5, 6, 7, 8, 0], "labels": [-100, -100, 7, 8, -100], "attention_mask": [1, 1, 1, 1, 0]}
    )
    assert prompt.ids == (5, 6) and prompt.recorded[0].ids == (7, 8) and prompt.recorded[0].mask == (True, True)
    assert prompt.row["prompt"] == shown([5, 6])
    text = encoded({"input_ids": [5, 6, 7]})
    assert text.ids == () and text.recorded[0].mask == (False, True, True)
    masked = encoded({"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 0]})
    assert masked.ids == (5,) and masked.recorded[0].mask == (True, False)
    two = encoded({"prompt_ids": [5], "completion_ids": [6, 7]})
    assert two.ids == (5,) and two.recorded[0].ids == (6, 7) and encoded({"prompt_ids": [5]}).recorded == ()
    pair = encoded({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]})
    assert [(side.ids, side.reward) for side in pair.recorded] == [((6,), 1.0), ((7,), -1.0)]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"input_ids": [5, -1]}, r"column input_ids is \[5, -1\]: want a list of token ids"),
        ({"input_ids": [5, 1.5]}, "want a list of token ids"),
        ({"input_ids": []}, "column input_ids is empty"),
        ({"input_ids": [5, 6], "labels": [5]}, r"column labels is \[5\]: want a list as long as input_ids \(2\)"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "labels has 6 at position 0, where input_ids has 5.*not shifted"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no token of input_ids is to be trained"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "attention_mask has zeros between ones"),
        ({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [6]}, "chosen_ids and rejected_ids are the same"),
    ],
)
def test_token_ids_that_do_not_fit_are_refused(row: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=f"row 0: .*{match}"):
        read(row)
