"""What a model takes, from its configuration: the longest sequence and the largest token id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlft.config.run import Config
from rlft.data.limits import NO_LIMITS, Limits, check_ids, check_length
from rlft.errors import DataError
from rlft.models.load import describe_base, resolve_device
from rlft.types import Prompt

SCALED = ("linear", "dynamic", "yarn")
"""RoPE types whose factor extends the context; the others (llama3, longrope) name it in max_position_embeddings."""


def context_of(config: Any) -> int | None:
    """Return the largest number of tokens that a model is made for; None where its config names none."""
    text = config.get_text_config()
    trained = getattr(text, "max_position_embeddings", None)
    if not isinstance(trained, int):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in SCALED:
        return trained
    # max_position_embeddings is the context before the extension in some configs and after it in others.
    original = rope.get("original_max_position_embeddings") or trained
    return max(trained, int(original * rope.get("factor", 1.0)))


def limits_of(config: Any) -> Limits:
    """Return what a model of this config takes."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return Limits(context_of(config), vocabulary if isinstance(vocabulary, int) else None)


def limits_of_files(cfg: Config) -> Limits:
    """Return what the model of a run takes, from its files, without loading it. Raises ConfigError as loading does.

    Nothing is known of a .gguf file, whose metadata takes as long to read as the model: see `check_loaded`.
    """
    config = describe_base(cfg, resolve_device(cfg)).config
    return NO_LIMITS if config is None else limits_of(config)


def check_loaded(cfg: Config, config: Any, prompts: Sequence[Prompt]) -> None:
    """Hold encoded rows against a loaded model of whose files nothing was known. Raises DataError naming the row."""
    if limits_of_files(cfg) != NO_LIMITS:
        return
    context, vocabulary = limits_of(config)
    for prompt in prompts:
        try:
            if context is not None:
                check_length(prompt, context)
            if vocabulary is not None:
                check_ids(prompt, vocabulary, lambda _: None)
        except DataError as error:
            raise DataError(f"row {prompt.index}: {error}", reason=error.reason) from None
