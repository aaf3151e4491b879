"""`torchrun -m rlft train`: one run on two ranks, from the command line, with ranks that die, stop or do not answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_ranks import make_home, settings
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rlft.config.files import to_toml
from rlft.config.run import Config

REWARDS = """
import os
import time


def digits(completions, trainer_state, **_):
    fault, rank = os.environ.get("FAULT"), int(os.environ.get("RANK", "0"))
    if fault == "slow":
        time.sleep(2)
    if fault == "sleep" and trainer_state.global_step == 1 and rank == 1:
        time.sleep(45)  # longer than the timeout of a reward
    if fault == "count" and rank == 1:
        return []
    return [sum(character.isdigit() for character in text) / 6 for text in completions]
"""
STEPS = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    make_home(folder)
    return folder


def write_config(folder: Path, home: Path, **more: object) -> Path:
    """A config in a separate folder, with its own copy of the rewards."""
    folder.mkdir(exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    table = settings(home, folder / "run", steps=STEPS, checkpoint={"every": 1}, if_exists="refuse")
    table["rewards"] = [f"{folder / 'rewards.py'}:digits"]
    (folder / "run.toml").write_text(to_toml(Config(**table | more)))
    return folder / "run.toml"


def start(config: Path, world: int, *flags: str, restarts: int = 0, fault: str = "") -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--max-restarts", str(restarts)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, *(launcher if world > 1 else []), "-m", "rlft", "train", str(config), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault, "GLOO_SOCKET_IFNAME": "lo"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, cwd=config.parent, **pipes)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process, once it has ended."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def signal_rank(process: subprocess.Popen[str], number: int, config: Path, step: int, kind: signal.Signals) -> None:
    """Send a signal to a rank as soon as the run has finished a step."""
    file, deadline = config.parent / "run" / "metrics.jsonl", time.monotonic() + 120
    while not file.is_file() or f'"step": {step},' not in file.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (rank,) = (child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(number))
    rank.send_signal(kind)


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
    code, _, err = ended(start(config, 1))
    assert code == 0, err
    return config


def test_one_command_trains_on_two_ranks(home: Path, alone: Path) -> None:
    config = write_config(home / "two", home)
    code, out, err = ended(start(config, 2))
    assert code == 0, err
    assert difference(config, alone) < 1e-5 and steps_of(config) == [1, 2, 3]
    # The lead alone prints.
    assert out.count(f"step {STEPS}/{STEPS}") == 1 and "divided over 2 ranks" in out


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_ranks(home: Path, alone: Path) -> None:
    config = write_config(home / "resumed", home)
    for world, steps in ((2, 1), (1, 2), (4, 3)):
        code, _, err = ended(start(config, world, "--resume", "auto", "--steps", str(steps)))
        assert code == 0, err
    assert difference(config, alone) < 1e-5 and steps_of(config) == [1, 2, 3]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_is_started_again_with_the_others(home: Path, alone: Path, rank: int) -> None:
    config = write_config(home / f"killed {rank}", home)
    process = start(config, 2, "--resume", "auto", restarts=2, fault="slow")
    signal_rank(process, rank, config, 1, signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 0, err
    assert "exitcode: -9" in err
    assert difference(config, alone) < 1e-5 and steps_of(config) == [1, 2, 3]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_step(home: Path, alone: Path) -> None:
    config = write_config(home / "stopped", home)
    process = start(config, 2, fault="slow")
    signal_rank(process, 1, config, 1, signal.SIGTERM)
    _, out, err = ended(process)
    assert re.search("stopped after step [12] of 3", out), err
    assert steps_of(config) in ([1], [1, 2])
    code, _, err = ended(start(config, 1, "--resume"))
    assert code == 0, err
    assert difference(config, alone) < 1e-5 and steps_of(config) == [1, 2, 3]


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_named(home: Path) -> None:
    config = write_config(home / "sleeping", home)
    code, _, err = ended(start(config, 2, "--ranks.timeout", "20", fault="sleep"))
    assert code != 0 and "waited for the other ranks in vain" in err and "Ranks 1" in err and "ranks.timeout" in err


def test_a_rank_that_fails_is_named_once_by_itself_and_once_by_the_lead(home: Path) -> None:
    config = write_config(home / "failing", home)
    code, _, err = ended(start(config, 2, fault="count"))
    assert code != 0
    assert err.count("error: rank 1: ") == 1 and err.count("returned 0 rewards for") == 2


@pytest.mark.slow  # two engines start, and share two processors
def test_each_rank_samples_with_its_own_vllm(home: Path) -> None:
    heads = LlamaConfig(**tiny_model().config.to_diff_dict() | {"hidden_size": 128, "head_dim": 32})  # 32: vLLM's least
    LlamaForCausalLM(heads).save_pretrained(home / "heads")
    tiny_tokenizer().save_pretrained(home / "heads")
    more = {"model": str(home / "heads"), "dtype": "float32", "engine": {"name": "vllm"}, "steps": 2}
    configs = [write_config(home / name, home, **more) for name in ("one", "both")]
    for config, world in zip(configs, (1, 2), strict=True):
        code, _, err = ended(start(config, world))
        assert code == 0, err
    rollouts = [pq.read_table(config.parent / "run/rollouts/step-000001.parquet").to_pylist() for config in configs]
    one, both = ([(row["prompt"], row["completion"], row["reward"]) for row in rows] for rows in rollouts)
    assert one == both
