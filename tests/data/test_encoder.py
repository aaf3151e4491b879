"""Many rows at once are encoded as one by one, under any tokenizer; a row at fault is an error in its place."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_row_formats import TOOLS, WEATHER, assistant, user
from test_turn_ends import SHAPES, tokenizer_of
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlft.config.data import Data
from rlft.data.batch_encode import encode_texts
from rlft.data.encode import Encoder
from rlft.data.reader import Reader
from rlft.errors import DataError
from rlft.types import Prompt

WORDS = ["a", "b ", " c", "\n", "", "  ", "d e"]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(WORDS, k=draw.randint(1, 6))) or "x" for _ in range(count)]


def both(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[Prompt | DataError]:
    """The rows encoded together, after a comparison with the rows encoded alone."""
    data = Data("x", **options)
    reader = Reader(data)
    read = [reader.read(row, i) for i, row in enumerate(rows)]
    assert reader.kind is not None
    together = Encoder(data, tokenizer, reader.kind).encode_many(read, 10)
    alone = Encoder(data, tokenizer, reader.kind)
    for i, (row, result) in enumerate(zip(read, together, strict=True)):
        try:
            assert alone.encode(row, 10 + i) == result
        except DataError as error:
            assert isinstance(result, DataError) and (str(error), error.reason) == (str(result), result.reason)
    return together


@pytest.mark.parametrize("shape", SHAPES)
def test_together_is_the_same_as_alone(shape: str) -> None:
    *parts, _ = SHAPES[shape]
    tokenizer = tokenizer_of(*parts)  # type: ignore[arg-type]
    one, two = texts(20, 1), texts(20, 2)
    for rows in (
        [{"prompt": a} for a in one],
        [{"prompt": [user(a)]} for a in one],
        [{"prompt": a, "completion": b} for a, b in zip(one, two, strict=True)],
        [{"prompt": a, "chosen": b + "1", "rejected": b + "2"} for a, b in zip(one, two, strict=True)],
        [{"messages": [user(a), assistant(b or "x"), user(b), assistant(a)]} for a, b in zip(one, two, strict=True)],
        [{"text": a} for a in one],
        [{"input_ids": [5, 6, i]} for i in range(20)],
    ):
        assert all(isinstance(result, Prompt) for result in both(rows, tokenizer))
        if "prompt" in rows[0] and isinstance(rows[0]["prompt"], str):
            both(rows, tokenizer, chat="never")


def test_a_row_at_fault_is_an_error_in_its_place() -> None:
    rows: list[dict[str, Any]] = [{"prompt": text} for text in ("ab", "c \ud83d", "<|im_start|>", "d", "ef")]
    rows[3]["tools"] = [WEATHER]
    results = both(rows, tiny_tokenizer())
    assert [isinstance(result, DataError) for result in results] == [False, True, True, True, False]
    assert str(results[1]).startswith("row 11, column prompt: the text holds half of a character")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[-1].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + TOOLS
    results = both([{"prompt": "a"}, {"prompt": "no"}, {"prompt": "b"}], tokenizer)
    assert [isinstance(result, DataError) for result in results] == [False, True, False]


def metaspace() -> Any:
    """A tokenizer that puts a mark before the first word of a text only, as those of sentencepiece do."""
    vocabulary = {
        piece: i for i, piece in enumerate(["<s>", "</s>", "<unk>", "▁", *"abcdefghij▁\nx<>|_uersant[INST]/"])
    }
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
    made.decoder = decoders.Metaspace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = SHAPES["mistral"][0]
    return fast


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace])
def test_shared_beginnings_and_ends_are_cut_only_where_a_tokenizer_cuts(make: Any) -> None:
    tokenizer = make()
    for begin, end in (
        ("", ""),
        ("ab ", " c"),
        ("<s>[INST] ab ", " ba</s>"),
        ("<|im_start|>a", "b<|im_end|>\n"),
        ("<s>", ""),
    ):
        given = [begin + text + end for text in texts(30, 3)]
        together = encode_texts(tokenizer, given, special=False)
        assert [list(ids) for ids in together] == [tokenizer.encode(text, add_special_tokens=False) for text in given]
        same = [given[0]] * 3
        assert [list(ids) for ids in encode_texts(tokenizer, same, False)] == [
            tokenizer.encode(text, add_special_tokens=False) for text in same
        ]
