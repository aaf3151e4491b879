"""Count the memory that a pass may take: on the device, which trainer and engine share, and on the host."""

from __future__ import annotations

import os
from functools import cache

import torch

GIB = 2**30


class DeviceMemory:
    """The memory of a device, for whoever plans with it.

    The vLLM engine reports what its pools have unmapped, since PyTorch goes on to count that as reserved.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.unmapped = 0
        """Bytes that PyTorch counts as reserved and that have no memory behind them."""

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        """Return the object of this device, the same one to every caller in the process.

        PyTorch's counts are those of the process, and pools of an engine stay unmapped after it was closed.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _of(device)

    def report_unmapped(self, size: int) -> None:
        """Set the bytes that are unmapped now, in all pools together."""
        self.unmapped = size

    @property
    def unused(self) -> int:
        """Bytes that PyTorch has reserved on the GPU without using them."""
        return torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device) - self.unmapped

    def free(self) -> float:
        """Return the bytes that a pass may take now: what the driver has free and PyTorch has unused; on a CPU, half of
        what the system has available."""
        if self.device.type != "cuda":
            return _meminfo("MemAvailable") / 2
        return torch.cuda.mem_get_info(self.device)[0] + self.unused


@cache
def _of(device: torch.device) -> DeviceMemory:
    return DeviceMemory(device)


def _meminfo(field: str) -> float:
    """Read a field of /proc/meminfo, in bytes; infinite on systems without it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024.0 for line in file if line.startswith(field))
    except OSError:
        return float("inf")


@cache
def host_free() -> float:
    """Return the bytes of host memory for offloading: this process's cgroup limit less 16 GiB. Read once, since every
    pass asks."""
    limit = float("inf")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            continue
        limit = min(limit, float("inf") if text == "max" else float(text))
    # The processes of one run on this machine share the memory.
    return max(0.0, min(limit, _meminfo("MemTotal")) - 16 * GIB) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
