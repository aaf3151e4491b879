"""Convert conversations as people write them to the messages that chat templates take.

Read are OpenAI's messages (arguments of tool calls as JSON text, no content beside tool calls, `function_call`), those
of ShareGPT (from, value), content in parts of text and images, keys that Arrow filled with null, and marks of turns
that are not to be trained (`weight`, `train`, `trainable`, `training`, `loss`). Everything else is refused by name.
"""

from __future__ import annotations

import json
from typing import Any

from rlft.data.images import held_in, is_image
from rlft.errors import DataError

ROLES = ("system", "user", "assistant", "tool", "developer")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""ShareGPT's `from` -> our role."""
MARKS = ("weight", "train", "training", "trainable", "loss")
"""Keys of a message that say whether it is trained: OpenAI's, Axolotl's, Tinker's, ms-swift's."""
UNTRAINED = "weight"
"""Key that a message keeps, with value 0, where it is not trained."""
TEXT_PARTS = ("text", "input_text", "output_text")
WANT = '{"role": ..., "content": ...}'


def messages_of(value: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return a conversation as messages with a known role and string content, and the images in it, in order.

    The content is a list of parts where it has images, which are only places there: {"type": "image"}. It is left out
    beside tool calls where there is none. `UNTRAINED` marks turns that are not trained. Raises DataError naming the
    message.
    """
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"want messages, a list of {WANT}, got {value!r:.80}")
    images: list[Any] = []
    return [_message(entry, i, images) for i, entry in enumerate(value)], images


def parsed_messages(value: Any) -> Any:
    """Return the messages that a JSON text holds, as a CSV file has them; any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    return _parsed(value, "it is no JSON")


def is_messages(value: Any) -> bool:
    """Return True for a value that looks like messages: a list of dicts."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)


def is_sharegpt(value: Any) -> bool:
    """Return True for messages with the keys from and value."""
    return is_messages(value) and "from" in value[0] and "role" not in value[0]


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a row as templates take them, None where it has none. JSON text is parsed."""
    tools = _parsed(value, "it is no JSON") if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"want a list of tools, each with name, description and parameters, got {value!r:.80}; rename the column "
            f"by data.columns if it means something else"
        )
    plain: list[dict[str, Any]] = without_nulls(tools)
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in plain
    ]


def without_nulls(value: Any) -> Any:
    """Return a copy of lists and dicts without the keys whose value is None, which Arrow adds to structs."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(inner) for inner in value]
    return value


def _message(entry: Any, place: int, images: list[Any]) -> dict[str, Any]:
    """Return a message; append the images that it holds to `images`."""
    if not isinstance(entry, dict):
        raise DataError(f"message {place} is {entry!r:.80}: want {WANT}")
    if len(entry) == 2 and entry.get("role") in ROLES and isinstance(entry.get("content"), str):
        return entry
    message: dict[str, Any] = without_nulls(entry)
    if "from" in message and "role" not in message:
        message = _of_sharegpt(message, place)
    if message.get("role") == "function":
        message["role"] = "tool"
    if message.get("role") not in ROLES:
        raise DataError(f"message {place} is {entry!r:.80}: want {WANT}, and a role among {', '.join(ROLES)}")
    if "function_call" in message:
        message["tool_calls"] = [*message.get("tool_calls", ()), message.pop("function_call")]
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = [_call(call, place) for call in _as_list(calls)]
    try:
        if "content" in message:
            message["content"] = _content(message["content"], images)
        elif "tool_calls" not in message:
            raise DataError(f"has no content, only {', '.join(entry)}: want {WANT}")
        _mark(message)
    except DataError as error:
        raise DataError(f"message {place} ({message['role']}) {error}", reason=error.reason) from None
    return message


def _of_sharegpt(message: dict[str, Any], place: int) -> dict[str, Any]:
    speaker, said = str(message.pop("from")).lower(), message.pop("value", None)
    if speaker not in SPEAKERS:
        raise DataError(f'message {place} is from = "{speaker}": known are {", ".join(SPEAKERS)}')
    if speaker in ("function_call", "tool_call"):
        return {**message, "role": "assistant", "tool_calls": _as_list(said)}
    return {**message, "role": SPEAKERS[speaker], **({} if said is None else {"content": said})}


def _as_list(calls: Any) -> list[Any]:
    if isinstance(calls, str):
        calls = _parsed(calls, "tool_calls is no JSON")
    return list(calls) if isinstance(calls, list | tuple) else [calls]


def _call(call: Any, place: int) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, which templates write as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"message {place} has the tool call {call!r:.80}: want a function with name and arguments")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        what = f"message {place}: the arguments of {function['name']} are no JSON object"
        arguments = _parsed(arguments, what) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"message {place}: the arguments of {function['name']} are {arguments!r:.80}: want an object")
    around = {key: value for key, value in call.items() if key in ("id", "index")}
    return {**around, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{what} ({error}): {text!r:.80}") from None


def _content(content: Any, images: list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"has the content {content!r:.80}: want a string")
    if not any(map(is_image, content)):
        return "".join(_text_of_part(part) for part in content)
    held = [held_in(part) for part in content if is_image(part)]
    images += [image for image in held if image is not None]
    return [{"type": "image"} if is_image(part) else {"type": "text", "text": _text_of_part(part)} for part in content]


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    raise DataError(
        f"has a part of its content that is neither text nor an image "
        f"({part if kind is None or kind in TEXT_PARTS else kind!r:.80}): video, sound and other parts are not "
        f"supported; leave such rows out"
    )


def _mark(message: dict[str, Any]) -> None:
    """Replace the marks of a message by `UNTRAINED` where one of them is off."""
    if detail := [key for key in ("train_detail", "training_detail") if key in message]:
        raise DataError(f"has {detail[0]}: parts of a turn cannot be marked; mark whole turns with weight = 0 or 1")
    marks = {key: message.pop(key) for key in MARKS if key in message}
    for key, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"has {key} = {value!r:.40}: want 0 or 1, since a turn is trained or not")
        if value and message["role"] != "assistant":
            raise DataError(f"has {key} = {value!r}: only turns of the assistant are trained; set it to 0")
    if not all(marks.values()):
        message[UNTRAINED] = 0


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages without the marks of turns that are not trained."""
    return [
        {key: value for key, value in message.items() if key != UNTRAINED} if UNTRAINED in message else message
        for message in messages
    ]
