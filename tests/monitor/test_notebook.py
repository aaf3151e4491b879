"""The display of a run in a notebook: one output of a real kernel's cell, updated, and its HTML."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

from rlft.monitor import notebook
from rlft.monitor.console import Console
from rlft.monitor.health import Message
from rlft.monitor.notebook import Notebook, curve
from rlft.monitor.panel import Example

ROOT = Path(__file__).parents[2]
CELL = """
import rlft

def vowels(completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]

result = rlft.train(
    rlft.Config(
        model="model", data=rlft.Data("prompts.jsonl"), out="run", steps=3, prompts_per_step=2, if_exists="number",
        sampling=rlft.Sampling(group_size=2, max_tokens=5), lora=rlft.Lora(rank=2), eval=rlft.Eval(rows=2),
    ),
    rewards=[vowels],
)
print("steps", result.steps, result.out.name)
"""


def run_cells(home: Path, cells: list[str]) -> list[list[dict[str, Any]]]:
    """The messages of each cell in a kernel."""
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    manager.start_kernel(cwd=str(home), env=env)
    client = manager.client()
    client.start_channels()
    seen: list[list[dict[str, Any]]] = []
    try:
        client.wait_for_ready(timeout=120)
        for cell in cells:
            messages: list[dict[str, Any]] = []
            reply = client.execute_interactive(cell, output_hook=messages.append, timeout=300)["content"]
            assert reply["status"] == "ok", reply
            seen.append(messages)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    return seen


def test_a_cell_has_one_output_that_is_updated_and_can_be_run_again(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "answer": f"<{i}>"} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number, messages in enumerate(run_cells(tmp_path, [CELL, CELL]), 1):
        shown = [message for message in messages if message["msg_type"] == "display_data"]
        updates = [message for message in messages if message["msg_type"] == "update_display_data"]
        printed = "".join(m["content"]["text"] for m in messages if m["content"].get("name") == "stdout")
        folder = "run" if number == 1 else f"run-{number}"
        assert printed == f"steps 3 {folder}\n"
        assert len(shown) == 1 and len(updates) > 5
        ids = {message["content"]["transient"]["display_id"] for message in [*shown, *updates]}
        assert len(ids) == 1
        last = updates[-1]["content"]["data"]["text/html"]
        assert "<b>step 3/3" in last and "<polyline" in last and "label &lt;" in last and "prompt" in last
        assert f"run folder: {folder}" in last and "sample from it" in last and "fused layers" not in last
        assert "reward &quot;vowels&quot; can only be called in this process" in last
        assert any("loading model" in update["content"]["data"]["text/html"] for update in [*shown, *updates])
        assert "fused layers" in (tmp_path / folder / "log.txt").read_text()


def test_outside_a_notebook_ipython_is_not_imported() -> None:
    code = (
        "import sys\nfrom rlft.monitor.notebook import display, Notebook\n"
        "assert type(display()).__name__ == 'Console' and 'IPython' not in sys.modules and 'torch' not in sys.modules\n"
        "import IPython\nassert not isinstance(display(), Notebook)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr


class Shown:
    """In the place of IPython's display."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def __call__(self, data: dict[str, str], **options: Any) -> Shown:
        assert options == {"raw": True, "display_id": True}
        self.pages.append(data["text/html"])
        return self

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.pages.append(data["text/html"])


@pytest.fixture
def shown(monkeypatch) -> Shown:
    import IPython.display

    made = Shown()
    monkeypatch.setattr(IPython.display, "display", made)
    return made


def test_what_a_model_writes_is_text_in_the_page(shown: Shown) -> None:
    with Notebook() as console:
        console.start(["<b>title</b>"], 4)
        example = Example("<script>alert(1)</script>\x1b", "a <i>prompt</i>", 0.5, '"><img>')
        console.step({"step": 1.0, "reward": 0.5}, example, [], [Message("x", "<u>act</u>")])
    page = shown.pages[-1]
    assert not re.search(r"<(script|i|img|u)\b", page) and "<b>title" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page and "reward 0.5, label" in page
    ElementTree.fromstring(page.replace("&nbsp;", " "))  # whole: every element is closed


def test_the_lines_are_bounded_and_a_detail_is_none(shown: Shown) -> None:
    with Notebook() as console:
        for number in range(100):
            console.note(f"line {number}.")
        console.detail("a detail")
    assert "line 99." in shown.pages[-1] and "line 79." not in shown.pages[-1] and "a detail" not in shown.pages[-1]


def test_progress_within_a_step_updates_no_more_than_twice_a_second(shown: Shown, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(notebook.time, "monotonic", lambda: now[0])
    console = Notebook()
    console.start([], 4)
    before = len(shown.pages)
    for done in range(100):
        now[0] += 0.1
        console.generating(done, 100)
    assert 15 <= len(shown.pages) - before <= 20


def test_another_thread_shows_nothing(shown: Shown) -> None:
    import threading

    console = Notebook()
    thread = threading.Thread(target=console.note, args=("from a tracker",))
    thread.start()
    thread.join()
    assert shown.pages == []
    console.note("from the loop")
    assert "from a tracker" in shown.pages[-1]


def test_the_curve_keeps_the_whole_run(shown: Shown) -> None:
    with Notebook() as console:
        console.start([], 3000)
        for number in range(1, 2001):
            console.step({"step": float(number), "reward": number / 2000}, None)
    first = re.search(r"step (\d+)</text>", shown.pages[-1])
    assert first and int(first[1]) <= 5 and "step 2000<" in shown.pages[-1]
    points = re.search(r'points="([^"]*)"', shown.pages[-1])
    assert points and len(points[1].split()) == notebook.MOST_POINTS


def test_a_curve_of_equal_values_or_of_one_point() -> None:
    assert curve([(1, 0.5)], "reward") == ""
    for value in (0.0, 0.5, -2.0):
        svg = curve([(1, value), (2, value)], "reward")
        ys = {point.split(",")[1] for point in re.findall(r"[\d.]+,[\d.]+", svg)}
        assert len(ys) == 1 and "nan" not in svg


def test_a_notebook_is_a_console() -> None:
    assert issubclass(Notebook, Console)
