"""Reward the tags around reasoning and answer, `<think>...</think> <answer>...</answer>`, softly or strictly.

Soft: each opening and each closing tag that occurs exactly once earns its share of 1, so that a model that rarely
writes the whole form sees a difference between its completions. Strict: 1 for the whole form and 0 for anything else,
as the format reward of DeepSeek-R1 (2501.12948).

    [[rewards]]
    use = "tags"
    weight = 0.2
    args = { elements = ["think", "answer"], strict = true }
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlft.rewards.builtin.exact import text_of


def tags(
    completions: list[Any],
    elements: Sequence[str] = ("think", "answer"),
    strict: bool = False,
    opened: str = "",
    **_: Any,
) -> list[float]:
    """Return the share of tags that occur exactly once; strict: 1.0 for the form alone, else 0.0.

    elements: their names, in order. In the strict form each element stands once, in this order, with nothing but white
    space around it. opened: the tag that the chat template opens at the end of the prompt, such as "<think>\\n", which
    the completion therefore lacks; a run sets it from its prompts.

    >>> tags(completions=["<think>4</think>4", "<think>4</think> <answer>4</answer>"])
    [0.5, 1.0]
    >>> tags(completions=["4</think> <answer>4</answer>"], strict=True, opened="<think>")
    [1.0]
    """
    if not elements or isinstance(elements, str) or not all(isinstance(name, str) for name in elements):
        raise ValueError(f'elements = {elements!r}: want a list of names, for example ["think", "answer"]')
    texts = [opened + text_of(item) for item in completions]
    marks = [mark for name in elements for mark in (f"<{name}>", f"</{name}>")]
    once = [sum(text.count(mark) == 1 for mark in marks) for text in texts]
    if not strict:
        return [count / len(marks) for count in once]
    form = re.compile(
        r"\s*" + "".join(f"<{re.escape(name)}>.*</{re.escape(name)}>\\s*" for name in elements), re.DOTALL
    )
    return [
        float(count == len(marks) and form.fullmatch(text) is not None) for count, text in zip(once, texts, strict=True)
    ]
