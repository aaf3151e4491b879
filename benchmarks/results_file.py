"""Results files: benchmarks/results/NAME_DEVICE_DATE.json, one shape for every benchmark (DESIGN 16)."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "rlft")


def device() -> str:
    """The GPU's name, or the CPU's with its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows ({"work", "stack", "metric", "value", "unit", "note"}) with device, versions and commit."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    dirty = subprocess.run(["git", "status", "--porcelain", "rlft"], capture_output=True, text=True, check=True).stdout
    today = datetime.date.today().isoformat()
    result = {
        "name": name,
        "device": device(),
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "commit": commit.strip() + ("+changes" if dirty else ""),
        "date": today,
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
    }
    path = RESULTS / f"{name}_{'gpu' if torch.cuda.is_available() else 'cpu'}_{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
