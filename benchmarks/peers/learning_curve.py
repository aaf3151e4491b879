"""Reward against time: the same GRPO run by TRL, Unsloth and rlft, each sampling for itself.

    python benchmarks/peers/learning_curve.py --out DIR --commit HASH --model /tmp/smollm2.gguf --unsloth /tmp/u

Sums of two numbers below 100, SmolLM2-135M-Instruct with a bf16 base and LoRA r 16, 32 prompts of 8 completions of at
most 16 tokens a step, the same learning rate, each library's defaults otherwise. The stacks are loaded first, one after
the other, and wait; then each trains alone. Time counts from the first step, compilation of kernels included; loading
and an engine's start are a row of their own.

    trl        GRPOTrainer with transformers' generate, its default
    trl-vllm   GRPOTrainer with vLLM in its colocated mode
    unsloth    GRPOTrainer over Unsloth's model, which samples
    rlft       rlft.train with vLLM on the trainer's weights
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from grpo_run import correct
from results_file import arguments, write
from stacks import DEVICE
from timing import row
from workers import Desk, Worker

FOLDER = "/tmp/smollm2-bf16"
"""Where the model lies as transformers reads it."""
WORK = "learning-curve/sums"
PROMPTS, GROUP, TOKENS, RATE = 32 if DEVICE == "cuda" else 2, 8, 16, 1e-4
STACKS = ("trl-vllm", "rlft", "trl", "unsloth")
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
SHARE = 0.1
"""Of the card, for TRL's vLLM."""


def sums(rows: int) -> list[dict[str, str]]:
    """The rows of the task."""
    draw = random.Random(0)
    pairs = [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(rows)]
    return [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in pairs]


class Curve:
    """Seconds since the first step and mean reward after each step."""

    def __init__(self, desk: Desk, began: float) -> None:
        self._desk, self._began, self._zero = desk, began, 0.0
        self.points: list[tuple[float, float]] = []

    def ready(self) -> None:
        """Everything is loaded: say so, and wait for the turn."""
        self._desk.wait()
        self._desk.answer(started=time.perf_counter() - self._began)
        self._desk.wait()
        self._zero = time.perf_counter()

    def step(self, reward: float) -> None:
        self.points.append((time.perf_counter() - self._zero, reward))

    def end(self, note: str) -> None:
        self._desk.answer(points=self.points, note=note)


