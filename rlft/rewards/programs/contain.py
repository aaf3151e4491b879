"""Run a program that nobody has read, within limits, and leave nothing of it behind.

A program is two processes: a keeper, which enters the namespaces and waits, and the program itself with its rlimits.
`supervise` watches time, output, the number of processes and their memory; `sweep` kills what is left. The caller is a
process that adopts orphans and does nothing else, so everything below it belongs to the program.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from rlft.rewards import kernel, processes

PREFIX = "rlft-program-"
"""Of the names of programs' folders."""
YOUNG = 60.0
"""Seconds after which a folder without a lock is abandoned."""
TICK = 0.02
"""Seconds between two looks at the processes of a program."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The whole environment of a program: a numerical library must not start a thread per core."""
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
"""Besides the interpreter's folders."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
STATUS = struct.Struct("!i")
FAILED = -1
"""In place of a wait status: the program could not be started, and the reason follows."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float
    """Wall time, and CPU time of each process."""
    memory_mb: int
    """Address space of each process, and resident memory of all of them."""
    processes: int = 16
    """Processes at a time, threads not counted."""
    file_mb: int = 16
    """Largest file, and the sum of all files."""
    files: int = 64
    """Open descriptors of each process."""
    output_kb: int = 1024
    """Standard output; more ends the program."""


class System(NamedTuple):
    """What the system allows besides rlimits, and where its Python lies."""

    namespaces: bool
    """Of users, processes, network and IPC."""
    mounts: bool
    """Within them, which a process under Landlock may not do: a reward's worker is such a process."""
    landlock: int
    """Version of its interface; 0 for none."""
    readable: tuple[str, ...]
    """Folders of the interpreter and its packages."""


@dataclass
class Running:
    """A program that runs."""

    keeper: int
    folder: str
    lock: int
    """Descriptor that holds a lock on the folder, which the kernel releases with this process."""
    status: int
    """Descriptor on which the keeper writes the program's wait status."""
    out: int
    err: int
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    ended: int | None = None
    """Wait status of the program."""
    failed: str = ""
    """Why it could not be started."""


class Ended(NamedTuple):
    """How a program ended."""

    outcome: str
    """"exit", "signal", or the limit it went over: "seconds", "memory", "processes", "files", "output"."""
    code: int
    """Exit code or signal; 0 for a limit."""
    stdout: str
    stderr: str
    """The last 2000 characters."""


def probe(readable: Sequence[str]) -> System:
    """Find out what the system allows, in a child process. readable: folders of the interpreter and its packages."""
    pid = os.fork()
    if pid == 0:
        allowed = 0
        try:
            kernel.allow_inspection(True)
            kernel.enter_namespaces()
            allowed = 1
            kernel.mount_memory(tempfile.gettempdir(), 1)
            allowed = 2
        finally:
            os._exit(allowed)
    allowed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return System(allowed >= 1, allowed >= 2, kernel.landlock_version(), tuple(readable))


def start(
    command: Sequence[str],
    files: Mapping[str, str],
    stdin: int,
    limits: Limits,
    system: System,
    channel: int | None = None,
) -> Running:
    """Start a program in an empty folder.

    command: arguments of the Python interpreter. files: texts by name, written into the folder first. stdin: descriptor
    of its input. channel: a further descriptor, 3 in the program.
    """
    folder = tempfile.mkdtemp(prefix=PREFIX)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    status, status_write = os.pipe()
    out, out_write = os.pipe()
    err, err_write = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        try:
            _keep(command, files, folder, (stdin, out_write, err_write, channel), status_write, limits, system)
        except BaseException as error:
            os.write(status_write, STATUS.pack(FAILED) + f"{error}\n".encode())
        os._exit(1)
    for fd in (status_write, out_write, err_write):
        os.close(fd)
    for fd in (status, out, err):
        os.set_blocking(fd, False)
    return Running(keeper, folder, lock, status, out, err)


def _keep(
    command: Sequence[str],
    files: Mapping[str, str],
    folder: str,
    descriptors: tuple[int, int, int, int | None],
    status: int,
    limits: Limits,
    system: System,
) -> NoReturn:
    """Enter the namespaces, start the program, and report how it ended."""
    os.setsid()
    # Without it /proc/self belongs to root, and the maps of the namespace cannot be written.
    kernel.allow_inspection(True)
    if system.namespaces:
        kernel.enter_namespaces()
    kernel.die_with_parent()
    pid = os.fork()
    if pid == 0:
        try:
            kernel.die_with_parent()
            if system.mounts:
                kernel.mount_memory(folder, limits.file_mb)
                if os.path.isdir("/run") and not any(path.startswith("/run/") for path in (folder, *system.readable)):
                    kernel.mount_memory("/run", 1)  # sockets of services lie here
            for name, text in files.items():
                Path(folder, name).write_text(text, encoding="utf-8", errors="surrogatepass")
            _become(command, folder, descriptors, status, limits, system)
        except BaseException as error:
            os.write(status, STATUS.pack(FAILED) + f"{error}\n".encode())
        os._exit(127)
    # A socket that the keeper held open would hide the end of the program from the tests.
    os.closerange(3, status)
    os.closerange(status + 1, 4096)
    _, ended = os.waitpid(pid, 0)
    os.write(status, STATUS.pack(ended))
    os._exit(0)


