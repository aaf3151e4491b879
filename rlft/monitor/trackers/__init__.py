"""Trackers: one file each, selected by name in `track.use`; "file.py:Class" selects a user's tracker.

A tracker is a class that is constructed with a `Start` and has two methods:

    log(step, metrics, tables, messages)
        Called once per step and per evaluation, in order, on a thread of this tracker. step: int, as in
        metrics.jsonl. metrics: dict of floats named as by transformers' callbacks ("train/reward",
        "eval/reward"), nan where not finite; log_metric("x", ...) of a reward is "train/custom/x". tables: name -> list
        of dicts with the same keys, one per completion. messages: new health messages, with `.name` and `.text`.
    finish(ok)
        Called at the end, on the main thread. ok: False when the run ended in an error.

Optional attributes: `link` is the URL of the run, or None, for the model card; `project`, where the run is listed, is
shown at the start. Errors of a tracker are
reported on the console, and the run continues: metrics.jsonl has all data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Start:
    """Arguments of a tracker."""

    folder: Path
    """The run folder. A tracker may store files in a subfolder of it."""
    name: str
    """Name of the run."""
    config: dict[str, Any]
    """All settings, nested as in config.toml, secrets masked."""
    track: Any
    """The [track] section (rlft.config.run.Track)."""
    step: int
    """Completed steps: 0, or those of the checkpoint that the run resumes from."""
    resumed: bool
    """True for a resumed run, which continues its record instead of starting a new one."""
    lines: int
    """Number of metrics lines logged before, including those past the checkpoint."""
