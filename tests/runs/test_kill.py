"""kill -9 in the middle of a run: resumed, it ends equal to one that nobody disturbed (`benchmarks/kill_soak.py`)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_soak import Fork, Run, differences, make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    make_home(folder)
    return folder


def test_four_kills_in_one_run_and_it_ends_equal_to_one_that_nobody_disturbed(home: Path) -> None:
    whole = Run(home, "whole", Fork)
    whole.finish()
    run = Run(home, "killed", Fork)
    # Before the first checkpoint, in step 4 after that of step 2, while the next one is written, and between the last
    # save and the report; on a busy machine a kill falls later than that, and what it hits is another moment.
    for moment, n in (("reward", 1), ("reward", 4), ("checkpoint", 1), ("end", 1)):
        landed = run.kill(moment, n, 0.002)
        assert landed or moment == "end", run.output()
        assert run.orphans() == []
    run.finish()
    assert differences(whole.out, run.out) == [], run.hits
    # What was lost is still there to be looked at.
    assert [*(run.out / "set-aside").rglob("metrics.jsonl")], run.hits


def test_sigterm_finishes_the_step_saves_and_exits_with_130_and_the_run_goes_on_to_an_equal_end(home: Path) -> None:
    run = Run(home, "stopped", Fork)
    process = run.start()
    while not run.count("begins"):
        time.sleep(0.001)
    process.terminate()
    assert process.wait() == 130, run.output()
    assert "stopping after this step and saving; SIGTERM again stops at once" in run.output()
    assert run.orphans() == []
    run.finish()
    assert differences(home / "whole", run.out) == []


EXITS = {
    "done": ([], 0, "sample from it:"),
    "engine": (["--algo.name=sft", "--data.path={home}/sft.jsonl", "--algo.name={home}/loss.py"], 1, "out of memory"),
    "setting": (["--algo.name=gprpo"], 2, 'error: algo.name = "gprpo": unknown'),
    "guard": (
        ["--parity.no_probe", "--rewards.0.use={home}/loss.py:none"],
        3,
        "error: every reward of this step is inv",
    ),
}


@pytest.mark.parametrize("name", EXITS)
def test_the_exit_code_of_a_real_process(name: str, home: Path) -> None:
    (home / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    (home / "loss.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from rlft.algos.loss import Loss\n"
        "@dataclass(frozen=True)\n"
        "class Huge(Loss):\n"
        "    def __call__(self, logprobs, batch): return torch.empty(2**60).sum(), {}\n"
        "def none(completions, **columns): return [None] * len(completions)\n"
    )
    flags, code, message = EXITS[name]
    run = Run(home, f"exit-{name}", Fork)
    process = run.start("--steps=1", "--eval.rows=0", "--eval.every=0", *(flag.format(home=home) for flag in flags))
    assert process.wait() == code, run.output()
    assert message in run.output() and "Traceback" not in run.output()
    assert run.orphans() == []


def test_the_comparison_finds_what_differs(home: Path) -> None:
    one, other = home / "whole", home / "killed"
    (other / "metrics.jsonl").write_text((other / "metrics.jsonl").read_text().replace('"step": 4', '"step": 5'))
    (other / "checkpoints" / "step-000006" / "adapter_model.safetensors").write_bytes(b"")
    (other / "rollouts" / "step-000003.parquet").unlink()
    assert [text.split(":")[0] for text in differences(one, other)] == [
        "metrics.jsonl",
        "checkpoints/step-000006/adapter_model.safetensors",
        "rollouts/*",
    ]
