"""The text of single tokens, so that a report can show numbers per token without the tokenizer.

A token alone has no text of its own: some tokenizers drop its leading space when it comes first, and a character may be
made of several tokens. So a piece is what a token adds behind another one, and neighbours that are only parts of a
character are decoded together, with the text on the first of them. Each token of the vocabulary is decoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rlft.types import Rollout

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers give for bytes that are not a whole character."""


class TokenText(dict[int, str]):
    """Token ids -> the text of each. As a dict: the tokens met so far."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._partial: set[int] = set()
        """Tokens that are not whole characters."""

    def __missing__(self, token: int) -> str:
        self[token] = piece = self._decode([token, token])[len(self._decode([token])) :]
        if BROKEN in piece:
            self._partial.add(token)
        return piece

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """As many texts as ids; special tokens by their names, "" for a later part of a character."""
        pieces = list(map(self.__getitem__, ids))
        if not self._partial.isdisjoint(ids):
            at = 0
            for partial, run in groupby(ids, self._partial.__contains__):
                end = at + len(list(run))
                if partial:
                    pieces[at:end] = [self._decode(ids[at:end]), *[""] * (end - at - 1)]
                at = end
        return pieces

    def first_groups(self, rollouts: Sequence[Rollout], groups: Sequence[int], most: int) -> list[list[str] | None]:
        """The pieces of the rollouts of the first `most` groups, None for the others. groups: group of each rollout."""
        return [self(r.completion_ids) if group < most else None for r, group in zip(rollouts, groups, strict=True)]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
