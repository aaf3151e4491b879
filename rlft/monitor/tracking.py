"""Manage the trackers of a run: check and start them, log each step to them, and finish them.

Each tracker runs on a separate thread, so the loop does not wait for it. If one fails or falls behind, this is reported
once and with a count at the end, and the run continues; metrics.jsonl and rollouts/ have all data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rlft.config import resolve, secrets
from rlft.config.files import to_table
from rlft.config.run import Config, Track
from rlft.environment import install, release, version
from rlft.errors import ConfigError, RlftError
from rlft.monitor.background import Background
from rlft.monitor.trackers import Start
from rlft.runs.folder import Run
from rlft.runs.tables import shown_images, shown_prompt
from rlft.types import Rollout

FINISH_SECONDS = 60.0
"""Seconds to wait at the end of a run for a tracker to process its queue."""


def problems(track: Track) -> Iterator[str]:
    """Yield reasons why trackers cannot start: unknown names, missing packages, no login. Uses no network or prompt."""
    for name in track.use:
        try:
            if ":" in name:
                _user_tracker(name)
                continue
            module = resolve.module(name, "rlft.monitor.trackers", "track.use")
        except RlftError as error:
            yield str(error)
            continue
        installed = version(module.PACKAGE)
        if installed is None:
            yield f'track.use = "{name}": {module.PACKAGE} is not installed: {install(name)}'
        elif release(installed) < release(module.SINCE):
            yield (
                f'track.use = "{name}": {module.PACKAGE} {installed} is too old: pip install -U '
                f"'{module.PACKAGE}>={module.SINCE}'"
            )
        elif hasattr(module, "problem") and (message := module.problem(track)):
            yield message


def _user_tracker(name: str) -> Any:
    """Return a user's tracker class. Raises ConfigError when it lacks a method; errors of its file propagate."""
    tracker_class = resolve.attribute(name, "track.use")
    missing = [method for method in ("log", "finish") if not callable(getattr(tracker_class, method, None))]
    if not isinstance(tracker_class, type) or missing:
        what = (
            f"no class but {type(tracker_class).__name__}"
            if not isinstance(tracker_class, type)
            else f"lacks {' and '.join(missing)}"
        )
        raise ConfigError(f'track.use = "{name}": {what}; see rlft/monitor/trackers/__init__.py for what a tracker is')
    return tracker_class


@dataclass
class _Tracker:
    name: str
    tracker: Any
    background: Background
    calls: int = 0
    missed: int = 0
    error: str = ""


class Tracking:
    """The trackers of a run, as a context manager that finishes them."""

    def __init__(self, cfg: Config, run: Run, step: int, resumed: bool, note: Callable[[str], None]) -> None:
        """Start the trackers. step: completed steps. note: called with messages. Raises ConfigError on failure."""
        self._rows, self._note = cfg.track.completions, note
        self._trackers: list[_Tracker] = []
        name = cfg.track.name or run.path.resolve().name
        start = Start(
            run.path.resolve(), name, secrets.masked(to_table(cfg)), cfg.track, step, resumed, run.lines_logged()
        )
        for use in cfg.track.use:
            make = (
                _user_tracker(use) if ":" in use else resolve.module(use, "rlft.monitor.trackers", "track.use").Tracker
            )
            try:
                self._trackers.append(_Tracker(use, make(start), Background(f"rlft-{use}")))
                if project := getattr(self._trackers[-1].tracker, "project", None):
                    note(f'{use}: project "{project}"')
            except Exception as error:  # a tracker may raise anything
                self._finish(ok=False)
                hint = '; or set track.mode = "offline"' if use == "wandb" and cfg.track.mode != "offline" else ""
                raise ConfigError(
                    f'track.use = "{use}": could not be started: {type(error).__name__}: {error}. Mend it or take it '
                    f"out of track.use{hint}"
                ) from error

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._finish(ok=kind is None)

    @property
    def link(self) -> str | None:
        """URL of the run at the first tracker that has one."""
        links = (getattr(tracker.tracker, "link", None) for tracker in self._trackers)
        return next((link for link in links if link), None)

    def log(
        self,
        step: int,
        values: Mapping[str, float],
        name: str,
        completions: Sequence[Rollout],
        scores: Mapping[str, Sequence[Any]],
        messages: Sequence[Any] = (),
    ) -> None:
        """Log a step, or an evaluation after it, to every tracker.

        values: as in metrics.jsonl. name: of the table of `completions`, of which the first `track.completions` are
        logged. scores: further columns, as long as `completions`. messages: new health messages.
        """
        if not self._trackers:
            return
        metrics = {
            metric if metric.startswith("eval/") else f"train/{metric}": value for metric, value in values.items()
        }
        rows = table(step, completions[: self._rows], scores)
        tables = {name: rows} if rows else {}
        for tracker in self._trackers:
            tracker.calls += 1
            if not tracker.background.offer(
                lambda tracker=tracker: self._call(tracker, step, metrics, tables, messages)
            ):
                self._note_failure(tracker, "it has fallen behind")

    def _call(self, tracker: _Tracker, *arguments: Any) -> None:
        try:
            tracker.tracker.log(*arguments)
        except Exception as error:  # a tracker may raise anything, and must not stop the run
            self._note_failure(tracker, f"{type(error).__name__}: {error}")

    def _note_failure(self, tracker: _Tracker, error: str) -> None:
        tracker.missed += 1
        if tracker.missed == 1:
            tracker.error = error
            self._note(f'tracker "{tracker.name}" failed: {error}; the run goes on, and metrics.jsonl has everything')

    def _finish(self, ok: bool) -> None:
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            if not tracker.background.flush(FINISH_SECONDS):
                self._note(f'tracker "{tracker.name}" is still busy after {FINISH_SECONDS:.0f} s and is left behind')
                continue
            tracker.background.stop()
            try:
                tracker.tracker.finish(ok)
            except Exception as error:  # as in `_call`
                self._note(f'tracker "{tracker.name}" could not be finished: {type(error).__name__}: {error}')
            if tracker.missed:
                self._note(
                    f'tracker "{tracker.name}" missed {tracker.missed} of {tracker.calls} rows ({tracker.error})'
                )


def table(step: int, rollouts: Sequence[Rollout], scores: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return one dict per completion: step, prompt, completion, scores (None if nan), tokens, finish reason.

    In a step with images also their names.
    """
    seen = any(rollout.prompt.images for rollout in rollouts)
    return [
        {
            "step": step,
            "prompt": shown_prompt(rollout.prompt),
            "completion": rollout.text,
            **({"images": ", ".join(shown_images(rollout.prompt))} if seen else {}),
            **{name: _cell(values[i]) for name, values in scores.items()},
            "tokens": len(rollout.completion_ids),
            "finish_reason": rollout.finish_reason,
        }
        for i, rollout in enumerate(rollouts)
    ]


def _cell(value: Any) -> Any:
    if isinstance(value, float | int):
        return None if math.isnan(value) else float(value)
    return value if value is None else str(value)
