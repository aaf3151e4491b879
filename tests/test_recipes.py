"""The recipes of examples/, a folder each: their small size runs, their stages chain, their rewards are right.

The model is the first layers of the real small one, so that texts and tags are those of a real tokenizer.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlft.cli.main import main
from rlft.config import resolve
from rlft.config.run import Config

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RECIPES = ("counting_shapes", "countdown", "dpo_from_samples", "gsm_style", "long_context", "sft_then_rl")
CONFIGS = [path for name in RECIPES for path in sorted((EXAMPLES / name).glob("*.toml"))]
SMALL = ["--prompts_per_step=2", "--sampling.max_tokens=8", "--parity.probe_prompts=2", "--steps=2"]
SEEN = SimpleNamespace(global_step=3)
"""What a reward function gets as trainer_state."""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch) -> None:
    """Paths in the recipes are the repository's; what they write goes elsewhere."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)


def script(name: str, *args: str, monkeypatch) -> None:
    """Run a script of a recipe."""
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def make_data(recipe: str, monkeypatch) -> None:
    """Write the rows that the small size of a recipe reads, as its README says."""
    if recipe == "gsm_style":
        script("gsm_style/make_data.py", "runs/data/gsm_style.jsonl", "--rows=40", monkeypatch=monkeypatch)
    elif recipe == "sft_then_rl":
        script("sft_then_rl/make_data.py", "runs/data/sft_then_rl", "--sft=20", "--rl=20", monkeypatch=monkeypatch)
    elif recipe == "counting_shapes":
        script(
            "counting_shapes/make_data.py", "runs/data/counting_shapes", "--sft=8", "--rl=8", monkeypatch=monkeypatch
        )
    elif recipe == "long_context":
        flags = ["--sentences=10", "--rows=10"]
        script("long_context/make_data.py", "runs/data/long_context_tiny.jsonl", *flags, monkeypatch=monkeypatch)


def train(config: str, model: Path, *flags: str) -> list[dict[str, Any]]:
    """Train two steps; returns their metrics."""
    cfg = Config.load(Path("examples") / config)
    flags += ("--eval.rows=2",) if cfg.eval.rows else ()
    flags += ("--sampling.group_size=2",) if cfg.algo.name == "grpo" else ()
    assert main(["train", f"examples/{config}", "--model", str(model), *SMALL, *flags]) == 0
    lines = (Path(cfg.out) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("recipe", ["countdown", "gsm_style", "long_context"])
def test_a_recipe_runs_two_steps_and_so_does_its_control(recipe: str, smollm2_cut: Path, monkeypatch) -> None:
    make_data(recipe, monkeypatch)
    assert [line["step"] for line in train(f"{recipe}/tiny.toml", smollm2_cut)] == [1, 2]
    rewards = Config.load(f"examples/{recipe}/tiny.toml").rewards
    shuffled = [f"--rewards.{i}.args={{ shuffled = true }}" for i in range(len(rewards))]
    assert main(["validate", f"examples/{recipe}/tiny.toml", "--model", str(smollm2_cut), *shuffled]) == 0


def test_rl_goes_on_with_the_adapter_of_sft(smollm2_cut: Path, monkeypatch) -> None:
    make_data("sft_then_rl", monkeypatch)
    train("sft_then_rl/sft_tiny.toml", smollm2_cut, "--optim.lr=1e-2")
    sft = Path("runs/sft_then_rl/sft_tiny/checkpoints/step-000002")
    train("sft_then_rl/rl_tiny.toml", smollm2_cut, "--lora.resume_from", str(sft), "--optim.lr=0")
    from safetensors.torch import load_file

    rl = Path("runs/sft_then_rl/rl_tiny/checkpoints/step-000002")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (sft, rl))
    assert before.keys() == after.keys() and all((after[name] == before[name]).all() for name in before)
    assert any(tensor.abs().max() > 0 for name, tensor in before.items() if "lora_B" in name)


