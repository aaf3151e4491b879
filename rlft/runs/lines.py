"""Files of one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlft.errors import ConfigError


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON object as a line. What is not finite becomes null: JSON has no NaN.

    It reaches the operating system before this returns, so killing the process loses no finished line.
    """
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None when it is torn or no object."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, null for what was not finite; [] when there is no file.

    The last line may be torn (the process was killed while writing) and is then left out. Raises ConfigError for any
    other line that is not a JSON object.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = [parse_line(line) for line in lines]
    if found and found[-1] is None:
        found.pop()
    if None in found:
        raise ConfigError(f"{path}: line {found.index(None) + 1} is not a JSON object: mend or remove the line")
    return [values for values in found if values is not None]
