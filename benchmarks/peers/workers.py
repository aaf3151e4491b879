"""Stacks in separate processes: a question is a line of JSON, its answer a line of JSON behind an "@".

`Worker` is the side that asks. `Desk` is the side of a stack whose training loop is not ours: the loop waits at the
desk for its next step, and what lies between `start` and `stop` is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

GIB = 2**30


class Worker:
    """A stack in a separate process."""

    def __init__(self, stack: str, arguments: list[str], path: str = "") -> None:
        """arguments: of Python. path: put before PYTHONPATH."""
        self.stack = stack
        self.error = ""
        """What ended it."""
        inherited = os.environ.get("PYTHONPATH", "")
        env = os.environ | {"PYTHONPATH": f"{path}:{inherited}" if path else inherited}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if line.startswith("@"):
                self._answers.put(line[1:])
        self._answers.put("")

    def ask(self, timeout: float = 600.0, **question: Any) -> dict[str, Any]:
        """The answer, or {"error": ...}: what the stack raised, the end of what it wrote, or that it took too long. One
        that has "ended" with it gives the same error to every later question."""
        if self.error:
            return {"error": self.error}
        answer = self._ask(timeout, question)
        self.error = answer["error"] if answer.get("ended") else ""
        return answer

    def _ask(self, timeout: float, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            return {"error": f"no answer in {timeout:.0f} s", "ended": True}
        return json.loads(line) if line else {"error": f"the process ended: {self.errors()}", "ended": True}

    def errors(self, characters: int = 1500) -> str:
        """The end of what the process wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()[-characters:].strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Desk:
    """Where a stack's loop waits for a question and hands in seconds and memory."""

    def __init__(self) -> None:
        self.question: dict[str, Any] = {}
        self.base = 0
        """Bytes of the loaded model."""
        self.last: dict[str, float] = {}
        """Loss and gradient norm of the step before, as the stack logs them."""
        self._began, self._blocks = 0.0, 0

    def loaded(self) -> None:
        """The model with its adapter is there: memory counts from here."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.base = torch.cuda.memory_allocated()

    def wait(self) -> dict[str, Any]:
        """The next question about a step; the process ends where there are no more."""
        import torch

        for line in sys.stdin:
            self.question = json.loads(line)
            if not self.question.get("release"):
                return self.question
            torch.cuda.empty_cache()
            self.answer()
        sys.stdout.flush()
        os._exit(0)  # threads of a trainer or an engine may never end

    def start(self) -> None:
        """What is measured begins."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._blocks = torch.cuda.memory_stats()["num_device_alloc"]
        self._began = time.perf_counter()

    def stop(self, apart: int = 0, **more: Any) -> None:
        """What is measured is over. apart: bytes that the allocator's peak does not count. more: of the answer."""
        import torch

        peak = 0.0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        if torch.cuda.is_available():
            peak = (torch.cuda.max_memory_allocated() - self.base + apart) / GIB
            # The driver takes milliseconds for a block, and waits for the GPU where others have to go first.
            blocks = torch.cuda.memory_stats()["num_device_alloc"] - self._blocks
            more["note"] = f"{more.get('note', '')}; {blocks} new blocks of memory".removeprefix("; ")
        self.answer(seconds=seconds, peak=peak, base=self.base / GIB, last=self.last, **more)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """What the loop raises, of whatever kind, is its last answer."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip() or "no words").splitlines()[0]
            self.answer(error=f"{type(error).__name__}: {first}", ended=True)

    def answer(self, **answer: Any) -> None:
        print("@" + json.dumps(answer), flush=True)
