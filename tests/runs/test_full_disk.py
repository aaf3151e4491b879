"""A disk that fills up or turns read-only at each kind of write: a message with the path, exit code 2, nothing lost."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_soak import RUN, differences
from quick_home import make_quick_home

from rlft.cli.main import main
from rlft.runs import checkpoint
from rlft.runs.folder import Run
from rlft.types import State


def run(home: Path, out: Path, *flags: str) -> int:
    """The run of kill_soak.py in this process, into `out`; returns its exit code."""
    file = home / "run.toml"
    file.write_text(RUN.format(home=home, out=out, steps=3, every=1))
    return main(["train", str(file), *flags])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    make_quick_home(folder)
    assert run(folder, folder / "whole") == 0
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Use up all of it but `leave` bytes, whole pages."""
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (2**16, 2**8, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
        file.truncate(file.tell() - leave)


SAVED = "the checkpoint could not be written: "
WRITES: dict[str, tuple[Any, str, int | str, str]] = {
    "the folder": (
        "rlft.runs.claim",
        "_locked",
        1,
        'out = "{out}": cannot write in it: No space left on device; make room there',
    ),
    "config": (Run, "write_config", 1, 'out = "{out}": cannot write config.toml: No space left on device'),
    "metrics": (Run, "log", 4, 'out = "{out}": cannot write metrics.jsonl: No space left on device'),
    "rollouts": (Run, "write_rollouts", 3, 'out = "{out}": cannot write rollouts/step-000003.parquet: No space left'),
    "evaluation": (Run, "write_evaluation", 2, 'out = "{out}": cannot write evaluations/step-000001.parquet: No spa'),
    "checkpoint": (checkpoint, "save_checkpoint", "step 2", "{out}/checkpoints/step-000002: " + SAVED),
    "the tensors of a checkpoint": (checkpoint, "_write_state", "step 2", "/step-000002: " + SAVED),
    "the adapter of a checkpoint": (PeftModel, "save_pretrained", 2, "/step-000002: " + SAVED),
    "the last checkpoint": (checkpoint, "save_checkpoint", "step 3", "{out}/checkpoints/step-000003: " + SAVED),
    "report": (
        "rlft.report",
        "write",
        1,
        "{out}/report.html: cannot be written: No space left on device; .*run rlft report",
    ),
}
"""Write -> where it is done, which call of it (or the first for which step) meets the full disk, and the message."""


def at_call(where: Any, name: str, which: int | str, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Do something right before a call of a function."""
    where = importlib.import_module(where) if isinstance(where, str) else where
    before = getattr(where, name)
    calls: list[str] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(next((f"step {arg.step}" for arg in args if isinstance(arg, State)), ""))
        if len(calls) == which or (calls[-1] == which and calls.count(calls[-1]) == 1):
            act()
        return before(*args, **options)

    patch.setattr(where, name, counted)


@pytest.mark.parametrize("write", WRITES)
def test_a_disk_that_fills_up_loses_nothing(write: str, home: Path, disk: Path, monkeypatch, capsys) -> None:
    where, name, which, message = WRITES[write]
    out = disk / "run"
    with monkeypatch.context() as patch:
        at_call(where, name, which, lambda: fill(disk, leave=12288 * ("of a" in write)), patch)
        assert run(home, out) == 2
    shown = capsys.readouterr().err
    assert re.search(message.replace("{out}", str(out)), shown), shown
    assert "--resume" in shown or write in ("the folder", "report")
    assert "Traceback" not in shown
    (disk / "filler").unlink()
    assert run(home, out, *(["--resume"] if out.exists() else [])) == 0
    assert differences(home / "whole", out) == []


def test_a_disk_that_turns_read_only_is_named_at_the_start_and_in_the_middle(home, disk, monkeypatch, capsys) -> None:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)

    out = disk / "run"
    with monkeypatch.context() as patch:
        at_call(Run, "log", 3, lambda: remount("ro"), patch)
        assert run(home, out) == 2
    shown = capsys.readouterr().err
    assert f'error: out = "{out}": cannot write metrics.jsonl: Read-only file system; make it writable, then' in shown
    assert run(home, out, "--resume") == 2
    told = "cannot write in it: Read-only file system; make it writable, or give another folder with --out"
    assert f'error: out = "{out}": {told}' in capsys.readouterr().err
    assert run(home, disk / "new") == 2
    assert f'error: out = "{disk}/new": {told}' in capsys.readouterr().err
    remount("rw")
    assert run(home, out, "--resume") == 0
    assert differences(home / "whole", out) == []


@pytest.mark.parametrize("call", [(Run, "write_rollouts", 2), (checkpoint, "save_checkpoint", "step 2")])
def test_a_folder_that_is_moved_away_stops_the_run_and_is_put_back(call, home, tmp_path, monkeypatch, capsys) -> None:
    out, away = tmp_path / "run", tmp_path / "away"
    with monkeypatch.context() as patch:
        at_call(*call, lambda: out.rename(away), patch)
        assert run(home, out) == 2
    shown = capsys.readouterr().err
    assert "No such file or directory; put the folder back (it was moved or removed), then go on with --resume" in shown
    assert "Traceback" not in shown and not out.exists()
    away.rename(out)
    assert run(home, out, "--resume") == 0
    assert differences(home / "whole", out) == []