def grpo(model: Any, tokenizer: Any, steps: int, curve: Curve, **more: Any) -> Any:
    """TRL's trainer with its defaults but for what the task says, in micro-batches of the whole step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Steps(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            curve.ready()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "reward" in logs:
                curve.step(float(logs["reward"]))

    peft = more.pop("peft_config", None)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=TOKENS,
        gradient_checkpointing=False,
        bf16=DEVICE == "cuda",
        use_cpu=DEVICE == "cpu",
        **more,
    )
    rows = [r | {"prompt": [{"role": "user", "content": r["prompt"]}]} for r in sums(steps * PROMPTS)]
    return GRPOTrainer(
        model,
        [correct],
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=[Steps()],
    )


def trl(steps: int, curve: Curve, **more: Any) -> str:
    from stacks import lora
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # TRL says "localhost", which not every machine knows, and vLLM logs to stdout, which is for answers.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_NO_USAGE_STATS": "1"}
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=DTYPE, device_map={"": DEVICE})
    grpo(model, AutoTokenizer.from_pretrained(FOLDER), steps, curve, peft_config=lora(), **more).train()
    return "transformers' generate"


def trl_vllm(steps: int, curve: Curve) -> str:
    trl(steps, curve, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=SHARE, vllm_max_model_length=512)
    return f"vLLM in the trainer's process with {SHARE:.0%} of the card"


def unsloth(steps: int, curve: Curve) -> str:
    from unsloth import FastLanguageModel, is_bfloat16_supported  # noqa: F401 (before TRL, which it changes)

    model, tokenizer = FastLanguageModel.from_pretrained(FOLDER, max_seq_length=512, load_in_4bit=False)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, target_modules=projections, use_gradient_checkpointing=False
    )
    grpo(model, tokenizer, steps, curve).train()
    return "Unsloth's own generation"


def rlft(steps: int, curve: Curve, engine: str = "vllm") -> str:
    import rlft

    class Steps(rlft.Callback):
        def on_start(self, run: rlft.View) -> None:
            curve.ready()

        def on_step(self, run: rlft.View) -> None:
            curve.step(run.metrics["reward"])

    cfg = rlft.Config(
        model=FOLDER,
        data=rlft.Data(rows=sums(steps * PROMPTS)),
        quantization="none",
        out=tempfile.mkdtemp() + "/run",
        steps=steps,
        prompts_per_step=PROMPTS,
        sampling=rlft.Sampling(group_size=GROUP, max_tokens=TOKENS),
        lora=rlft.Lora(rank=16, alpha=32),
        optim=rlft.Optim(lr=RATE, schedule="constant"),
        engine=rlft.Engine(engine),  # type: ignore[arg-type]
    )
    rlft.train(cfg, rewards=[correct], callbacks=[Steps()])
    return f"{engine}; its own checks of every step included"


def worker(stack: str, steps: int) -> None:
    """Run a stack once; what it raises is its answer."""
    began = time.perf_counter()
    desk = Desk()
    curve = Curve(desk, began)
    runs: dict[str, Callable[..., str]] = {"trl": trl, "trl-vllm": trl_vllm, "unsloth": unsloth, "rlft": rlft}
    with desk.failures():
        stack, _, engine = stack.partition(":")
        note = runs[stack](steps, curve, engine) if engine else runs[stack](steps, curve)
        curve.end(note)
        desk.wait()


def rows_of(stack: str, started: dict[str, Any], curve: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one stack: a failure, or start, reward after each step, and its seconds."""
    wrong = started.get("error") or curve.get("error")
    if wrong:
        return [row(WORK, stack, "failed", 1.0, "", wrong[-400:])]
    points, note = curve["points"], curve["note"]
    rows = [
        row(WORK, stack, "start_seconds", started["started"], "s", "imports, loading and the engine's start"),
        row(WORK, stack, "seconds", points[-1][0], "s", f"{len(points)} steps; {note}"),
    ]
    for i, (seconds, reward) in enumerate(points, 1):
        rows.append(row(f"{WORK}/{i}", stack, "step_end_seconds", seconds, "s", "since the first step began"))
        rows.append(row(f"{WORK}/{i}", stack, "reward", reward, "", f"mean of {PROMPTS * GROUP} completions"))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--unsloth", default="")
    parser.add_argument("--fa4", default="")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stacks", nargs="+", default=list(STACKS), help="rlft:eager samples without vLLM")
    args = parser.parse_args()
    if not (Path(FOLDER) / "config.json").exists():
        export = ["export-base", args.model, FOLDER, "--quantization", "none"]
        subprocess.run([sys.executable, "-m", "rlft", *export], check=True)
    paths = {"unsloth": args.unsloth, "rlft": args.fa4}
    workers, started = {}, {}
    for stack in args.stacks:
        workers[stack] = Worker(stack, [__file__, "--worker", stack, str(args.steps)], paths.get(stack, ""))
        started[stack] = workers[stack].ask(300.0, load=True)
        print(stack, started[stack], flush=True)
    rows: list[dict[str, Any]] = []
    for stack, process in workers.items():
        curve = process.ask(300.0, train=True)
        rows += rows_of(stack, started[stack], curve)
        process.close()
        print(stack, [f"{s:.1f}s {r:.3f}" for s, r in curve.get("points", [])] or curve, flush=True)
        write("learning_curve", rows, args.out, args.commit)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]))
    else:
        main()
