"""The text of single tokens: joined they are the text, spaces and split characters included."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlft.monitor.token_text import TokenText
from rlft.types import Prompt, Rollout

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as GPT-2 spells them, and an end token."""
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*BYTES, "<end>"])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.mark.parametrize("text", ["a b", " two  spaces\n", "é", "x🙂🙂y 答案", "", "<end> a<end>"])
def test_pieces_join_to_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    pieces = TokenText(tokenizer)(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text


def test_the_parts_of_a_character_are_shown_on_its_first() -> None:
    tokenizer = byte_tokenizer()
    assert TokenText(tokenizer)(tokenizer.encode("aé!")) == ["a", "é", "", "!"]


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    tokenizer = byte_tokenizer()
    half = tokenizer.encode("🙂")[:2]
    assert set(TokenText(tokenizer)([*half, *tokenizer.encode("a")])) == {"\N{REPLACEMENT CHARACTER}", "", "a"}


def test_a_token_keeps_the_space_before_it() -> None:
    """A decoder of SentencePiece's kind drops the space of the first token."""
    made = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    made.decoder = decoders.Metaspace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    assert TokenText(tokenizer)([0, 1, 0]) == [" a", " b", " a"]


def test_only_the_first_groups_are_decoded() -> None:
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer.encode("ab"))
    rollouts = [Rollout(Prompt((1,), {}, i), ids, (True,) * 2, None, "ab", "stop", 0, 0, 0) for i in range(3)]
    assert TokenText(tokenizer).first_groups(rollouts, [0, 1, 2], 2) == [["a", "b"], ["a", "b"], None]
