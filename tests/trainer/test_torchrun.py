"""`torchrun -m rlft train`: one run on two ranks, from the command line, with ranks that die, stop or do not answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_ranks import make_home, settings

from rlft.config.files import to_toml
from rlft.config.run import Config

REWARDS = '''
import os
import signal
import time
from pathlib import Path

HERE = Path(__file__).parent


def once(name):
    """Return True in the first call for this name."""
    try:
        (HERE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def digits(completions, trainer_state, **_):
    step, rank = trainer_state["global_step"], int(os.environ.get("RANK", "0"))
    if os.environ.get("FAULT") == "kill" and step == 2 and rank == 1 and once("killed"):
        os.kill(os.getppid(), signal.SIGKILL)  # the rank, whose worker this is
    if os.environ.get("FAULT") == "stop" and step == 1 and rank == 1 and once("stopped"):
        os.kill(os.getppid(), signal.SIGTERM)
    if os.environ.get("FAULT") == "sleep" and step == 1 and rank == 1:
        time.sleep(25)
    if os.environ.get("FAULT") == "count" and rank == 1:
        return []
    return [sum(character.isdigit() for character in text) / 6 for text in completions]
'''
STEPS = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    make_home(folder)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def write_config(folder: Path, home: Path, **more: object) -> Path:
    """A config in a folder of its own, with its own copy of the rewards, which leave marks beside them."""
    folder.mkdir(exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    table = settings(home, folder / "run", steps=STEPS, checkpoint={"every": 1}, if_exists="refuse")
    table["rewards"] = [f"{folder / 'rewards.py'}:digits"]
    (folder / "run.toml").write_text(to_toml(Config(**table | more)))
    return folder / "run.toml"


def torchrun(config: Path, world: int, *flags: str, restarts: int = 0, fault: str = "") -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts", str(restarts)]
    launcher += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, *(launcher if world > 1 else []), "-m", "rlft", "train", str(config), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault, "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=config.parent)


def adapter(config: Path) -> dict[str, torch.Tensor]:
    return load_file(config.parent / "run" / "checkpoints" / f"step-{STEPS:06d}" / "adapter_model.safetensors")


def steps_of(config: Path) -> list[int]:
    lines = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def difference(config: Path, other: Path) -> float:
    weights, others = adapter(config), adapter(other)
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


@pytest.fixture(scope="module")
def alone(home: Path) -> Path:
    config = write_config(home / "alone", home)
    assert torchrun(config, 1).returncode == 0
    return config


def test_one_command_trains_on_two_ranks(home: Path, alone: Path) -> None:
    config = write_config(home / "two", home)
    ended = torchrun(config, 2)
    assert ended.returncode == 0, ended.stderr
    assert difference(config, alone) < 1e-5 and steps_of(config) == [1, 2, 3]
    # The lead alone prints.
    assert ended.stdout.count(f"step {STEPS}/{STEPS}") == 1 and "2 ranks" in ended.stdout


def test_a_run_goes_on_with_any_number_of_ranks(home: Path, alone: Path) -> None:
    config = write_config(home / "resumed", home)
    for world, steps in ((2, 1), (1, 2), (4, 3)):
        ended = torchrun(config, world, "--resume", "auto", "--steps", str(steps))
        assert ended.returncode == 0, ended.stderr
    assert difference(config, alone) < 1e-5 and steps_of(config) == [1, 2, 3]


def test_a_killed_rank_is_started_again_with_the_others(home: Path, alone: Path) -> None:
    config = write_config(home / "killed", home)
    ended = torchrun(config, 2, "--resume", "auto", restarts=2, fault="kill")
    assert ended.returncode == 0, ended.stderr
    assert (config.parent / "killed").exists() and "rank 0 waited for the other ranks in vain" in ended.stderr
    assert difference(config, alone) < 1e-5 and steps_of(config) == [1, 2, 3]


def test_a_signal_to_one_rank_stops_all_after_the_step(home: Path, alone: Path) -> None:
    config = write_config(home / "stopped", home)
    ended = torchrun(config, 2, fault="stop")
    assert "stopped after step 2 of 3" in ended.stdout, ended.stderr
    assert steps_of(config) == [1, 2]
    assert torchrun(config, 1, "--resume").returncode == 0
    assert difference(config, alone) < 1e-5


def test_a_rank_that_does_not_answer_is_named(home: Path) -> None:
    config = write_config(home / "slow", home)
    began = time.monotonic()
    ended = torchrun(config, 2, "--ranks.timeout", "10", fault="sleep")
    assert ended.returncode != 0 and time.monotonic() - began < 100
    assert "waited for the other ranks in vain" in ended.stderr and "Ranks 1" in ended.stderr
    assert "ranks.timeout" in ended.stderr


def test_a_rank_that_fails_is_named_once_by_itself_and_once_by_the_lead(home: Path) -> None:
    config = write_config(home / "failing", home)
    ended = torchrun(config, 2, fault="count")
    assert ended.returncode != 0
    assert ended.stderr.count("error: rank 1: ") == 1 and ended.stderr.count("returned 0 rewards for") == 2


@pytest.mark.slow  # two engines start, and share two processors
def test_each_rank_samples_with_its_own_vllm(home: Path) -> None:
    configs = [
        write_config(home / name, home, dtype="float32", engine={"name": "vllm"}, steps=2) for name in ("one", "both")
    ]
    for config, world in zip(configs, (1, 2), strict=True):
        ended = torchrun(config, world)
        assert ended.returncode == 0, ended.stderr
    rollouts = [pq.read_table(config.parent / "run/rollouts/step-000001.parquet").to_pylist() for config in configs]
    one, both = ([(row["prompt"], row["completion"], row["reward"]) for row in rows] for rows in rollouts)
    assert one == both
