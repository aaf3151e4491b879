"""The run folder: its layout, atomic writes, and what a resume sets aside.

    config.toml                      all settings, resolved
    metrics.jsonl                    one JSON object per step or evaluation, with its `step`
    rollouts/step-000012.parquet     every completion of step 12 with its rewards
    evaluations/step-000012.parquet  every held-out completion of an evaluation after step 12
    checkpoints/step-000012/         PEFT adapter and trainer state (rlft.runs.checkpoint)
    checkpoints/best.json            the best of them on the held-out rows
    set-aside/001/                   data past the checkpoint at the first resume (002: second, ...); never deleted
    plan.json                        bytes that training keeps in memory, by purpose
    data.parquet                     the rows, where they were given from Python
    log.txt                          what the run printed, and the details that it did not (rlft.monitor.console)
    report.html                      rlft.report
    .signature                       of config.toml, by the user who made the run (rlft.runs.trust)
    run.lock                         the process that writes the folder (rlft.runs.lock)

Step 12 is the twelfth step; its rollouts have policy version 11. Only the process that has claimed the folder
(rlft.runs.claim) writes it; anyone may read it at any time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlft.config.paths import user_path
from rlft.errors import ConfigError
from rlft.rewards.parts import score_columns
from rlft.runs import lock
from rlft.runs.disk import make_folder, make_subfolder, publish, reason, remedy, replace_file, sync
from rlft.runs.lines import append_line, parse_line, read_lines
from rlft.runs.tables import Unreadable, read_table, rollout_table
from rlft.types import Best, Sample

PIECED_GROUPS = 4
"""Number of groups per step whose tokens are also saved as text, for the report."""
TEXTS = ("prompt", "data", "completion", "pieces.list.element", "finish_reason")
"""Columns of a rollouts file with repeated values, which are dictionary-encoded."""
FILES = ("plan.json", "log.txt", "report.html", "data.parquet", "dropped.jsonl", "config.toml", "metrics.jsonl")
FOLDERS = ("checkpoints", "rollouts", "evaluations", "set-aside", "wandb", "tensorboard")
"""What a run and its trackers leave in the folder. The two files that make it a run come last, for `Run.clear`."""
STEP = re.compile(r"step-(\d+)(\.parquet)?")


def step_of(path: Path) -> int | None:
    """Return the step in the name of a file or folder; None for any other name, such as a temporary one."""
    match = STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def _steps_in(folder: Path) -> dict[int, Path]:
    """Return step -> file or folder, in order of steps."""
    entries = [(step, path) for path in folder.glob("step-*") if (step := step_of(path)) is not None]
    return dict(sorted(entries))


@dataclass(frozen=True)
class Aside:
    """What `Run.set_aside` has moved."""

    path: Path
    """The folder that it is in."""
    damaged: list[int]
    """Numbers of lines of metrics.jsonl that could not be read, from 1; a truncated last one is none of them."""


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Return True for a row of metrics that is an evaluation, and False for one that is a step."""
    return any(name.startswith("eval/") for name in row)


