"""The text of single tokens, so that a report can show numbers per token without the tokenizer.

Decoding a single token is ambiguous: some tokenizers drop the leading space of the first token, and a character may
consist of several tokens. The text of a token is therefore what it adds after another token. Adjacent tokens that are
parts of a character are decoded together, with the text assigned to the first. Each token id is decoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rlft.types import Rollout

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""Output of tokenizers for bytes that are not a complete character."""


class TokenText(dict[int, str]):
    """Map token ids to texts. The dict has the tokens decoded so far."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._partial: set[int] = set()
        """Tokens that are not complete characters."""

    def __missing__(self, token: int) -> str:
        self[token] = piece = self._decode([token, token])[len(self._decode([token])) :]
        if BROKEN in piece:
            self._partial.add(token)
        return piece

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return one text per id: special tokens by name, "" for a later part of a character."""
        pieces = list(map(self.__getitem__, ids))
        if not self._partial.isdisjoint(ids):
            start = 0
            for partial, run in groupby(ids, self._partial.__contains__):
                end = start + len(list(run))
                if partial:
                    pieces[start:end] = [self._decode(ids[start:end]), *[""] * (end - start - 1)]
                start = end
        return pieces

    def first_groups(self, rollouts: Sequence[Rollout], groups: Sequence[int], most: int) -> list[list[str] | None]:
        """Return the token texts of rollouts in the first `most` groups, None for others. groups: of each rollout."""
        return [
            self(rollout.completion_ids) if group < most else None
            for rollout, group in zip(rollouts, groups, strict=True)
        ]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
