"""The loop written out in examples/grpo_from_scratch.py against the library's, on the real small model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest
from fused_pair import one_thread  # noqa: F401
from sums import ROOT, sums

from rlft.config.files import to_toml
from rlft.runs.folder import Run
from rlft.trainer.loop import train


@pytest.mark.slow
def test_the_loop_written_out_has_the_same_first_three_losses(smollm2: Path, tmp_path: Path) -> None:
    """In float64: both draw the same uniform numbers, and in fp32 a token comes to lie on the other side of one by
    rounding now and then (seen twice in 4,100); from there on the two would train on different texts."""
    cfg = sums(smollm2, tmp_path / "run", steps=3, prompts_per_step=2, seed=1, dtype="float64")
    cfg = replace(cfg, parity=replace(cfg.parity, probe=False))
    (tmp_path / "config.toml").write_text(to_toml(cfg))
    # Both at the same time, with a thread each: products of 16 rows gain little from a second one.
    script = ["examples/grpo_from_scratch.py", "--config", str(tmp_path / "config.toml"), "--steps", "3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *script], cwd=ROOT, env=env, stdout=PIPE, stderr=PIPE, text=True) as other:
        train(cfg)
        printed, errors = other.communicate()
    assert other.returncode == 0, errors
    ours = [line["loss"] for line in Run.resume(tmp_path / "run").metrics()]
    plain = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert len(plain) == 3 and any(abs(loss) > 1e-3 for loss in plain)
    assert ours == pytest.approx(plain, abs=1e-4)
