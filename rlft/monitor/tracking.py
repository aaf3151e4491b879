"""All trackers of a run: checked before it, started, told of each step, finished.

The loop hands a step over and does not wait: each tracker works on a thread of its own. One that fails or falls behind
is noted, once when it begins and with a count at the end, and the run goes on; metrics.jsonl and rollouts/ have it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rlft.config import resolve
from rlft.config.files import to_table
from rlft.config.run import Config, Track
from rlft.environment import release, version
from rlft.errors import ConfigError, RlftError
from rlft.monitor.background import Background
from rlft.monitor.trackers import Start
from rlft.runs.folder import Run
from rlft.runs.tables import shown_prompt
from rlft.types import Rollout

LINGER = 60.0
"""Seconds that the end of a run waits for a tracker to take what it was given."""


def problems(track: Track) -> Iterator[str]:
    """What keeps the trackers from starting: unknown names, missing packages, no login. No network, no prompt."""
    for name in track.use:
        try:
            if ":" in name:
                _own(name)
                continue
            module = resolve.module(name, "rlft.monitor.trackers", "track.use")
        except RlftError as error:
            yield str(error)
            continue
        have = version(module.PACKAGE)
        if have is None:
            yield f"track.use = \"{name}\": {module.PACKAGE} is not installed: pip install 'rlft[{name}]'"
        elif release(have) < release(module.SINCE):
            yield (
                f'track.use = "{name}": {module.PACKAGE} {have} is too old: pip install -U '
                f"'{module.PACKAGE}>={module.SINCE}'"
            )
        elif hasattr(module, "problem") and (found := module.problem(track)):
            yield found


def _own(name: str) -> Any:
    """A user's tracker class. Raises ConfigError when it lacks a method; what its file raises passes through."""
    made = resolve.attribute(name, "track.use")
    missing = [method for method in ("log", "finish") if not callable(getattr(made, method, None))]
    if not isinstance(made, type) or missing:
        what = f"no class but {type(made).__name__}" if not isinstance(made, type) else f"lacks {' and '.join(missing)}"
        raise ConfigError(f'track.use = "{name}": {what}; see rlft/trackers/__init__.py for what a tracker is')
    return made


@dataclass
class _Tracker:
    name: str
    tracker: Any
    background: Background
    calls: int = 0
    missed: int = 0
    error: str = ""


class Tracking:
    """The trackers of a run. A context manager: they are finished on the way out, whatever happened."""

    def __init__(self, cfg: Config, run: Run, step: int, resumed: bool, note: Callable[[str], None]) -> None:
        """Start them. step: steps done. note: told what goes wrong. Raises ConfigError when one cannot be started."""
        self._rows, self._note = cfg.track.completions, note
        self._trackers: list[_Tracker] = []
        name = cfg.track.name or run.path.resolve().name
        start = Start(run.path.resolve(), name, to_table(cfg), cfg.track, step, resumed, run.lines_logged())
        for use in cfg.track.use:
            make = _own(use) if ":" in use else resolve.module(use, "rlft.monitor.trackers", "track.use").Tracker
            try:
                self._trackers.append(_Tracker(use, make(start), Background(f"rlft-{use}")))
            except Exception as error:  # a tracker may raise anything: no network, a full disk, a wrong key
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
        """The run's page at the first tracker that has one."""
        links = (getattr(t.tracker, "link", None) for t in self._trackers)
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
        """Hand a step, or an evaluation after it, to every tracker.

        values: as logged to metrics.jsonl. name: of the table of `completions`, of which the first `track.completions`
        go. scores: further columns, as long as `completions`. messages: health messages that are new.
        """
        if not self._trackers:
            return
        metrics = {k if k.startswith("eval/") else f"train/{k}": v for k, v in values.items()}
        rows = table(step, completions[: self._rows], scores)
        tables = {name: rows} if rows else {}
        for t in self._trackers:
            t.calls += 1
            if not t.background.offer(lambda t=t: self._call(t, step, metrics, tables, messages)):
                self._failed(t, "it has fallen behind")

    def _call(self, t: _Tracker, *arguments: Any) -> None:
        try:
            t.tracker.log(*arguments)
        except Exception as error:  # a tracker may raise anything, and none of it is worth a run
            self._failed(t, f"{type(error).__name__}: {error}")

    def _failed(self, t: _Tracker, error: str) -> None:
        t.missed += 1
        if t.missed == 1:
            t.error = error
            self._note(f'tracker "{t.name}" failed: {error}; the run goes on, and metrics.jsonl has everything')

    def _finish(self, ok: bool) -> None:
        trackers, self._trackers = self._trackers, []
        for t in trackers:
            if not t.background.flush(LINGER):
                self._note(f'tracker "{t.name}" is still busy after {LINGER:.0f} s and is left behind')
                continue
            t.background.stop()
            try:
                t.tracker.finish(ok)
            except Exception as error:  # as in `_call`
                self._note(f'tracker "{t.name}" could not be finished: {type(error).__name__}: {error}')
            if t.missed:
                self._note(f'tracker "{t.name}" missed {t.missed} of {t.calls} rows ({t.error})')


def table(step: int, rollouts: Sequence[Rollout], scores: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """One dict per completion: step, prompt, completion, the scores (None where not a number), how it ended."""
    return [
        {
            "step": step,
            "prompt": shown_prompt(r.prompt),
            "completion": r.text,
            **{name: _cell(values[i]) for name, values in scores.items()},
            "tokens": len(r.completion_ids),
            "finish_reason": r.finish_reason,
        }
        for i, r in enumerate(rollouts)
    ]


def _cell(value: Any) -> Any:
    if isinstance(value, float | int):
        return None if math.isnan(value) else float(value)
    return value if value is None else str(value)
