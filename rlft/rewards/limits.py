"""What a worker process may do: memory, size of files, network, and other processes of the user.

These are limits for mistakes and for model-written code that means no harm. They are no sandbox: a worker reads and
writes the files of its user. Only the standard library is imported, in the worker itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import sys

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
CAPABILITY_VERSION = 0x20080522
CAPABILITIES = (16, 17, 19, 21, 22, 38, 39)
"""SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN, SYS_BOOT, PERFMON, BPF."""
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
"""Numbers of system calls, equal on every architecture."""
LANDLOCK_VERSION = 1
MAKE_BLOCK_DEVICE = 1 << 11
"""A right over files that no reward needs: a domain has to give up at least one."""
LARGEST_LIMIT = 2**62
"""Bytes; the system takes 64 bits with a sign."""
SCOPE_SIGNAL = 1 << 1


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process (Linux only). Errors are ignored, since old kernels lack some options."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


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
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def leave_network() -> None:
    """Move this process to a network namespace without any interface. Raises OSError where that is not allowed."""
    if sys.platform != "linux":
        raise OSError("only Linux has network namespaces")
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()  # as they are outside
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        first = ctypes.get_errno()
        if libc.unshare(CLONE_NEWNET):  # root may leave it without a user namespace
            raise OSError(first, os.strerror(first))
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


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


def domain_version() -> int:
    """Return the version of Landlock in this kernel, below 1 without it."""
    libc = ctypes.CDLL(None)
    return libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)


def leave_others_alone() -> None:
    """Keep this process and all it starts from signals to, and from memory and environment of, any other process.

    The kernel does it by a Landlock domain (Linux 5.13; signals since 6.12). Without one nothing is changed.
    """
    libc, version = ctypes.CDLL(None), domain_version()
    if version < 1:
        return
    # struct landlock_ruleset_attr: rights over files, rights over the network, scopes; older kernels know the first.
    rights = [MAKE_BLOCK_DEVICE, 0, SCOPE_SIGNAL] if version >= 6 else [MAKE_BLOCK_DEVICE]
    attributes = struct.pack(f"={len(rights)}Q", *rights)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