def test_a_model_made_from_nothing_learns_by_sft_and_then_by_rl(monkeypatch) -> None:
    make_data("counting_shapes", monkeypatch)
    model = Path("runs/data/counting_shapes/model")
    script("counting_shapes/make_model.py", str(model), monkeypatch=monkeypatch)
    first, second = train("counting_shapes/sft_tiny.toml", model)
    assert second["loss"] != first["loss"]
    adapter = "runs/counting_shapes/sft_tiny/checkpoints/step-000002"
    train("counting_shapes/rl_tiny.toml", model, "--lora.resume_from", adapter)
    page = Path("runs/counting_shapes/rl_tiny/report.html").read_text()
    assert "data:image/jpeg;base64," in page


def test_dpo_trains_on_the_pairs_of_a_sampling_run(smollm2_cut: Path, monkeypatch) -> None:
    # The cut model knows no sums: a reward that its texts differ in stands for the answer.
    Path("texts.py").write_text(
        "def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    lines = train("dpo_from_samples/sample_tiny.toml", smollm2_cut, "--rewards.0.use=texts.py:length")
    assert all(line["grad_norm"] > 0 for line in lines)
    folder = Path("runs/dpo_from_samples/sample_tiny")
    weights = [path for path in folder.glob("checkpoints/*/adapter_model.safetensors")]
    from safetensors.torch import load_file

    assert all(tensor.abs().max() == 0 for name, tensor in load_file(weights[-1]).items() if "lora_B" in name)
    script("dpo_from_samples/make_pairs.py", str(folder), "runs/data/pairs_tiny.jsonl", monkeypatch=monkeypatch)
    pairs = [json.loads(line) for line in Path("runs/data/pairs_tiny.jsonl").read_text().splitlines()]
    assert pairs and all(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    assert len(train("dpo_from_samples/dpo_tiny.toml", smollm2_cut, "--prompts_per_step=1")) == 2


def test_a_run_without_unequal_rewards_gives_no_pairs(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit, match=r"^nothing: no prompt has completions of unequal reward"):
        script("dpo_from_samples/make_pairs.py", "nothing", "pairs.jsonl", monkeypatch=monkeypatch)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_of_a_recipe_names_what_is_there(path: Path) -> None:
    cfg = Config.load(path)
    files = [reward.use for reward in (*cfg.rewards, *cfg.eval.rewards)] + [cfg.data.template]
    for name in files:
        if name and ":" in name:
            assert callable(resolve.attribute(name, "rewards")), name
    assert cfg.out == f"runs/{path.parent.name}/{path.stem}"
    if cfg.lora.resume_from:
        first = Config.load(path.with_name(path.name.replace("rl_", "sft_")))
        assert cfg.lora.resume_from == f"{first.out}/checkpoints/step-{first.steps:06}"
    assert str(path.relative_to(ROOT)) in (path.parent / "README.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_the_readme_of_a_recipe_names_files_that_are_there(name: str) -> None:
    text = (EXAMPLES / name / "README.md").read_text()
    named = set(re.findall(r"examples/[\w./]+\.(?:py|toml|md)", text))
    assert named and all((ROOT / path).is_file() for path in named)
    assert "shuffled" in text and "bigger model" in text.lower()


def function(reference: str) -> Any:
    return resolve.attribute(f"{EXAMPLES}/{reference}", "rewards")


def test_the_rewards_of_word_problems() -> None:
    form, correct = (function(f"gsm_style/rewards.py:{name}") for name in ("form", "correct"))
    whole = "<think>3 + 4 is 7</think> <answer>7</answer>"
    texts = [whole, "7", "<answer>7</answer>", whole + whole, [{"role": "assistant", "content": whole}]]
    assert form(texts, SEEN) == [1.0, 0.0, 0.5, 0.0, 1.0]
    assert correct(texts, ["7"] * 5, SEEN) == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert correct(["<answer>$1,000</answer>"], ["so 10 * 100 = 1000\n#### 1,000"], SEEN) == [1.0]


def test_the_reward_of_countdown() -> None:
    solved = function("countdown/rewards.py:solved")
    cases = {
        "(3 + 4) * 2 = 14": 1.0,
        "4 * 3 + 2": 1.0,
        "3 + 4": 0.1,
        "3 * 3 + 4 + 1": 0.0,
        "14": 0.0,
        "": 0.0,
        "3 ** 4": 0.0,
        "4 / (3 - 3)": 0.0,
        "__import__('os').abort()": 0.0,
        "(" * 150: 0.0,
        "2 * 3 + 2 * 4": 0.0,
        "3 + 4 / 2": 0.1,
        "'\\s' + 3": 0.0,
        "3or 4": 0.0,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text, reward in cases.items():
            assert solved([text], [[2, 3, 4]], [14], SEEN) == [reward], text
    assert not caught, "Python's parser warns about what a model writes"


def test_the_reward_of_retrieval_and_of_sft_then_rl() -> None:
    found, correct = function("long_context/rewards.py:found"), function("sft_then_rl/rewards.py:correct")
    assert found(["4821", "The code is 4829.", "none", "48210"], ["4821"] * 4, SEEN) == [1.0, 0.75, 0.0, 0.8]
    texts = ["<answer>-3</answer>", "<answer>3</answer>", "<answer>-3</answer><answer>-3</answer>"]
    assert correct(texts, ["-3"] * 3, SEEN) == [1.0, 0.0, 0.0]


def test_the_reward_of_counting() -> None:
    counted = function("counting_shapes/rewards.py:counted")
    texts = ["3", "There are 3.", "3 of 4", "", "4", [{"role": "assistant", "content": "3"}]]
    assert counted(texts, ["3"] * 6, SEEN) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_a_control_hands_out_the_same_rewards_in_another_order() -> None:
    texts = [f"<answer>{i % 3}</answer>" for i in range(12)]
    for reference, columns in (
        ("gsm_style/rewards.py:correct", {"answer": ["0"] * 12}),
        ("sft_then_rl/rewards.py:correct", {"answer": ["0"] * 12}),
        ("counting_shapes/rewards.py:counted", {"answer": ["0"] * 12}),
    ):
        true, control = (function(reference)(texts, **columns, trainer_state=SEEN, shuffled=on) for on in (False, True))
        assert sorted(true) == sorted(control) and true != control


def test_data_is_the_same_each_time(monkeypatch) -> None:
    for recipe in ("gsm_style", "sft_then_rl", "long_context", "counting_shapes"):
        make_data(recipe, monkeypatch)
        before = {path: path.read_bytes() for path in Path("runs/data").rglob("*.jsonl")}
        make_data(recipe, monkeypatch)
        assert before and before == {path: path.read_bytes() for path in Path("runs/data").rglob("*.jsonl")}
    rows = [json.loads(line) for line in Path("runs/data/sft_then_rl/sft.jsonl").read_text().splitlines()]
    left = [json.loads(line)["prompt"] for line in Path("runs/data/sft_then_rl/rl.jsonl").read_text().splitlines()]
    assert not {row["prompt"] for row in rows} & set(left)
    for row in rows:
        assert f"<answer>{eval(row['prompt'].removeprefix('Work out ').rstrip('.'))}</answer>" in row["completion"]


@pytest.mark.parametrize(("accuracy", "code", "told"), [(0.82, 0, "reached: "), (0.70, 1, "NOT REACHED: ")])
def test_the_speedrun_fails_below_what_earlier_runs_reached(accuracy: float, code: int, told: str, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speedrun

    ran: list[Any] = []
    monkeypatch.setattr(
        speedrun, "run", lambda *args: ran.append(args) or {"before": 0.275, "after": accuracy, "steps": 60}
    )
    monkeypatch.setattr(sys, "argv", ["speedrun.py"])
    assert speedrun.main() == code
    assert ran == [("speedrun", ["--seed", "42", "--device", "cpu", "--steps", "60"])]
    want = speedrun.expected()
    assert 0.70 < want.lowest < want.accuracy and (ROOT / "benchmarks" / "results" / want.file).is_file()
    assert capsys.readouterr().out.splitlines()[-1].startswith(told)
