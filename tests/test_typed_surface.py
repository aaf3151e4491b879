"""pyright over what a user writes: a script with the public names, and the Python of the README."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import rlft

ROOT = Path(__file__).parents[1]
SCRIPT = """
import peft
import rlft
import torch
from transformers import AutoModelForCausalLM
from rlft import Config, Result, Reward


def digits(completions: list[str], **columns: object) -> list[float]:
    return [float(sum(map(str.isdigit, text))) for text in completions]


cfg = Config(
    model="Qwen/Qwen3-0.6B", data="train.jsonl", out="runs/first", steps=3, rewards=["number", Reward("exact", 0.5)],
    algo="gspo", optim={"lr": 1e-5}, sampling=rlft.Sampling(group_size=4), lora=rlft.Lora(rank=8),
)
show = lambda state, metrics: print(state.step, metrics["reward"])
result: Result = rlft.train(cfg, rewards=[digits], callbacks=[show])
again: Result = rlft.train("run.toml", steps=3, sampling={"max_tokens": 64})
loaded: Config = Config.load("run.toml")
rate: float = loaded.optim.lr
path: str = loaded.data.path
names: list[str] = [str(reward.use) for reward in loaded.rewards]
after: float = result.after["eval/reward"]
dapo: Config = rlft.preset("dapo", model="m", data="d", out="o", steps=1)
model, tokenizer = rlft.load("Qwen/Qwen3-0.6B", quantization="nf4")
rlft.train(cfg, model=model, tokenizer=tokenizer, optimizer=torch.optim.SGD)
rlft.train(cfg, model=peft.get_peft_model(AutoModelForCausalLM.from_pretrained("m"), peft.LoraConfig()))
rlft.train("run.toml", model="Qwen/Qwen3-0.6B", optimizer=lambda weights: torch.optim.NAdam(weights, lr=1e-5))
with rlft.sampler(model, tokenizer, rlft.Sampling(group_size=2)) as sampler, rlft.scorer([digits], timeout=3) as scorer:
    rollouts: list[rlft.Rollout] = sampler.generate(["a", {"prompt": "b", "answer": "c"}])
    scores: torch.Tensor = scorer(rollouts)
    sampler.update()
"""
WRONG = {
    "rlft.Optim(lr=None)": "reportArgumentType",
    "rlft.Sampling(num_generations=3)": "reportCallIssue",
    "rlft.train(3)": "reportArgumentType",
    "rlft.train('run.toml', model=3)": "reportArgumentType",
    "rlft.train('run.toml', optimizer='sgd')": "reportArgumentType",
    "rlft.Config(model='m', data='d', out='o').optim.learning_rate": "reportAttributeAccessIssue",
}


def reported(tmp_path: Path, files: dict[str, str]) -> dict[str, list[str]]:
    """File -> the rules that pyright finds broken in it."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    # trl does not say what it exports.
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic", "reportPrivateImportUsage": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found: dict[str, list[str]] = {name: [] for name in files}
    for problem in json.loads(run.stdout)["generalDiagnostics"]:
        found[Path(problem["file"]).name].append(problem.get("rule", problem["message"]))
    return found


def test_pyright_knows_what_users_write(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert snippets
    files = {"script.py": SCRIPT} | {f"readme_{i}.py": text for i, text in enumerate(snippets)}
    wrong = {f"wrong_{i}.py": f"import rlft\n{line}\n" for i, line in enumerate(WRONG)}
    found = reported(tmp_path, files | wrong)
    assert {name: found[name] for name in files if found[name]} == {}
    for name, rule in zip(wrong, WRONG.values(), strict=True):
        assert rule in found[name], (wrong[name], found[name])


def test_help_shows_parameters_and_every_public_name_has_a_docstring() -> None:
    given = ["model", "tokenizer", "optimizer"]
    basics = ["cfg", "rewards", "resume", "callbacks", "verbose"]
    assert list(inspect.signature(rlft.train).parameters) == [*basics, *given, "settings"]
    for name in rlft.__all__:
        value = getattr(rlft, name)
        assert name == "__version__" or inspect.getdoc(value), name


def test_the_lists_of_public_names_agree() -> None:
    text = (ROOT / "rlft" / "__init__.py").read_text()
    typed = set(re.findall(r"^    from rlft\.\S+ import (\w+) as \1$", text, re.M))
    assert typed == set(rlft.__all__) - {"__version__"} == set(rlft._WHERE)
    sections = {cls.__name__ for cls in __import__("rlft.config.section", fromlist=["x"]).SECTIONS}
    assert sections <= set(rlft.__all__)
