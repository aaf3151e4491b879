"""Encode rows: token ids of the prompt and of recorded completions, held against what the model takes.

Prompt and completion are encoded separately and concatenated, so that the trained tokens are those an engine would
sample after the prompt. A row is drafted first, as pieces of text (rlft.data.drafts), and encoded then, so that the
texts of many rows are encoded in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from rlft.config.data import Data
from rlft.data.batch_encode import encode_texts
from rlft.data.chat import Side, encode_marked
from rlft.data.drafts import Asked, Draft, Drafter, in_column, named, without_prompt
from rlft.data.folders import folders_of
from rlft.data.images import images_in, shows_images
from rlft.data.kinds import IDS
from rlft.data.limits import NO_LIMITS, Limits, check_ids, check_length, check_places
from rlft.data.messages import plain
from rlft.data.reader import Reader
from rlft.data.template import encoding_fault
from rlft.data.tokens import SIDES, mask_of, split_ids
from rlft.errors import DataError
from rlft.types import Image, Prompt, Recorded

PART = 256
"""Rows that are encoded together, while the next ones are drafted."""

Coded = dict[tuple[str, bool], Sequence[int]]
"""(text, with special tokens) -> its ids."""


def encode_prompt(row: dict[str, Any], index: int, data: Data, tokenizer: Any, limits: Limits = NO_LIMITS) -> Prompt:
    """Read and encode one row. limits: what the model takes. Raises DataError naming the row."""
    reader = Reader(data)
    row = reader.read(row, index)
    assert reader.kind is not None, "the first row decides it"
    return Encoder(data, tokenizer, reader.kind, limits).encode(row, index)


class Encoder:
    """Encodes the rows of one dataset that a `Reader` has read."""

    def __init__(self, data: Data, tokenizer: Any, kind: str, limits: Limits = NO_LIMITS) -> None:
        """kind: the reader's. limits: what the model takes, which every row is held against."""
        self.tokenizer, self.kind, self.limits = tokenizer, kind, limits
        # A fast tokenizer may be changed by a call (truncation, padding), and refuses that during another call.
        self._lock = Lock()
        self._drafter = Drafter(data, tokenizer, kind)
        self._data, self._folders = data, folders_of(data)
        self._marked = kind == "messages" and self._drafter.template.marks_generation()
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # Ids up to the vocabulary as shared objects: a separate int takes 28 bytes, a reference 8.
        self._ints = list(range(len(tokenizer)))
        self._checks_ids = limits.vocabulary is not None and (kind in IDS or len(tokenizer) > limits.vocabulary)

    def notes(self) -> list[str]:
        """Return what the start of a run says about the rows encoded so far."""
        unread = self._drafter.template.unread
        keys = f"data: the chat template does not read the key {', '.join(unread)} of messages, so the model does not"
        return [*self._drafter.notes, *([keys] if unread else [])]

    def encode(self, row: dict[str, Any], index: int) -> Prompt:
        """Encode one row. Raises DataError naming row and column."""
        try:
            self._check_sees(row)
            if self.kind in IDS:
                return self._checked(self._of_ids(row, index))
            if self._marked:
                return self._checked(self._of_marked(row, index))
            draft = self._written(self._drafter.draft(row))
            coded = {(text, special): self._ids(text, special, column) for text, special, column in draft.texts()}
            return self._checked(self._assemble(draft, coded, index))
        except DataError as error:
            raise _in_row(error, index) from None
        except RecursionError:
            raise DataError(f"row {index}: nested too deeply to be encoded") from None

    def encode_many(self, rows: Sequence[dict[str, Any]], start: int) -> list[Prompt | DataError]:
        """Encode rows, numbered from `start`, with an error in place of a row that is at fault. Same as `encode`."""
        results: list[Prompt | DataError] = []
        # The tokenizer works outside of the interpreter lock, so that the next rows are drafted meanwhile.
        with ThreadPoolExecutor(1, "rlft-encode") as aside:
            waiting: list[tuple[int, list[Draft | None], Future[Coded]]] = []
            for place in range(0, len(rows), PART):
                drafts = self._drafts(rows[place : place + PART])
                waiting.append((place, drafts, aside.submit(self._coded, drafts)))
                if len(waiting) > 1:
                    results += self._results(rows, start, *waiting.pop(0))
            for part in waiting:
                results += self._results(rows, start, *part)
        return results

    def _coded(self, drafts: Sequence[Draft | None]) -> Coded:
        """Encode the texts of drafted rows; without those that have to be encoded one by one."""
        coded: Coded = {}
        wanted = {(text, special): None for draft in drafts if draft for text, special, _ in draft.texts()}
        for special in (False, True):
            texts = [text for text, needs in wanted if needs is special]
            with self._lock:
                ids = encode_texts(self.tokenizer, texts, special)
            coded |= zip([(text, special) for text in texts], ids, strict=False)
        return coded

    def _results(
        self, rows: Sequence[dict[str, Any]], start: int, place: int, drafts: list[Draft | None], coded: Future[Coded]
    ) -> Iterator[Prompt | DataError]:
        """Yield the prompts of the rows from `place` on, which were drafted and encoded together."""
        known = coded.result()
        for i, draft in enumerate(drafts, place):
            try:
                yield self._finished(draft, known, start + i) or self.encode(rows[i], start + i)
            except DataError as error:
                yield error

    def _finished(self, draft: Draft | None, coded: Coded, index: int) -> Prompt | None:
        """Return the prompt of a drafted row; None where a text of it has to be encoded by itself."""
        if draft is None:
            return None
        try:
            return self._checked(self._assemble(draft, coded, index))
        except KeyError:
            return None
        except DataError as error:
            raise _in_row(error, index) from None

    # ---- drafts ----------------------------------------------------------------------------------------------------

    def _drafts(self, rows: Sequence[dict[str, Any]]) -> list[Draft | None]:
        """Draft rows; None for those that are encoded alone, since they are at fault or need no text."""
        if self.kind in IDS or self._marked:
            return [None] * len(rows)
        drafts: list[Draft | None] = []
        for row, asked in zip(rows, self._rendered_together(rows), strict=True):
            try:
                self._check_sees(row)
                drafts.append(self._written(self._drafter.draft(row, asked)))
            except (DataError, RecursionError):
                drafts.append(None)
        return drafts

    def _written(self, draft: Draft) -> Draft:
        """Return a draft whose prompt has what the model's processor writes around images."""
        reader = self.limits.images
        if reader is None or draft.prompt is None:
            return draft
        return draft._replace(prompt=reader.written(draft.prompt, self.tokenizer, draft.special))

    def _rendered_together(self, rows: Sequence[dict[str, Any]]) -> list[Asked | None]:
        """Render the prompts of rows in one call, where they have no tools and no beginning of an answer."""
        asked: list[Asked | None] = []
        for row in rows:
            try:
                asked.append(None if self.kind in ("messages", "text") else self._drafter.asked(row))
            except DataError:
                asked.append(None)
        plain_ones = [i for i, each in enumerate(asked) if each and not each.tools and not each.prefilled]
        texts = self._drafter.template.render_many([asked[i].messages for i in plain_ones])  # type: ignore[union-attr]
        for i, text in zip(plain_ones, texts or (), strict=False):
            asked[i] = asked[i]._replace(rendered=text)  # type: ignore[union-attr]
        return asked

    # ---- ids -------------------------------------------------------------------------------------------------------

    def _ids(self, text: str, special: bool, column: str) -> Sequence[int]:
        try:
            with self._lock:
                return self.tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:  # each tokenizer raises other errors
            raise named(encoding_fault(text, error), column) from error

    def _shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        try:
            return tuple(map(self._ints.__getitem__, ids))
        except IndexError:
            return tuple(ids)

    def _assemble(self, draft: Draft, coded: Coded, index: int) -> Prompt:
        """Put the ids of a drafted row together."""
        ids = () if draft.prompt is None else self._shared(coded[draft.prompt, draft.special])
        self._check_bos(ids, "the text" if draft.special else "the rendered prompt", draft.special)
        ids, images = self._expanded(ids, draft.row)
        alone = draft.prompt is None
        recorded = tuple(self._recorded(side, coded, alone) for side in draft.sides)
        return Prompt(ids, draft.row, index, draft.messages, recorded, images)

    def _expanded(self, ids: tuple[int, ...], row: dict[str, Any]) -> tuple[tuple[int, ...], tuple[Image, ...]]:
        """Return the ids of a prompt with all tokens of the row's images, and the images."""
        reader = self.limits.images
        if reader is None or not (images_in(row) or reader.places.intersection(ids)):
            return ids, ()
        return reader.expanded(ids, images_in(row), self._folders)

    def _recorded(self, side: Side, coded: Coded, alone: bool) -> Recorded:
        """Put the ids of a completion together. alone: nothing comes before it, so its first token is not trained."""
        ids: list[int] = []
        mask: list[bool] = []
        for piece in side.pieces:
            new = coded[piece.text, alone]
            ids += new
            mask += [piece.train] * len(new)
        eos, bos = self._eos, self._bos
        if alone:
            self._check_bos(ids, "the text", True)
        elif ids[:1] == [bos] and bos != eos:
            raise DataError(
                f"the completion begins with {self.tokenizer.bos_token}, which begins a sequence: it stands after a "
                f"prompt; remove it"
            )
        if side.eos and ids[-1:] != [eos]:
            if eos is None:
                raise DataError("the tokenizer has no eos_token, with which a completion ends; set one, or give a chat")
            ids, mask = [*ids, eos], [*mask, True]
        if alone:
            mask[0] = False  # nothing precedes the first token to predict it from
        return Recorded(self._shared(ids), tuple(mask), side.reward, side.text)

    def _of_ids(self, row: dict[str, Any], index: int) -> Prompt:
        """Encode a row that is token ids already. Its prompt is decoded for rewards."""
        if self.kind == "input_ids":
            prompt, ids, mask = split_ids(row)
            recorded = (Recorded(ids, mask, 1.0, self._decoded(ids)),)
        else:
            prompt = tuple(row["prompt_ids"])
            recorded = tuple(
                Recorded(tuple(row[column]), mask_of(row, column), reward, self._decoded(row[column]))
                for column, reward in SIDES[self.kind]
            )
        self._check_bos(prompt or recorded[0].ids, "the row", True)
        return Prompt(prompt, {**row, "prompt": self._decoded(prompt)}, index, None, recorded)

    def _decoded(self, ids: Sequence[int]) -> str:
        try:
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)
        except Exception as error:  # an id beyond the vocabulary, which `_checked` names where it can
            raise DataError(f"the tokenizer cannot decode the ids ({error})", reason="vocabulary") from error

    def _of_marked(self, row: dict[str, Any], index: int) -> Prompt:
        """Encode a conversation whose template marks what the assistant says."""
        messages, first = self._drafter.turns(row)
        reader = self.limits.images
        text = "" if reader is None else in_column("messages", self._drafter.template.render, messages[:first])
        if reader is not None and reader.written(text, self.tokenizer) != text:
            raise DataError(
                "the chat template marks the assistant's tokens ({% generation %}), and the model's processor writes "
                "text around images, which the marks would not follow; take the marks out of the template",
                reason="template",
            )
        ids, recorded = in_column(
            "messages",
            encode_marked,
            self._drafter.template,
            messages,
            row.get("tools"),
            self._data.chat_template_kwargs,
        )
        self._check_bos(ids, "the rendered conversation")
        ids, images = self._expanded(ids, row)
        return Prompt(ids, without_prompt(row), index, tuple(plain(messages[:first])), (recorded,), images)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check_sees(self, row: dict[str, Any]) -> None:
        """Raise DataError for a row with images where the model takes text alone, or the row is token ids."""
        if not shows_images(row):
            return
        if self.limits.images is None:
            raise DataError(
                "the row has images, and the model takes text alone; give a vision-language model, or, for a column "
                'that means something else, rename it by data.columns, for example {picture = "image"}',
                reason="images",
            )
        if self.kind in IDS:
            raise DataError("the row has images, and its prompt is token ids: give the prompt as text or messages")

    def _check_bos(self, ids: Sequence[int], what: str, added: bool = False) -> None:
        if self._bos is None or len(ids) < 2 or not ids[0] == ids[1] == self._bos:
            return
        if added and self.kind not in IDS:
            raise DataError(
                f"{what} begins with two BOS tokens, since the tokenizer adds one; remove {self.tokenizer.bos_token} "
                f"from it"
            )
        raise DataError(f"{what} begins with two BOS tokens; remove the one in the text or the template")

    def _checked(self, prompt: Prompt) -> Prompt:
        """Hold a prompt against what the model takes."""
        context, vocabulary, images = self.limits
        limit = self._data.max_prompt_tokens
        # A prompt above data.max_prompt_tokens is dropped or refused by whoever loads the dataset.
        if context is not None and (limit is None or len(prompt.ids) <= limit):
            check_length(prompt, context)
        if images is not None:
            check_places(prompt, images, self._token)
        if vocabulary is not None and self._checks_ids:
            check_ids(prompt, vocabulary, self._token, frozenset() if images is None else images.beyond)
        return prompt

    def _token(self, token_id: int) -> str | None:
        return None if token_id >= len(self.tokenizer) else self.tokenizer.convert_ids_to_tokens(token_id)


def _in_row(error: DataError, index: int) -> DataError:
    joint = "" if str(error).startswith(", column") else ": "
    return DataError(f"row {index}{joint}{error}", reason=error.reason)
