"""Read and write files of one JSON object per line."""

from __future__ import annotations

import json
import math
import sys
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
    """Parse one line; None when it is truncated, or no row of metrics: an object of numbers with a whole `step`.

    Numbers beyond those of a float and names with half a character (a lone surrogate) are never written, nor read.
    """
    try:
        row = json.loads(line)
        "".join(row).encode()
    except (ValueError, TypeError, RecursionError):  # UnicodeEncodeError is a ValueError
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53
    return row if whole and all(map(_is_number, row.values())) else None


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics in a file by step, with null for non-finite numbers; [] when there is no file.

    A truncated last line (the process was killed while writing) is ignored. Raises ConfigError for any other line that
    is no row.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [parse_line(line) for line in lines]
    if rows and rows[-1] is None:
        rows.pop()
    if None in rows:
        raise ConfigError(
            f"{path}: line {rows.index(None) + 1} is no row of metrics (numbers and a whole step): fix or remove the "
            f"line, or go on with --resume, which sets it aside"
        )
    return sorted((row for row in rows if row is not None), key=lambda row: row["step"])
