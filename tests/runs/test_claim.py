"""One process at a time writes a run folder, and what is in the folder decides what a start does with it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlft.errors import ConfigError
from rlft.runs import lock
from rlft.runs.claim import claim, decide, find
from rlft.runs.folder import Run

CONFIG = 'model = "m"\nout = "o"\n\n[data]\npath = "d"\n'
HOLD = """
import sys, time
from rlft.runs.claim import claim
with claim(sys.argv[1]) as claimed:
    print("held", flush=True)
    time.sleep(60)
"""


def made(path: Path, steps: int = 0) -> Path:
    """A run folder with an evaluation before the first step, and with this many steps."""
    run = Run.create(path)
    run.write_config(CONFIG)
    run.log(0, {"eval/reward": 0.5})
    for step in range(1, steps + 1):
        run.log(step, {"loss": 1.0})
    return path


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def held_by(process: int) -> str:
    return rf'out = ".*run": is being written by process {process} on {socket.gethostname()}; .* with --out'


def test_a_second_writer_is_refused_with_process_and_host_until_the_first_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        for resume in (False, True):
            with pytest.raises(ConfigError, match=held_by(process.pid)), claim(tmp_path / "run", resume):
                pass
        assert Run(tmp_path / "run").metrics() == []  # a reader needs no lock
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "run" / lock.NAME).exists()
        with claim(tmp_path / "run") as claimed:
            assert claimed.action == "start"
    finally:
        process.kill()
        process.communicate()


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with claim(tmp_path / "run"), pytest.raises(ConfigError, match=held_by(os.getpid())), claim(tmp_path / "run"):
        pass


def test_of_many_that_start_at_once_one_holds_the_folder_at_any_time(tmp_path: Path) -> None:
    inside, most, wins = [0], [0], [0]
    guard = threading.Lock()

    def start() -> None:
        won = 0
        while won < 3:
            try:
                with claim(tmp_path / "run"):
                    with guard:
                        inside[0] += 1
                        most[0], wins[0] = max(most[0], inside[0]), wins[0] + 1
                    with guard:
                        inside[0] -= 1
                won += 1
            except lock.Busy:
                continue

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and wins[0] == 8 * 3


def test_a_fork_does_not_hold_the_lock_after_its_parent_is_gone(tmp_path: Path) -> None:
    with claim(tmp_path / "run"):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # until the parent closes its end
            os._exit(0)
    try:
        with claim(tmp_path / "run") as claimed:
            assert claimed.action == "start"
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_a_run_whose_folder_was_moved_writes_nothing_into_another_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with claim(path) as claimed:
        made(path)
        path.rename(tmp_path / "moved")
        path.mkdir()
        with pytest.raises(ConfigError, match=r"metrics.jsonl: No such file or directory; put the folder back"):
            claimed.run.log(1, {"loss": 1.0})
        process = holder(path)
        try:
            with pytest.raises(ConfigError, match=held_by(process.pid)):
                claimed.run.log(1, {"loss": 1.0})
        finally:
            process.kill()
            process.communicate()
    assert not (path / "metrics.jsonl").exists()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with claim(tmp_path / "run") as claimed:
        assert len(claimed.notes) == 1
        assert "its file system has no locks (No locks available), so nothing keeps a second" in claimed.notes[0]


def test_a_start_that_fails_leaves_no_folder_and_no_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claim(tmp_path / "a" / "run"):
        raise KeyError
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with claim(tmp_path / "mine"):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_an_out_that_is_a_file_or_refused_by_the_system_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    told = r'out = ".*/file": cannot write in it: File exists; .* with --out'
    with pytest.raises(ConfigError, match=told), claim(tmp_path / "file"):
        pass
    with pytest.raises(ConfigError, match=r'out = "/proc/rlft": cannot write in it'), claim("/proc/rlft"):
        pass


@pytest.mark.parametrize(
    ("out", "why"), [("~nobody-here/x", "home directory"), ("x" * 300, "File name too long"), ("a\0b", "null")]
)
def test_a_path_that_the_system_does_not_take_is_named(out: str, why: str) -> None:
    with (
        pytest.raises(ConfigError, match=f'out = ".*": cannot be a path here: .*{why}.*; give another one'),
        claim(out),
    ):
        pass


def test_the_working_directory_can_be_numbered(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(made(tmp_path / "first", steps=1))
    with claim(".", if_exists="number") as claimed:
        assert claimed.run.path == tmp_path / "first-2"


@pytest.mark.parametrize(
    ("found", "resume", "if_exists", "action"),
    [
        ("nothing", False, "refuse", "start"),
        ("nothing", False, "resume", "start"),
        ("nothing", False, "overwrite", "start"),
        ("nothing", True, "refuse", "resume"),
        ("unstarted", False, "refuse", "restart"),
        ("unstarted", False, "resume", "resume"),
        ("unstarted", False, "overwrite", "overwrite"),
        ("unstarted", False, "number", "restart"),
        ("unstarted", True, "overwrite", "resume"),
        ("started", False, "resume", "resume"),
        ("started", False, "overwrite", "overwrite"),
        ("started", False, "number", None),
        ("started", True, "number", "resume"),
    ],
)
def test_what_a_start_does(tmp_path: Path, found: str, resume: bool, if_exists: str, action: str | None) -> None:
    if found != "nothing":
        made(tmp_path, steps=int(found == "started"))
    assert find(Run(tmp_path)) == found
    assert decide(Run(tmp_path), resume, if_exists) == action


def test_a_folder_that_holds_a_run_and_one_that_holds_none_are_named(tmp_path: Path) -> None:
    told = r'out = ".*run": already holds a run; go on with --resume, .* "number"'
    with pytest.raises(ConfigError, match=told), claim(made(tmp_path / "run", steps=1)):
        pass
    with pytest.raises(ConfigError, match="holds no run to resume"), claim(tmp_path / "new", resume=True):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds no run to resume"), claim(tmp_path / "mine", resume=True):
        pass


FOREIGN = {
    "a config of another program": {"config.toml": "[tool]\n"},
    "the config of a run that is to be made": {"config.toml": CONFIG},
    "metrics of another program": {"metrics.jsonl": '{"step": 0}\n'},
    "checkpoints of another program": {"checkpoints/step-100/model.bin": "x"},
    "a config of another program and metrics": {"config.toml": "[tool]\n", "metrics.jsonl": ""},
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("if_exists", ["refuse", "resume", "overwrite", "number"])
def test_what_is_not_ours_is_never_written_over(tmp_path: Path, name: str, if_exists: str) -> None:
    for file, text in FOREIGN[name].items():
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text(text)
    told = r"holds .* that no run of rlft wrote; give another folder with --out"
    with pytest.raises(ConfigError, match=told), claim(tmp_path / "run", if_exists=if_exists):
        pass
    assert all((tmp_path / "run" / file).read_text() == text for file, text in FOREIGN[name].items())


def test_an_overwritten_run_goes_when_room_is_made_and_what_is_not_of_the_run_stays(tmp_path: Path) -> None:
    path = made(tmp_path / "run", steps=2)
    (path / "notes.txt").write_text("mine")
    (path / "checkpoints" / "step-000002").mkdir(parents=True)
    before = sorted(file.name for file in path.iterdir())
    with claim(path, if_exists="overwrite") as claimed:
        pass
    assert sorted(file.name for file in path.iterdir()) == before  # a start that fails removes nothing
    with claim(path, if_exists="overwrite") as claimed:
        claimed.make_room()
    assert [file.name for file in path.iterdir()] == ["notes.txt"]


def test_an_overwrite_that_was_killed_is_finished_by_the_next(tmp_path: Path, monkeypatch) -> None:
    path, rename = made(tmp_path / "run", steps=2), Path.rename
    (path / "checkpoints" / "step-000002").mkdir(parents=True)

    def killed(self: Path, target: Path) -> Path:
        if self.name == "metrics.jsonl":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        with claim(path, if_exists="overwrite") as claimed:
            claimed.make_room()
    assert not (path / "config.toml").exists() and (path / "metrics.jsonl").exists()
    with pytest.raises(ConfigError, match="already holds a run"), claim(path):
        pass
    with claim(path, if_exists="overwrite") as claimed:
        claimed.make_room()
    assert list(path.iterdir()) == []


def test_a_number_is_that_of_the_first_folder_without_a_run_or_writer(tmp_path: Path) -> None:
    with claim(tmp_path / "first", if_exists="number") as claimed:
        assert claimed.run.path == tmp_path / "first"
    made(tmp_path / "first", steps=1)
    made(tmp_path / "first-3", steps=1)
    with claim(tmp_path / "first", if_exists="number") as one, claim(tmp_path / "first", if_exists="number") as other:
        assert [one.run.path.name, other.run.path.name] == ["first-2", "first-4"]


def test_a_run_without_a_finished_step_starts_again_and_its_evaluation_is_set_aside(tmp_path: Path) -> None:
    with claim(made(tmp_path / "run")) as claimed:
        assert "has not finished a step, so this one starts in its place" in claimed.notes[0]
        claimed.make_room()
    assert Run(tmp_path / "run").metrics() == []
    assert (tmp_path / "run" / "set-aside" / "001" / "metrics.jsonl").read_text().count("\n") == 1
