"""The lock that lets one process write a run folder at a time.

The kernel holds it (flock on the file run.lock) and releases it when the process ends, however it ends. The file names
the process; it is removed with the lock, and a kill leaves it, which does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
from pathlib import Path

from rlft.errors import ConfigError
from rlft.runs.disk import reason

NAME = "run.lock"
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system without locks answers."""

_held: set[int] = set()
"""File descriptors of the locks of this process."""
_hooks: list[str] = []
"""Not empty once `_close_all` is registered."""


class Busy(ConfigError):
    """Another process writes the run folder."""


class Lock:
    """An exclusive lock on a run folder."""

    def __init__(self, folder: Path) -> None:
        """Take the lock at once.

        Raises Busy when another process, or another thread of this one, holds it, and OSError when the folder
        cannot be written.
        """
        self._path = folder / NAME
        self.missing = ""
        """Why the file system has no locks; "" when the lock is held."""
        self._handle = self._locked()
        try:
            self._path.write_text(json.dumps({"process": os.getpid(), "host": _host()}))
        except OSError:
            self.release()
            raise

    def _locked(self) -> int:
        while True:
            handle = self._open()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(handle)
                if error.errno not in UNSUPPORTED:
                    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                        raise _busy(self._path.parent) from error
                    raise
                self.missing = reason(error)
                return _kept(self._open())
            # The former holder may have removed the file between the two calls: then this lock is on no file at all.
            if _is_file(handle, self._path):
                return _kept(handle)
            os.close(handle)

    def _open(self) -> int:
        # For reading: a file that is held open for writing would keep a file system from being made read-only.
        return os.open(self._path, os.O_RDONLY | os.O_CREAT, 0o644)

    def release(self) -> None:
        """Remove the file, where that can be done, and release the lock."""
        with contextlib.suppress(OSError):  # a disk that has become read-only; a file that is left does no harm
            if _is_file(self._handle, self._path):
                self._path.unlink()
        _held.discard(self._handle)
        os.close(self._handle)


def check_ours(folder: Path) -> None:
    """Raise Busy when run.lock names another process: a run that began after this one's folder was moved away."""
    try:
        record = json.loads((folder / NAME).read_bytes())
        ours = (record["process"], record["host"]) == (os.getpid(), _host())
    except (OSError, ValueError, TypeError, KeyError):  # no lock was taken, or it is being written
        return
    if not ours:
        raise _busy(folder)


def _busy(folder: Path) -> Busy:
    return Busy(
        f'out = "{folder}": is being written by {writer(folder)}; wait for it to end or stop it, or give another '
        f"folder with --out"
    )


@functools.cache
def _host() -> str:
    """Name of this machine when it was first asked for: a network may give it another one while a run goes on."""
    return socket.gethostname()


def writer(folder: Path) -> str:
    """Return the process that has written run.lock: "process 123 on host"."""
    try:
        record = json.loads((folder / NAME).read_bytes())
        return f"process {record['process']} on {record['host']}"
    except (OSError, ValueError, TypeError, KeyError):  # not yet written, or just removed
        return "another process"


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _kept(handle: int) -> int:
    """Remember the lock, so that a fork of this process does not hold it on after this one was killed."""
    if not _hooks:
        os.register_at_fork(after_in_child=_close_all)
        _hooks.append("fork")
    _held.add(handle)
    return handle


def _close_all() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


def is_held(folder: Path) -> bool:
    """Return whether a process seems to write the folder, without touching its lock.

    Taking the lock to see, even for a moment, would refuse a run that starts in that moment. A process of another host
    counts as alive while run.lock is there.
    """
    try:
        record = json.loads((folder / NAME).read_bytes())
        process, host = int(record["process"]), record["host"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError):  # not yet written
        return (folder / NAME).exists()
    return host != _host() or _is_alive(process)


def _is_alive(process: int) -> bool:
    with contextlib.suppress(OSError, IndexError):  # no such process, or no /proc: asked by a signal below
        # A process that has ended and was not waited for can still be sent signals.
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return state[0] not in "ZX"
    try:
        os.kill(process, 0)
    except PermissionError:  # of another user
        return True
    except (OSError, OverflowError):
        return False
    return True
