"""What a worker may reach: variables, files, network and other processes; and that nothing of it outlives the run."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_rewards import rollouts

from rlft.config.data import Reward
from rlft.errors import RewardError
from rlft.rewards import environment, kernel
from rlft.rewards.score import RewardFunction, build_rewards, score

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="subreapers and namespaces are Linux's")

SOURCE = r"""
import os, resource, signal, socket, subprocess, time

def note(pid):
    with open(f"{PIDS}/{pid}", "w"): pass

def hangs(completions):
    if "text 1" in completions: time.sleep(60)
    return [1.0] * len(completions)

def forked_twice(completions, **_):
    if "text 1" in completions and os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note(os.getpid())
            os.execve("/bin/sleep", ["sleep", "98761"], {})
        os._exit(0)
    return hangs(completions)
def empty_environment(completions, **_):
    if "text 1" in completions:
        note(subprocess.Popen(["/bin/sleep", "98761"], env={}, start_new_session=True).pid)
    return hangs(completions)
def stopped(completions, **_):
    if "text 1" in completions:
        child = subprocess.Popen(["/bin/sleep", "98761"], env={}, start_new_session=True)
        note(child.pid)
        os.kill(child.pid, signal.SIGSTOP)
    return hangs(completions)
def ends_beside_it(completions, **_):
    if "text 1" in completions:
        note(subprocess.Popen(["/bin/sleep", "98761"], env={}, start_new_session=True).pid)
        os._exit(3)
    return [1.0] * len(completions)
def family(completions, **_):
    if "text 1" in completions:
        for _ in range(4): os.fork()  # 15 more, each with a sleep of its own
        note(subprocess.Popen(["/bin/sleep", "98761"], env={}).pid)
        time.sleep(60)
    return [1.0] * len(completions)
def kills_its_parent(completions, **_):
    if "text 1" in completions:
        note(subprocess.Popen(["/bin/sleep", "98761"], start_new_session=True).pid)
        try: os.kill(os.getppid(), signal.SIGKILL)
        except PermissionError: pass
    return hangs(completions)

def reads(completions, log_extra, **_):
    for name in "environ", "mem":
        try: open(f"/proc/{RUN}/{name}", "rb")
        except PermissionError: continue
        raise RuntimeError(f"can read {name} of the run")
    log_extra("names", [" ".join(sorted(os.environ))] * len(completions))
    return [1.0] * len(completions)
def signals(completions, **_):
    os.kill(RUN, signal.SIGTERM)
    return [1.0] * len(completions)
def needs_a_key(completions, **_):
    return [float(len(os.environ["MY_API_KEY"]))] * len(completions)
def writes(completions, **_):
    with open(f"{PIDS}/../large", "wb") as file: file.write(b"x" * 2**21)
    return [1.0] * len(completions)
def set_limits(completions, **_):
    return [float(resource.getrlimit(resource.RLIMIT_CORE) == (0, 0))] * len(completions)
def connects(completions, **_):
    try: socket.create_connection(("127.0.0.1", PORT), 5)
    except OSError: return [0.0] * len(completions)
    return [1.0] * len(completions)
"""


class Place:
    """A folder with the functions, and the pids that they have noted."""

    def __init__(self, folder: Path) -> None:
        self.pids, self.file = folder / "pids", folder / "isolation.py"
        self.pids.mkdir()
        self.opened: list[RewardFunction] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        port = self.listening.getsockname()[1]
        self.file.write_text(f"PIDS, RUN, PORT = {str(self.pids)!r}, {os.getpid()}, {port}\n{SOURCE}")

    def make(self, name: str, **settings: Any) -> RewardFunction:
        (function,) = build_rewards([Reward(f"{self.file}:{name}", **{"timeout": 1.0, **settings})])
        self.opened.append(function)
        return function

    def alive(self) -> list[int]:
        return [int(path.name) for path in self.pids.iterdir() if _alive(int(path.name))]

    def noted(self) -> int:
        return len(list(self.pids.iterdir()))


@pytest.fixture
def place(tmp_path: Path):
    made = Place(tmp_path)
    yield made
    made.listening.close()
    for function in made.opened:
        function.close()
    for pid in made.alive():
        os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def values(function: RewardFunction, count: int = 4) -> list[float]:
    return score(rollouts(count), [function], {})[0].tolist()


DETACHED = ["forked_twice", "empty_environment", "stopped", "ends_beside_it", "family", "kills_its_parent"]


@LINUX
@pytest.mark.parametrize("name", DETACHED)
def test_whatever_a_worker_started_ends_with_it(name: str, place: Place) -> None:
    function = place.make(name)
    total, _ = score(rollouts(4), [function], {})
    assert total[0] == total[2] == total[3] == 1.0 and math.isnan(total[1])
    assert place.noted() >= 3 and place.alive() == []


RUN = """
import os, sys, time
sys.path[:0] = sys.argv[1].split(":")
from test_rewards import rollouts
from rlft.config.data import Reward
from rlft.rewards.score import build_rewards, score
functions = build_rewards([Reward(sys.argv[2], timeout=100)])
if (child := os.fork()) == 0:  # it holds the pipes of the workers open
    time.sleep(100)
