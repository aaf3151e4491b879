"""What transformers calls a KV cache, as an argument of `forward` and as a field of its result."""

from __future__ import annotations

import inspect

from torch import nn

NAMES = ("cache", "past_key_values")
"""transformers 5.24 has the first name and warns of the second, 5.19 has the second only."""


def name(model: nn.Module) -> str:
    """What `model.forward` calls its KV cache, one of NAMES; "" when it takes none by such a name."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in NAMES if name in parameters), "")
