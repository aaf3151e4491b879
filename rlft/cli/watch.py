"""`rlft watch RUN`: follow a run from another terminal, by what it writes into its folder.

Nothing is written into the folder and no lock is taken, so that a run never notices who watches it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlft.config.paths import user_path
from rlft.errors import ConfigError
from rlft.monitor.console import Console
from rlft.monitor.health import HealthMonitor
from rlft.monitor.panel import Example, label_of, prompt_text
from rlft.report.page import algorithm_of, config_of
from rlft.runs import lock
from rlft.runs.folder import Run, is_evaluation
from rlft.runs.lines import parse_line
from rlft.runs.tables import Unreadable, read_columns

SECONDS = 1.0
"""Time between two looks at the folder."""
EARLIER = 10
"""Rows of metrics from before the start that are shown as lines."""


def watch(folder: Path, console: Console | None = None) -> None:
    """Show a run until it ends, or until Ctrl-C. Raises ConfigError for a folder that is none of a run."""
    run = Run(user_path(folder, "RUN"))
    if not run.exists() and not lock.is_held(run.path):
        what = "holds no run" if run.path.is_dir() else "no such folder"
        raise ConfigError(f"{run.path}: {what}; give the folder of a run, the `out` of its config")
    with console or Console() as console:
        watcher = Watcher(run, console)
        try:
            while watcher.look():
                time.sleep(SECONDS)
        except KeyboardInterrupt:
            console.close()
            console.note(f"{run.path} is not watched any more; the run itself goes on")
            return
        console.close()
        done, steps = console.panel.done, console.panel.steps
        page = f"; its report is {run.report}" if run.report.is_file() else ""
        console.note(f"the run has ended at step {done}{f' of {steps}' if steps else ''}{page}")


class Watcher:
    """What has been seen of a run."""

    def __init__(self, run: Run, console: Console) -> None:
        """Begin with nothing seen."""
        self._run, self._console = run, console
        self._tail = Tail(run.metrics_file)
        self._health: HealthMonitor | None = None
        """None until the first look that finds the run's config."""
        self._seconds = 0.0
        """Time of all steps."""

    def look(self) -> bool:
        """Show what is new. Returns False once the run has ended."""
        # Asked first: what is written between the two is shown by this look, and nothing is written after the end.
        running = lock.is_held(self._run.path)
        rows, again = self._tail.read()
        panel = self._console.panel
        if again:  # the run was resumed, or another one started in the folder
            panel.history, panel.done, self._health, self._seconds = [], 0, None, 0.0
        if self._health is None and self._run.config.is_file():
            config = config_of(self._run)
            self._health = HealthMonitor(algorithm_of(config))
            steps = config.get("steps")
            self._console.start([f"{config.get('model', '')}: {self._run.path}"], steps if type(steps) is int else 0)
            for row in rows[:-EARLIER]:
                self._add(row)
            rows = rows[-EARLIER:]
        if self._health is None:
            self._console.phase("waiting for the run to load its model")
        for row in rows:
            self._show(row, newest=row is rows[-1])
        self._wait(running)
        return running

    def _add(self, row: Mapping[str, float]) -> tuple[list[Any], list[Any]]:
        """Count a row; returns health messages that are new and those that apply."""
        assert self._health is not None
        step = int(row["step"])
        if is_evaluation(row):
            return self._health.evaluation(step, row), self._health.active
        self._seconds += row.get("step_time", 0.0)
        new = self._health.step(step, row)
        self._console.panel.add(row)
        return new, self._health.active

    def _show(self, row: Mapping[str, float], newest: bool) -> None:
        new, active = self._add(row)
        if is_evaluation(row):
            self._console.evaluation(int(row["step"]), row, new, active)
        else:
            example = self._example() if newest and not self._console.plain else None
            self._console.step(row, example or self._console.panel.example, new, active)

    def _example(self) -> Example | None:
        """Return a completion of the newest step that has any on disk."""
        steps = self._run.rollout_steps()
        try:
            rows = self._run.read_rollouts(steps[-1], groups=1) if steps else []
        except Unreadable:
            return None
        if not rows:
            return None
        row = rows[0]
        prompt = prompt_text(row["prompt"], bool(row.get("prompt_is_messages")))
        return Example(row["completion"], prompt, row["reward"], label_of(read_columns(row.get("data"))))

    def _wait(self, running: bool) -> None:
        """Show how long the step after the newest one has been running."""
        panel = self._console.panel
        if self._health is None:
            return
        what = f"step {panel.done + 1}" if running and panel.done != panel.steps else ""
        panel.enter(what)
        waited = max(0.0, time.time() - self._run.metrics_file.stat().st_mtime) if what else 0.0
        panel.phase_began = time.monotonic() - waited
        panel.elapsed = self._seconds + waited


class Tail:
    """Reads the lines that are added to metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        """Begin at the start of the file, which may not be there yet."""
        self._path, self._place, self._file = path, 0, -1

    def read(self) -> tuple[list[dict[str, float]], bool]:
        """Return the rows that are new, and whether the file is another one, so that these are all there are.

        nan stands for numbers that are not finite. A line that is no row is left out: a resume sets it aside.
        """
        try:
            with self._path.open("rb") as file:
                size, number = file.seek(0, 2), self._path.stat().st_ino
                again = self._file not in (-1, number) or size < self._place
                if again:
                    self._place = 0
                self._file = number
                file.seek(self._place)
                data = file.read()
        except FileNotFoundError:
            return [], False
        data = data[: data.rfind(b"\n") + 1]  # the rest is being written
        self._place += len(data)
        rows = (parse_line(line) for line in data.splitlines())
        return [
            {name: math.nan if value is None else value for name, value in row.items()}
            for row in rows
            if row is not None
        ], again
