"""The wheel and what is in it; marked slow, an environment of its own outside the checkout that trains from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from tiny import save_tiny

ROOT = Path(__file__).parents[1]
SMALL = ["--steps=2", "--prompts_per_step=2", "--sampling.group_size=2", "--eval.rows=2", "--parity.probe_prompts=2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the checkout, which is left as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = ["ls-files", "--cached", "--others", "--exclude-standard", "rlft", "pyproject.toml", "README.md", "LICENSE"]
    for name in subprocess.run(["git", *files], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    # Not isolated: an index need not be there. The backend is setuptools, which this environment has.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list(out.glob("rlft-*.tar.gz"))) == 1
    (built,) = out.glob("rlft-*.whl")
    return built


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    """`python -m build` makes the wheel from the source archive, so that one is whole too."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "rlft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == files


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the wheel, and this one's packages but for the checkout."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=False, system_site_packages=False)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    # Packages of this environment as a plain entry of sys.path: Python runs no .pth in it, so that the editable
    # installation of rlft is not there.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    flags = ["--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *flags, str(wheel)], check=True)

    away = tmp_path / "away"
    away.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    found = subprocess.run(
        [python, "-c", "import rlft; print(rlft.__file__)"],
        cwd=away,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(site), found.stdout
    command = [python, "-m", "rlft", "demo", "--model", str(save_tiny(tmp_path / "model")), *SMALL]
    run = subprocess.run(command, cwd=away, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [json.loads(line) for line in (away / "rlft-demo/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (away / "rlft-demo/run/report.html").is_file()
    # Presets are in it as well.
    preset = "import rlft; print(rlft.preset('dapo', model='m', data='d', out='o', steps=1, prompts_per_step=16).algo)"
    subprocess.run([python, "-c", preset], cwd=away, env=env, capture_output=True, check=True)
