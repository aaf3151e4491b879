"""A background thread for writes: completions to disk, steps to trackers.

A step submits a call and does not wait for it. Calls run in order. `flush` waits for all of them, and the loop does so
before each checkpoint, so that a killed run has all data up to the step it resumes from.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType

PENDING = 64
"""Largest number of pending calls; a step's completions stay in memory until they are written."""


class Background:
    """Runs calls one after another on a daemon thread."""

    def __init__(self, name: str) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(PENDING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Flush and stop. An error of a call is raised, unless another exception is already propagating."""
        try:
            self.flush()
        except Exception:
            if error is None:
                raise
        finally:
            self.stop()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as error:  # raised in the loop by `raise_error`
                self._error = self._error or error
            finally:
                self._calls.task_done()

    def submit(self, call: Callable[[], None]) -> None:
        """Queue a call. Blocks only when `PENDING` calls are queued. Raises the error of an earlier call, once."""
        self.raise_error()
        self._calls.put(call)

    def offer(self, call: Callable[[], None]) -> bool:
        """Queue a call without blocking. Returns False, without queueing it, when `PENDING` calls are queued."""
        self.raise_error()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def flush(self, seconds: float | None = None) -> bool:
        """Wait for all queued calls. Returns False after `seconds`. Raises the error of a call, like `submit`."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._calls.all_tasks_done:
            while self._calls.unfinished_tasks:
                remaining = None if end is None else end - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return False
                self._calls.all_tasks_done.wait(remaining)
        self.raise_error()
        return True

    def raise_error(self) -> None:
        """Raise the first error of a call since the last check."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def stop(self) -> None:
        """Stop the thread after the queued calls; nothing may be queued afterwards.

        Waits at most a second, so that a hanging call does not block the exit. An idle thread must have ended before
        the interpreter exits: killed inside a C++ library, it would abort the process with SIGABRT.
        """
        with contextlib.suppress(queue.Full):  # the thread hangs in a call
            self._calls.put_nowait(None)
        self._thread.join(1.0)
