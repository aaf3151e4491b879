"""Positions of tokens in a sequence with images: time, row and column (M-RoPE), or one for all, as text has them.

On three axes, a text token has one position on all of them. The tokens of an image have the time at which it starts,
and their row and column from there on; the text behind it goes on after the larger side of the image. See Qwen2-VL,
https://arxiv.org/abs/2409.12191, section 2.1.
"""

from __future__ import annotations

import numpy as np

from rlft.types import Image, Prompt


def prompt_positions(prompt: Prompt) -> np.ndarray:
    """Return the positions of a prompt's tokens, [3, tokens] int64; equal on all axes without images."""
    parts, token, position = [], 0, 0
    for image in filter(on_axes, prompt.images):
        parts.append(_text(position, image.start - token))
        position += image.start - token
        rows, columns = np.divmod(np.arange(image.tokens), image.width)
        parts.append(position + np.stack([np.zeros_like(rows), rows, columns]))
        position += max(image.height, image.width)
        token = image.start + image.tokens
    parts.append(_text(position, len(prompt.ids) - token))
    return np.concatenate(parts, axis=1)


def next_position(prompt: Prompt) -> int:
    """Return the position of the first token behind a prompt: that after its largest one."""
    seen = filter(on_axes, prompt.images)
    return len(prompt.ids) + sum(max(image.height, image.width) - image.tokens for image in seen)


def on_axes(image: Image) -> bool:
    """Return whether the tokens of an image have positions on three axes."""
    return image.layout == "axes"


def feature_places(image: Image) -> np.ndarray:
    """Return which tokens of an image stand for its features, [features] int64, counted from its first."""
    places = np.arange(image.tokens).reshape(image.height, -1)
    return places[:, : image.width].flatten()


def completion_positions(prompt: Prompt, tokens: int) -> np.ndarray:
    """Return the positions of `tokens` tokens behind a prompt, [3, tokens] int64."""
    return _text(next_position(prompt), tokens)


def _text(start: int, tokens: int) -> np.ndarray:
    return np.broadcast_to(np.arange(start, start + tokens), (3, tokens))
