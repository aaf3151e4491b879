"""Write files so that a power cut leaves each one old or new and whole, and explain what a system refuses.

A file's bytes and the entry in its folder reach the disk separately, so both are synced. Nothing else in rlft calls
fsync.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def sync(path: Path) -> None:
    """Sync a file's bytes, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its final name, durably. Both are in the same folder."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def make_folder(path: Path, share: bool = False) -> None:
    """Create a folder and its missing parents, and sync the entries of the new ones.

    share: other users may enter the folder, as far as the umask allows; else only its owner. Parents are made as the
    umask says.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True, mode=0o777 if share else 0o700)
    for folder in missing:
        sync(folder.parent)


def make_subfolder(path: Path) -> None:
    """Create a folder in one that must be there, and sync its entry. Raises OSError where that one is gone."""
    if not path.is_dir():
        path.mkdir(mode=0o700)
        sync(path.parent)


def reason(error: OSError) -> str:
    """Return the message of the operating system, without additions of a library."""
    return os.strerror(error.errno) if error.errno else str(error)


def remedy(error: OSError) -> str:
    """Return what to do about a write that the system refused, as an imperative."""
    if error.errno in FULL:
        return "make room there"
    if error.errno in GONE:
        return "put the folder back (it was moved or removed)"
    if error.errno in FORBIDDEN:
        return "make it writable"
    if error.errno == errno.EIO:
        return "check the disk, or the network it is on"
    return "see what is in the way there"
