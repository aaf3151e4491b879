"""Results files: benchmarks/results/NAME_DEVICE_DATE.json, one shape for every benchmark."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "flash-attn-4", "rlft")
"""Those that are installed are in the file with their versions."""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark that runs on a machine without the checkout. doc: its module's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    return parser


def device() -> str:
    """The GPU's name, or the CPU's with its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of the packages that are installed, and of Python."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"python": platform.python_version()}


def commit_now(checkout: Path | None = None) -> str:
    """The commit of a checkout, with "+changes" where rlft/ has others; None: of the current folder."""
    run = functools.partial(subprocess.run, cwd=checkout, capture_output=True, text=True, check=True)
    dirty = run(["git", "status", "--porcelain", "rlft"]).stdout
    return run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + ("+changes" if dirty else "")


def write(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, commit: str | None = None) -> Path:
    """Write the rows ({"work", "stack", "metric", "value", "unit", "note"}) with device, versions and commit.

    commit: for a machine without the checkout; None asks git.
    """
    import torch

    today = datetime.date.today().isoformat()
    result = {
        "name": name,
        "device": device(),
        "versions": versions(),
        "commit": commit or commit_now(),
        "date": today,
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{'gpu' if torch.cuda.is_available() else 'cpu'}_{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
