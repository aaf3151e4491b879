"""Every way out of the loop leaves the last completed step, a report, and a line that says how to go on."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_soak import RUN, differences
from quick_home import make_quick_home

from rlft.cli.main import main
from rlft.config.data import Eval
from rlft.config.run import Checkpoint, Config
from rlft.errors import ConfigError, DataError, TrainError
from rlft.rollout.eager import EagerEngine
from rlft.runs.folder import Run
from rlft.trainer import broken, ending, loop, record
from rlft.trainer.loop import train
from rlft.trainer.optim import Optimizer

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "--optim.minibatches=3",
    "--parity.no_probe",
    "--checkpoint.keep=1",
    "--algo.kl_coef=0.1",
    "--curriculum.solved_share=0.9",
    "--checkpoint.every=0",
    "--eval.every=1",
)
"""Several updates a step, a reference, and an evaluation after each step."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ending")
    make_quick_home(folder)
    assert run(folder, folder / "whole") == 0
    return folder


def file_of(home: Path, out: Path) -> Path:
    file = home / f"{out.name}.toml"
    file.write_text(RUN.format(home=home, out=out, steps=3, every=1))
    return file


def run(home: Path, out: Path, *flags: str) -> int:
    """`rlft train` of three steps in this process."""
    return main(["train", str(file_of(home, out)), *SETTINGS, *flags])


class Bug(Exception):
    """What no check of ours foresees."""


