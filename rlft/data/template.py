"""A tokenizer and its chat template, with the facts about the template that hold for a whole dataset.

A template is a program of the model's author: it may raise anything, write a Python object where text belongs, or leave
out what it does not know. What it raises becomes DataError here, with its words; what it makes of tool calls, tools and
content in parts is found once, by rendering a probe.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from rlft.config.data import Data
from rlft.data.messages import plain
from rlft.errors import DataError

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]] | None

PROBE = "rlft-content"
"""Content of a message that is rendered to find how the template treats it."""
PROBE_KEY = "rlft-argument"
TAG = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$")
"""A tag at the end of a text, such as <think>."""


USUAL = ("role", "content", "tool_calls", "tool_call_id", "name", "id")
"""Keys of messages that a template may leave out without a note."""


class TurnEnd(NamedTuple):
    """How a chat template ends an assistant turn."""

    text: str
    """Text after the content up to and including `token`; usually `token` alone."""
    token: str
    """The added token of the tokenizer that ends the turn, as text: <|im_end|>, <end_of_turn>, </s>."""
    behind: str
    """Text after the token at the end of a conversation: nothing, a newline, EOS."""


class CallForm(NamedTuple):
    """The form of a tool call that the template writes correctly."""

    content: dict[str, Any]
    """What a message without content gets: an empty string, None, or no key."""
    as_text: bool
    """Whether the arguments are handed over as JSON text."""


class ChatTemplate:
    """Renders conversations for one dataset."""

    def __init__(self, data: Data, tokenizer: Any) -> None:
        """data: for `chat_template_kwargs`. The tokenizer may have no template; then only `ids` can be called."""
        self.tokenizer = tokenizer
        self.source = template_text(tokenizer)
        """Text of the template, "" without one."""
        self.unread: dict[str, None] = {}
        """Keys of messages, found so far, that the text of the template does not mention."""
        self._kwargs = data.chat_template_kwargs
        self._ends: dict[tuple[str, ...], TurnEnd | None] = {}
        self._opening: dict[tuple[Any, ...], str | None] = {}
        self._calls: CallForm | None = None
        self._in_parts: bool | None = None
        self._shows_tools: bool | None = None

    # ---- text and ids ----------------------------------------------------------------------------------------------

    def ids(self, text: str) -> tuple[int, ...]:
        """Encode a text without adding special tokens. Raises DataError for text that is no Unicode."""
        try:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # each tokenizer raises other errors
            raise encoding_fault(text, error) from error

    def render(
        self, messages: Messages, tools: Tools = None, open_turn: bool = False, resume_turn: bool = False
    ) -> str:
        """Render the conversation as text. Raises DataError with the template's words.

        open_turn: append the start of the assistant's turn. resume_turn: leave the last message's turn open.
        """
        self._check_tools(tools)
        shaped = self.shaped(messages)
        try:
            return self._call(shaped, tools, open_turn, resume_turn)
        except Exception as error:  # a template raises what its author wants
            raise self._refusal(error, shaped, tools) from error

    def render_many(self, conversations: Sequence[Messages]) -> list[str] | None:
        """Render conversations without tools, each with an opened turn; None if the template refuses any of them."""
        try:
            return self._call([self.shaped(messages) for messages in conversations], None, True, False)  # type: ignore[return-value]
        except Exception:  # each of them is rendered alone then, where the error is explained
            return None

    def _call(self, messages: Any, tools: Tools, open_turn: bool, resume_turn: bool) -> str:
        given = {} if tools is None else {"tools": list(tools)}
        options = {"continue_final_message": True} if resume_turn else {"add_generation_prompt": open_turn}
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **given, **self._kwargs)

    def shaped(self, messages: Messages) -> list[dict[str, Any]]:
        """Return the messages in the form that this template writes correctly, without marks."""
        if self._in_parts is None:
            self._in_parts = self._wants_parts()
        if not self._in_parts and all(len(message) == 2 and "content" in message for message in messages):
            return list(messages)
        shaped = []
        for message in plain(list(messages)):
            self.unread.update((key, None) for key in message if key not in USUAL and key not in self.source)
            if "tool_calls" in message:
                message = self._shaped_call(message)
            if self._in_parts and isinstance(message.get("content"), str):
                message = {**message, "content": [{"type": "text", "text": message["content"]}]}
            shaped.append(message)
        return shaped

    # ---- errors ----------------------------------------------------------------------------------------------------

    def _refusal(self, error: Exception, messages: Messages, tools: Tools) -> DataError:
        name, words = type(error).__name__, str(error).strip().partition("\n")[0]
        if isinstance(error, RecursionError):
            words = "nested too deeply"
        elif type(error).__module__.partition(".")[0] != "jinja2" or not words:
            words = f"{name}: {words}" if words else name
        if name == "TemplateSyntaxError":
            return DataError(
                f"the chat template has a syntax error ({words:.300}); mend it in the tokenizer", reason="template"
            )
        return DataError(
            f"the chat template refuses the conversation ({words:.300}){self._advice(messages, tools)}",
            reason="template",
        )

    def _advice(self, messages: Messages, tools: Tools) -> str:
        """Say what to change in messages that the template refuses, where that can be found."""
        roles = [str(message.get("role")) for message in messages]
        if roles[0] in ("system", "developer") and self._takes(messages[1:], tools):
            return (
                "; it takes the conversation without its system message: leave out data.system or that message, or put "
                "its text into the user's"
            )
        for i, (role, following) in enumerate(itertools.pairwise(roles)):
            if role == following:
                return f"; messages {i} and {i + 1} are both {role}: join them to one, or leave the row out"
        return "; fix the row or leave it out, or set another template in the tokenizer"

    def _takes(self, messages: Messages, tools: Tools) -> bool:
        try:
            return bool(messages) and bool(self._call(self.shaped(messages), tools, False, False))
        except Exception:
            return False

    # ---- facts, found once -----------------------------------------------------------------------------------------

    def turn_end(self, history: Messages, tools: Tools = None) -> TurnEnd | None:
        """Find how the template ends an assistant turn after `history`: with the first added token after the content.

        None if no added token follows. The same for all histories with equal roles. Raises DataError when the template
        does not render the assistant's content.
        """
        key = tuple(message["role"] for message in history)
        if key not in self._ends:
            whole = self.render([*history, {"role": "assistant", "content": PROBE}], tools)
            _, separator, rest = whole.rpartition(PROBE)
            if not separator:
                raise DataError(
                    "the chat template does not show what the assistant says; use that of an instruct model",
                    reason="template",
                )
            match = self.added.search(rest)
            self._ends[key] = None if match is None else TurnEnd(rest[: match.end()], match[0], rest[match.end() :])
        return self._ends[key]

    def opening(self, messages: Messages, tools: Tools, opened: str) -> str:
        """Return the text by which the template opens the assistant's turn after messages that end as these.

        opened: the messages rendered with the turn opened. "" where the last message opens the turn, as [/INST] of
        Mistral does. Raises DataError for a template that opens no turn.
        """
        key = (messages[0]["role"], messages[-1]["role"], len(messages) > 1, bool(tools))
        if key not in self._opening:
            closed = self.render(messages, tools)
            header = opened[len(closed) :] if opened.startswith(closed) else None
            if opened == closed and not self._is_open(messages, tools, closed):
                raise DataError(
                    "the chat template opens no assistant turn (add_generation_prompt changes nothing), so the model "
                    "would go on with the user's; use the template of an instruct model",
                    reason="template",
                )
            self._opening[key] = header
        return self._opening[key] or ""

    def _is_open(self, messages: Messages, tools: Tools, text: str) -> bool:
        """Return whether the assistant's turn begins right after the messages, without a generation prompt.

        An example is [/INST] of Mistral: it closes the last message, and at most white space comes before the answer.
        """
        probed = self.render([*messages[:-1], {**messages[-1], "content": PROBE}], tools)
        whole = self.render([*messages, {"role": "assistant", "content": PROBE}], tools)
        before_answer = whole.rpartition(PROBE)[0]
        return (
            bool(probed.rpartition(PROBE)[2].strip())
            and before_answer.startswith(text)
            and not before_answer[len(text) :].strip()
        )

    def _wants_parts(self) -> bool:
        """Return True for a template that shows content only in parts, [{"type": "text", ...}]."""
        if not self.source:
            return False
        shown = []
        for content in (PROBE, [{"type": "text", "text": PROBE}]):
            try:
                shown.append(PROBE in self._call([{"role": "user", "content": content}], None, False, False))
            except Exception:  # the rows show what it raises
                shown.append(False)
        return shown == [False, True]

    def _shaped_call(self, message: dict[str, Any]) -> dict[str, Any]:
        form = self._calls = self._calls or self._call_form()
        if form.as_text:
            calls = [
                {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        return message if "content" in message else {**message, **form.content}

    def _call_form(self) -> CallForm:
        """Find the form in which the template shows a tool call. Raises DataError if it shows none."""
        arguments = {PROBE_KEY: 1}
        contents: list[dict[str, Any]] = [{"content": ""}, {"content": None}, {}]
        for as_text, content in itertools.product((False, True), contents):
            call = {"name": PROBE, "arguments": _json(arguments) if as_text else arguments}
            message = {
                "role": "assistant",
                **content,
                "tool_calls": [{"id": "rlft00000", "type": "function", "function": call}],
            }
            # Templates that want the answer of a tool, or none, are tried with both.
            answer = {"role": "tool", "name": PROBE, "tool_call_id": "rlft00000", "content": "1"}
            for end in ([], [answer]):
                try:
                    text = self._call([{"role": "user", "content": "?"}, message, *end], None, False, False)
                except Exception:
                    continue
                quoted_badly = f"'{PROBE_KEY}'" in text or f'\\"{PROBE_KEY}' in text
                if PROBE_KEY in text and not quoted_badly:
                    return CallForm(content, as_text)
        raise DataError(
            "the chat template does not show tool_calls, so what the assistant calls would be lost; use a model whose "
            "template does, or write the calls into content",
            reason="template",
        )

    def _check_tools(self, tools: Tools) -> None:
        """Raise DataError for tools that the template does not show."""
        if not tools:
            return
        if self._shows_tools is None:
            question = [{"role": "user", "content": "?"}]
            try:
                without, given = (self._call(question, each, True, False) for each in (None, tools))
            except Exception:  # the row shows what it raises
                return
            self._shows_tools = without != given
        if not self._shows_tools:
            raise DataError(
                "the chat template does not show tools, so the column tools would not reach the model; use a model "
                'whose template does, or rename the column by data.columns, for example {my_tools = "tools"}',
                reason="template",
            )

    @property
    def added(self) -> re.Pattern[str]:
        """Pattern of all tokens added to the vocabulary: special tokens, and tags such as </think>."""
        return _pattern(self.tokenizer, len(self.tokenizer))

    def marks_generation(self) -> bool:
        """Return True when the template itself marks the assistant's tokens, with {% generation %}."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None


def template_text(tokenizer: Any) -> str:
    """Return the text of a tokenizer's chat template, of all of them where it has several; "" without one."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(map(str, dict(template).values()))


def encoding_fault(text: str, error: Exception) -> DataError:
    """Return the error for a text that the tokenizer refuses."""
    for i, letter in enumerate(text):
        if "\ud800" <= letter <= "\udfff":
            return DataError(
                f"the text holds half of a character at position {i} (\\u{ord(letter):04x}, a lone surrogate): it was "
                f"cut in the middle of an emoji, say; repair it, or leave the row out",
                reason="text",
            )
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"the tokenizer refuses the text ({type(error).__name__}: {words:.200})", reason="text")


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


@lru_cache(maxsize=4)
def _pattern(tokenizer: Any, _size: int) -> re.Pattern[str]:
    # Cached, since some tokenizers have thousands of them. `_size` changes when tokens are added.
    contents = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return re.compile(
        "|".join(re.escape(content) for content in sorted(contents, key=len, reverse=True) if content) or "(?!)"
    )
