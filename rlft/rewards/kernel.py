"""What Linux offers to contain a process: namespaces, Landlock, and a few switches of prctl.

Everything is called through the C library. A call that the system refuses raises OSError.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Sequence

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV = 2, 4
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
"""Numbers of the system calls, equal on every architecture."""
INSIDE = 1000
"""User and group inside the user namespace. Not 0, so that a program started there has no capabilities."""

READ = 1 << 0 | 1 << 2 | 1 << 3
"""Landlock: execute, read files, list folders."""
WRITE_FILE, MAKE_BLOCK_DEVICE, TRUNCATE, DEVICE = 1 << 1, 1 << 11, 1 << 14, 1 << 15
ON_FILES = READ ^ (1 << 3) | WRITE_FILE | TRUNCATE
"""Landlock: the rights that a rule on a single file may give."""
SCOPE_SIGNAL = 1 << 1
"""Landlock: signals to processes outside."""


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    _checked(LIBC.prctl(option, value, 0, 0, 0), f"prctl({option})")


def die_with_parent() -> None:
    """Have this process killed when the thread that started it ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none of them gets lost."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def allow_inspection(allowed: bool) -> None:
    """Let other processes of this user read this one's memory through /proc or ptrace, or not."""
    _prctl(PR_SET_DUMPABLE, int(allowed))


def enter_namespaces() -> None:
    """Enter new namespaces of users, mounts, IPC and network; the next child is the first of a new one of processes.

    The network has no interface. When the first process of the namespace ends, the kernel kills all others.
    """
    outside = os.geteuid(), os.getegid()  # afterwards they are nobody's
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWPID
    _checked(LIBC.unshare(flags), "unshare")
    _map_user(outside, (INSIDE, INSIDE))


def leave_network() -> None:
    """Enter a new namespace of the network, which has no interface, as the same user and group."""
    outside = os.geteuid(), os.getegid()
    try:
        _checked(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET), "unshare")
    except OSError:
        if LIBC.unshare(CLONE_NEWNET):  # which root may do without a namespace of users
            raise
        return
    _map_user(outside, outside)


def _map_user(outside: tuple[int, int], inside: tuple[int, int]) -> None:
    """Say who this process is in its new namespace of users: (user, group) outside and inside."""
    maps = (
        ("setgroups", "deny"),
        ("uid_map", f"{inside[0]} {outside[0]} 1"),
        ("gid_map", f"{inside[1]} {outside[1]} 1"),
    )
    for name, text in maps:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount_memory(folder: str, megabytes: int) -> None:
    """Mount an empty file system in memory over a folder, in this process's mount namespace."""
    options = f"size={megabytes}m,nr_inodes=4096,mode=700".encode()
    flags = MS_NOSUID | MS_NODEV
    _checked(LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options), f"mount {folder}")


def landlock_version() -> int:
    """Return the version of Landlock's interface; 0 where the kernel has none or it is switched off."""
    return max(0, LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1))


def restrict(readable: Sequence[str], devices: Sequence[str], writable: str, version: int) -> None:
    """Restrict this process and its descendants for good.

    They may read below `readable` and do anything below `writable`; of everything else they can neither read nor
    change nor list anything. From version 4 on they cannot use TCP, from 6 on they cannot send a signal to a process
    outside. devices: files that can be read and written.
    """
    rights = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (DEVICE if version >= 5 else 0)
    ruleset = _ruleset(rights, 3, 3, version)
    rules = [*((path, READ) for path in readable), *((path, READ | WRITE_FILE) for path in devices), (writable, rights)]
    for path, allowed in rules:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed &= rights if os.path.isdir(path) else rights & ON_FILES
        rule = struct.pack("=Qi", allowed, fd)
        _checked(LIBC.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(fd)
    _enter_domain(ruleset)


def leave_others_alone(version: int) -> None:
    """Keep this process and its descendants from memory and environment of processes outside, and from signals to them.

    Signals from version 6 of Landlock on.
    """
    # A domain has to give up at least one right over files; no reward makes block devices.
    _enter_domain(_ruleset(MAKE_BLOCK_DEVICE, 0, SCOPE_SIGNAL, version))


def _ruleset(files: int, network: int, scopes: int, version: int) -> int:
    """Return a descriptor of a ruleset that takes these rights away; network from version 4 on, scopes from 6 on."""
    attributes = struct.pack("=QQQ", files, network if version >= 4 else 0, scopes if version >= 6 else 0)
    size = ctypes.c_size_t(24 if version >= 6 else 16 if version >= 4 else 8)
    return _checked(LIBC.syscall(LANDLOCK_CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset")


def _enter_domain(ruleset: int) -> None:
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    try:
        _checked(LIBC.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)
