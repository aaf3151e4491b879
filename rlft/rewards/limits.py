"""What a worker process may do: memory, size of files, network, and other processes of the user.

These are limits for mistakes and for model-written code that means no harm. They are no sandbox: a worker reads and
writes the files of its user. Only the standard library and `rlft.rewards.kernel` are imported, in the worker itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import sys

from rlft.rewards import kernel

PR_CAPBSET_DROP = 24
CAPABILITY_VERSION = 0x20080522
CAPABILITIES = (16, 17, 19, 21, 22, 38, 39)
"""SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN, SYS_BOOT, PERFMON, BPF."""
LARGEST_LIMIT = 2**62
"""Bytes; the system takes 64 bits with a sign."""


def no_core_dumps() -> None:
    """Switch core dumps off for this process and all it starts: they hold memory, and a hang is killed many times."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def resources(memory_mb: int | None, file_mb: int) -> None:
    """Limit the address space of each process (None: not), and the size of each file that is written."""
    import resource

    for limit, megabytes in ((resource.RLIMIT_AS, memory_mb), (resource.RLIMIT_FSIZE, file_mb)):
        if megabytes is not None:
            size = min(megabytes * 2**20, LARGEST_LIMIT)
            hard = resource.getrlimit(limit)[1]
            size = size if hard == resource.RLIM_INFINITY else min(size, hard)
            resource.setrlimit(limit, (size, size))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even by kill -9 and in a call (Linux only).

    With its descendants it is also the first choice of the out-of-memory killer, so that the run itself survives.
    """
    with contextlib.suppress(OSError):
        kernel.die_with_parent()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def leave_network() -> None:
    """Move this process to a network namespace without any interface. Raises OSError where that is not allowed."""
    if sys.platform != "linux":
        raise OSError("only Linux has network namespaces")
    kernel.leave_network()


def give_up_root() -> None:
    """Give up what lets root look into other processes and change the kernel; root of a container has little of it."""
    libc = ctypes.CDLL(None)
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    data = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: bits 0 to 31, then 32 to 63
    if libc.capget(header, data):
        return
    sets = list(struct.unpack("=6I", data.raw))
    for capability in CAPABILITIES:
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        half, bit = divmod(capability, 32)
        for i in range(3):
            sets[3 * half + i] &= ~(1 << bit)
    libc.capset(header, struct.pack("=6I", *sets))


def leave_others_alone() -> None:
    """Keep this process and all it starts from signals to, and from memory and environment of, any other process.

    The kernel does it by a Landlock domain (Linux 5.13; signals since 6.12). Without one nothing is changed.
    """
    version = kernel.landlock_version()
    if version:
        with contextlib.suppress(OSError):
            kernel.leave_others_alone(version)