def _become(
    command: Sequence[str],
    folder: str,
    descriptors: tuple[int, int, int, int | None],
    status: int,
    limits: Limits,
    system: System,
) -> None:
    """Replace this process by the program. status: descriptor for a failure; it closes when the program starts."""
    if os.getuid() == 0 and not system.namespaces:
        # A limit on processes does not bind root, and root could signal and read every process.
        user = 50_000 + os.getpid() % 10_000
        os.chown(folder, user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        kernel.die_with_parent()
    stdin, out, err, channel = descriptors
    keep = [os.dup(fd) for fd in (stdin, out, err) if fd is not None]
    extra = [] if channel is None else [os.dup(channel)]
    for place, fd in enumerate([*keep, *extra]):
        os.dup2(fd, place)
        os.set_inheritable(place, True)
    os.closerange(3 + len(extra), status)
    os.closerange(status + 1, 4096)
    os.chdir(folder)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if system.landlock:
        own = os.path.dirname(os.path.abspath(__file__))
        kernel.restrict([*READABLE, *system.readable, own], DEVICES, folder, system.landlock)
    _limit(limits, system)
    os.execve(sys.executable, [sys.executable, "-I", "-B", "-X", "utf8", *command], ENVIRONMENT)


def _limit(limits: Limits, system: System) -> None:
    memory, seconds = limits.memory_mb * 2**20, int(limits.seconds) + 1
    # Counted over the whole user, but from Linux 5.14 on within a namespace of users.
    release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    others = 0 if system.namespaces and release >= (5, 14) else processes.count_of_user()
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits.file_mb * 2**20),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_NPROC, 4 * limits.processes + others),  # counts threads too
        (resource.RLIMIT_AS, memory),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def supervise(programs: Sequence[Running], limits: Limits, system: System) -> Ended:
    """Wait until the first of the programs ends or one goes over a limit, then kill them all.

    Raises OSError when one of them could not be started, and TimeoutError when one cannot be killed.
    """
    first, deadline = programs[0], time.monotonic() + limits.seconds
    outcome, code, looked = "", 0, 0.0
    pipes = {fd: (program, name) for program in programs for fd, name in _pipes(program)}
    poll = select.poll()
    for fd in pipes:
        poll.register(fd, select.POLLIN)
    while not outcome:
        ready = poll.poll(TICK * 1000)
        for fd, _ in ready:
            program, name = pipes[fd]
            if not _read(program, fd, name):
                poll.unregister(fd)
        # Standard output of the first counts; the others' may be as long without being kept.
        if any(program.failed for program in programs):
            break
        if len(first.stdout) > limits.output_kb * 1024:
            outcome = "output"
        elif first.ended is not None:
            outcome, code = _outcome(first.ended)
        elif time.monotonic() > deadline:
            outcome = "seconds"
        elif time.monotonic() > looked + TICK:
            outcome, looked = _over(limits, programs, system), time.monotonic()
    sweep(programs)
    for program in programs:
        if program.failed:
            raise OSError(program.failed)
    while len(first.stdout) <= limits.output_kb * 1024 and _read(first, first.out, "stdout"):
        pass  # what lay in the pipe when the program ended; nobody is left to write more
    _read(first, first.err, "stderr")
    for fd in pipes:
        os.close(fd)
    text = bytes(first.stdout[: limits.output_kb * 1024]).decode("utf-8", "replace")
    return Ended(outcome, code, text, first.stderr.decode("utf-8", "replace")[-2000:])


def _pipes(program: Running) -> list[tuple[int, str]]:
    return [(program.out, "stdout"), (program.err, "stderr"), (program.status, "status")]


def _read(program: Running, fd: int, name: str) -> bool:
    """Read what there is in a pipe. Returns False at its end."""
    with contextlib.suppress(BlockingIOError):
        data = os.read(fd, 2**16)
        if not data:
            return False
        if name == "status":
            (status,) = STATUS.unpack_from(data)
            if status == FAILED:
                program.failed = data[STATUS.size :].partition(b"\n")[0].decode("utf-8", "replace")
            elif program.ended is None:
                program.ended = status
        elif name == "stdout":
            program.stdout += data
        else:
            program.stderr = (program.stderr + data)[-8000:]
    return True


def _outcome(status: int) -> tuple[str, int]:
    code = os.waitstatus_to_exitcode(status)
    return ("exit", code) if code >= 0 else ("signal", -code)


def _over(limits: Limits, programs: Sequence[Running], system: System) -> str:
    """Return the limit that the processes below this one exceed; "" for none."""
    pids = processes.descendants(os.getpid())
    if len(pids) - 2 * len(programs) > limits.processes:
        return "processes"
    if not system.mounts and any(_size(program.folder) > limits.file_mb * 2**20 for program in programs):
        return "files"
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return "memory" if pages * resource.getpagesize() > (limits.memory_mb * len(programs) + 128) * 2**20 else ""


def _size(folder: str) -> int:
    """Return the bytes of all files below a folder."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def sweep(programs: Sequence[Running]) -> None:
    """Kill every process below this one, and delete the programs' folders."""
    for program in programs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program.keeper, signal.SIGKILL)
    processes.kill_all_below()
    for program in programs:
        shutil.rmtree(program.folder, ignore_errors=True)
        os.close(program.lock)


def delete_abandoned() -> None:
    """Delete the folders of programs whose launcher was killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, of another user, or deleted by another launcher
            if time.time() - path.stat().st_mtime < YOUNG:
                continue  # its launcher may not hold the lock yet
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
