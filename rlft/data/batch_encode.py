"""Encode many texts with one call of a fast tokenizer, which uses all cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode_texts(tokenizer: Any, texts: Sequence[str], special: bool) -> Sequence[Sequence[int]]:
    """Return the ids of each text, the same as tokenizer.encode(text, add_special_tokens=special).

    Nothing for texts that have to be encoded one by one: those of a tokenizer in Python, and texts of which the
    tokenizer refuses one.
    """
    if not texts or not getattr(tokenizer, "is_fast", False):
        return []
    # This also resets truncation and padding of the backend, which earlier calls or the tokenizer's file may have set.
    tokenizer.encode("", add_special_tokens=special)
    backend = tokenizer.backend_tokenizer
    try:
        if special:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=True)]
        begin, finish = _shared_ends(tokenizer, texts)
        first, last = texts[0][:begin], texts[0][len(texts[0]) - finish :]
        before, behind = (backend.encode(part, add_special_tokens=False).ids if part else [] for part in (first, last))
        middles = [text[begin : len(text) - finish] for text in texts]
        encodings = backend.encode_batch_fast(middles, add_special_tokens=False)
        return [[*before, *encoding.ids, *behind] for encoding in encodings]
    except Exception:  # each text is encoded alone then, where the error is explained
        return []


def _shared_ends(tokenizer: Any, texts: Sequence[str]) -> tuple[int, int]:
    """Return how many characters at the beginning and at the end all texts share and are encoded alike in all.

    A text may be cut before a special token, since tokenizers split there before anything else.
    """
    # The first and the last text in alphabetic order share what all share.
    begin = _common(min(texts), max(texts))
    backwards = [text[::-1] for text in texts]
    finish = min(_common(min(backwards), max(backwards)), min(map(len, texts)) - begin)
    cuts = [token.content for token in tokenizer.added_tokens_decoder.values() if _cuts(token)]
    head, tail = texts[0][:begin], texts[0][len(texts[0]) - finish :]
    begin = max((head.rfind(cut) for cut in cuts), default=-1)
    places = [place for cut in cuts if (place := tail.find(cut)) >= 0]
    return max(begin, 0), finish - min(places) if places else 0


def _common(first: str, second: str) -> int:
    """Return the number of characters with which both begin."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _cuts(token: Any) -> bool:
    """Return whether a text can be cut before a token: it is found in the text as it is, whatever is around it."""
    return token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
