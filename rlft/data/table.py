"""Prompts of a dataset in little memory: token ids in flat arrays, and `Prompt` objects that are built when drawn."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import overload

import numpy as np

from rlft.data.images import packed, unpacked
from rlft.data.rows import Packed, Row
from rlft.types import Prompt, Recorded

APART = ("ids", "row", "index", "recorded", "images")
REST = tuple(field.name for field in fields(Prompt) if field.name not in APART)
"""Fields of a prompt that are kept as Python values."""


class Encoded:
    """A growing list of prompts, each as a part of flat arrays."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Start an empty list. rows: those that the prompts come from."""
        self._rows = rows
        self._ids, self._ends = array("i"), array("q", [0])
        self._recorded_ids, self._recorded_mask, self._recorded_ends = array("i"), bytearray(), array("q", [0])
        self._counts = array("q", [0])
        """Recorded completions of all prompts before each."""
        self._places, self._indices = array("q"), array("q")
        self._rest, self._images = Packed(), Packed()
        self._any_image = False

    def append(self, prompt: Prompt, row: Row, place: int) -> None:
        """Add a prompt that was encoded from a row. place: of the row among the rows."""
        self._ids.extend(prompt.ids)
        self._ends.append(len(self._ids))
        texts = []
        for recorded in prompt.recorded:
            self._recorded_ids.extend(recorded.ids)
            self._recorded_mask += bytes(recorded.mask)
            self._recorded_ends.append(len(self._recorded_ids))
            texts.append((recorded.reward, recorded.text))
        self._counts.append(len(self._recorded_ends) - 1)
        self._places.append(place)
        self._indices.append(prompt.index)
        # A row that encoding has changed (an implicit prompt) is kept; any other is read from the rows again.
        changed = None if prompt.row is row else prompt.row
        self._rest.append((changed, texts, [getattr(prompt, name) for name in REST]))
        self._images.append(packed(prompt.images))
        self._any_image |= bool(prompt.images)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Prompt:
        changed, texts, rest = self._rest[i]
        row = self._rows[self._places[i]] if changed is None else changed
        ids = tuple(self._ids[self._ends[i] : self._ends[i + 1]])
        recorded = []
        for text, j in zip(texts, range(self._counts[i], self._counts[i + 1]), strict=True):
            start, stop = self._recorded_ends[j], self._recorded_ends[j + 1]
            mask = tuple(map(bool, self._recorded_mask[start:stop]))
            recorded.append(Recorded(tuple(self._recorded_ids[start:stop]), mask, *text))
        more = dict(zip(REST, rest, strict=True))
        images = unpacked(self._images[i], row)
        return Prompt(ids=ids, row=row, index=self._indices[i], recorded=tuple(recorded), images=images, **more)

    def key(self, i: int) -> bytes:
        """Return what two rows have in common whose prompts are equal; a text without a prompt is its own.

        An image is known by the digest of its bytes.
        """
        start, stop = self._ends[i], self._ends[i + 1]
        if start < stop:
            return self._ids[start:stop].tobytes() + b"".join(digest.encode() for digest in self._digests(i))
        start, stop = self._recorded_ends[self._counts[i]], self._recorded_ends[self._counts[i] + 1]
        return self._recorded_ids[start:stop].tobytes()

    def sees(self, i: int) -> bool:
        """Return whether a prompt has images."""
        return bool(self._digests(i))

    def _digests(self, i: int) -> list[str]:
        return [digest for _, digest, *_ in self._images[i]] if self._any_image else []

    def lengths(self) -> np.ndarray:
        """Return the tokens of each prompt, [prompts] int64."""
        return np.diff(np.array(self._ends))

    def longest(self) -> np.ndarray:
        """Return the tokens of each prompt with its longest recorded completion, [prompts] int64; 0 without one."""
        recorded, counts = np.diff(np.array(self._recorded_ends)), np.array(self._counts)
        completions = np.zeros(len(self), np.int64)
        some = np.diff(counts) > 0
        if some.any():
            completions[some] = np.maximum.reduceat(recorded, counts[:-1][some])
        return np.where(some, self.lengths() + completions, 0)

    def digest(self, order: np.ndarray) -> str:
        """Return 16 hex digits that depend on all tokens and images of the prompts in this order.

        order: [prompts] int64.
        """
        ends, recorded_ends, counts = map(np.array, (self._ends, self._recorded_ends, self._counts))
        completions = _indices(counts, order)
        whole = hashlib.blake2b(digest_size=8)
        for lengths, places in ((ends, order), (counts, order), (recorded_ends, completions)):
            whole.update(np.diff(lengths)[places].tobytes())
        for flat, bounds, places in ((self._ids, ends, order), (self._recorded_ids, recorded_ends, completions)):
            tokens = np.array(flat)
            for start in range(0, len(places), 2**16):
                whole.update(tokens[_indices(bounds, places[start : start + 2**16])].tobytes())
        for i in order.tolist() if self._any_image else ():
            whole.update("".join(self._digests(i)).encode())
        return whole.hexdigest()


def _indices(ends: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the indices of all values of some parts of a flat array. ends: [parts + 1], where each part begins."""
    starts, lengths = ends[places], ends[places + 1] - ends[places]
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)


class PromptTable(Sequence[Prompt]):
    """Prompts of a dataset, in order. Each access builds a new `Prompt`."""

    def __init__(self, encoded: Encoded, order: np.ndarray | None = None) -> None:
        """View prompts. order: [prompts] int64, which of them and in which order; None: all."""
        self._encoded = encoded
        self._order = np.arange(len(encoded)) if order is None else order

    @classmethod
    def of(cls, prompts: Iterable[Prompt]) -> PromptTable:
        """Make a table of prompts."""
        prompts = list(prompts)
        encoded = Encoded([prompt.row for prompt in prompts])
        for i, prompt in enumerate(prompts):
            encoded.append(prompt, prompt.row, i)
        return cls(encoded)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> PromptTable: ...
    def __getitem__(self, place: int | slice) -> Prompt | PromptTable:
        if isinstance(place, slice):
            return PromptTable(self._encoded, self._order[place])
        return self._encoded[int(self._order[place])]

    def select(self, places: Sequence[int] | np.ndarray) -> PromptTable:
        """Return the prompts at these places."""
        return PromptTable(self._encoded, self._order[np.asarray(places, np.int64)])

    def keys(self) -> list[bytes]:
        """Return one value per prompt, equal where all tokens and images of two prompts are. See `Encoded.key`."""
        return [self._encoded.key(i) for i in self._order.tolist()]

    def lengths(self) -> np.ndarray:
        """Return the tokens of each prompt, [prompts] int64."""
        return self._encoded.lengths()[self._order]

    def longest(self) -> np.ndarray:
        """Return the tokens of each prompt with its longest recorded completion, [prompts] int64; 0 without one."""
        return self._encoded.longest()[self._order]

    def with_images(self) -> int:
        """Return the number of prompts that have images."""
        return sum(map(self._encoded.sees, self._order.tolist()))

    def longest_prompt(self) -> Prompt:
        """Return the first of the prompts with the most tokens."""
        return self[int(self.lengths().argmax())]

    def digest(self) -> str:
        """Return 16 hex digits that depend on all tokens and images of prompts, on completions, and on their order."""
        return self._encoded.digest(self._order)


def table_of(prompts: Sequence[Prompt]) -> PromptTable:
    """Return prompts as a table, whose lengths are known without building them."""
    return prompts if isinstance(prompts, PromptTable) else PromptTable.of(prompts)
