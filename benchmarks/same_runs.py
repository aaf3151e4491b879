"""Whole runs by two checkouts of rlft, compared to the bit: what a change of structure must leave as it was.

    python benchmarks/same_runs.py --before /path/to/another/checkout

One small run of each family of algorithms (a model of two layers, eager engine, CPU) by the checkout given and by this
one. Compared are every byte of the checkpoints, every row of metrics.jsonl but for times and rates, every row of the
rollouts and evaluations, and the report but for times, memory and settings.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kill_soak import UNEQUAL, differences, make_home
from results_file import commit_now, write

ROOT = Path(__file__).parents[1]
OLD_NAMES = {"dynamic_sampling": "refill", "tokens_per_micro_batch": "budget"}
"""Settings and metrics -> what they are called in version 0.1."""
COMMON = """
model = "{home}/model"
out = "{out}"
steps = 4
prompts_per_step = 4
checkpoint = {{ every = 2 }}
lora = {{ rank = 4, alpha = 8 }}
packing = {{ tokens_per_micro_batch = 96 }}
"""
SAMPLED = """
data = "{home}/prompts.jsonl"
rewards = ["{home}/rewards.py:digits", "{home}/rewards.py:held"]
sampling = {{ group_size = 4, max_tokens = 6 }}
eval = {{ rows = 4, every = 2, rewards = ["{home}/rewards.py:held"] }}
"""
HELD_OUT = "eval = {{ rows = 4, every = 2 }}\n"
WORKS = {
    "grpo": SAMPLED + 'optim = {{ lr = 1e-2 }}\nalgo = {{ name = "grpo", kl_coef = 0.05 }}',
    "grpo, several updates": SAMPLED + "optim = {{ lr = 1e-2, minibatches = 2, passes = 2 }}",
    "gspo": SAMPLED + 'optim = {{ lr = 1e-2, minibatches = 2 }}\nalgo = {{ name = "gspo" }}',
    "dr_grpo": SAMPLED + 'optim = {{ lr = 1e-2 }}\nalgo = {{ name = "dr_grpo" }}',
    "cispo": SAMPLED + 'optim = {{ lr = 1e-2 }}\nalgo = {{ name = "cispo" }}',
    "rloo": SAMPLED + 'optim = {{ lr = 1e-2 }}\nalgo = {{ name = "rloo" }}',
    "reinforce": SAMPLED + 'optim = {{ lr = 1e-2 }}\nalgo = {{ name = "reinforce" }}',
    "gdpo": SAMPLED + 'optim = {{ lr = 1e-2 }}\nalgo = {{ name = "gdpo" }}',
    "dynamic sampling": SAMPLED + "optim = {{ lr = 1e-2 }}\ndynamic_sampling = {{ rounds = 3 }}\n"
    "overlong = {{ penalty_share = 0.5 }}",
    "online_dpo": SAMPLED.replace("group_size = 4", "group_size = 2")
    + 'optim = {{ lr = 1e-2 }}\nalgo = {{ name = "online_dpo" }}',
    "sft": 'data = "{home}/sft.jsonl"\noptim = {{ lr = 1e-2 }}\nalgo = {{ name = "sft" }}\n' + HELD_OUT,
    "dpo": 'data = "{home}/pairs.jsonl"\noptim = {{ lr = 1e-2 }}\nalgo = {{ name = "dpo" }}\n' + HELD_OUT,
    "simpo": 'data = "{home}/pairs.jsonl"\noptim = {{ lr = 1e-2 }}\nalgo = {{ name = "simpo" }}',
    "kto": 'data = "{home}/labels.jsonl"\noptim = {{ lr = 1e-2 }}\nalgo = {{ name = "kto" }}',
}
SECTIONS = (
    "Evaluation",
    "Learning",
    "Optimisation",
    "Engine against trainer",
    "Completions",
    "Held-out completions",
    "Health",
)
"""Sections of the report that hold no times, memory or settings."""


def more_data(home: Path) -> None:
    """Recorded completions, pairs and labels beside the prompts of `make_home`."""
    kinds: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": f"say {i}", "completion": f"it is {i * 7}"} for i in range(24)],
        "pairs": [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": f"no {i % 3}"} for i in range(24)],
        "labels": [{"prompt": f"say {i}", "completion": f"it is {i}", "label": i % 2 == 0} for i in range(24)],
    }
    for name, rows in kinds.items():
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def run(tree: Path, home: Path, name: str, which: str) -> tuple[Path, str]:
    """One run by the checkout `tree`: its folder, and "" or why it failed."""
    out = home / which / name.replace(" ", "-").replace(",", "")
    text = (COMMON + WORKS[name]).format(home=home, out=out)
    if (tree / "rlft" / "config.py").exists():  # version 0.1
        for new, old in OLD_NAMES.items():
            text = text.replace(new, old)
    file = out.with_suffix(".toml")
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    env = {**os.environ, "PYTHONPATH": str(tree), "KILL_SOAK_MARKS": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rlft", "train", str(file)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tree)
    metrics = out / "metrics.jsonl"
    if metrics.exists():
        metrics.write_text(metrics.read_text().replace('"refill/', '"dynamic_sampling/'))
    return out, "" if ended.returncode == 0 else ended.stderr[-400:]


def sections(out: Path) -> dict[str, str]:
    """Heading -> text of the sections of a report that two equal runs share."""
    page = (out / "report.html").read_text().replace("refill/", "dynamic_sampling/").replace(str(out), "RUN")
    parts = re.split(r"<h[23][^>]*>(.*?)</h[23]>", page)
    return {head: text for head, text in zip(parts[1::2], parts[2::2], strict=True) if head in SECTIONS}


def detail(difference: str, one: Path, other: Path) -> list[str]:
    """A difference of two run folders, with the names that only one has and those whose values differ."""
    if difference.startswith("metrics.jsonl"):
        tables = [merged_rows(out / "metrics.jsonl") for out in (one, other)]
        name = "metrics"
    elif difference.endswith("state.json"):
        tables = [json.loads((out / difference).read_text()) for out in (one, other)]
        name = difference
    else:
        return [difference]
    only = [sorted(tables[0].keys() - tables[1].keys()), sorted(tables[1].keys() - tables[0].keys())]
    unequal = sorted(key for key in tables[0].keys() & tables[1].keys() if tables[0][key] != tables[1][key])
    texts = [f"{name}: only before: {', '.join(only[0])}"] if only[0] else []
    texts += [f"{name}: only after: {', '.join(only[1])}"] if only[1] else []
    return texts + ([f"{name}: differ: {', '.join(unequal)}"] if unequal else [])


def merged_rows(path: Path) -> dict[str, list[Any]]:
    """Metric -> its values in the order of the rows, without times and rates."""
    columns: dict[str, list[Any]] = {}
    for line in path.read_text().splitlines():
        for name, value in json.loads(line).items():
            if not name.startswith(UNEQUAL):
                columns.setdefault(name, []).append(value)
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--name", default="same_runs", help="of the results file")
    parser.add_argument("works", nargs="*", default=list(WORKS))
    args = parser.parse_args()
    before = args.before.resolve()
    commit = commit_now(before)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_home(home)
        more_data(home)
        for name in args.works:
            (one, why), (other, why_other) = run(before, home, name, "before"), run(ROOT, home, name, "after")
            unequal = [text for text in (why, why_other) if text]
            if not unequal:
                unequal = [text for name in differences(one, other) for text in detail(name, one, other)]
                pages = sections(one), sections(other)
                assert {"Learning", "Optimisation"} <= pages[0].keys(), list(pages[0])
                unequal += [f"report: {head}" for head in SECTIONS if pages[0].get(head) != pages[1].get(head)]
            note = "; ".join(unequal) or "checkpoints, metrics, rollouts, evaluations and report are equal"
            print(f"{name}: {note}", flush=True)
            rows.append(
                {
                    "work": f"same/{name}",
                    "stack": "rlft",
                    "metric": "equal",
                    "value": int(not unequal),
                    "unit": "yes or no",
                }
                | {"note": f"{commit} and {commit_now()}: {note}"}
            )
    if args.works == list(WORKS):
        print(write(args.name, rows))


if __name__ == "__main__":
    main()
