"""The event loop of async reward functions that are called in the process of the run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from rlft.rewards.worker import settle

LIVELY = 1.0
"""Seconds within which a loop must answer after a timeout, or it is taken for blocked."""


class Ended(Exception):
    """A task raised SystemExit or KeyboardInterrupt, which would end the loop of all functions."""


class Loop:
    """An event loop in a separate thread, for async functions called in this process.

    The functions run concurrently, can share objects bound to the loop, and do not conflict with the loop of a
    notebook. The loop runs from the first use until `close`. A loop that a function ended or blocks is replaced.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
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
                self._thread = None

    def close(self) -> None:
        """Cancel the running tasks and stop the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None and thread.is_alive():
                assert self._loop is not None and self._end is not None
                self._loop.call_soon_threadsafe(self._end.set)
                thread.join(1.0)  # a coroutine that blocks its loop cannot be stopped; it dies with the process

    def _serve(self, ready: threading.Event) -> None:
        async def until_end() -> None:
            end = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.set_task_factory(_task)
            self._loop, self._end = loop, end
            ready.set()
            await end.wait()

        # Either comes from a callback of the loop. Its calls are cancelled, which makes them faults.
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            asyncio.run(until_end())


def _task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """Make a task that hands on SystemExit and KeyboardInterrupt as an exception that does not end the loop."""

    async def guarded() -> Any:
        try:
            return await coroutine
        except (SystemExit, KeyboardInterrupt) as error:
            raise Ended(f"{type(error).__name__}: {error}") from error

    return asyncio.Task(guarded(), loop=loop, **options)
