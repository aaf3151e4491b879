"""What a model takes, from its configuration: the longest sequence and the largest token id."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rlft.config.run import Config
from rlft.data.limits import NO_LIMITS, Limits, check_ids, check_length
from rlft.errors import DataError
from rlft.models.load import describe_base, resolve_device
from rlft.models.rope import context_of, vocabulary_of
from rlft.models.vision import image_reader
from rlft.types import Prompt


def limits_of(config: Any) -> Limits:
    """Return what a model of this config takes."""
    return Limits(context_of(config), vocabulary_of(config))


def limits_of_files(cfg: Config) -> Limits:
    """Return what the model of a run takes, from its files, without loading it. Raises ConfigError as loading does.

    Nothing is known of a .gguf file, whose metadata takes as long to read as the model: see `check_loaded`.
    """
    config = describe_base(cfg, resolve_device(cfg)).config
    return NO_LIMITS if config is None else limits_of(config)._replace(images=image_reader(cfg.model, config, cfg.data))


def check_loaded(limits: Limits, config: Any, *parts: Sequence[Prompt]) -> None:
    """Hold encoded rows against a loaded model of whose files nothing was known. Raises DataError naming the row.

    limits: those of its files, which the rows were held against when they were encoded.
    """
    if limits != NO_LIMITS:
        return
    context, vocabulary, _ = limits_of(config)
    for prompt in itertools.chain(*parts):
        try:
            if context is not None:
                check_length(prompt, context)
            if vocabulary is not None:
                check_ids(prompt, vocabulary, lambda _: None)
        except DataError as error:
            raise DataError(f"row {prompt.index}: {error}", reason=error.reason) from None
