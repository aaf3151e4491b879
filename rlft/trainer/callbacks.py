"""Callbacks: what a script does while a run goes on. They may stop the run and ask for a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

from rlft.errors import ConfigError, RlftError, TrainError
from rlft.rewards.texts import LONGEST, described, type_name
from rlft.types import Sample, State

Event = Literal["on_start", "on_rollouts", "on_step", "on_evaluate", "on_save", "on_end"]
CALL = "__call__"
"""Method of an object that is called as a function."""
EVENTS: tuple[Event, ...] = ("on_start", "on_rollouts", "on_step", "on_evaluate", "on_save", "on_end")


@dataclass
class View:
    """What a callback sees of a run, and what it may ask of it."""

    out: Path
    """Folder of the run."""
    step: int
    """Steps that are done; in `on_rollouts` without the one that is running."""
    steps: int
    """Steps of the whole run."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Those of the step in `on_step`, of the evaluation in `on_evaluate` and `on_end`; a copy."""
    samples: Sequence[Sample] = ()
    """Completions of the step with their rewards, in `on_rollouts` and `on_step`."""
    checkpoint: Path | None = None
    """The folder that was saved, in `on_save` and `on_end`."""
    stopping: bool = field(default=False, repr=False)
    saving: bool = field(default=False, repr=False)

    def stop(self) -> None:
        """End the run after this step, as Ctrl-C does: with a checkpoint, a report, and a way to go on."""
        self.stopping = True

    def save(self) -> None:
        """Save a checkpoint once this step is done."""
        self.saving = True


class Callback:
    """Base of callbacks: override what you need. One that raises ends the run with its name, and no step is lost."""

    def on_start(self, run: View) -> None:
        """Called once everything is loaded, before the first evaluation."""

    def on_rollouts(self, run: View) -> None:
        """Called when the completions of a step are sampled and scored, before they are trained on."""

    def on_step(self, run: View) -> None:
        """Called after each step."""

    def on_evaluate(self, run: View) -> None:
        """Called after each evaluation of the held-out rows."""

    def on_save(self, run: View) -> None:
        """Called when a checkpoint was saved."""

    def on_end(self, run: View) -> None:
        """Called after the last evaluation, when report and checkpoint are there."""


class Callbacks:
    """The callbacks of a run."""

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        """Check the callbacks: `Callback` objects, or functions (state, metrics) called after each step.

        Raises ConfigError for anything else, and for functions that would have to be awaited.
        """
        if not isinstance(callbacks, list | tuple):
            raise ConfigError(
                f"callbacks: a {type_name(callbacks)} is no list of them: give [callback], or [] for none"
            )
        for callback in callbacks:
            called = [callback, *(getattr(callback, name, None) for name in (*EVENTS, CALL))]
            if any(map(inspect.iscoroutinefunction, called)):
                raise ConfigError(
                    f"callbacks: {_name(callback)} is async, and a callback is called, not awaited: give one without "
                    f"async, which may call asyncio.run"
                )
            if isinstance(callback, type) or not (_methods(callback) or callable(callback)):
                raise ConfigError(
                    f"callbacks: {_name(callback)} is {'a class' if isinstance(callback, type) else 'no callback'}: "
                    f"give an rlft.Callback object, or a function (state, metrics) that is called after each step"
                )
        self._callbacks = tuple(callbacks)
        self.stopping = False
        """Whether a callback has asked the run to stop."""
        self._saving = False

    def call(self, event: Event, view: View, state: State) -> None:
        """Call what listens to an event. Raises TrainError (exit code 2) naming the callback that raised."""
        for callback in self._callbacks:
            try:
                if isinstance(callback, Callback) or _methods(callback):
                    if (method := getattr(callback, event, None)) is not None:
                        method(view)
                elif event == "on_step":
                    callback(state, dict(view.metrics))  # a copy: what a callback puts into it is no metric of ours
            except RlftError:
                raise
            except Exception as error:
                raise _fault(callback, state.step, error) from error
        self.stopping, self._saving = self.stopping or view.stopping, self._saving or view.saving

    def save_wanted(self) -> bool:
        """Return True once after a callback has asked for a checkpoint."""
        wanted, self._saving = self._saving, False
        return wanted


def _methods(callback: Any) -> bool:
    return any(callable(getattr(callback, event, None)) for event in EVENTS)


def _name(callback: Callable[..., Any]) -> str:
    return callback.__name__ if isinstance(callback, FunctionType | type) else type(callback).__name__


def _fault(callback: Any, step: int, error: Exception) -> TrainError:
    fault = TrainError(
        f"callback {_name(callback)} raised at step {step}: {type_name(error)}: {described(error, str, LONGEST)}; mend "
        f"it or leave it out"
    )
    fault.exit_code = 2
    return fault
