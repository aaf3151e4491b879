"""Read and write files of one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlft.errors import ConfigError


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON object as a line. Non-finite numbers become null, since JSON has no NaN.

    The line is passed to the operating system before this returns, so killing the process loses no complete line.
    """
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse one line; None when it is truncated or not an object."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects in a file, with null for non-finite numbers; [] when there is no file.

    A truncated last line (the process was killed while writing) is ignored. Raises ConfigError for any
    other line that is not a JSON object.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    objects = [parse_line(line) for line in lines]
    if objects and objects[-1] is None:
        objects.pop()
    if None in objects:
        raise ConfigError(f"{path}: line {objects.index(None) + 1} is not a JSON object: fix or remove the line")
    return [values for values in objects if values is not None]
