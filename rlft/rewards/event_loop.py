"""The event loop of async reward functions that are called in the process of the run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from rlft.rewards.call import settle

LIVELY = 1.0
"""Seconds within which a loop must answer after a timeout, or it is taken for blocked."""


class Loop:
    """An event loop in a separate thread, for async functions called in this process.

    The functions run concurrently, can share objects bound to the loop, and do not conflict with the loop of a
    notebook. The loop runs from the first use until `close`. A loop that a function blocks is replaced.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def submit(self, begin: Callable[[], Awaitable[Any]]) -> concurrent.futures.Future[Any]:
        """Call `begin` on the loop and await its result."""

        async def run() -> Any:
            return await settle(begin())

        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                ready = threading.Event()
                self._thread = threading.Thread(target=self._serve, args=(ready,), name="rlft-rewards", daemon=True)
                self._thread.start()
                ready.wait()
            assert self._loop is not None
            return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def replace_if_blocked(self) -> None:
        """Leave a loop that does not answer to its thread, which nothing can stop; the next call starts another."""
        with self._lock:
            loop, thread = self._loop, self._thread
            if loop is None or thread is None or not thread.is_alive():
                return
            answered = threading.Event()
            loop.call_soon_threadsafe(answered.set)
            if not answered.wait(LIVELY):
                self._stop(loop)
                self._thread = None

    def close(self) -> None:
        """Cancel the running tasks and stop the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None and thread.is_alive():
                assert self._loop is not None
                self._stop(self._loop)
                thread.join(1.0)  # a coroutine that blocks its loop cannot be stopped; it dies with the process

    def _stop(self, loop: asyncio.AbstractEventLoop) -> None:
        self._stopping.set()
        loop.call_soon_threadsafe(loop.stop)

    def _serve(self, ready: threading.Event) -> None:
        loop, stopping = asyncio.new_event_loop(), threading.Event()
        self._loop, self._stopping = loop, stopping
        loop.call_soon(ready.set)
        while not stopping.is_set():
            # Either comes from a task or a callback of a function, and stops the loop for a moment.
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
            with contextlib.suppress(BaseException):  # whatever a task of a user raises when it is cancelled
                loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
