"""Name the KV cache of a transformers model, as an argument of `forward` and as a field of its result."""

from __future__ import annotations

import inspect

from torch import nn

NAMES = ("cache", "past_key_values")
"""transformers 5.24 has the first name and deprecates the second; 5.19 has only the second."""


def name(model: nn.Module) -> str:
    """Return the name of the KV cache argument of `model.forward`, one of NAMES; "" if it has none."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in NAMES if name in parameters), "")
