"""The parent of a reward worker: it ends with the run, and everything that the worker started ends with it.

It is a subreaper (Linux): a process whose parent dies becomes its child, whatever session and environment it has, so
walking its descendants finds all of them. It watches the run by a pipe and a pidfd, which work after kill -9 too. It
runs no code of a user.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal

from rlft.rewards import kernel, limits, processes

PATIENCE = 5.0
"""Seconds for killing all descendants: one that the kernel does not let go is left."""


def supervise(life: int, pipes: tuple[int, ...]) -> None:
    """Fork the worker and return in it. The calling process stays its supervisor and never returns.

    life: read end of a pipe that the run holds open. pipes: those of the worker, closed in the supervisor.
    """
    limits.no_core_dumps()
    with contextlib.suppress(OSError):  # an old kernel
        kernel.adopt_orphans()
    run = _watch(os.getppid())
    wake, written = os.pipe()
    os.set_blocking(written, False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for fd in (life, wake, written, *run):
            os.close(fd)
        os.setsid()  # a signal to its own group does not reach the supervisor
        return
    for fd in pipes:
        os.close(fd)
    status = _wait(worker, wake, (life, *run))
    with contextlib.suppress(TimeoutError):
        processes.kill_all_below(PATIENCE)
    _end_like(status)


def _watch(process: int) -> tuple[int, ...]:
    """Return a pidfd of the process, or nothing where there are none."""
    try:
        return (os.pidfd_open(process),)
    except (OSError, AttributeError):  # an old kernel, or the process has ended, which the pipe shows too
        return ()


def _wait(worker: int, wake: int, ends: tuple[int, ...]) -> int:
    """Reap children until the worker ends or the run does; return the worker's exit code, 0 while it runs."""
    poll = select.poll()
    for fd in (wake, *ends):
        poll.register(fd, select.POLLIN)
    while True:
        events = {fd for fd, _ in poll.poll()}
        if events & set(ends):
            return 0
        if signal.SIGTERM in os.read(wake, 4096):
            return 0
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    return os.waitstatus_to_exitcode(ended[1])


def _end_like(code: int) -> None:
    """End this process as the worker ended, with its exit code or by its signal."""
    if code < 0:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(max(0, code))
