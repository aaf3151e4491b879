"""Rewards defined where users define them: in a script without a guard, and in a cell of a Jupyter kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]

CONFIG = """
cfg = rlft.Config(
    model="model", data=rlft.Data("prompts.jsonl"), out=OUT, steps=2, prompts_per_step=2,
    sampling=rlft.Sampling(group_size=2, max_tokens=5), lora=rlft.Lora(rank=2), parity=rlft.Parity(probe=False),
)
"""

SCRIPT = f"""
import rlft
from trl.rewards import get_soft_overlong_punishment  # a reward script of TRL's: its rewards are as they were
from my_rewards import digits

open("ran", "a").write("once more\\n")
OUT = "run"

def short(completions, **kwargs):
    return [-float(len(text)) for text in completions]

async def judged(prompts, completions, answer, **kwargs):
    return [float(a in text) for text, a in zip(completions, answer)]
{CONFIG}
rewards = [short, judged, digits, get_soft_overlong_punishment(5, 3), lambda completions, **_: [None] * 4]
result = rlft.train(cfg, rewards=rewards)
print("steps", result.steps)
"""

CELLS = [
    f"import rlft\nOUT = 'notebook'\n{CONFIG}",
    """
async def judged(completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.001)
    return [float(len(text)) for text in completions]

calls = []
def counted(completions, **kwargs):
    calls.append(len(completions))
    return [1.0 if "a" in text else 0.0 for text in completions]
""",
    """
from rlft.rewards.score import build_rewards, score
from rlft.types import Prompt, Rollout
made = [Rollout(Prompt((1,), {"prompt": "p"}, i), (1,), (True,), None, "ab" * i, "stop", 0, 0, 0) for i in range(3)]
functions = build_rewards([judged, counted])
print("score", score(made, functions, {})[0].tolist())
for f in functions: f.close()
""",
    "result = rlft.train(cfg, rewards=[judged, counted])\nprint('steps', result.steps, 'calls', calls)",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    tiny_model(seed=3).unload().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "my_rewards.py").write_text(
        "import os\ndef digits(completions, log_metric, **kwargs):\n    log_metric('pid', os.getpid())\n"
        "    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"
    )
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_script_without_a_guard_trains_and_is_not_run_again(home: Path) -> None:
    (home / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=home, env=environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("steps 2\n") and (home / "ran").read_text() == "once more\n"
    first, second = metrics(home / "run")
    for name in ("short", "judged", "digits", "soft_overlong_punishment_reward"):
        assert first[f"rewards/{name}/invalid"] == 0.0 and first[f"rewards/{name}/mean"] is not None, name
    assert first["rewards/<lambda>/mean"] is None
    assert first["custom/pid"] == second["custom/pid"]  # one worker for the whole run
    assert 'reward "short" can only be called in this process' in run.stdout
    assert 'reward "digits" can only' not in run.stdout


def test_a_jupyter_kernel_scores_and_trains_with_functions_of_its_cells(home: Path) -> None:
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel(cwd=str(home), env=environment())
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        printed: list[str] = []

        def hook(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        for cell in CELLS:
            reply = client.execute_interactive(cell, output_hook=hook, timeout=120)["content"]
            assert reply["status"] == "ok", reply
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    text = "".join(printed)
    assert "score [0.0, 3.0, 5.0]" in text and "steps 2 calls [3, 4, 4]" in text
    assert metrics(home / "notebook")[-1]["rewards/judged/invalid"] == 0.0
