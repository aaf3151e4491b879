"""TRL's own loss code, imported as if vLLM were not installed: with it TRL's import takes ten seconds and warns."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def trl(module: str, name: str) -> Any:
    """`name` of `trl.module`."""
    hidden = "vllm" not in sys.modules
    if hidden:
        sys.modules["vllm"] = None  # type: ignore[assignment]
    try:
        return getattr(importlib.import_module(f"trl.{module}"), name)
    finally:
        if hidden:
            del sys.modules["vllm"]
