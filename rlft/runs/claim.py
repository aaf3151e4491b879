"""Claim a run folder for one writing process: decide what to do with a run that is there, under the folder's lock.

nothing      no run: start
unstarted    a run without a finished step: start again; its evaluation goes to set-aside/
started      a run with a finished step: `if_exists` decides
foreign      config.toml, metrics.jsonl or checkpoints/ of something else: refuse
"""

from __future__ import annotations

import contextlib
import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlft.config.paths import user_path
from rlft.errors import ConfigError
from rlft.runs import lock
from rlft.runs.disk import make_folder, reason
from rlft.runs.folder import Run
from rlft.runs.lines import parse_line

Found = Literal["nothing", "unstarted", "started", "foreign"]
Action = Literal["start", "restart", "resume", "overwrite"]
TWICE = (
    'go on with --resume, give another folder with --out, or set if_exists to "resume", "overwrite" or "number" (a '
    "numbered folder beside it)"
)


@dataclass(frozen=True)
class Claim:
    """A run folder that this process alone may write."""

    run: Run
    action: Action
    notes: list[str]
    """What the user must know about the folder."""

    @property
    def resumed(self) -> bool:
        """Whether the run goes on from its newest checkpoint."""
        return self.action == "resume"

    def make_room(self) -> None:
        """Remove or set aside what is in the way of a start. Called once nothing can stop the start any more."""
        if self.action == "overwrite":
            self.run.clear()
        elif self.action == "restart":
            self.run.set_aside(-1)


@contextlib.contextmanager
def claim(out: str | Path, resume: bool = False, if_exists: str = "refuse", share: bool = False) -> Iterator[Claim]:
    """Create the folder where it is missing, take its lock, and hold it until the block ends.

    resume: a run must be there, or an empty folder. if_exists, share: as in `Config`. A folder that the block leaves
    empty is removed again, where this call has made it. Raises ConfigError when another process writes the folder, when
    it cannot be written, and for what `decide` refuses.
    """
    out = user_path(out, "out")
    candidates = numbered(out) if if_exists == "number" and not resume else iter([out])
    for path in candidates:
        run, new = Run(path), not path.exists()
        if resume and new:
            decide(run, resume, if_exists)  # raises
        try:
            held = _locked(run, share)
        except lock.Busy:
            if if_exists == "number" and not resume:
                continue
            raise
        try:
            action = decide(run, resume, if_exists)
            if action is None:
                continue
            yield Claim(run, action, _notes(run, action, held.missing))
            return
        finally:
            held.release()
            if new and path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _locked(run: Run, share: bool) -> lock.Lock:
    with run.writing("in it", "or"):
        while True:
            make_folder(run.path, share)
            try:
                return lock.Lock(run.path)
            except FileNotFoundError:
                if run.path.is_dir():
                    raise
                # Removed just now by a start that failed.


def _notes(run: Run, action: Action, missing: str) -> list[str]:
    notes = {
        "overwrite": f"{run.path}: the run in it is removed once this one has loaded",
        "restart": f"{run.path}: the run in it has not finished a step, so this one starts in its place",
    }
    unlocked = (
        f"{run.path}: its file system has no locks ({missing}), so nothing keeps a second process out of this folder: "
        f"start no other run in it"
    )
    return [*([notes[action]] if action in notes else []), *([unlocked] if missing else [])]


def numbered(out: Path) -> Iterator[Path]:
    """Yield runs/first, runs/first-2, runs/first-3, ..."""
    yield out
    out = out if out.name not in ("", "..") else out.resolve()
    for number in itertools.count(2):
        yield out.with_name(f"{out.name}-{number}")


def decide(run: Run, resume: bool, if_exists: str) -> Action | None:
    """Return what a start does with the folder; None: try the next number.

    Raises ConfigError when the folder must not be written, or has no run to resume.
    """
    try:
        found = find(run)
    except OSError as error:
        raise ConfigError(
            f'out = "{run.path}": cannot be read: {reason(error)}; make it readable, or give another folder with --out'
        ) from error
    if found == "foreign":
        raise ConfigError(
            f'out = "{run.path}": holds {_foreign(run)} that no run of rlft wrote; give another folder with --out'
        )
    if resume:
        if found == "nothing" and not _is_empty(run):
            raise ConfigError(
                f'out = "{run.path}": holds no run to resume; leave out --resume, or give the folder of a run'
            )
        return "resume"
    if found == "nothing":
        return "start"
    if if_exists == "resume":
        return "resume"
    if if_exists == "overwrite":
        return "overwrite"
    if found == "unstarted":
        return "restart"
    if if_exists == "number":
        return None
    raise ConfigError(f'out = "{run.path}": already holds a run; {TWICE}')


def find(run: Run) -> Found:
    """Look at what a folder holds."""
    if run.discarded.exists():
        return "started"  # an overwrite that was killed
    if not run.exists():
        return "nothing"
    if run.has_checkpoint() or run.rollout_steps():
        return "started" if run.metrics_file.is_file() or _checkpoints_are_ours(run) else "foreign"
    if not run.metrics_file.is_file():
        return "foreign"
    lines = [parse_line(line) for line in run.metrics_file.read_bytes().splitlines()]
    # A start writes an empty metrics.jsonl before config.toml.
    if not _config_is_ours(run) and (run.config.exists() or lines):
        return "foreign"
    return "unstarted" if all(line is not None and line["step"] == 0 for line in lines) else "started"


def _config_is_ours(run: Run) -> bool:
    try:
        return {"model", "data", "out"} <= tomllib.loads(run.config.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError):
        return False


def _checkpoints_are_ours(run: Run) -> bool:
    return any(run.checkpoints.glob("step-*/state.json"))


def _foreign(run: Run) -> str:
    names = [path.name for path in (run.config, run.metrics_file, run.checkpoints) if path.exists()]
    return " and ".join(names)


def _is_empty(run: Run) -> bool:
    """Return True for a folder with at most temporary files, as a start that is killed while loading leaves."""
    return run.path.is_dir() and all(
        path.name.startswith(".") or path.name in (lock.NAME, "data.parquet") for path in run.path.iterdir()
    )
