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

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 38, 36
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
"""Numbers of system calls, equal on every architecture."""
LANDLOCK_VERSION = 1
MAKE_BLOCK_DEVICE = 1 << 11
"""A right over files that no reward needs: a domain has to give up at least one."""
SCOPE_SIGNAL = 1 << 1


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process (Linux only). Errors are ignored, since old kernels lack some options."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def no_core_dumps() -> None:
    """Switch core dumps off for this process and all it starts: they hold memory, and a hang is killed many times."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def resources(memory_mb: int | None, file_mb: int | None) -> None:
    """Limit the address space of each process, and the size of each file that is written. None: no limit."""
    import resource

    for limit, megabytes in ((resource.RLIMIT_AS, memory_mb), (resource.RLIMIT_FSIZE, file_mb)):
        if megabytes is not None:
            size = megabytes * 2**20
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
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        first = ctypes.get_errno()
        if libc.unshare(CLONE_NEWNET):  # root may leave it without a user namespace
            raise OSError(first, os.strerror(first))
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def leave_others_alone() -> None:
    """Keep this process and all it starts from signals to, and from memory and environment of, any other process.

    The kernel does it by a Landlock domain (Linux 5.13; signals since 6.12). Without one nothing is changed.
    """
    libc = ctypes.CDLL(None)
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    if version < 1:
        return
    # struct landlock_ruleset_attr: rights over files, rights over the network, scopes; older kernels know the first.
    attributes = struct.pack("=QQQ", MAKE_BLOCK_DEVICE, 0, SCOPE_SIGNAL) if version >= 6 else struct.pack("=Q", 1 << 11)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
