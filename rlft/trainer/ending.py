"""How a run ends before its last step: signals that stop it, and what any exception leaves behind.

Every way out saves the last completed step and writes a report, as far as the disk allows, and tells how to go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from rlft import dist, report
from rlft.monitor.console import Console
from rlft.runs.claim import find
from rlft.trainer.saving import save
from rlft.trainer.session import Session

INSISTENT = (signal.SIGINT, signal.SIGTERM)
"""Signals that stop at once when they come again."""
WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
"""What a closed terminal sends, and Slurm before the time is up; both may come more than once."""

Handler = Callable[[int, FrameType | None], Any]


class Ways(NamedTuple):
    """How a user goes on with a run, as a command to type or a call."""

    resume: Callable[[Path], str]
    """From the run folder: with its newest checkpoint."""
    start: str
    """From the start, where there is no checkpoint."""


FROM_PYTHON = Ways(lambda out: f'the same call with resume=True (out="{out}")', "the same call")


@contextlib.contextmanager
def handled(numbers: tuple[signal.Signals, ...], handler: Handler) -> Iterator[None]:
    """Handle these signals inside the block, but not a SIGHUP that is ignored, as under nohup.

    Does nothing in a thread other than the main one, which cannot set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number in numbers
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt inside the block on SIGTERM, SIGHUP and SIGUSR1, as Python does on Ctrl-C."""
    terminals = _terminals()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave(terminals)
        raise KeyboardInterrupt(signal.Signals(number).name)

    with handled((signal.SIGTERM, *WARNINGS), interrupt):
        yield


@contextlib.contextmanager
def stop_on_signals(console: Console) -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 sets, to stop after the current step.

    A second Ctrl-C or SIGTERM raises KeyboardInterrupt at once.
    """
    stop, terminals = threading.Event(), _terminals()

    def handle(number: int, _frame: FrameType | None) -> None:
        what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if number == signal.SIGHUP:
            _leave(terminals)
        if stop.is_set():
            if number in INSISTENT:
                raise KeyboardInterrupt(what)
            return
        stop.set()
        again = f"{what} again" if number in INSISTENT else "SIGTERM"
        # Printing is not reentrant: when the signal interrupts a print, the note is dropped; the run stops anyway.
        with contextlib.suppress(RuntimeError):
            console.note(f"stopping after this step and saving; {again} stops at once and loses this step")

    with handled((*INSISTENT, *WARNINGS), handle):
        yield stop


def _terminals() -> list[int]:
    """Return which of the descriptors of stdout and stderr are terminals."""
    return [number for number in (1, 2) if os.isatty(number)]


def _leave(terminals: list[int]) -> None:
    """Send to nowhere what is printed to a terminal that was closed: writing to it would raise."""
    for number in terminals:
        try:
            termios.tcgetattr(number)
        except (termios.error, OSError):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), number)


@contextlib.contextmanager
def saved_on_the_way_out(session: Session, ways: Ways) -> Iterator[None]:
    """When the block raises, save the last completed step, write a report, and add a note that tells how to go on."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            traceback.clear_frames(error.__traceback__)  # they keep every tensor of the failed pass alive
        if dist.lead():
            error.add_note(rescue(session, ways))
        raise


def rescue(session: Session, ways: Ways) -> str:
    """Save the last completed step and write a report; return what was saved and how to go on.

    A failure in here becomes part of the text, and is not raised: the exception that ended the run is the one to read.
    """
    _, trainer, recorder = session
    run, faults, saved = recorder.run, [], ""
    recorder.console.close()
    try:
        trainer.progress.restore()
        if trainer.state.step:
            # One more than usual is kept: a run that fails again and again removes no checkpoint.
            path = save(session, trainer.cfg.checkpoint.keep + 1)
            saved = f"step {trainer.state.step} of {trainer.steps} is saved in {path}"
    except Exception as fault:
        faults.append(f"step {trainer.state.step} could not be saved: {_brief(fault)}")
    try:
        saved += f"{', ' if saved else ''}the report is {report.write(run.path)}"
    except Exception as fault:
        faults.append(f"the report could not be written: {_brief(fault)}")
    newest = ""
    if not trainer.state.step:
        newest = "no step was finished"
    elif not saved.startswith("step") and run.has_checkpoint():
        newest = f"the newest checkpoint is {run.latest_checkpoint()}"
    fresh = find(run) == "unstarted"
    way = f"Start again with: {ways.start}" if fresh else f"Go on with: {ways.resume(run.path)}"
    text = "; ".join(part for part in (*faults, saved, newest) if part)
    return f"{text[0].upper()}{text[1:]}. {way}"


def _brief(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]
