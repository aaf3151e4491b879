"""Hold encoded rows against what a model takes: the longest sequence and the largest token id."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import NamedTuple

from rlft.data.image_readers import ImageReader, advice
from rlft.errors import DataError
from rlft.types import Prompt


class Limits(NamedTuple):
    """What a model takes; None where it is not known."""

    context: int | None = None
    """Largest number of tokens of a sequence."""
    vocabulary: int | None = None
    """Rows of the embedding."""
    images: ImageReader | None = None
    """Reads the images of prompts; None for a model that takes text alone."""


NO_LIMITS = Limits()


def check_length(prompt: Prompt, context: int) -> None:
    """Raise DataError for a prompt that leaves no room, or a recorded completion that ends beyond the context."""
    completion = max((len(recorded.ids) for recorded in prompt.recorded), default=1)
    if len(prompt.ids) + completion <= context:
        return
    if prompt.recorded:
        what = f"{len(prompt.ids) + completion} tokens with its completion"
    else:
        what = f"the prompt has {len(prompt.ids)} tokens"
    raise DataError(
        f"{what}{advice(prompt)}, and the model's context is {context}; shorten the row or leave it out: "
        f'data.max_prompt_tokens drops long prompts, data.on_error = "drop" every such row',
        reason="too long",
    )


def check_ids(
    prompt: Prompt, vocabulary: int, token: Callable[[int], str | None], places: Set[int] = frozenset()
) -> None:
    """Raise DataError for a token id that has no row in the embedding.

    token: the text of an id, None if unknown. places: ids of places of images, which a model may have beyond its
    vocabulary.
    """
    ids = (token_id for token_id in prompt.ids if token_id not in places)
    recorded = (max(each.ids, default=0) for each in prompt.recorded)
    largest = max(max(ids, default=0), *recorded, 0)
    if largest < vocabulary:
        return
    text = token(largest)
    if text is None:
        raise DataError(
            f"token id {largest}, and the model's embedding has {vocabulary} rows: the ids are of another tokenizer",
            reason="vocabulary",
        )
    raise DataError(
        f"token {largest} ({text}), and the model's embedding has {vocabulary} rows: tokens were added to the "
        f"tokenizer and not to the model; save the model again after model.resize_token_embeddings(len(tokenizer)), "
        f"or take the tokenizer without them",
        reason="vocabulary",
    )


def check_places(prompt: Prompt, reader: ImageReader, token: Callable[[int], str | None]) -> None:
    """Raise DataError for tokens that are places of images without an image. token: as in `check_ids`."""
    for recorded in prompt.recorded:
        if found := reader.places.intersection(recorded.ids):
            raise DataError(
                f"the completion has {token(min(found))}, the place of an image: remove it", reason="images"
            )
    if not prompt.images and (found := reader.places.intersection(prompt.ids)):
        raise DataError(f"the prompt has {token(min(found))}, and the row no images: remove it", reason="images")