def at_call(where: Any, name: str, which: int, patch: pytest.MonkeyPatch, fault: Callable[[], BaseException]) -> None:
    """Raise at the `which`-th call of a function."""
    before, calls = getattr(where, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == which and where is not Optimizer:
            raise fault()
        value = before(*args, **options)
        if calls[0] == which:  # the weights have changed, and nobody knows it yet
            raise fault()
        return value

    patch.setattr(where, name, counted)


# Three updates a step.
PLACES: dict[str, tuple[Any, str, int, int]] = {
    "sampling": (loop, "sample_and_score", 3, 2),
    "advantages": (loop, "advantages", 3, 2),
    "the first update": (Optimizer, "step", 7, 2),
    "between two updates": (loop, "update", 8, 2),
    "inside an update": (Optimizer, "step", 9, 2),
    "before the adapter is handed over": (loop, "advance", 3, 2),
    "the engine": (EagerEngine, "load_adapter", 7, 2),
    "the numbers of the step": (loop, "step_values", 3, 2),
    "the record of the step": (loop, "record", 3, 2),
    "a check after the step": (broken, "check_step", 3, 2),
    "the evaluation after a step": (loop, "measure", 3, 2),
    "the last evaluation": (loop, "measure", 4, 3),
    "the check after the last step": (broken, "check_end", 1, 3),
}
"""Where it fails -> module, function, which call of it, and the step that must be saved."""
FAULTS: dict[str, tuple[Callable[[], BaseException], int]] = {
    "a bug": (lambda: Bug("surprise"), 1),
    "a guard": (lambda: TrainError("the policy is broken"), 3),
    "memory": (lambda: torch.OutOfMemoryError("CUDA out of memory"), 1),
    "the user": (lambda: KeyboardInterrupt(), 130),
    "the data": (lambda: DataError("row 3"), 2),
}


QUICK = ("the first update", "between two updates", "a check after the step", "the evaluation after a step")


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        pytest.param(place, list(FAULTS)[i % len(FAULTS)], marks=[] if place in QUICK else [pytest.mark.slow])
        for i, place in enumerate(PLACES)
    ],
)
def test_a_step_that_fails_leaves_the_one_before_it_and_a_resume_ends_equal(
    place: str, fault: str, home: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    where, name, which, saved = PLACES[place]
    raised, code = FAULTS[fault]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(where, name, which, patch, raised)
        assert run(home, out) == code
    assert Run(out).latest_checkpoint().name == f"step-{saved:06d}" and (out / "report.html").stat().st_size > 1000
    last = capfd.readouterr().err.rstrip().splitlines()[-1]
    assert f"tep {saved} of 3 is saved in {out}/checkpoints/step-{saved:06d}, the report is {out}/report.html" in last
    command = f"rlft train {home}/run.toml {' '.join(SETTINGS)} --resume"
    assert last.endswith(f"Go on with: {command}"), last
    assert main(command.split()[1:]) == 0
    # The card of a checkpoint that was saved on the way out lacks the evaluation that failed.
    assert [text for text in differences(home / "whole", out) if not text.endswith("README.md")] == []


def test_a_reward_that_breaks_leaves_a_checkpoint_and_the_line_that_goes_on(home: Path, tmp_path: Path, capfd) -> None:
    out, file = tmp_path / "run", tmp_path / "grader.py"
    good = (home / "rewards.py").read_text().split("held")[0]
    broken = "    if trainer_state.global_step == 2: raise RuntimeError('the grader is down')\n"
    file.write_text(good.replace("**columns):\n", f"trainer_state, **columns):\n{broken}"))
    assert run(home, out, f"--rewards.0.use={file}:digits") == 3
    shown = capfd.readouterr().err
    assert "the grader is down" in shown
    assert f"Step 2 of 3 is saved in {out}" in shown.splitlines()[-1]
    assert f"--rewards.0.use={file}:digits --resume" in shown.splitlines()[-1]
    file.write_text(good)
    assert run(home, out, f"--rewards.0.use={file}:digits", "--resume") == 0
    # The card names the file of the reward.
    assert [text for text in differences(home / "whole", out) if not text.endswith("README.md")] == []


def test_before_a_step_is_finished_the_same_command_starts_again(
    home: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(loop, "measure", 1, patch, KeyboardInterrupt)
        assert run(home, out) == 130
    told = capfd.readouterr().err.splitlines()
    assert told[0] == "interrupted"
    assert "o step was finished. Start again with: rlft train " in told[-1]
    with monkeypatch.context() as patch:
        at_call(loop, "update", 2, patch, lambda: Bug("surprise"))  # after the evaluation, within the first step
        assert run(home, out) == 1
    assert len(Run(out).metrics()) == 1
    assert run(home, out) == 0
    assert differences(home / "whole", out) == []


def config(home: Path, out: Path, **changes: Any) -> Config:
    return replace(Config.load(file_of(home, out)), **{"checkpoint": Checkpoint(every=0), **changes})


def test_a_callback_that_raises_is_named_and_its_step_is_saved(home: Path, tmp_path: Path) -> None:
    def cb(state: Any, values: dict[str, float]) -> None:
        raise KeyError("x")

    with pytest.raises(
        TrainError, match="callback cb raised at step 1: KeyError: 'x'; mend it or leave it out"
    ) as caught:
        train(config(home, tmp_path / "run"), callbacks=[cb])
    assert isinstance(caught.value.__cause__, KeyError) and caught.value.exit_code == 2
    assert f'Go on with: the same call with resume=True (out="{tmp_path}/run")' in caught.value.__notes__[0]
    assert Run(tmp_path / "run").latest_checkpoint().name == "step-000001"
    assert train(config(home, tmp_path / "run"), resume=True).steps == 3
    assert [row["step"] for row in Run(tmp_path / "run").metrics() if "loss" in row] == [1, 2, 3]


def test_an_exception_of_ours_in_a_callback_passes_as_it_is(home: Path, tmp_path: Path) -> None:
    def stop(state: Any, values: dict[str, float]) -> None:
        raise TrainError("enough")

    with pytest.raises(TrainError, match=r"^enough"):
        train(config(home, tmp_path / "run"), callbacks=[stop])


def test_a_failure_while_saving_does_not_hide_the_first_one(home: Path, tmp_path: Path, monkeypatch) -> None:
    at_call(record, "call_back", 99, monkeypatch, KeyboardInterrupt)
    monkeypatch.setattr(ending, "save", lambda *_: (_ for _ in ()).throw(ConfigError("no room")))

    def cb(state: Any, values: dict[str, float]) -> None:
        raise KeyError("x")

    with pytest.raises(TrainError, match="callback cb raised") as caught:
        train(config(home, tmp_path / "run"), callbacks=[cb])
    assert caught.value.__notes__[0].startswith("Step 1 could not be saved: no room; the report is ")
    assert "Go on with: the same call with resume=True" in caught.value.__notes__[0]


def test_a_broken_step_that_is_tried_again_and_again_removes_no_checkpoint(
    home: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "run"
    flags = ("--checkpoint.every=1", "--checkpoint.keep=2")
    assert run(home, out, "--steps=2", *flags) == 0
    for _ in range(3):
        with monkeypatch.context() as patch:
            at_call(broken, "check_step", 1, patch, lambda: TrainError("broken"))
            assert run(home, out, *flags, "--resume") == 3
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == ["step-000001", "step-000002"]


def test_a_checkpoint_is_saved_by_time(home: Path, tmp_path: Path) -> None:
    seen: list[list[int]] = []
    cfg = config(home, tmp_path / "run", eval=Eval(), checkpoint=Checkpoint(minutes=1e-9, keep=9))
    train(cfg, callbacks=[lambda state, _: seen.append(steps(tmp_path / "run"))])
    assert seen == [[], [1], [1, 2]]
    train(config(home, tmp_path / "other", eval=Eval(), checkpoint=Checkpoint(minutes=0, keep=9)))
    assert steps(tmp_path / "other") == [3]


def steps(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def test_a_finished_run_has_nothing_to_do_and_nothing_is_loaded(
    home: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    cfg = config(home, tmp_path / "run")
    first = train(cfg)
    monkeypatch.setattr(loop, "build_session", None)
    capsys.readouterr()
    for again in (lambda: train(cfg, resume=True), lambda: train(replace(cfg, if_exists="resume"))):
        assert again() == first
        assert capsys.readouterr().out == f"{tmp_path}/run: nothing to do: step 3 of 3; raise steps to train on\n"


def test_a_run_of_epochs_has_nothing_to_do_too(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    cfg = config(home, tmp_path / "run", eval=Eval())
    cfg = replace(cfg, steps=None, data=replace(cfg.data, epochs=0.2))
    train(cfg)
    monkeypatch.setattr(loop, "build_session", None)
    train(cfg, resume=True)
    assert "nothing to do: step 2 of 2" in capsys.readouterr().out


def test_a_run_that_has_gone_further_is_not_called_done(home: Path, tmp_path: Path) -> None:
    cfg = config(home, tmp_path / "run")
    train(cfg)
    with pytest.raises(ConfigError, match=r"steps = 2: the newest checkpoint of .*run is of step 3 already; raise ste"):
        train(replace(cfg, steps=2), resume=True)


def test_an_existing_run_is_overwritten_or_numbered_when_asked_to(home: Path, tmp_path: Path) -> None:
    cfg = config(home, tmp_path / "run", steps=1)
    train(cfg)
    assert train(replace(cfg, if_exists="number")).out == tmp_path / "run-2"
    assert Config.load(tmp_path / "run-2" / "config.toml").out == str(tmp_path / "run-2")
    with pytest.raises(ConfigError, match="model"):
        train(replace(cfg, if_exists="overwrite", model=str(tmp_path / "none")))
    assert steps(tmp_path / "run") == [1]  # a start that fails removes nothing
    train(replace(cfg, if_exists="overwrite", steps=2))
    assert steps(tmp_path / "run")[-1] == 2 and not (tmp_path / "run" / "set-aside").exists()


# ---- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_signals_stop_the_run_and_leave_a_checkpoint_and_a_report(
    number: signal.Signals, times: int, home: Path, tmp_path: Path, capsys
) -> None:
    def send(state: Any, _: Any) -> None:
        if state.step == 2:
            for _ in range(times):
                signal.raise_signal(number)

    before = signal.getsignal(number)
    if number == signal.SIGTERM and times == 2:
        with pytest.raises(KeyboardInterrupt):
            train(config(home, tmp_path / "run", steps=50), callbacks=[send])
    else:
        result = train(config(home, tmp_path / "run", steps=50), callbacks=[send])
        assert result.interrupted and result.steps == 2
    assert steps(tmp_path / "run")[-1] == 2 and (tmp_path / "run" / "report.html").exists()
    assert signal.getsignal(number) is before
    assert "stopping after this step and saving; SIGTERM " in capsys.readouterr().out


def test_sighup_that_nohup_ignores_stays_ignored(home: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send = lambda state, _: signal.raise_signal(signal.SIGHUP)  # noqa: E731
        assert train(config(home, tmp_path / "run", steps=2), callbacks=[send]).steps == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint_and_a_report(home: Path, tmp_path: Path) -> None:
    out, (controller, terminal) = tmp_path / "run", pty.openpty()
    flags = [*SETTINGS, "--steps=400", "--eval.rows=0", "--eval.every=0"]
    process = subprocess.Popen(
        [sys.executable, "-c", HANGUP, "train", str(file_of(home, out)), *flags],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(terminal)
    os.set_blocking(controller, False)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        read(controller)
        time.sleep(0.01)
    os.close(controller)
    assert process.wait(60) == 130
    assert steps(out) and (out / "report.html").exists()


HANGUP = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from rlft.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def read(controller: int) -> None:
    """Empty the terminal's buffer, which would block the writer."""
    try:
        os.read(controller, 65536)
    except BlockingIOError:
        return