class Run:
    """A run folder with its paths as attributes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics_file = path / "metrics.jsonl"
        self.plan_file = path / "plan.json"
        self.log_file = path / "log.txt"
        self.report = path / "report.html"
        self.rollouts = path / "rollouts"
        self.evaluations = path / "evaluations"
        self.checkpoints = path / "checkpoints"
        self.discarded = path / ".discarded-run"
        """What `clear` is removing."""

    @classmethod
    def create(cls, out: str | Path, share: bool = False) -> Run:
        """Create the folder of a new run, if missing. It counts as a run once `write_config` was called."""
        run = cls(user_path(out, "out"))
        with run.writing("in it", "or"):
            make_folder(run.path, share)
        return run

    @classmethod
    def resume(cls, out: str | Path) -> Run:
        """Open the folder of an existing run to read it. Raises ConfigError when `out` has no run."""
        run = cls(user_path(out, "out"))
        if not run.exists():
            raise ConfigError(f'out = "{out}": holds no run; give the folder of a run')
        return run

    def exists(self) -> bool:
        """Return True when the folder has a run, in any state."""
        return any(path.exists() for path in (self.config, self.metrics_file, self.checkpoints))

    @contextlib.contextmanager
    def writing(self, what: str, then: str = "then go on with --resume; or") -> Iterator[None]:
        """Turn an OSError inside the block (disk full, read-only, no permission) into a ConfigError naming `what`."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f'out = "{self.path}": cannot write {what}: {reason(error)}; {remedy(error)}, {then} give another '
                f"folder with --out"
            ) from error

    # ---- writing ----

    def write_config(self, text: str) -> None:
        """Write config.toml, after an empty metrics.jsonl where there is none."""
        with self.writing("config.toml"):
            self.metrics_file.touch()
            replace_file(self.config, text.encode())

    def write_plan(self, plan: Mapping[str, int]) -> None:
        """Write plan.json: bytes that training keeps in memory, by purpose."""
        with self.writing("plan.json"):
            replace_file(self.plan_file, json.dumps(plan, indent=2).encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of a step, or of an evaluation after it, to metrics.jsonl, which `write_config` made.

        Raises ConfigError when the folder was moved or removed, and when another process writes one of its name since.
        """
        lock.check_ours(self.path)
        with self.writing("metrics.jsonl"):
            self.metrics_file.stat()  # appending would make a new file, in a folder that is not this run's
            # Given twice: first in the line, and not replaced by a metric of that name, which a user's loss may return.
            append_line(self.metrics_file, {"step": step} | dict(values) | {"step": step})

    def write_rollouts(self, step: int, samples: Sequence[Sample], pieces: Sequence[list[str] | None] = ()) -> None:
        """Write every completion of a step; nan is written as null.

        pieces: the text of each token, per sample. Columns: step, row (of the dataset), group, sample, prompt,
        prompt_is_messages (the prompt is their JSON), data (JSON of the row's other columns), completion,
        completion_ids, sampler_logprobs and logprobs (float32), pieces, reward, rewards/NAME for each function and
        what it logged, advantage, finish_reason, tokens, policy_version.
        """
        tokens = {
            "logprobs": [_completion_logprobs(sample) for sample in samples],
            "pieces": list(pieces) or [None] * len(samples),
        }
        self._write(self.rollouts, step, samples, score_columns(samples), tokens)

    def write_evaluation(self, step: int, samples: Sequence[Sample]) -> None:
        """Write every held-out completion of an evaluation after `step`: rollouts and rewards."""
        self._write(self.evaluations, step, samples, {"reward": [sample.reward for sample in samples]}, {})

    def _write(
        self,
        folder: Path,
        step: int,
        samples: Sequence[Sample],
        scores: Mapping[str, Sequence[Any]],
        tokens: Mapping[str, Sequence[Any]],
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = rollout_table(pa, step, [sample.rollout for sample in samples], scores, tokens)
        with self.writing(f"{folder.name}/step-{step:06d}.parquet"):
            make_subfolder(folder)
            path = folder / f"step-{step:06d}.parquet"
            temporary = path.with_name(f".{path.name}.tmp")
            # Dictionary encoding of log-probs, which hardly ever repeat, would take three quarters of the time.
            pq.write_table(table, temporary, use_dictionary=[*TEXTS])  # type: ignore[arg-type]
            # Renamed at the end, so that a partial file never has the final name.
            publish(temporary, path)

    def sync(self) -> None:
        """Sync metrics.jsonl to disk; all other files of the run are synced when they are written."""
        with self.writing("metrics.jsonl"):
            if self.metrics_file.exists():
                sync(self.metrics_file)

    def clear(self) -> None:
        """Remove what a run has left in the folder, and nothing else.

        Moved first, so that a kill in between leaves a folder that `clear` can finish.
        """
        with self.writing("in it", "or"):
            self.discarded.mkdir(exist_ok=True)
            trash = tempfile.mkdtemp(dir=self.discarded)
            for name in (*FOLDERS, *FILES):
                if os.path.lexists(self.path / name):
                    (self.path / name).rename(Path(trash) / name)
            sync(self.path)
            shutil.rmtree(self.discarded)

    def set_aside(self, step: int) -> Aside | None:
        """Move metrics, rollouts and evaluations past `step` to set-aside/001 (002, ...), for a run resumed at `step`.

        Returns what was moved, or None when there was nothing to move. A truncated last line (kill, full disk) is moved
        too, and so is every line that is no row of metrics.
        """
        data = self.metrics_file.read_bytes() if self.metrics_file.exists() else b""
        lines = data.splitlines()
        rows = [parse_line(line) for line in lines]
        steps = [math.inf if row is None else row["step"] for row in rows]
        damaged = [number for number, row in enumerate(rows[:-1], 1) if row is None]
        if lines and not data.endswith(b"\n"):
            steps[-1] = math.inf  # truncated, even if it parses as an object
        past = [line for line, line_step in zip(lines, steps, strict=True) if line_step > step]
        files = [
            path
            for folder in (self.rollouts, self.evaluations)
            for line_step, path in _steps_in(folder).items()
            if line_step > step
        ]
        if not past and not files:
            return None
        with self.writing("set-aside"):
            number = 1 + max((int(path.name) for path in self._asides()), default=0)
            aside = self.path / "set-aside" / f"{number:03d}"
            make_folder(aside)
            for path in files:
                make_folder(aside / path.parent.name)
                path.rename(aside / path.parent.name / path.name)
            for folder in {path.parent for path in files}:
                sync(folder)
                sync(aside / folder.name)
            if past:
                # Copy first, then shorten the original, so that a kill in between loses nothing.
                replace_file(aside / self.metrics_file.name, b"".join(line + b"\n" for line in past))
                remaining = (line for line, line_step in zip(lines, steps, strict=True) if line_step <= step)
                replace_file(self.metrics_file, b"".join(line + b"\n" for line in remaining))
        return Aside(aside, damaged)

    def _asides(self) -> list[Path]:
        return [path for path in (self.path / "set-aside").glob("*") if path.name.isdecimal()]

    # ---- reading ----

    def has_checkpoint(self) -> bool:
        """Return True when there is a checkpoint."""
        return bool(_steps_in(self.checkpoints))

    def latest_checkpoint(self) -> Path:
        """Return the folder of the newest checkpoint. Raises ConfigError when there is none."""
        if not self.has_checkpoint():
            raise ConfigError(
                f'out = "{self.path}": holds no checkpoint yet; let the run go on with rlft train FILE --resume, and '
                f"set checkpoint.every to save sooner"
            )
        return list(_steps_in(self.checkpoints).values())[-1]

    def checkpoint(self, which: str = "latest") -> Path:
        """Return the folder of a checkpoint: "latest", "best" (on the held-out rows) or a step, "12".

        Raises ConfigError naming the existing checkpoints.
        """
        if which == "latest":
            return self.latest_checkpoint()
        checkpoints = _steps_in(self.checkpoints)
        best = self.best() if which == "best" else None
        if best is None and which == "best":
            raise ConfigError(
                f'--checkpoint best: no checkpoint of {self.path} was evaluated; choose "latest" or one of its steps: '
                f"{', '.join(map(str, checkpoints)) or '(none)'}, and set eval.rows and eval.every in the next run"
            )
        step = best.step if best is not None else int(which) if which.isdigit() else -1
        if step not in checkpoints:
            raise ConfigError(
                f'--checkpoint {which}: {self.path} has no such checkpoint; give "latest", "best" or one of its steps: '
                f"{', '.join(map(str, checkpoints)) or '(none)'}"
            )
        return checkpoints[step]

    def best(self, also: int | None = None) -> Best | None:
        """Return the best evaluation among the steps with a checkpoint and `also`, a step about to be saved.

        The first of equals wins; None without one. Read from metrics.jsonl, so that data set aside by a resume does not
        count.
        """
        steps = {*_steps_in(self.checkpoints), also}
        rows = [row for row in self.metrics() if row.get("step") in steps]
        for metric, sign in (("eval/reward", 1), ("eval/loss", -1)):
            candidates = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
            if candidates:
                step, value = max(candidates, key=lambda pair: sign * pair[1])
                return Best(step, metric, value)
        return None

    def chosen_among(self) -> int:
        """Return how many evaluations of trained steps `best` was chosen from, including those of removed checkpoints.

        From 2 on, the result of the best is biased upwards on these rows, and its interval does not account for that.
        """
        best = self.best()
        return 0 if best is None else sum(row.get(best.metric) is not None for row in self.metrics() if row["step"])

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, oldest first, with null for non-finite numbers."""
        return read_lines(self.metrics_file)

    def lines_logged(self) -> int:
        """Return the number of metrics lines ever written, including those set aside and truncated ones."""
        files = [self.metrics_file, *(self.path / "set-aside").glob("*/metrics.jsonl")]
        return sum(len(file.read_bytes().splitlines()) for file in files if file.exists())

    def first_evaluation(self) -> dict[str, float]:
        """Return the eval/* metrics of the run's first evaluation, nan where not finite; empty without one."""
        return next(self._evaluations(), (0, {}))[1]

    def evaluation(self, step: int) -> dict[str, float]:
        """Return the eval/* metrics of the evaluation after `step`, nan where not finite; empty without one."""
        return next((values for at, values in self._evaluations() if at == step), {})

    def _evaluations(self) -> Iterator[tuple[int, dict[str, float]]]:
        for row in self.metrics():
            if is_evaluation(row):
                yield (
                    row["step"],
                    {
                        name: math.nan if value is None else value
                        for name, value in row.items()
                        if name.startswith("eval/")
                    },
                )

    def first_rewards(self) -> dict[int, list[float]]:
        """Return dataset row -> rewards of its completions (nan: invalid) in the first evaluation; {} without one.

        Raises Unreadable.
        """
        rows: dict[int, list[float]] = {}
        for record in self.read_evaluation(steps[0]) if (steps := self.evaluation_steps()) else []:
            rows.setdefault(record["row"], []).append(math.nan if record["reward"] is None else record["reward"])
        return rows

    def rollout_steps(self) -> list[int]:
        """Return the steps with saved rollouts, in order."""
        return list(_steps_in(self.rollouts))

    def evaluation_steps(self) -> list[int]:
        """Return the steps with a saved evaluation, in order."""
        return list(_steps_in(self.evaluations))

    def read_rollouts(self, step: int, groups: int | None = None) -> list[dict[str, Any]]:
        """Read the rollouts of a step: one dict per completion, of the first `groups` groups if given.

        Raises Unreadable.
        """
        return read_table(self.rollouts / f"step-{step:06d}.parquet", groups)

    def plan(self) -> dict[str, int]:
        """Read plan.json; empty for a run without it. Raises Unreadable."""
        if not self.plan_file.exists():
            return {}
        try:
            plan = json.loads(self.plan_file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise Unreadable(self.plan_file, error) from error
        if not isinstance(plan, dict) or not all(type(size) is int for size in plan.values()):
            raise Unreadable(self.plan_file, "not a table of bytes")
        return plan

    def read_evaluation(self, step: int) -> list[dict[str, Any]]:
        """Read the evaluation of a step: one dict per completion. Raises Unreadable."""
        return read_table(self.evaluations / f"step-{step:06d}.parquet")


def _completion_logprobs(sample: Sample) -> Any:
    """Return the trainer's log-probs of the completion; None for one that is empty or was not run."""
    length = len(sample.rollout.completion_ids)
    return None if sample.logprobs is None or not length else sample.logprobs[-length:]
