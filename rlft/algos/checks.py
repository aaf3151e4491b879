"""Checks of settings that several losses share. Each raises ConfigError with the setting, its value and the remedy."""

from __future__ import annotations

import math
from typing import Any, get_args

from rlft.errors import ConfigError


def check_above_zero(**numbers: float) -> None:
    """Raise ConfigError unless every given setting of [algo] is above 0 and finite."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"algo.{name} = {value}: want a number above 0")


def check_zero_or_more(**numbers: float) -> None:
    """Raise ConfigError unless every given setting of [algo] is at least 0 and finite."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"algo.{name} = {value}: want 0 or more, and finite")


def check_choice(names: Any, **values: str) -> None:
    """Raise ConfigError unless every given setting of [algo] is one of `names`, a Literal."""
    for name, value in values.items():
        if value not in get_args(names):
            raise ConfigError(f'algo.{name} = "{value}": want one of {", ".join(get_args(names))}')


def check_clip(low: float, high: float) -> None:
    """Raise ConfigError unless [1 - low, 1 + high] is a valid range of ratios around 1."""
    check_zero_or_more(clip_low=low, clip_high=high)
    if low >= 1:
        raise ConfigError(f"algo.clip_low = {low}: want below 1, the ratio is never negative")


def check_smoothing(value: float) -> None:
    """Raise ConfigError unless `value` is a share of labels that may be wrong."""
    if not 0 <= value < 0.5:
        raise ConfigError(f"algo.label_smoothing = {value}: want 0 or more, below 0.5 (the share of wrong labels)")
