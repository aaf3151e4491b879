"""`rlft watch`: a running and a finished run, by what they write, without a trace in their folder."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console as Terminal
from tiny import save_tiny

import rlft
from rlft.cli import watch as module
from rlft.cli.main import main
from rlft.cli.watch import Tail, watch
from rlft.config.run import Config
from rlft.errors import ConfigError
from rlft.monitor.console import Console
from rlft.runs import lock
from rlft.runs.lines import append_line
from rlft.runs.lock import Lock

CONFIG = 'model = "m"\ndata = "d.jsonl"\nout = "o"\nsteps = 3\n'
ROOT = Path(__file__).parents[2]


def step(number: int, **values: float) -> dict[str, float]:
    return {"step": number, "reward": number / 10, "loss": 0.0, "step_time": 1.0} | values


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two of three steps."""
    (tmp_path / "config.toml").write_text(CONFIG)
    append_line(tmp_path / "metrics.jsonl", {"step": 0, "eval/reward": 0.5, "eval/rows": 4.0})
    for number in (1, 2):
        append_line(tmp_path / "metrics.jsonl", step(number))
    return tmp_path


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_an_evaluation_that_does_not_say_its_rows_is_shown(run: Path, capsys) -> None:
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/reward": 0.5}\n')
    assert main(["watch", str(run)]) == 0
    assert "held-out rows after step 0: reward 0.5" in capsys.readouterr().out


def test_a_run_that_has_ended_is_shown_and_left_as_it_is(run: Path, capsys) -> None:
    before = listing(run)
    assert main(["watch", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"m: {run}",
        "held-out rows (4) after step 0: reward 0.5",
        "step 1/3  reward 0.100  loss 0.0000  1.0 s  2 s left",
        "step 2/3  reward 0.200  loss 0.0000  1.0 s  1 s left",
        "the run has ended at step 2 of 3",
    ]
    assert listing(run) == before


def test_a_running_run_is_followed_to_its_end(run: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.02)
    held = Lock(run)

    def train() -> None:
        time.sleep(0.3)
        with (run / "metrics.jsonl").open("a") as file:  # half a line, as a look may find it
            file.write('{"step": 3, "reward": ')
            file.flush()
            time.sleep(0.2)
            file.write('null, "completions/clipped_ratio": 0.95}\n')
        (run / "report.html").touch()
        held.release()

    thread = threading.Thread(target=train)
    thread.start()
    watch(run)
    thread.join()
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "step 3/3  reward nan",
        "! step 3: 95% of completions hit max_tokens: raise sampling.max_tokens",
        f"the run has ended at step 3 of 3; its report is {run}/report.html",
    ]


def test_a_run_that_is_still_loading_is_waited_for(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.02)
    held = Lock(tmp_path)

    def start() -> None:
        time.sleep(0.2)
        (tmp_path / "metrics.jsonl").touch()
        (tmp_path / "config.toml").write_text(CONFIG)
        held.release()

    thread = threading.Thread(target=start)
    thread.start()
    watch(tmp_path)
    thread.join()
    assert capsys.readouterr().out.splitlines() == [f"m: {tmp_path}", "the run has ended at step 0 of 3"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["watch", str(tmp_path / "missing")]) == 2
    assert "missing: no such folder; give the folder of a run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no run; give the folder of a run"):
        watch(tmp_path)


def test_only_the_last_rows_from_before_are_lines(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.replace("steps = 3\n", "epochs = 1\n"))
    for number in range(1, 41):
        append_line(tmp_path / "metrics.jsonl", step(number))
    watch(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == [f"step {number}" for number in range(31, 41)]
    assert lines[-1] == "the run has ended at step 40"


def test_ctrl_c_leaves_the_run_alone(run: Path) -> None:
    held = Lock(run)
    before = listing(run)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    watcher = subprocess.Popen(
        [sys.executable, "-m", "rlft", "watch", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    try:
        assert watcher.stdout is not None and watcher.stderr is not None
        while not (line := watcher.stdout.readline()).startswith(b"step 2"):
            assert line, watcher.stderr.read()
        watcher.send_signal(signal.SIGINT)
        out, err = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
        watcher.wait()
    assert watcher.returncode == 0 and err == b"" and out.endswith(b"is not watched any more; the run itself goes on\n")
    assert listing(run) == before
    held.release()


def test_a_resume_that_sets_rows_aside_shows_the_new_ones(run: Path) -> None:
    tail = Tail(run / "metrics.jsonl")
    assert [row["step"] for row in tail.read()[0]] == [0, 1, 2] and tail.read() == ([], False)
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (run / "new").write_text("".join(kept))
    (run / "new").rename(run / "metrics.jsonl")
    append_line(run / "metrics.jsonl", step(2, reward=0.9))
    rows, again = tail.read()
    assert again and [row.get("reward") for row in rows] == [None, 0.1, 0.9]


def test_whether_a_process_writes_the_folder_is_seen_without_the_lock(tmp_path: Path) -> None:
    assert not lock.is_held(tmp_path)
    held = Lock(tmp_path)
    assert lock.is_held(tmp_path)
    held.release()
    assert not lock.is_held(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    file = tmp_path / lock.NAME
    time.sleep(0.5)  # it has ended and was not waited for, as a killed child of a shell that waits for another one
    for process, host, wanted in (
        (os.getpid(), socket.gethostname(), True),
        (ended.pid, socket.gethostname(), False),
        (2**22 + 1, socket.gethostname(), False),  # above the largest number of a process
        (ended.pid, "another-host", True),
    ):
        file.write_text(json.dumps({"process": process, "host": host}))
        assert lock.is_held(tmp_path) is wanted, (process, host)
        with file.open() as handle:  # nobody holds it: a run that starts now is not refused
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ended.wait()
    file.write_text("")
    assert lock.is_held(tmp_path)  # its holder is about to write its name


def test_a_completion_is_shown_with_its_prompt_reward_and_label(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "say 7", "answer": "42"}))
    settings = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / "run")}
    rlft.train(
        Config(**settings, steps=1, prompts_per_step=1, sampling={"group_size": 2, "max_tokens": 3}),
        rewards=[lambda completions, **_: [0.25] * len(completions)],
    )
    screen = io.StringIO()
    terminal = Terminal(file=screen, force_terminal=True, width=100)
    watch(tmp_path / "run", Console(plain=False, terminal=terminal))
    text = screen.getvalue()
    assert "prompt: say 7" in text and "(reward 0.25, label 42)" in text
