"""Trackers: one file each, found by its name in `track.use`; "file.py:Class" is one of your own.

A tracker is a class made with a `Start`, with two methods:

    log(step, metrics, tables, messages)
        Called once per step and per evaluation, on a thread of the tracker's own, in order. step: int, as in
        metrics.jsonl. metrics: dict of floats under the names that transformers' callbacks give ("train/reward",
        "eval/reward"), nan where not finite. tables: name -> list of dicts with the same keys, one per completion.
        messages: new health messages, with `.name` and `.text`.
    finish(ok)
        Called at the end, on the main thread. ok: False when the run ended in an error.

An attribute `link`, if there is one, is the run's page (a URL, or None); it goes into the model card. What a tracker
raises is noted on the console and the run goes on: metrics.jsonl has everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Start:
    """What a tracker is started with."""

    folder: Path
    """The run's folder; what a tracker keeps for itself goes into a folder of its own in it."""
    name: str
    """Name of the run."""
    config: dict[str, Any]
    """Every setting, nested as in config.toml."""
    track: Any
    """The [track] section (rlft.config.run.Track)."""
    step: int
    """Steps done: 0, or those of the checkpoint that the run goes on from."""
    resumed: bool
    """True when the run was started before, so that its record goes on instead of a new one."""
    lines: int
    """Lines of metrics that were logged before, those past the checkpoint included."""
