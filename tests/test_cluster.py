"""The files of examples/cluster start ranks with flags that torchrun and `rlft train` take."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from rlft.cli.flags import split_resume

FOLDER = Path(__file__).parents[1] / "examples" / "cluster"
STUB = '#!/bin/sh\n[ "$1" = torchrun ] && shift\nprintf "%s\\n" "$@" > "$ARGUMENTS"\n'
STARTS = {"torchrun.sh": ["run.toml"], "torchrun-nodes.sh": ["host", "run.toml"], "slurm.sbatch": ["run.toml"]}


def of_script(path: Path, home: Path) -> list[str]:
    """What a script gives to torchrun, found by a torchrun that writes down its arguments."""
    for name in ("torchrun", "srun"):
        (home / name).write_text(STUB)
        (home / name).chmod(0o755)
    # More than a pipe holds: a reader that leaves early would end the script.
    (home / "scontrol").write_text("#!/bin/sh\nseq -f node-%.0f 20000\n")
    (home / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    environment = os.environ | slurm | {"GPUS": "8", "ARGUMENTS": str(home / "arguments")}
    environment["PATH"] = f"{home}:{environment['PATH']}"
    subprocess.run(["bash", path, *STARTS[path.name], "--steps", "3"], env=environment, check=True)
    return (home / "arguments").read_text().splitlines()


def of_sky() -> list[str]:
    """What SkyPilot's task gives to torchrun, with its variables filled in."""
    task = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    values = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "1", "host": "h"}
    text = task["run"].partition("torchrun ")[2].replace("\\\n", " ")
    for name, value in (values | task["envs"]).items():
        text = text.replace(f"${name}", value)
    assert "$" not in text
    return shlex.split(text)


def of_kubernetes() -> list[str]:
    """What the job's container gives to torchrun."""
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    # The first pod of an indexed job is JOB-0, which the service gives an address.
    assert service["metadata"]["name"] == pod["subdomain"] == job["metadata"]["name"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500" in command
    assert f"--nnodes={job['spec']['completions']}" in command
    return command[1:]


@pytest.mark.parametrize("name", [*STARTS, "sky.yaml", "kubernetes.yaml"])
def test_torchrun_takes_the_flags(name: str, tmp_path: Path) -> None:
    others: dict[str, Any] = {"sky.yaml": of_sky, "kubernetes.yaml": of_kubernetes}
    arguments = others[name]() if name in others else of_script(FOLDER / name, tmp_path)
    options = get_args_parser().parse_args(arguments)
    assert options.module and options.training_script == "rlft" and options.training_script_args[0] == "train"
    rest, resume = split_resume(options.training_script_args[1:])
    assert resume == "auto" and rest[0].endswith("run.toml")
    assert options.nproc_per_node == "8" and options.max_restarts > 0
    if name in STARTS:
        assert rest[1:] == ["--steps", "3"]  # flags of the user are handed on


def test_the_files_are_short() -> None:
    for path in FOLDER.iterdir():
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert path.suffix == ".md" or path.name in (FOLDER / "README.md").read_text()
