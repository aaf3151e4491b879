"""One thread that writes while the loop goes on: completions to disk, steps to trackers.

A step hands over a call and does not wait for it. What was handed over is done in order; `flush` waits for all of it,
and the loop does so before each checkpoint, so that a killed run has everything up to the step it goes on from.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType

PENDING = 64
"""Calls that may wait; a step's completions are kept in memory until they are written."""


class Background:
    """Calls done one after another on a thread of their own, which ends with the process."""

    def __init__(self, name: str) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(PENDING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Everything handed over is done; what a call raised is raised, unless another error is on its way out."""
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
            except BaseException as error:  # a thread has nobody to raise to: `raise_error` hands it to the loop
                self._error = self._error or error
            finally:
                self._calls.task_done()

    def submit(self, call: Callable[[], None]) -> None:
        """Have `call` done after those before it. Waits only when `PENDING` are waiting. Raises what an earlier call
        raised, once."""
        self.raise_error()
        self._calls.put(call)

    def offer(self, call: Callable[[], None]) -> bool:
        """`submit` that never waits: False, and `call` is not done, when `PENDING` are waiting."""
        self.raise_error()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything handed over is done; False when that took longer than `seconds`. Raises as `submit`."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._calls.all_tasks_done:
            while self._calls.unfinished_tasks:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._calls.all_tasks_done.wait(left)
        self.raise_error()
        return True

    def raise_error(self) -> None:
        """Raise what a call raised since this was last asked."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def stop(self) -> None:
        """End the thread after what was handed over; nothing may be handed over afterwards.

        Waits a second at most: a thread that hangs in a call holds up nothing. One that only waits must be gone before
        the interpreter is: killed then, inside a library in C++, it would take the process down with SIGABRT.
        """
        with contextlib.suppress(queue.Full):  # it hangs in a call
            self._calls.put_nowait(None)
        self._thread.join(1.0)
