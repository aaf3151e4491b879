"""Draft rows: what the model is asked and what is recorded, as pieces of text with the chat template applied once.

A string prompt becomes one user turn where the tokenizer has a chat template (`data.chat = "never"`: taken as it is).
In a chat a completion ends with the template's end of turn (<|im_end|>, <end_of_turn>), which is not always
tokenizer.eos_token. Plain text ends with EOS, and so does a completion outside a chat, or in a chat whose turns end
without a token.

Faults of templates do not show in the parity check, since engine and trainer see the same tokens. They are therefore
errors here: a prompt that is already rendered, a template that opens no assistant turn, a turn that is opened twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlft.config.data import Data
from rlft.data.chat import Piece, Side, ended, split_turns
from rlft.data.images import images_in, text_of, with_places
from rlft.data.messages import plain
from rlft.data.template import TAG, ChatTemplate, Tools
from rlft.errors import DataError


class Asked(NamedTuple):
    """The prompt of a row in a chat."""

    messages: list[dict[str, Any]]
    tools: Tools
    rendered: str | None = None
    """Its text, where it was rendered before."""

    @property
    def prefilled(self) -> bool:
        """Whether the completion goes on with the last message."""
        return self.messages[-1]["role"] == "assistant"


class Draft(NamedTuple):
    """A row before its texts are encoded."""

    row: dict[str, Any]
    messages: tuple[dict[str, Any], ...] | None
    prompt: str | None
    """Text of the prompt; None for plain text, which is all completion."""
    special: bool
    """Whether the tokenizer adds its special tokens (BOS) to what comes first."""
    sides: tuple[Side, ...]
    columns: tuple[str, ...]
    """Columns of the prompt and the sides, for errors."""

    def texts(self) -> list[tuple[str, bool, str]]:
        """Return (text, with special tokens, column) of all parts."""
        first = [] if self.prompt is None else [(self.prompt, self.special, self.columns[0])]
        alone = self.special and self.prompt is None
        return first + [
            (piece.text, alone, column)
            for side, column in zip(self.sides, self.columns[1:], strict=True)
            for piece in side.pieces
        ]


class Drafter:
    """Drafts the rows of one dataset."""

    def __init__(self, data: Data, tokenizer: Any, kind: str) -> None:
        """kind: a key of `rlft.data.kinds.KINDS` other than those of token ids."""
        self.template, self.kind = ChatTemplate(data, tokenizer), kind
        self.notes: dict[str, None] = {}
        """What the start of a run says about the rows drafted so far."""
        self._data, self._tokenizer = data, tokenizer
        self._chat = bool(self.template.source) and data.chat == "auto"
        special = tokenizer.all_special_tokens
        marks = [token for token in special if len(token) > 3 and token in self.template.source]
        self._rendered = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        self._special = frozenset(special)
        self._tags: dict[str, str] = {}

    def asked(self, row: dict[str, Any]) -> Asked | None:
        """Return the prompt of a row as messages; None for a string outside a chat."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            if not self._chat:
                if self._data.system:
                    raise DataError(
                        "data.system needs a chat template, and this tokenizer has none or data.chat is never"
                    )
                if row.get("system"):
                    self._note(
                        "data: the column system is not used, since the prompts are not put into a chat template"
                    )
                return None
            self._check_not_rendered(prompt)
            messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
            messages = with_places(messages, len(images_in(row)))
        else:
            if not self.template.source:
                raise DataError("the prompt is messages, but the tokenizer has no chat template; give strings")
            messages = with_places(plain(prompt), len(images_in(row)))
            for message in messages:
                self._check_not_rendered(text_of(message.get("content", "")))
        return Asked(self._with_system(messages, row), row.get("tools"))

    def _with_system(self, messages: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
        own = row.get("system")
        system = own if isinstance(own, str) and own else self._data.system
        if system and messages[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": system}, *messages]
        return messages

    def _check_not_rendered(self, text: str) -> None:
        """Raise DataError when a message contains special tokens of the template, as a rendered prompt does."""
        if mark := self._rendered.search(text):
            raise DataError(
                f"the prompt contains {mark[0]}, a mark of the chat template: it was rendered already and would be put "
                f'into the template twice; give the plain question, or data.chat = "never"'
            )

    def _prompt_text(self, asked: Asked) -> str:
        """Render what is asked, with the assistant's turn opened, or left open behind its beginning."""
        if asked.prefilled:
            if "tool_calls" in asked.messages[-1]:
                raise DataError(
                    "the prompt ends with a call of a tool, which cannot be continued; add the tool's answer"
                )
            self._note(
                "data: prompts end with an assistant message, which the completions continue; cut it off where it is "
                "an answer and not the beginning of one"
            )
            return self.template.render(asked.messages, asked.tools, resume_turn=True)
        text = asked.rendered or self.template.render(asked.messages, asked.tools, open_turn=True)
        if self.kind == "prompt" and (tag := self._opened_with(asked, text)):
            self._note(
                f"the chat template opens the assistant's turn with {tag}: completions begin after it, so a reward "
                f"that looks for {tag} in a completion does not find it"
            )
        return text

    def _opened_with(self, asked: Asked, text: str) -> str:
        """Return the tag, such as <think>, that ends the opening of the turn; "" for none."""
        opening = self.template.opening(asked.messages, asked.tools, text)
        if opening not in self._tags:
            tag = TAG.search(opening)
            self._tags[opening] = tag[1] if tag is not None and tag[1] not in self._special else ""
        return self._tags[opening]

    def draft(self, row: dict[str, Any], asked: Asked | None = None) -> Draft:
        """Draft one row. asked: its prompt, where it is known already."""
        if self.kind == "text":
            side = Side((Piece(row["text"], True),), 1.0, row["text"], not self._has_end(row["text"]))
            return Draft(without_prompt(row), None, None, True, (side,), ("text", "text"))
        if self.kind == "messages":
            return in_column("messages", self._draft_conversation, row)
        asked = asked or self.asked(row)
        prompt = row["prompt"] if asked is None else in_column("prompt", self._prompt_text, asked)
        rewards: dict[str, float] = {}
        if self.kind in ("completion", "label"):
            rewards = {"completion": -1.0 if self.kind == "label" and not row["label"] else 1.0}
        elif self.kind == "preference":
            rewards = {"chosen": 1.0, "rejected": -1.0}
        sides = tuple(
            in_column(column, self._side, row[column], reward, asked, prompt) for column, reward in rewards.items()
        )
        messages = None if asked is None else tuple(asked.messages)
        return Draft(row, messages, prompt, asked is None, sides, ("prompt", *rewards))

    def _draft_conversation(self, row: dict[str, Any]) -> Draft:
        messages, first = self.turns(row)
        tools = row.get("tools")
        before = self.template.render(messages[:first], tools, open_turn=True)
        pieces, last = split_turns(self.template, before, messages[:first], messages[first:], tools)
        self._say_end(messages[:first], tools)
        history = tuple(plain(messages[:first]))
        side = Side(pieces, 1.0, last)
        return Draft(without_prompt(row), history, before, False, (side,), ("messages", "messages"))

    def turns(self, row: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """Return the messages of a conversation with the system message, and the place of the first answer."""
        if not self.template.source:
            raise DataError("the row is messages, but the tokenizer has no chat template")
        messages = with_places(self._with_system(row["messages"], row), len(images_in(row)))
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
        if not first:
            raise DataError("messages need an assistant message after at least one other")
        return messages, first

    def _side(self, said: Any, reward: float, asked: Asked | None, prompt: str) -> Side:
        if not isinstance(said, str):
            if asked is None:
                raise DataError(
                    "the completion is messages but the prompt is a string that is not put into a chat template"
                )
            if asked.prefilled:
                raise DataError("the prompt ends with an assistant message, which a string continues, not messages")
            pieces, last = split_turns(self.template, prompt, asked.messages, said, asked.tools)
            return Side(pieces, reward, last)
        if asked is None:
            return Side((Piece(said, True),), reward, said, eos=True)
        history = asked.messages[:-1] if asked.prefilled else asked.messages
        text = said if asked.prefilled else self._continued(said, asked, prompt)
        self._say_end(history, asked.tools)
        text, eos = ended(self.template, text, history, asked.tools)
        return Side((Piece(text, True),), reward, said, eos)

    def _continued(self, said: str, asked: Asked, prompt: str) -> str:
        """Return a completion without the tag that the template has opened already; refuse a whole turn."""
        opening = self.template.opening(asked.messages, asked.tools, prompt)
        header = opening.strip()
        if header and said.lstrip().startswith(header):
            raise DataError(
                f"the completion begins with {header!r}, which the chat template has opened already: give what the "
                f"assistant says, without the marks of a turn"
            )
        tag = self._opened_with(asked, prompt)
        if not tag or not said.lstrip().startswith(tag):
            return said
        self._note(
            f"the chat template opens the assistant's turn with {tag}: the {tag} at the beginning of a completion is "
            f"left out, since it would be there twice"
        )
        space = opening[len(opening.rstrip()) :]
        return said.lstrip().removeprefix(tag).removeprefix(space)

    def _has_end(self, text: str) -> bool:
        """Return whether a text ends with EOS or, rendered before, with the end of a turn and white space."""
        ends = self.template.added.findall(text[-200:].rstrip())
        return bool(ends) and text.rstrip().endswith(ends[-1]) and ends[-1] in self._special

    def _say_end(self, history: Sequence[dict[str, Any]], tools: Tools) -> None:
        end = self.template.turn_end(history, tools)
        if end is not None and end.token != self._tokenizer.eos_token:
            self._note(
                f"a turn ends with {end.token}, as the chat template has it, and not with tokenizer.eos_token = "
                f"{self._tokenizer.eos_token}: that is what is trained, and where sampling stops"
            )

    def _note(self, text: str) -> None:
        self.notes[text] = None


def in_column(column: str, function: Any, *args: Any) -> Any:
    """Call a function, and name the column in the faults of template and tokenizer that it raises."""
    try:
        return function(*args)
    except DataError as error:
        raise named(error, column) from None


def named(error: DataError, column: str) -> DataError:
    """Return a fault of template or tokenizer with the column, as text that goes on after "row N"."""
    new = error.reason in ("template", "text") and not str(error).startswith(", column")
    return DataError(f", column {column}: {error}", reason=error.reason) if new else error


def without_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose prompt is its messages or nothing, so that a column prompt is not taken for it."""
    return {name: value for name, value in row.items() if name != "prompt"} if "prompt" in row else row