print(child, flush=True)
score(rollouts(4), functions, {})
"""


@LINUX
@pytest.mark.parametrize("name", ["forked_twice", "empty_environment", "family"])
def test_whatever_a_worker_started_ends_with_a_killed_run(name: str, place: Place) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "rewards")))
    command = [sys.executable, "-c", RUN, paths, f"{place.file}:{name}"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    forked = int(run.stdout.readline())
    want = 16 if name == "family" else 1
    for _ in range(1200):
        if place.noted() >= want:
            break
        time.sleep(0.05)
    assert len(place.alive()) >= want
    run.kill()
    run.wait()
    run.stdout.close()
    try:
        for _ in range(100):
            if not place.alive():
                return
            time.sleep(0.05)
        pytest.fail(f"{place.alive()} are still running")
    finally:
        os.kill(forked, signal.SIGKILL)


# ---- the environment ---------------------------------------------------------------------------------------------

SECRETS = """
HF_TOKEN=x WANDB_API_KEY=x AWS_SECRET_ACCESS_KEY=x AWS_SESSION_TOKEN=x DB_PWD=x GITHUBTOKEN=x openai_api_key=x
MYSQL_PASS=x SSH_AUTH_SOCK=/tmp/agent MY-PASSWORD=x GOOGLE_APPLICATION_CREDENTIALS=/key.json SENTRY_DSN=x
DATABASE_URL=postgres://me:word@host/db HARMLESS=hf_abcdef ALSO=sk-abcdef PEM=-----BEGIN-KEY https_proxy=http://u:p@proxy
"""
HARMLESS = """
PATH=/bin HOME=/root PWD=/tmp OLDPWD=/ TOKENIZERS_PARALLELISM=false LANG=C HF_HOME=/cache CUDA_VISIBLE_DEVICES=0
KEYBOARD=us AUTHOR=me PASSAGE=x PASS=1 http_proxy=http://proxy:3128 TASK=skip-it PYTHONPATH=/a:/b WANDB_MODE=offline
"""


def variables(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


def test_a_secret_is_known_by_its_name_or_its_value() -> None:
    secrets, harmless = variables(SECRETS), variables(HARMLESS)
    kept, withheld = environment.of_worker(secrets | harmless, (), "f")
    assert kept == harmless and set(withheld) == set(secrets)
    assert environment.of_worker(secrets, ["HF_TOKEN"], "f").variables == {"HF_TOKEN": "x"}
    with pytest.raises(RewardError, match='reward "f": env names NOT_HERE, which is not set here'):
        environment.of_worker({}, ["NOT_HERE"], "f")


@LINUX
def test_a_worker_sees_no_secret_and_no_memory_of_the_run(place: Place, monkeypatch) -> None:
    if kernel.landlock_version() < 1:
        pytest.skip("needs Landlock")
    monkeypatch.setenv("A_TOKEN", "1")
    monkeypatch.setenv("ANOTHER_TOKEN", "1")
    _, parts = score(rollouts(2), [place.make("reads", env=["ANOTHER_TOKEN"])], {})
    (names,) = parts.outcomes["reads"].extras["names"][:1]
    assert "ANOTHER_TOKEN" in names.split() and "A_TOKEN" not in names.split()


def test_a_worker_has_the_variables_that_its_reward_names(place: Place, monkeypatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "four")
    hint = r'(?s)KeyError: .MY_API_KEY.*no variable that looks like a secret; env = \["MY_API_KEY"\] in its table'
    with pytest.raises(RewardError, match=hint):
        values(place.make("needs_a_key"))
    assert values(place.make("needs_a_key", env=["MY_API_KEY"])) == [4.0] * 4


# ---- limits ------------------------------------------------------------------------------------------------------


def test_a_worker_dumps_no_core_and_writes_no_file_larger_than_its_limit(place: Place) -> None:
    assert values(place.make("set_limits")) == [1.0] * 4
    with pytest.raises(RewardError, match=r"OSError: \[Errno 27\] File too large"):
        values(place.make("writes", file_mb=1))
    assert values(place.make("writes", file_mb=3)) == [1.0] * 4
    assert values(place.make("writes", file_mb=2**53, memory_mb=2**53)) == [1.0] * 4


@LINUX
def test_a_worker_cannot_signal_the_run(place: Place) -> None:
    if kernel.landlock_version() < 6:
        pytest.skip("needs Landlock's scope of signals, Linux 6.12")
    with pytest.raises(RewardError, match="PermissionError"):
        values(place.make("signals"))


@LINUX
def test_a_worker_without_network_reaches_nothing_and_one_with_it_does(place: Place) -> None:
    assert values(place.make("connects")) == [1.0] * 4
    try:
        function = place.make("connects", network=False)
    except RewardError as error:
        pytest.skip(str(error))
    assert values(function) == [0.0] * 4


def test_where_the_network_cannot_be_left_the_setting_is_refused(place: Place, tmp_path: Path, monkeypatch) -> None:
    """Python runs sitecustomize in the worker too, where it takes the network namespaces away."""
    (tmp_path / "sitecustomize.py").write_text(
        "from rlft.rewards import limits\n"
        "def denied(): raise PermissionError(1, 'Operation not permitted')\n"
        "limits.leave_network = denied\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=r"network = false: this system lets no process leave the network .*not perm"):
        place.make("connects", network=False)


@pytest.mark.parametrize(
    "setting", [{"memory_mb": 100}, {"file_mb": 1}, {"env": ["A"]}, {"network": False}, {"batch": "group"}]
)
def test_a_limit_of_a_process_is_refused_where_there_is_none(setting: dict[str, Any]) -> None:
    def local(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    (name,) = setting
    with pytest.raises(RewardError, match=f'reward "local": {name} needs a separate process'):
        build_rewards([Reward(local, **setting)])  # type: ignore[arg-type]
