"""A run as an object: its numbers, completions and model, read from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rlft.errors import ConfigError
from rlft.report.summary import Picture, plot, summary
from rlft.runs.folder import Run

if TYPE_CHECKING:
    from peft import PeftModel


class Result:
    """A run by its folder, as `rlft.train` and `rlft.open` return it. A notebook shows its curves and its table."""

    def __init__(self, out: str | Path, interrupted: bool = False) -> None:
        """Open the folder of a run. Raises ConfigError when it holds none."""
        self._run = Run.resume(out)
        self.out = self._run.path
        """Folder of the run."""
        self.interrupted = interrupted
        """True when `rlft.train` was stopped before the last step."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Result) and (self.out, self.interrupted) == (other.out, other.interrupted)

    def __hash__(self) -> int:
        return hash((self.out, self.interrupted))

    def __repr__(self) -> str:
        values = self.after or self.before
        held = f", held-out reward {values['eval/reward']:.3f}" if "eval/reward" in values else ""
        return f"Result({str(self.out)!r}, {self.steps} steps{held})"

    def _repr_html_(self) -> str:
        return summary(self._run)._repr_html_()

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return max((row["step"] for row in self._run.metrics() if "loss" in row), default=0)

    @property
    def adapter(self) -> Path:
        """Folder of the newest checkpoint, a PEFT adapter. Raises ConfigError when there is none yet."""
        return self._run.latest_checkpoint()

    @property
    def best(self) -> Path | None:
        """Folder of the checkpoint that did best on the held-out rows; None when none was evaluated."""
        best = self._run.best()
        return None if best is None else self._run.checkpoint(str(best.step))

    @property
    def report(self) -> Path:
        """The report of the run, report.html."""
        return self.out / "report.html"

    @property
    def before(self) -> dict[str, float]:
        """Metrics of the evaluation before the first step; empty without [eval]."""
        return self._run.first_evaluation()

    @property
    def after(self) -> dict[str, float]:
        """Metrics of the evaluation after the newest step, with the change since the first one; empty without one."""
        steps = self.steps
        return self._run.evaluation(steps) if steps else {}

    def metrics(self) -> Any:
        """Return all metrics, a row per step and per evaluation.

        A pandas DataFrame where pandas is installed, else a dict of columns; missing and non-finite numbers are None in
        a column, NaN in a frame.
        """
        return _table(self._run.metrics())

    def rollouts(self, step: int | None = None, held_out: bool = False) -> Any:
        """Return every completion of a step with its rewards, advantage and tokens, as `metrics` returns a table.

        step: None for the newest. held_out: the completions of the evaluation after that step. Raises ConfigError when
        there are none of that step.
        """
        run = self._run
        steps = run.evaluation_steps() if held_out else run.rollout_steps()
        at = steps[-1] if step is None and steps else step
        if at not in steps:
            what = "held-out completions" if held_out else "rollouts"
            raise ConfigError(
                f"step = {step}: {self.out} has {what} of the steps {', '.join(map(str, steps)) or 'none'}"
            )
        return _table(run.read_evaluation(at) if held_out else run.read_rollouts(at))

    def plot(self, *names: str) -> Picture:
        """Draw metrics over steps, by default what the run learns by. Shown by a notebook; `.save(path)` writes it.

        Raises ConfigError for a metric that the run does not have.
        """
        return plot(self._run, names)

    @overload
    def generate(self, prompts: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], **options: Any) -> str | list[str]:
        """Sample a completion for a prompt, or one for each of several. options: those of `rlft.generate`."""
        return generate(self.out, prompts, **options)

    def evaluate(self, **options: Any) -> dict[str, float]:
        """Measure a checkpoint on the run's held-out rows. options: those of `rlft.evaluate`."""
        return evaluate(self.out, **options)

    def model(self, checkpoint: str = "latest") -> tuple[PeftModel, Any]:
        """Load the model with the adapter of a checkpoint, and its tokenizer.

        checkpoint: "latest", "best", a step, or "base" for an adapter that changes nothing. Raises ConfigError when
        there is no such checkpoint.
        """
        from rlft.trainer.reopen import open_run

        with open_run(self.out, checkpoint) as opened:
            return opened.policy.model, opened.tokenizer


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    try:
        import pandas
    except ImportError:
        return columns
    return pandas.DataFrame(columns)


def open(out: str | Path) -> Result:
    """Open the folder of a run, finished or still going, as `rlft.train` returns it.

    Raises ConfigError when the folder holds no run.
    """
    return Result(out)


def generate(
    out: str | Path,
    prompts: str | Sequence[str],
    max_tokens: int | None = None,
    temperature: float | None = None,
    checkpoint: str = "latest",
    images: Sequence[Any] = (),
) -> Any:
    """Sample a completion of a prompt from a run, or a list with one for each of several.

    Prompts are put into the format of the run's data. max_tokens, temperature: None for the run's; 0 is greedy.
    checkpoint: "latest", "best", a step ("12"), or "base". images: shown before each prompt: paths, bytes or PIL
    images. Raises ConfigError when the folder has no run or no such checkpoint, and DataError for images that cannot be
    read, or that the model does not take.
    """
    from rlft.trainer.reopen import generate_from_run

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    # From here, not from the folder of the run's data.
    shown = [str(Path(image).absolute()) if isinstance(image, str | Path) else image for image in images]
    completions = generate_from_run(Path(out), texts, max_tokens, temperature, checkpoint, shown)
    return completions[0] if isinstance(prompts, str) else completions


def evaluate(
    out: str | Path,
    checkpoint: str = "latest",
    rows: int | None = None,
    rewards: Sequence[Any] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Measure a checkpoint of a run on its held-out rows; returns the metrics eval/* and `step`.

    checkpoint: "latest", "best", a step ("12"), or "base". rows: only this many of the first rows. rewards: in place of
    the run's. settings: of [eval] (samples, temperature, max_tokens, ...). Nothing is written to the folder. Raises
    ConfigError when the run has no held-out rows, nothing to score them with, or no such checkpoint.
    """
    from rlft.trainer.reopen import evaluate_run

    return evaluate_run(Path(out), checkpoint, rows, rewards, **settings)
